"""How the state of one parameter is stored, beside mlx.optimizers' ``m`` and ``v``: brings a state from any form into the one
that the options ask for, and back into stock's.

Codes and remainders are those of csrc/math/encodings.h; what converts them is the extension's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from . import _ext
from ._arguments import as_array
from ._clipping import GUARD_STATE
from ._options import FUSED_DTYPES, Options
from ._tree import flattened

MOMENTS = ("m", "v")
EXTRAS = ("remainder", "m_scale", "v_scale")
_CODES = {"m": mx.int8, "v": mx.uint8}
_BLOCK = 32


def fresh(parameter: mx.array, options: Options) -> dict[str, mx.array]:
    """The state of a parameter that has had no update: zeros."""
    dtype = options.dtype_of_moments(parameter)
    state: dict[str, mx.array] = {}
    for name in MOMENTS:
        is_coded = dtype == mx.int8
        state[name] = mx.zeros(parameter.shape, _CODES[name] if is_coded else dtype)
        if is_coded:
            state[f"{name}_scale"] = mx.zeros(_scale_shape(parameter.shape), mx.bfloat16)
    if options.has_remainder(parameter):
        state["remainder"] = mx.zeros(parameter.shape, mx.int16)
    return state


def adopted(path: str, parameter: mx.array, state: dict, options: Options) -> dict[str, Any]:
    """The state in the form that the options ask for: the same arrays where they have it already.

    Raises:
        ValueError: If something does not fit, naming the path.
        TypeError: If something is no array.
    """
    if reason := options.why_not(parameter):
        raise ValueError(f"[{options.op}] parameter of {path} {reason}")
    new = {name: x for name, x in state.items() if name not in EXTRAS}
    is_ours = parameter.dtype in FUSED_DTYPES
    wanted = options.dtype_of_moments(parameter) if is_ours else None
    for name in MOMENTS:
        moment = _moment_of(name, path, state, parameter)
        has_codes = moment.dtype == _CODES[name]
        scale = _scale_of(name, path, moment, state) if has_codes else None
        if wanted is None:
            # Stock's to store: as it is, but not in codes.
            new[name] = moment if scale is None else _decoded(moment, scale, parameter.dtype)
        elif wanted == mx.int8:
            if scale is None:
                moment, scale = _ext.quantize_moment(moment, name == "v")
            new[name], new[f"{name}_scale"] = moment, scale
        elif scale is not None:
            new[name] = _decoded(moment, scale, wanted)
        else:
            new[name] = moment if moment.dtype == wanted else moment.astype(wanted)
    if is_ours and options.has_remainder(parameter):
        if "remainder" in state:
            remainder = as_array("remainder", state["remainder"], path)
            _check_shape("remainder", path, remainder, parameter)
            if remainder.dtype != mx.int16:
                raise ValueError(
                    f"[adam_update] remainder of {path} must be int16 but got {remainder.dtype}"
                )
        else:
            remainder = mx.zeros(parameter.shape, mx.int16)
        new["remainder"] = remainder
    return new


def has_codes(state: dict) -> bool:
    """Whether a state is in codes, which stock operations cannot read."""
    return any(state[name].dtype == _CODES[name] for name in MOMENTS)


def _moment_of(name: str, path: str, state: dict, parameter: mx.array) -> mx.array:
    if name not in state:
        raise ValueError(f"[adam_update] state of {path} must hold {name} but got nothing")
    moment = as_array(name, state[name], path)
    _check_shape(name, path, moment, parameter)
    if moment.dtype != _CODES[name] and not mx.issubdtype(moment.dtype, mx.floating):
        raise ValueError(
            f"[adam_update] {name} of {path} must be floating or {_CODES[name]} with a scale but got "
            f"{moment.dtype}"
        )
    return moment


def _decoded(codes: mx.array, scale: mx.array, dtype: mx.Dtype) -> mx.array:
    decoded: mx.array = _ext.dequantize_moment(codes, scale)
    if dtype == mx.float64:  # which MLX has on the CPU alone
        return mx.astype(decoded, dtype, stream=mx.cpu)
    return decoded.astype(dtype)


def stock_state(optimizer: Any) -> dict[str, Any]:
    """The state tree that ``mlx.optimizers.Adam`` or ``AdamW`` would hold in this optimizer's place.

    ``m`` and ``v`` are in their parameter's dtype, lazily; remainders of master weights are left out, since stock has none:
    only what the parameters themselves hold goes on. The optimizer keeps its own state.

    Args:
        optimizer: A :class:`mlx_fused_adam.Adam` or ``AdamW`` whose state belongs to parameters that it has seen, by an
            update or by ``init``.

    Returns:
        A new tree, to be given to ``mlx.optimizers.Adam(...).state`` or to ``mx.save_safetensors``.

    Raises:
        ValueError: If the dtype of a parameter is not known: call ``optimizer.init(parameters)`` first.
        TypeError: If it is no optimizer of this package.
    """
    dtypes = getattr(optimizer, "_parameter_dtypes", None)
    if dtypes is None:
        raise TypeError(
            f"[stock_state] optimizer must be an Adam or AdamW of mlx_fused_adam but got {optimizer!r}"
        )

    def stocks(path: str, state: dict) -> dict[str, Any]:
        if path not in dtypes:
            raise ValueError(
                f"[stock_state] optimizer must know the parameter of {path or 'the state'} but got "
                "none: call optimizer.init(parameters) first"
            )
        return _stock_moments(path, state, dtypes[path])

    state = map_states(stocks, optimizer.state)
    return {k: x for k, x in state.items() if not (k in GUARD_STATE and isinstance(x, mx.array))}


def map_states(change: Callable[[str, dict], Any], tree: Any, path: str = "") -> Any:
    """A new tree with each parameter's state replaced by ``change(path, state)``, and the rest as it is."""
    if isinstance(tree, dict) and all(isinstance(tree.get(name), mx.array) for name in MOMENTS):
        return change(path, tree)
    inner = f"{path}." if path else ""
    if isinstance(tree, dict):
        return {key: map_states(change, x, f"{inner}{key}") for key, x in tree.items()}
    if isinstance(tree, (list, tuple)):
        items = [map_states(change, x, f"{inner}{i}") for i, x in enumerate(tree)]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree


