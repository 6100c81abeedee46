"""A model in NumPy of all that an optimizer and its parameters must hold, step by step: for test_programs.py.

Arithmetic is the oracle's, rounding and storage those of rounding_reference.py and storage_reference.py; nothing is
evaluated by MLX here but schedules. Values are float32 arrays that hold exactly what a tensor of its dtype stores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np

from support import oracle
from support.rounding_reference import bits_of_step, rounded
from support.storage_reference import decode, draws_of_step, encode, joined, rounded_to_24, upper_half
from support.stored_tensors import lay_out

MOMENTS = ("m", "v")
CODED = {"int8": mx.int8, "int4": mx.uint8}  # the dtypes of m
BITS_OF_CODES = {mx.int8: 8, mx.uint8: 4}
NEAREST = 0x8000  # the draw with which codes are rounded to nearest
SMALLEST_CODED, SHORTEST_CODED_ROW = 4096, 32


ONE = np.float32(1)


def float32(x: Any) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.asarray(np.asarray(x), np.float32)


def to_dtype(x: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """Rounded to nearest."""
    return float32(oracle.store(x, dtype))


def halves(x: np.ndarray) -> np.ndarray:
    """The bits of bfloat16 values."""
    return np.asarray(x.astype(ml_dtypes.bfloat16)).view(np.uint16)


def unit_of(remainder: np.ndarray) -> int:
    """What one of a correction counts for in the lower bits of a float32."""
    return 256 if remainder.dtype == np.int8 else 1


def at_random(x: np.ndarray, draws: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """Rounded stochastically; what is not finite stays."""
    if dtype == mx.float32:
        return x
    is_finite = np.isfinite(x)
    with np.errstate(over="ignore", invalid="ignore"):
        found = rounded(np.where(is_finite, x, 0), draws.reshape(x.shape), dtype)
        # Half a unit above the largest finite number comes infinity.
        found = float32(found.astype(oracle.NUMPY_DTYPES[dtype]))
    return float32(np.where(is_finite, np.copysign(found, x), x))


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A parameter and its state as stored: ``m`` and ``v``, scales of codes, remainder. Nothing of it is ever
    changed.
    """

    dtype: mx.Dtype
    value: np.ndarray
    state: Mapping[str, np.ndarray] | None = None
    state_dtype: mx.Dtype | None = None  # int8 stands for codes of 8 bits, uint8 for those of 4
    count: int = 0  # of updates by a subclass's own rule

    def moment(self, name: str) -> np.ndarray:
        """The float32 values that are stored."""
        assert self.state is not None
        if bits := BITS_OF_CODES.get(self.state_dtype):
            return decode(name, self.state[name], self.state[f"{name}_scale"], bits, self.value.shape[-1])
        return self.state[name]

    @property
    def weight(self) -> np.ndarray:
        """The float32 value that is updated."""
        if self.state is not None and "remainder" in self.state:
            remainder = self.state["remainder"]
            return np.asarray(joined(halves(self.value), remainder.astype(np.int64) * unit_of(remainder)))
        return self.value


