"""The state of one parameter, converted from any form to the one that the options ask for, and back to MLX's.

Beside mlx.optimizers' ``m`` and ``v`` it may hold auxiliary arrays: the scales of quantized moments, and a master
weight's low bits. csrc/math/encodings.h defines their formats; the extension converts moments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.optimizers import MultiOptimizer as _MLXMultiOptimizer
from mlx.utils import tree_map

from . import _ext
from ._arguments import as_array
from ._clipping import RECORDED
from ._options import FUSED_DTYPES, QUANTIZED_BITS, Options
from ._tree import flattened

MOMENTS = ("m", "v")
# Keys of an optimizer's state that mlx.optimizers does not have.
SHARED = RECORDED | {"weight_decay"}
AUXILIARY = ("remainder", "m_scale", "v_scale")
_ARRAYS = (*MOMENTS, *AUXILIARY)
_QUANTIZED = {8: {"m": mx.int8, "v": mx.uint8}, 4: {"m": mx.uint8, "v": mx.uint8}}
_ELEMENTS_PER_SCALE = 32


class Seen(NamedTuple):
    """What an optimizer keeps of a parameter."""

    dtype: str
    columns: int  # elements along the last axis, of which 4-bit moments do not tell whether they are odd


def fresh(parameter: mx.array, options: Options) -> dict[str, mx.array]:
    """Zeros: the state of a parameter before its first update."""
    dtype = options.dtype_of_moments(parameter)
    state: dict[str, mx.array] = {}
    bits = QUANTIZED_BITS.get(dtype)
    for name in MOMENTS:
        if bits is None:
            state[name] = mx.zeros(parameter.shape, dtype)
        else:
            state[name] = mx.zeros(_quantized_shape(parameter.shape, bits), _QUANTIZED[bits][name])
            state[f"{name}_scale"] = mx.zeros(_scale_shape(parameter.shape), mx.bfloat16)
    if options.has_correction(parameter):
        state["remainder"] = mx.zeros(parameter.shape, options.correction_dtype)
    return state


def converted(path: str, parameter: mx.array, state: dict, options: Options) -> dict[str, Any]:
    """The state as the options ask for it; an array that fits already is the same object.

    Raises:
        ValueError: If a part has the wrong shape or dtype or is missing, naming the path.
        TypeError: If a part is no array.
    """
    if reason := options.why_not(parameter):
        raise ValueError(f"[{options.op}] parameter of {path} {reason}")
    new = {name: x for name, x in state.items() if name not in AUXILIARY}
    is_fused = parameter.dtype in FUSED_DTYPES
    if not (is_fused or any(f"{name}_scale" in state for name in MOMENTS)):
        return new  # mlx.optimizers' own
    wanted = options.dtype_of_moments(parameter) if is_fused else parameter.dtype
    wanted_bits = QUANTIZED_BITS.get(wanted)
    for name in MOMENTS:
        moment, bits = _checked_moment(name, path, state, parameter)
        scale = None if bits is None else _checked_scale(name, path, parameter.shape, state)
        if scale is not None and bits != wanted_bits:
            moment = _dequantized(name, bits, moment, scale, parameter.shape[-1], mx.float32 if wanted_bits else wanted)
        if wanted_bits:
            if bits != wanted_bits:
                moment, scale = _ext.quantize_moment(moment, name == "v", wanted_bits)
            new[name], new[f"{name}_scale"] = moment, scale
        elif not is_fused or moment.dtype == wanted:  # mlx.optimizers takes any
            new[name] = moment
        else:
            new[name] = moment.astype(wanted)
    if is_fused and options.has_correction(parameter):
        if "remainder" in state:
            correction = as_array("remainder", state["remainder"], path)
            _check_shape("remainder", path, correction, parameter)
            new["remainder"] = _converted_correction(path, correction, options.correction_dtype)
        else:
            new["remainder"] = mx.zeros(parameter.shape, options.correction_dtype)
    return new


def makes_ours(init_single: Callable[[mx.array, dict], Any], parameter: mx.array, options: Options) -> bool:
    """Whether a subclass's ``init_single`` gives a parameter the state that the options ask for, and perhaps more."""
    if parameter.dtype not in FUSED_DTYPES:
        return False
    made: dict = {}
    init_single(parameter, made)

    def form(state: dict) -> dict[str, Any]:
        return {k: (getattr(x, "shape", 0), getattr(x, "dtype", 0)) for k, x in state.items() if k in _ARRAYS}

    return form(made) == form(fresh(parameter, options))


