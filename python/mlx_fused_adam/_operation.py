"""The operation by itself, in the manner of ``mx.fast``: one tensor, any MLX transformation."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from . import _ext
from ._backends import backend_of

Scalar = float | mx.array


def adam_update(
    parameter: mx.array,
    gradient: mx.array,
    m: mx.array,
    v: mx.array,
    learning_rate: Scalar,
    *,
    step: Scalar | None = None,
    betas: Sequence[float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    bias_correction: bool = False,
    stream: mx.Stream | mx.Device | mx.DeviceType | None = None,
) -> tuple[mx.array, mx.array, mx.array]:
    r"""One Adam (or, with ``weight_decay``, AdamW) update of one tensor, fused into one pass.

    .. math::

        m &= \beta_1 m + (1 - \beta_1) g \\
        v &= \beta_2 v + (1 - \beta_2) g^2 \\
        w &= (1 - \lambda\,\mathrm{weight\_decay}) w - c_1 m / (\sqrt{v} c_2 + \epsilon)

    where :math:`w` is the parameter, :math:`g` the gradient and :math:`\lambda` the learning rate, with
    :math:`c_1 = \lambda, c_2 = 1`, or under bias correction at step :math:`t`
    :math:`c_1 = \lambda / (1 - \beta_1^t), c_2 = 1 / \sqrt{1 - \beta_2^t}`
    (Kingma & Ba 2015; Loshchilov & Hutter 2019). Arithmetic is float32 whatever the dtypes, with one rounding
    at each store. Buffers of inputs that nobody else holds are reused for the results; what you still hold never changes.

    Args:
        parameter: Any shape; float32, bfloat16 or float16.
        gradient: Same shape, any memory layout; float32, bfloat16 or float16.
        m, v: First and second moment, same shape, one of those dtypes (the same for both).
        learning_rate: A number, or an array of one element (it may be lazy).
        step: Steps taken, this one included, so 1 at first. Needed with ``bias_correction``, else ignored.
        betas: Decay rates of ``m`` and ``v``, in [0, 1). Default: ``(0.9, 0.999)``.
        eps: Added to the denominator, at least 0. Default: ``1e-8``.
        weight_decay: Decoupled weight decay. Default: ``0.0``.
        bias_correction: Default: ``False``, as in ``mlx.optimizers``.
        stream: Stream or device (``mx.cpu``, say) to run on. Default: MLX's.

    Returns:
        The new ``(parameter, m, v)``, each in its own dtype.

    Raises:
        ValueError: For shapes, dtypes or values that do not fit.

    Example:
        >>> w, m, v = mx.ones(3), mx.zeros(3), mx.zeros(3)
        >>> w, m, v = fused.adam_update(w, mx.ones(3), m, v, 1e-3)
    """
    if len(betas) != 2:
        raise ValueError(f"[adam_update] betas must be two numbers but got {betas!r}")
    if isinstance(step, (int, float)) and step < 1:
        raise ValueError(f"[adam_update] step must be at least 1 but got {step}")
    beta1, beta2 = betas
    parameters, ms, vs = _ext.adam_update(
        [parameter],
        [gradient],
        [m],
        [v],
        as_array(learning_rate),
        None if step is None else as_array(step),
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        bias_correction=bias_correction,
        fused=backend_of(stream).is_fused,
        stream=stream,
        name=lambda _: "the tensor",
    )
    return parameters[0], ms[0], vs[0]


def as_array(x: Scalar) -> mx.array:
    """A number as a float32 array; an array as it is."""
    return x if isinstance(x, mx.array) else mx.array(x, mx.float32)