def _stock_moments(path: str, state: dict, dtype: str) -> dict[str, Any]:
    new = {name: x for name, x in state.items() if name not in EXTRAS}
    for name in MOMENTS:
        moment = state[name]
        if moment.dtype == _CODES[name]:
            new[name] = _decoded(moment, _scale_of(name, path, moment, state), getattr(mx, dtype))
        else:
            new[name] = moment.astype(getattr(mx, dtype))
    return new


def _scale_of(name: str, path: str, codes: mx.array, state: dict) -> mx.array:
    what = f"{name}_scale of {path}"
    if f"{name}_scale" not in state:
        raise ValueError(
            f"[adam_update] {what} must be there, since {name} is {_CODES[name]}, but got nothing"
        )
    scale = as_array(f"{name}_scale", state[f"{name}_scale"], path)
    shape = _scale_shape(codes.shape)
    if scale.dtype != mx.bfloat16 or scale.shape != shape:
        raise ValueError(
            f"[adam_update] {what} must be bfloat16 of shape {shape} but got {scale.dtype} of shape "
            f"{scale.shape}"
        )
    return scale


def _check_shape(name: str, path: str, x: mx.array, parameter: mx.array) -> None:
    if x.shape != parameter.shape:
        raise ValueError(
            f"[adam_update] {name} of {path} must have the parameter's shape {parameter.shape} but got "
            f"{x.shape}"
        )


def _scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-1], -(-shape[-1] // _BLOCK)) if shape else shape


def dtypes_by_path(parameters: Any) -> dict[str, str]:
    """The name of every parameter's dtype, by its path."""
    return {path: str(x.dtype).rpartition(".")[2] for path, x in flattened(parameters)}