def _converted_correction(path: str, correction: mx.array, dtype: mx.Dtype) -> mx.array:
    """A correction of 16 or 8 bits in the other number of bits, to nearest; the parameter stays as it is."""
    if correction.dtype not in (mx.int16, mx.int8):
        raise ValueError(
            f"[adam_update] remainder of {path} must be int16, or int8 for 24 bits, but got {correction.dtype}"
        )
    if correction.dtype == dtype:
        return correction
    if dtype == mx.int16:
        return correction.astype(mx.int16) * 256
    return mx.clip(mx.round(correction.astype(mx.float32) / 256), -128, 127).astype(mx.int8)


def is_quantized(state: dict) -> bool:
    """Whether a state has 8-bit or 4-bit moments, which MLX's operations cannot read."""
    return any(_bits_of(name, state) for name in MOMENTS)


def _bits_of(name: str, state: dict) -> int | None:
    """The bits of a quantized moment. What the dtype of ``v`` means, that of ``m`` tells."""
    dtype = getattr(state[name], "dtype", None)
    if name == "v":
        if dtype != mx.uint8:
            return None
        return 4 if getattr(state.get("m"), "dtype", None) == mx.uint8 else 8
    return QUANTIZED_BITS.get(dtype) if name == "m" and dtype else None


def unpacked_shapes(name: str, states: tuple[dict, dict]) -> list[tuple[int, ...]]:
    """The shapes of a moment in two states, both as bytes if it has 4 bits in one of them."""
    bits = [_bits_of(name, state) for state in states]
    is_mixed = 4 in bits and bits != [4, 4]
    shapes: list[tuple[int, ...]] = [state[name].shape for state in states]
    return [_quantized_shape(x, 4) if is_mixed and b != 4 else x for x, b in zip(shapes, bits, strict=True)]


def stock_state(optimizer: Any) -> dict[str, Any]:
    """The state tree that the optimizer of mlx.optimizers would hold in this optimizer's place.

    ``m`` and ``v`` are in their parameter's dtype, lazily. The low bits of master weights (``remainder``) are left out,
    since mlx.optimizers has no place for them: training continues from the 16-bit parameters. The optimizer keeps its
    own state.

    Args:
        optimizer: A :class:`mlx_fused_adam.Adam` or ``AdamW`` that has seen the parameters of its state, in an update
            or in ``init``; or a MultiOptimizer, of this package or MLX's, where parts that are not fused keep their
            state as it is.

    Returns:
        A new tree, for ``mlx.optimizers.Adam(...).state`` or ``mx.save_safetensors``.

    Raises:
        ValueError: If the dtype of a parameter is not known: call ``optimizer.init(parameters)`` first.
        TypeError: If it is not an optimizer of this package.
    """
    if isinstance(optimizer, _MLXMultiOptimizer):
        is_known = [hasattr(x, "_seen_parameters") or isinstance(x, _MLXMultiOptimizer) for x in optimizer.optimizers]
        parts = zip(optimizer.optimizers, is_known, strict=True)
        return {"states": [stock_state(x) if known else tree_map(lambda x: x, x.state) for x, known in parts]}
    seen: dict[str, Seen] | None = getattr(optimizer, "_seen_parameters", None)
    if seen is None:
        raise TypeError(
            f"[stock_state] optimizer must be an Adam, AdamW or MultiOptimizer of mlx_fused_adam but got {optimizer!r}"
        )

    def without_options(path: str, state: dict) -> dict[str, Any]:
        if path not in seen:
            raise ValueError(
                f"[stock_state] optimizer must know the parameter of {path or 'the state'} but got "
                "none: call optimizer.init(parameters) first"
            )
        dtype, columns = getattr(mx, seen[path].dtype), seen[path].columns
        new = {name: x for name, x in state.items() if name not in AUXILIARY}
        for name in MOMENTS:
            moment = state[name]
            if bits := _bits_of(name, state):
                packed = moment.shape[-1]
                if bits == 4 and (columns + 1) // 2 != packed:  # two parameters whose keys make one path
                    columns = 2 * packed
                scale = _checked_scale(name, path, (*moment.shape[:-1], columns), state)
                new[name] = _dequantized(name, bits, moment, scale, columns, dtype)
            else:
                new[name] = moment.astype(dtype)
        return new

    state = map_states(without_options, optimizer.state)
    return {k: x for k, x in state.items() if not (k in SHARED and isinstance(x, mx.array))}


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


