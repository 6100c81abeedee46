"""The operation by itself, like those of ``mx.fast``: one tensor, any MLX transformation."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from . import _ext
from ._arguments import Scalar, as_array, as_number, as_scalar, check_betas
from ._backends import backend_of
from ._options import as_seed


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
    seed: int | None = None,
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
    at each store, to nearest unless a seed is given. Buffers of inputs that nobody else holds are reused for the
    results; what you still hold never changes.

    Args:
        parameter: Any shape; float32, bfloat16 or float16. NumPy arrays are taken too, here and for ``m`` and ``v``.
        gradient: Same shape, any memory layout; float32, bfloat16 or float16.
        m, v: First and second moment, same shape, one of those dtypes (the same for both). float16 cannot hold a
            ``v`` that is smaller than 6e-8: with gradients below 0.005 or so, use bfloat16 or float32.
        learning_rate: A number, or an array of one element (it may be lazy).
        step: Steps taken, this one included, so from 1 to 2**63 - 1. Needed with ``bias_correction``, else ignored.
        betas: Decay rates of ``m`` and ``v``, in [0, 1). Default: ``(0.9, 0.999)``.
        eps: Added to the denominator, at least 0. Default: ``1e-8``.
        weight_decay: Decoupled weight decay. Default: ``0.0``.
        bias_correction: Default: ``False``, as in ``mlx.optimizers``.
        seed: If given, 16-bit results are rounded stochastically, to a mean that is right, with bits that depend on
            ``seed``, ``step`` (then needed) and the element. Derivatives and vmap round to nearest. Default: to
            nearest.
        stream: Stream or device (``mx.cpu``, say) to run on. Default: MLX's.

    Returns:
        The new ``(parameter, m, v)``, each in its own dtype.

    Raises:
        ValueError: For shapes, dtypes or values that do not fit.
        TypeError: For arguments of another type.

    Example:
        >>> w, m, v = mx.ones(3), mx.zeros(3), mx.zeros(3)
        >>> w, m, v = fused.adam_update(w, mx.ones(3), m, v, 1e-3)
    """
    tensors = {"parameter": parameter, "gradient": gradient, "m": m, "v": v}
    parameter, gradient, m, v = (as_array(what, x, "the tensor") for what, x in tensors.items())
    if not (stream is None or isinstance(stream, (mx.Stream, mx.Device, mx.DeviceType))):
        raise TypeError(f"[adam_update] stream must be a stream or a device but got {stream!r}")
    one_step = _ext.AdamStep(
        as_scalar("learning_rate", learning_rate),
        None if step is None else as_scalar("step", step),
        betas=check_betas("adam_update", betas),
        eps=as_number("adam_update", "eps", eps),
        weight_decay=as_number("adam_update", "weight_decay", weight_decay),
        bias_correction=bool(bias_correction),
        rounding="nearest" if seed is None else "all",
        seed=0 if seed is None else as_seed("adam_update", seed),
    )
    backend = backend_of(stream)
    (parameter,), (state,) = _ext.adam_update(
        [parameter],
        [gradient],
        [{"m": m, "v": v}],
        one_step,
        uses_kernel=backend.uses_kernel,
        stream=backend.place(stream),
        name=lambda _: "the tensor",
    )
    return parameter, state["m"], state["v"]
