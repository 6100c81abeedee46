"""How the state of one parameter is stored, beside mlx.optimizers' ``m`` and ``v``: brings a state from any form into the one
that the options ask for, and back into stock's.

Codes and remainders are those of csrc/storage_formats.h; what converts them is the extension's.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from . import _ext
from ._arguments import as_array
from ._options import FUSED_DTYPES, Options

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
    new = {name: x for name, x in state.items() if name not in EXTRAS}
    if parameter.dtype not in FUSED_DTYPES:
        return new | {name: as_array(name, state[name], path) for name in MOMENTS}
    if reason := options.why_not(parameter):
        raise ValueError(f"[{options.op}] parameter of {path} {reason}")
    wanted = options.dtype_of_moments(parameter)
    for name in MOMENTS:
        moment = as_array(name, state[name], path)
        if moment.dtype != _CODES[name]:
            if wanted == mx.int8:
                _check_shape(name, path, moment, parameter)
                new[name], new[f"{name}_scale"] = _ext.encode_moment(moment, name == "v")
            else:
                new[name] = moment if moment.dtype == wanted else moment.astype(wanted)
            continue
        scale = _scale_of(name, path, moment, state)
        if wanted == mx.int8:
            new[name], new[f"{name}_scale"] = moment, scale
        else:
            new[name] = _ext.decode_moment(moment, scale).astype(wanted)
    if options.has_remainder(parameter):
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
    return _stock_tree("", optimizer.state, dtypes)


def _stock_tree(path: str, node: Any, dtypes: dict[str, mx.Dtype]) -> Any:
    if isinstance(node, dict) and all(isinstance(node.get(name), mx.array) for name in MOMENTS):
        if path not in dtypes:
            raise ValueError(
                f"[stock_state] optimizer must know the parameter of {path or 'the state'} but got "
                "none: call optimizer.init(parameters) first"
            )
        return _stock_moments(path, node, dtypes[path])
    inner = f"{path}." if path else ""
    if isinstance(node, dict):
        return {key: _stock_tree(f"{inner}{key}", x, dtypes) for key, x in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(_stock_tree(f"{inner}{i}", x, dtypes) for i, x in enumerate(node))
    return node


def _stock_moments(path: str, state: dict, dtype: mx.Dtype) -> dict[str, Any]:
    new = {name: x for name, x in state.items() if name not in EXTRAS}
    for name in MOMENTS:
        moment = state[name]
        if moment.dtype == _CODES[name]:
            moment = _ext.decode_moment(moment, _scale_of(name, path, moment, state))
        new[name] = moment.astype(dtype)
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


def dtypes_by_path(parameters: Any) -> dict[str, mx.Dtype]:
    """The dtype of every parameter, by its path."""
    return {path: x.dtype for path, x in tree_flatten(parameters)}