def seen_by_path(parameters: Any) -> dict[str, Seen]:
    """What is kept of every parameter, by its path."""
    return {
        path: Seen(str(x.dtype).rpartition(".")[2], x.shape[-1] if x.ndim else 1) for path, x in flattened(parameters)
    }


def _checked_moment(name: str, path: str, state: dict, parameter: mx.array) -> tuple[mx.array, int | None]:
    """A moment, and its bits if it is quantized."""
    if name not in state:
        raise ValueError(f"[adam_update] state of {path} must hold {name} but got nothing")
    moment = as_array(name, state[name], path)
    bits = _bits_of(name, {"m": state.get("m"), name: moment})
    if bits == 4:
        shape = _quantized_shape(parameter.shape, 4)
        if moment.shape != shape:
            raise ValueError(
                f"[adam_update] {name} of {path} must have shape {shape}, two values to a byte, but got {moment.shape}"
            )
        return moment, bits
    _check_shape(name, path, moment, parameter)
    if bits is None and not mx.issubdtype(moment.dtype, mx.floating):
        raise ValueError(
            f"[adam_update] {name} of {path} must be floating or {_QUANTIZED[8][name]} with a scale but got "
            f"{moment.dtype}"
        )
    return moment, bits


def _checked_scale(name: str, path: str, shape: tuple[int, ...], state: dict) -> mx.array:
    """The scale of a moment of this shape."""
    key = f"{name}_scale"
    if key not in state:
        raise ValueError(
            f"[adam_update] {key} of {path} must be there, since {name} is {state[name].dtype}, but got nothing"
        )
    scale = as_array(key, state[key], path)
    shape = _scale_shape(shape)
    if scale.dtype != mx.bfloat16 or scale.shape != shape:
        raise ValueError(
            f"[adam_update] {key} of {path} must be bfloat16 of shape {shape} but got {scale.dtype} of shape "
            f"{scale.shape}"
        )
    return scale


def _check_shape(name: str, path: str, x: mx.array, parameter: mx.array) -> None:
    if x.shape != parameter.shape:
        raise ValueError(
            f"[adam_update] {name} of {path} must have the parameter's shape {parameter.shape} but got {x.shape}"
        )


def _dequantized(
    name: str, bits: int | None, quantized: mx.array, scale: mx.array, columns: int, dtype: mx.Dtype
) -> mx.array:
    """The values of a moment of so many bits that has so many elements along the last axis."""
    moment: mx.array = _ext.dequantize_moment(quantized, scale, name == "v", columns if bits == 4 else None)
    # MLX has float64 on the CPU alone.
    return mx.astype(moment, dtype, stream=mx.cpu if dtype == mx.float64 else None)


def _quantized_shape(shape: tuple[int, ...], bits: int) -> tuple[int, ...]:
    return (*shape[:-1], -(-shape[-1] * bits // 8)) if shape else shape


def _scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-1], -(-shape[-1] // _ELEMENTS_PER_SCALE)) if shape else shape