@dataclasses.dataclass(frozen=True)
class Options:
    """An optimizer's arguments."""

    kind: str = "AdamW"
    adds: str = "nothing"  # what a subclass brings: see SUBCLASSES of test_programs.py
    schedule: Callable[[mx.array], mx.array] | None = None
    learning_rate: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.1
    bias_correction: bool = False
    state_dtype: str | None = None
    stochastic_rounding: bool | None = None
    seed: int = 0
    master_weights: bool = False
    master_weight_bits: int = 32
    max_grad_norm: float | None = None
    skip_nonfinite: bool = False
    decay_filter: Any = None
    decays: Callable[[str], bool] = lambda path: True  # what decay_filter says

    def arguments(self) -> dict[str, Any]:
        """For the constructor."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del found["kind"], found["adds"], found["decays"]
        found["learning_rate"] = found.pop("schedule") or self.learning_rate
        if self.kind == "Adam":
            del found["weight_decay"], found["decay_filter"]
        return found

    def wanted(self, tensor: Tensor) -> mx.Dtype:
        """The dtype in which a tensor's moments are to be stored."""
        if self.adds == "float32 moments":
            return mx.float32
        if self.state_dtype in CODED:
            shape = tensor.value.shape
            is_large = tensor.value.size >= SMALLEST_CODED and shape[-1] >= SHORTEST_CODED_ROW
            return CODED[self.state_dtype] if is_large else mx.bfloat16
        if self.state_dtype is not None:
            return getattr(mx, self.state_dtype)
        return mx.float32 if tensor.dtype == mx.float32 else mx.bfloat16

    def settings(self, path: str, learning_rate: float) -> oracle.Settings:
        is_decayed = self.kind == "AdamW" and self.decays(path)
        return oracle.Settings(
            learning_rate=learning_rate,
            beta1=self.betas[0],
            beta2=self.betas[1],
            eps=self.eps,
            weight_decay=self.weight_decay if is_decayed else 0.0,
            bias_correction=self.bias_correction,
        )

    def after_load(self, file: Options, side: str) -> Options | None:
        """These options after the load of a file of others, or None where it is rejected."""
        ignored = {"learning_rate", "decays", "schedule", "kind", "adds"}
        if self.kind == "Adam":
            ignored |= {"weight_decay", "decay_filter"}
        found = {x.name: getattr(file, x.name) for x in dataclasses.fields(self) if x.name not in ignored}
        differing = {name: x for name, x in found.items() if x != getattr(self, name)}
        has_other_schedule = bool(self.schedule) != bool(file.schedule)
        if side == "optimizer":
            return self
        if self.kind != file.kind or side == "error" and (differing or has_other_schedule):
            return None
        if "decay_filter" in differing:
            differing["decays"] = file.decays
        is_unreadable = callable(differing.get("decay_filter")) or has_other_schedule and file.schedule
        return None if is_unreadable else dataclasses.replace(self, **differing)


def clipped(gradient: np.ndarray, scale: np.float32) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return float32(gradient * scale)


class Model:
    """An optimizer and its parameters. ``copy()`` is cheap: tensors are shared, since none is ever changed."""

    def __init__(self, options: Options, tensors: dict[str, Tensor]) -> None:
        self.options = options
        self.tensors = tensors
        self.step = 0
        self.forget_guard()
        self.learning_rate = self._scheduled() if options.schedule else float(np.float32(options.learning_rate))

    def copy(self) -> Model:
        new = object.__new__(Model)
        new.__dict__ = {**self.__dict__, "tensors": dict(self.tensors)}
        return new

    @property
    def paths_with_state(self) -> list[str]:
        return [path for path, tensor in self.tensors.items() if tensor.state is not None]

    def _scheduled(self) -> float:
        assert self.options.schedule is not None
        with mx.stream(mx.cpu):
            return self.options.schedule(mx.array(self.step, mx.uint64)).item()

    def replace(self, path: str, value: np.ndarray) -> None:
        self.tensors[path] = dataclasses.replace(self.tensors[path], value=value)

    def init(self, paths: list[str]) -> None:
        """Zeros where there is no state; elsewhere the state in the form that the options ask for."""
        for path in {*paths, *self.paths_with_state}:
            self.tensors[path] = self._adopted(self.tensors[path])

    def _adopted(self, tensor: Tensor) -> Tensor:
        wanted = self.options.wanted(tensor)
        if self.options.adds == "float32 moments" and tensor.state is not None:
            return tensor
        shape = tensor.value.shape
        wanted_bits = BITS_OF_CODES.get(wanted)
        state: dict[str, np.ndarray] = {}
        for name in MOMENTS:
            if tensor.state is None and wanted_bits:
                state[name] = encode(name, np.zeros(shape, np.float32), np.full(shape, NEAREST), wanted_bits)[0]
                state[f"{name}_scale"] = np.zeros((*shape[:-1], -(-shape[-1] // 32)), np.float32)
            elif tensor.state is None:
                state[name] = np.zeros(shape, np.float32)
            elif wanted_bits and tensor.state_dtype == wanted:
                state |= {k: tensor.state[k] for k in (name, f"{name}_scale")}
            elif wanted_bits:
                codes = encode(name, tensor.moment(name), np.full(shape, NEAREST), wanted_bits)
                state[name], state[f"{name}_scale"] = codes
            else:
                state[name] = to_dtype(tensor.moment(name), wanted)
        if self.options.master_weights and tensor.dtype == mx.bfloat16:
            kind = np.int8 if self.options.master_weight_bits == 24 else np.int16
            old = (tensor.state or {}).get("remainder", np.zeros(shape, kind))
            wide = old.astype(np.float64) * unit_of(old)
            state["remainder"] = np.clip(np.round(wide / 256), -128, 127) if kind == np.int8 else wide
            state["remainder"] = np.asarray(state["remainder"].astype(kind))
        count = tensor.count if tensor.state else 0
        return dataclasses.replace(tensor, state=state, state_dtype=wanted, count=count)

    def forget_guard(self) -> None:
        self.grad_norm, self.skipped = 0.0, 0

    def set_options(self, options: Options) -> None:
        """As the next update goes by them; what is not recorded any more begins anew."""
        self.options = options
        self.grad_norm = 0.0 if options.max_grad_norm is None else self.grad_norm
        self.skipped = self.skipped if options.skip_nonfinite else 0

    @property
    def guard(self) -> dict[str, tuple[np.generic, mx.Dtype]]:
        """The entries of the state beside step, learning rate and parameters."""
        found: dict[str, tuple[np.generic, mx.Dtype]] = {}
        if self.options.max_grad_norm is not None:
            found["grad_norm"] = (np.float32(self.grad_norm), mx.float32)
        if self.options.skip_nonfinite:
            found["skipped"] = (np.uint64(self.skipped), mx.uint64)
        return found

    def take_norm(self, gradients: dict[str, np.ndarray], state: Mapping[str, Any]) -> tuple[np.float32, bool]:
        """The factor of the gradients, and whether the step is applied.

        The order in which squares are summed is not the model's to know: the norm is held against float64, and then
        believed.
        """
        options = self.options
        with np.errstate(over="ignore", invalid="ignore"):
            wide = [np.square(g.astype(np.float64)).sum() for g in gradients.values()]
            total = float(np.sum(wide))
        largest = float(np.finfo(np.float32).max)
        is_finite = total <= largest
        is_near = 0.999 * largest < total < 1.001 * largest
        scale = np.float32(1)
        if options.max_grad_norm is not None:
            norm = np.float32(state["grad_norm"].item())
            assert is_near or np.isfinite(norm) == is_finite, f"grad_norm {norm}, not {total**0.5}"
            if np.isfinite(norm):
                np.testing.assert_allclose(norm, np.sqrt(total), rtol=1e-5, err_msg="grad_norm")
                is_finite = True
            self.grad_norm = float(norm)
            quotient = np.float32(options.max_grad_norm) / (norm + np.float32(1e-6))
            scale = np.minimum(quotient, np.float32(1))
        if is_near and options.skip_nonfinite:
            is_finite = state["skipped"].item() == self.skipped
        return scale, is_finite or not options.skip_nonfinite

    def update(self, gradients: dict[str, np.ndarray], scale: np.float32 = ONE, is_applied: bool = True) -> None:
        """One step; gradients in the order of their tree, which numbers the tensors."""
        options = self.options
        if not is_applied:
            self.skipped += 1
            return
        if options.schedule:
            self.learning_rate = self._scheduled()
        self.step += 1
        for number, (path, gradient) in enumerate(gradients.items()):
            tensor = self.tensors[path]
            if options.adds == "a rule":  # which sees one parameter at a time
                number, tensor = 0, dataclasses.replace(tensor, count=tensor.count + 1)
            settings = options.settings(path, self.learning_rate)
            new = oracle.adam(
                tensor.weight, clipped(gradient, scale), *map(tensor.moment, MOMENTS),
                self.step, settings, oracle.stepwise,
            )  # fmt: skip
            self.tensors[path] = self._stored(tensor, number, *map(float32, new))

    def _stored(self, tensor: Tensor, number: int, w: np.ndarray, m: np.ndarray, v: np.ndarray) -> Tensor:
        options, shape = self.options, tensor.value.shape
        bits = bits_of_step(options.seed, self.step, number, w.size)
        state: dict[str, np.ndarray] = {}
        if bits_of_codes := BITS_OF_CODES.get(tensor.state_dtype):
            draws = draws_of_step(options.seed, self.step, number, shape)
            for name, x in (("m", m), ("v", v)):
                state[name], state[f"{name}_scale"] = encode(name, x, draws[name], bits_of_codes)
        else:
            for name, x, is_random in (
                ("m", m, options.stochastic_rounding is True),
                ("v", v, options.stochastic_rounding is not False),
            ):
                assert tensor.state_dtype is not None
                state[name] = (
                    at_random(x, bits[name], tensor.state_dtype) if is_random else to_dtype(x, tensor.state_dtype)
                )
        assert tensor.state is not None
        if "remainder" in tensor.state:
            is_special = ~np.isfinite(w)
            clean = np.where(is_special, np.float32(0), w)
            if options.master_weight_bits == 24:
                draws = bits["parameter"].reshape(shape)
                clean = rounded_to_24(clean, None if options.stochastic_rounding is False else draws)
            halves_of_w = upper_half(clean).astype(np.uint32) << 16
            value = np.where(is_special, w, np.asarray(halves_of_w).view(np.float32))
            lower = np.where(is_special, 0, clean.view(np.uint32) & 0xFFFF).astype(np.uint16).view(np.int16)
            state["remainder"] = lower if options.master_weight_bits == 32 else (lower >> 8).astype(np.int8)
        elif options.stochastic_rounding is not False:
            value = at_random(w, bits["parameter"], tensor.dtype)
        else:
            value = to_dtype(w, tensor.dtype)
        return dataclasses.replace(tensor, value=float32(value), state=state)

    def to_mlx(self) -> None:
        """The state that mlx.optimizers would hold: moments in the parameter's dtype, and nothing beside them."""
        for path in self.paths_with_state:
            tensor = self.tensors[path]
            state = {name: to_dtype(tensor.moment(name), tensor.dtype) for name in MOMENTS}
            self.tensors[path] = dataclasses.replace(tensor, state=state, state_dtype=tensor.dtype)


def by_mlx(model: Model, path: str, gradient: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The parameter, m and v after a step of mlx.optimizers on the CPU, from what the model holds; all float32."""
    tensor, options = model.tensors[path], model.options
    settings = options.settings(path, model.learning_rate)
    arguments: dict[str, Any] = dict(
        learning_rate=model._scheduled() if options.schedule else model.learning_rate,
        betas=list(options.betas),
        eps=options.eps,
        bias_correction=options.bias_correction,
    )
    kind = optim.Adam
    if settings.weight_decay:
        kind, arguments["weight_decay"] = optim.AdamW, options.weight_decay
    assert tensor.state is not None
    with mx.stream(mx.cpu):
        optimizer = kind(**arguments)
        optimizer.state["step"] = mx.array(model.step + 1, mx.uint64)
        state = {name: mx.array(tensor.state[name]) for name in MOMENTS}
        new = optimizer.apply_single(mx.array(gradient), mx.array(tensor.value), state)
        mx.eval(new, state)
    return np.array(new), np.array(state["m"]), np.array(state["v"])


# ---- Comparing ----


def values_of(x: mx.array) -> np.ndarray:
    """The values of an array: float32 for floating ones, as stored for others; a copy."""
    if x.dtype == mx.bfloat16:
        wide = np.array(x.view(mx.uint16) if x.size else x.astype(mx.uint16)).astype(np.uint32)
        return np.asarray(np.asarray(wide << 16).view(np.float32))
    found = np.array(x)
    return found.astype(np.float32) if x.dtype == mx.float16 else found


def assert_same(actual: np.ndarray, expected: np.ndarray, what: str) -> None:
    """Bit for bit, up to the bits of NaN."""
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape} instead of {expected.shape}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} instead of {expected.dtype}"
    if actual.dtype == np.float32:
        a, e = np.atleast_1d(actual), np.atleast_1d(expected)
        same = np.ascontiguousarray(a).view(np.uint32) == np.ascontiguousarray(e).view(np.uint32)
        same |= np.isnan(a) & np.isnan(e)
    else:
        a, e = np.atleast_1d(actual), np.atleast_1d(expected)
        same = a == e
    if not same.all():
        wrong = np.argwhere(~same)
        at = tuple(int(i) for i in wrong[0])
        raise AssertionError(
            f"{what}: {len(wrong)} of {same.size} elements differ, first at {at}: {a[at]!r} instead of {e[at]!r}"
        )


def assert_array(actual: mx.array, expected: np.ndarray, dtype: mx.Dtype, what: str) -> None:
    assert actual.dtype == dtype, f"{what}: {actual.dtype} instead of {dtype}"
    assert_same(values_of(actual), expected, what)


def state_dtypes(tensor: Tensor) -> dict[str, mx.Dtype]:
    """The dtypes of all that a state holds."""
    is_coded = tensor.state_dtype in BITS_OF_CODES
    dtypes = {
        "m": tensor.state_dtype,
        "v": mx.uint8 if is_coded else tensor.state_dtype,
        "m_scale": mx.bfloat16,
        "v_scale": mx.bfloat16,
    }
    assert tensor.state is not None
    if (remainder := tensor.state.get("remainder")) is not None:
        dtypes["remainder"] = mx.int8 if remainder.dtype == np.int8 else mx.int16
    return {name: dtype for name, dtype in dtypes.items() if name in tensor.state}


# ---- Drawing ----


def random_values(rng: np.random.Generator, shape: tuple[int, ...], scale: float, dtype: mx.Dtype) -> np.ndarray:
    """Values of many sizes, some of them 0."""
    x = rng.normal(size=shape) * np.exp(rng.normal(size=shape)) * scale
    x = np.where(rng.random(shape) < 0.1, 0.0, x)
    return to_dtype(float32(x), dtype)


LAYOUTS = [
    "linear", "column-major", "column-major, padded", "strided", "reversed", "permuted", "between vectors",
    "broadcast", "broadcast columns",
]  # fmt: skip


def layout_for(shape: tuple[int, ...], layout: str) -> str:
    """The layout, or "linear" where a tensor of this shape cannot have it."""
    needs_matrix = layout.startswith("column-major") or layout == "permuted"
    if not shape or 0 in shape or (needs_matrix and len(shape) < 2):
        return "linear"
    return layout


def repeated(x: np.ndarray, layout: str) -> np.ndarray:
    """The values, made such as the layout can hold: those of a broadcast array repeat."""
    if layout == "broadcast":
        return np.ascontiguousarray(np.broadcast_to(x[:1], x.shape))
    if layout == "broadcast columns":
        return np.ascontiguousarray(np.broadcast_to(x[..., :1], x.shape))
    return x


def laid_out(x: np.ndarray, dtype: mx.Dtype, layout: str, rng: np.random.Generator) -> mx.array:
    """An MLX array of these values in this layout, lazily."""
    whole = mx.array(x).astype(dtype)
    if layout == "permuted":
        order = [int(i) for i in rng.permutation(x.ndim)]
        back = [int(i) for i in np.argsort(order)]
        return mx.contiguous(whole.transpose(order)).transpose(back)
    return lay_out(whole, layout)
