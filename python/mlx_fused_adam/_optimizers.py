"""Drop-in Adam and AdamW: subclasses of MLX's that hand all parameters to the fused operation at once.

The state tree, schedules, defaults and errors are inherited from mlx.optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

# As they are at import: users may put this package's classes in their place.
from mlx.optimizers import Adam as _MLXAdam
from mlx.optimizers import AdamW as _MLXAdamW
from mlx.optimizers import Optimizer as _MLXOptimizer
from mlx.utils import tree_map

from . import _ext
from ._arguments import as_array, as_number, as_scalar, check_betas, check_ranges
from ._backends import backend_of, known_backend
from ._clipping import Clipping, check_names, clipping_of, fit_recorded
from ._decay import DecayFilter
from ._options import FUSED_DTYPES, Options
from ._state import Seen, converted, fresh, makes_ours, seen_by_path
from ._step import Leaves, Step
from ._structure import fit_loaded, is_one_state
from ._tree import flattened, padded, paths_of, walk, with_states
from ._warn import warn


class _Option:
    """An option as an attribute. An assignment is checked; the next update converts the state and goes by it.

    A step that ``mx.compile`` has traced keeps the options that it was traced with.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, optimizer: _Fused | None, owner: type) -> Any:
        return self if optimizer is None else optimizer._options.value_of(self._name)

    def __set__(self, optimizer: _Fused, value: Any) -> None:
        optimizer._change_options(optimizer._options.replaced({self._name: value}))


class _Fused(_MLXOptimizer):
    """Initialize state and apply gradients; comes before mlx.optimizers.Adam or AdamW in the bases."""

    betas: list[float]
    eps: float
    bias_correction: bool
    state_dtype = _Option()
    stochastic_rounding = _Option()
    seed = _Option()
    master_weights = _Option()
    master_weight_bits = _Option()
    max_grad_norm = _Option()
    skip_nonfinite = _Option()
    shard_group = _Option()
    _options: Options
    _seen_parameters: dict[str, Seen]  # those that init has seen, by path
    _decay_filter: DecayFilter | None = None
    _loaded: tuple[str, dict] | None = None  # a file and its state, which has not met its parameters yet
    _is_hinted = False

    def _set_options(self, options: Options) -> None:
        check_ranges(options.op, self.betas, self.eps)
        if options.master_weight_bits != 32 and not options.master_weights:
            raise ValueError(f"[{options.op}] master_weights must be True with master_weight_bits=24 but got False")
        self._options = options
        self._seen_parameters = {}
        fit_recorded(self._state, options)
        self._make_arrays()
        # A schedule's value is lazy, and another thread could not evaluate it.
        mx.eval(self._state)

    def _hint(self, parameters: Any) -> None:
        """Warn once of an option that has no effect on any of the parameters."""
        options = self._options
        if self._is_hinted or not parameters:
            return
        asked = {"master_weights": options.master_weights, "stochastic_rounding": options.stochastic_rounding}
        names = [name for name, x in asked.items() if x and not (name == "stochastic_rounding" and options.state_dtype)]
        dtypes = {x.dtype for _, x in flattened(parameters)}
        if names and dtypes and not dtypes & {mx.bfloat16, mx.float16}:
            self._is_hinted = True
            warn(f"[{options.op}] {' and '.join(names)} has no effect: no parameter is bfloat16")

    def _change_options(self, options: Options) -> None:
        fit_recorded(self._state, options)
        self._options = options
        self._initialized = False  # so that the next update converts the state

    def _make_arrays(self) -> None:
        """Make arrays of numbers that were assigned to the state, or that a schedule returned."""
        if not isinstance(self._state, dict):
            raise TypeError(f"[{self._options.op}] state must be a dict but got {self._state!r}")
        for name in ("step", "learning_rate", *self._schedulers):
            x = self._state.get(name)
            if x is not None and not isinstance(x, mx.array):
                self._state[name] = mx.array(x, mx.uint64 if name == "step" else mx.float32)

    def __repr__(self) -> str:
        """Class, hyper-parameters, options that differ from their defaults, and the back end if it is known."""
        try:
            defaults = Options(self._options.op).described()
            named = {k: x for k, x in self._description().items() if k not in defaults or x != defaults[k]}
        except (AttributeError, TypeError, ValueError):  # not constructed yet, traced, or with a state that is no state
            return object.__repr__(self)
        given = ", ".join(f"{name}={x!r}" for name, x in named.items() if name != "decay_filter" or x)
        known = known_backend()
        return f"{type(self).__name__}({given})" + (f" on {known}" if known else "")

    @property
    def backend(self) -> str:
        """The code that updates parameters on the default device, as ``"cpu"``, ``"metal"`` or ``"stock (<reason>)"``.

        The first update of each combination of dtypes compiles its kernels and runs their self-check, which may take a
        second; so does this, if there has been none. Parameters of other dtypes than float32, bfloat16 and float16
        always fall back to mlx.optimizers.
        """
        return backend_of().description

    def init(self, parameters: Any) -> None:
        """Make the state of parameters that have none, as mlx.optimizers does, and convert what was loaded.

        A state of mlx.optimizers, or of other options, is converted to what the options ask for.

        Raises:
            ValueError: If part of a state or a parameter does not fit, or a file that was loaded has no state of a
                parameter, or one that no parameter takes, naming its path; no state is changed then.
        """
        was_initialized, loaded = self._initialized, self._loaded
        before = tree_map(lambda x: x, self._state)
        try:
            check_names(parameters, self._options)
            if self._decay_filter:
                self._decay_filter.check(self._seen_parameters | seen_by_path(parameters))
            fit_recorded(self._state, self._options)
            self._make_arrays()
            self._fit_loaded(parameters, parameters)
            super().init(padded(parameters, self._state))
            self._hint(parameters)
            self._convert(parameters)
        except BaseException:
            self._restore(before, was_initialized, loaded)
            raise

    def _convert(self, parameters: Any) -> None:
        """Convert the state of all parameters that have one to what the options ask for."""
        states: list[tuple[dict, dict]] = []
        seen = dict(self._seen_parameters)
        for path, parameter, state in with_states(parameters, self._state):
            if not is_one_state(state):
                continue
            parameter = as_array("parameter", parameter, path)
            seen |= seen_by_path({path: parameter})
            # A subclass's own state is its own, unless it makes ours and adds to it.
            if self._makes_state or makes_ours(self.init_single, parameter, self._options):
                states.append((state, converted(path or "the parameter", parameter, state, self._options)))
        for state, new in states:
            state.clear()
            state.update(new)
        self._seen_parameters = seen

    @property
    def _makes_state(self) -> bool:
        """Whether the state of single parameters is made here, and not by a subclass or the instance."""
        return getattr(self.init_single, "__func__", None) is _Fused.init_single

    def init_single(self, parameter: mx.array, state: dict) -> None:
        """Give one parameter's state zeros: ``m``, ``v``, and the auxiliary arrays of the options."""
        super().init_single(parameter, state)
        if parameter.dtype in FUSED_DTYPES:
            state.update(fresh(parameter, self._options))

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        """Update every parameter that has a gradient; arguments and result as in mlx.optimizers.

        An exception leaves step, schedules and state as they were before.

        Raises:
            ValueError: If a gradient's shape or dtype does not fit or its parameter is missing, naming the path.
            TypeError: If a gradient or parameter is no array, naming the path.
        """
        return self._applied(gradients, parameters)[0]  # one line: after it, an interrupt would find a whole step

    def _applied(
        self, gradients: Any, parameters: Any, clipping: Clipping | None = None
    ) -> tuple[Any, Callable[[], None]]:
        """The result of an update, and what takes the update back; ``clipping`` replaces that of the options."""
        self._make_arrays()
        was_initialized, loaded = self._initialized, self._loaded
        copy_all = self._has_own_rule or not was_initialized
        before = tree_map(lambda x: x, self._state) if copy_all else dict(self._state)
        written: list[_ext.Changes] = []

        def undo() -> None:
            try:
                for changes in written:
                    changes.undo()
            finally:
                self._restore(before, was_initialized, loaded)

        try:
            if loaded and not was_initialized:
                self._fit_loaded(_those_with(gradients, parameters), parameters)
            if self._has_own_rule and (self._options.needs_norm or self._decay_filter):
                raise ValueError(
                    f"[{self._options.op}] apply_single must be the package's own with max_grad_norm, skip_nonfinite "
                    f"and decay_filter but got one of {type(self).__name__}, which knows neither norm nor path"
                )
            check_names(gradients, self._options)
            if not was_initialized:
                self.init(_those_with(gradients, parameters))
                # Those without a gradient, too, so that no later update meets the form that an option before asked for.
                self._convert(parameters)
            if self._has_own_rule:
                return super().apply_gradients(gradients, parameters), undo
            step = self.step
            for name, scheduler in self._schedulers.items():
                value = scheduler(step)
                self.state[name] = value if isinstance(value, mx.array) else mx.array(value, mx.float32)
            self.state["step"] = step + 1
            is_shared = clipping is not None
            result, changes, clipping = self._updated(gradients, parameters, self.state, clipping)
            written.append(changes)
            changes.apply()
            if clipping:
                clipping.keep_counters(self.state, before, ("step", *self._schedulers))
                if not is_shared:
                    clipping.record(self.state)
            return result, undo
        except BaseException as error:
            # A rejected or interrupted update is no step, and leaves no moments of a wrong shape behind.
            undo()
            if isinstance(error, TypeError):
                for path, gradient in flattened(gradients):
                    as_array("gradient", gradient, path)
            raise

    @property
    def _has_own_rule(self) -> bool:
        """Whether a subclass or the instance has its own rule for single parameters, which changes state as it goes."""
        return getattr(self.apply_single, "__func__", None) is not _Fused.apply_single

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        """Update one parameter with ``state["m"]`` and ``state["v"]``; return the new parameter.

        Clipping and skipping look at this gradient alone; their norm and count are not recorded.
        """
        result: mx.array
        result, changes, _ = self._updated(gradient, parameter, state)
        changes.apply()
        return result

    def _updated(
        self, gradients: Any, parameters: Any, states: Any, clipping: Clipping | None = None
    ) -> tuple[Any, _ext.Changes, Clipping | None]:
        """The new parameters, the changes of the states, and the clipping; changes nothing."""
        found = walk(gradients, parameters, states)
        leaves = Leaves(found.gradients, found.parameters, found.states, lambda: paths_of(gradients))
        if clipping is None:
            clipping = clipping_of(leaves.gradients, self._options, leaves.paths)
        # An attribute of this name in a subclass of Adam is its own.
        weight_decay = self.weight_decay if isinstance(self, AdamW) else 0.0
        if not isinstance(weight_decay, mx.array):
            weight_decay = float(weight_decay)
        beta1, beta2 = map(float, self.betas)
        fused_step = _ext.AdamStep(
            as_scalar("learning_rate", self.learning_rate),
            as_scalar("step", self.step),
            betas=(beta1, beta2),
            eps=float(self.eps),
            weight_decay=weight_decay,
            bias_correction=bool(self.bias_correction),
            rounding=self._options.rounding_request,
            seed=self._options.seed,
            gradient_scale=clipping and clipping.gradient_scale,
            is_applied=clipping and clipping.is_applied,
        )
        decay_filter = self._decay_filter if isinstance(weight_decay, mx.array) or weight_decay else None
        step = Step(fused_step, self._options, decay_filter, clipping, self._fall_back)
        new, changed = step.update(leaves, found.is_fused)
        return found.result(new), _ext.Changes(leaves.states, changed), clipping

    def _restore(self, state: dict, is_initialized: bool, loaded: tuple[str, dict] | None) -> None:
        self._state.clear()
        self._state.update(state)
        self._initialized, self._loaded = is_initialized, loaded

    def _fit_loaded(self, trained: Any, parameters: Any) -> None:
        """Put a loaded state in the containers of its first parameters, unless the user has set another since."""
        if self._loaded and self._loaded[1] is self._state and isinstance(trained, dict):
            op, file = self._options.op, self._loaded[0]
            state = fit_loaded(op, file, self._state, trained, parameters, makes_empty_states=not self._makes_state)
            self._state.clear()
            self._state.update(state)
        self._loaded = None

    def _fall_back(self, gradient: mx.array, parameter: mx.array, state: dict, is_decayed: bool) -> mx.array:
        """Update one parameter as mlx.optimizers does; its Adam is its AdamW without decay."""
        result: mx.array
        if is_decayed:
            result = super().apply_single(gradient, parameter, state)
        else:
            result = _MLXAdam.apply_single(self, gradient, parameter, state)  # type: ignore[arg-type]  # Adam comes after this class
        return result

    def _description(self) -> dict[str, Any]:
        """Hyper-parameters and options in JSON's types."""

        def told(name: str) -> Any:
            return "schedule" if name in self._schedulers else float(f"{float(getattr(self, name)):.7g}")

        self._make_arrays()
        found = {
            "learning_rate": told("learning_rate"),  # in float32's digits
            "betas": [float(beta) for beta in self.betas],
            "eps": float(self.eps),
            "bias_correction": bool(self.bias_correction),
            **self._options.described(),
        }
        if isinstance(self, AdamW):
            known = self._decay_filter
            found["weight_decay"] = told("weight_decay")
            found["decay_filter"] = known and known.described
        return found

    def _take_description(self, found: dict[str, Any]) -> None:
        """Take hyper-parameters and options from another optimizer's description; the learning rate belongs to the
        state.
        """
        options = self._options.replaced({k: x for k, x in found.items() if k != "shard_group"})
        decay_filter = self._decay_filter
        if "decay_filter" in found:
            wanted = found["decay_filter"]
            decay_filter = None if wanted is None else DecayFilter(options.op, wanted)
        self._options, self._decay_filter = options, decay_filter
        for name in ("betas", "eps", "bias_correction", "weight_decay"):
            if name in found and found[name] != "schedule":
                setattr(self, name, found[name])


class Adam(_Fused, _MLXAdam):
    """``mlx.optimizers.Adam`` in one pass over memory.

    Arguments, defaults, state tree and methods are those of :class:`mlx.optimizers.Adam`; float32 results on the CPU
    are bit-identical to it. 16-bit parameters are updated in float32 arithmetic with one rounding at each store, and
    their ``m`` and ``v`` are bfloat16. The options' auxiliary arrays (scales, ``remainder``) are beside ``m`` and ``v``
    in the state; grad and ``vmap`` of an update are not supported with them.

    Args:
        learning_rate (float or callable): The learning rate, or a schedule of the step.
        betas (list[float]): Decay rates of ``m`` and ``v``. Default: ``[0.9, 0.999]``.
        eps (float): Added to the denominator. Default: ``1e-8``.
        bias_correction (bool): Whether to correct ``m`` and ``v`` for their start from zero (Kingma & Ba 2015, section
            3). Default: ``False``.
        state_dtype (str or Dtype, optional): The dtype of ``m`` and ``v``: ``"float32"``, ``"bfloat16"``, ``"int8"`` or
            ``"int4"``. The last two are quantized to 8 or 4 bits, with one scale for 32 neighbours along the last axis;
            in 4 bits, two values share a byte of a uint8 array. Parameters with fewer than 4096 elements, or a last
            axis shorter than 32, use bfloat16 instead. Default: float32 for float32 parameters, bfloat16 for 16-bit
            ones.
        stochastic_rounding (bool, optional): The 16-bit results that are rounded stochastically, which is right on
            average: ``None``: parameters and ``v``, whose small steps rounding to nearest would lose; ``True``: ``m``
            as well; ``False``: none, as in mlx.optimizers; an error with ``"int8"`` and ``"int4"``, which are
            always rounded stochastically. Default: ``None``.
        seed (int): Seed of that rounding. Equal seeds give equal results, on any device and after a resume. Default:
            ``0``.
        master_weights (bool): Whether the state holds the low 16 bits of each bfloat16 parameter's float32 value
            (``remainder``, int16), so that training equals that of float32 parameters. The parameter is that value
            rounded to nearest, ties away from zero. Has no effect on float32 parameters; float16 ones are an error.
            Default: ``False``.
        master_weight_bits (int): 32, or 24 for a correction of one byte (``remainder``, int8): each step rounds the
            24-bit value stochastically, or with ``stochastic_rounding=False`` to nearest. Default: ``32``.
        max_grad_norm (float, optional): The largest global norm of the gradients, greater than 0. Larger gradients are
            scaled down inside the update, as by ``mlx.optimizers.clip_grad_norm``, with the norm summed in float32. The
            norm before clipping is ``state["grad_norm"]``, a float32 array. Default: no clipping.
        skip_nonfinite (bool): Whether to skip a step whose gradients hold NaN or infinity, or whose sum of squares
            exceeds float32's range (3.4e38): parameters, moments, step and schedules keep their bits, and
            ``state["skipped"]``, a uint64 array, counts it. Default: ``False``.
        shard_group (mlx.core.distributed.Group, optional): The processes that parameters and gradients are sharded
            over, as with ``mlx.nn.fully_shard``. Norm and skipping consider all shards, and a file of
            :func:`save_optimizer` is loaded by the same rank of as many processes. Default: not sharded.

    Raises:
        ValueError: At construction, for betas outside [0, 1), a negative eps, a number that is not finite, or an
            option's value that is not among its choices or conflicts with another.
        TypeError: At construction, for a value that is not a number, or an unknown option.
    """

    def __init__(
        self,
        learning_rate: float | Callable[[mx.array], mx.array],
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        bias_correction: bool = False,
        *,
        state_dtype: str | mx.Dtype | None = None,
        stochastic_rounding: bool | None = None,
        seed: int = 0,
        master_weights: bool = False,
        master_weight_bits: int = 32,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        shard_group: mx.distributed.Group | None = None,
    ) -> None:
        super().__init__(*_checked("Adam", learning_rate, betas, eps, bias_correction), bias_correction)
        self._set_options(
            Options(
                "Adam", state_dtype, stochastic_rounding, seed, master_weights, master_weight_bits, max_grad_norm,
                skip_nonfinite, shard_group,
            )
        )  # fmt: skip


class AdamW(_Fused, _MLXAdamW):
    """``mlx.optimizers.AdamW`` in one pass over memory. Arguments and errors are those of :class:`Adam`, and:

    Args:
        weight_decay (float or callable): Decoupled weight decay (Loshchilov & Hutter 2019), or a schedule of the step,
            whose value is then ``state["weight_decay"]``. Default: ``0.01``.
        decay_filter (callable, str or list[str], optional): The parameters that weight decay applies to: a callable of
            path and parameter that returns a bool, called once for each path; or regular expressions, searched for in
            the path (``"layers.0.mlp.weight"``). Default: all.
    """

    def __init__(
        self,
        learning_rate: float | Callable[[mx.array], mx.array],
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Callable[[mx.array], mx.array] = 0.01,
        bias_correction: bool = False,
        *,
        state_dtype: str | mx.Dtype | None = None,
        stochastic_rounding: bool | None = None,
        seed: int = 0,
        master_weights: bool = False,
        master_weight_bits: int = 32,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        shard_group: mx.distributed.Group | None = None,
        decay_filter: Callable[[str, mx.array], bool] | Sequence[str] | str | None = None,
    ) -> None:
        if not callable(weight_decay):
            weight_decay = as_number("AdamW", "weight_decay", weight_decay)
        checked = _checked("AdamW", learning_rate, betas, eps, bias_correction)
        super().__init__(*checked, weight_decay, bias_correction)  # type: ignore[arg-type]
        self._set_options(
            Options(
                "AdamW", state_dtype, stochastic_rounding, seed, master_weights, master_weight_bits, max_grad_norm,
                skip_nonfinite, shard_group,
            )
        )  # fmt: skip
        self.decay_filter = decay_filter

    @property
    def weight_decay(self) -> Any:
        """A number, or with a schedule its value, a scalar array; either may be assigned."""
        return self.state["weight_decay"] if "weight_decay" in self._schedulers else self._weight_decay

    @weight_decay.setter
    def weight_decay(self, x: Any) -> None:
        self._schedulers.pop("weight_decay", None)
        self._state.pop("weight_decay", None)
        if callable(x):
            self._maybe_schedule("weight_decay", x)
        else:
            self._weight_decay = x

    @property
    def decay_filter(self) -> Any:
        """The parameters that weight decay applies to, as it was given; an assignment counts from the next update."""
        return self._decay_filter and self._decay_filter.wanted

    @decay_filter.setter
    def decay_filter(self, wanted: Any) -> None:
        self._decay_filter = None if wanted is None else DecayFilter("AdamW", wanted)

    def decayed(self, parameters: Any) -> list[str]:
        """The paths of the parameters that weight decay applies to; all of them without a ``decay_filter``."""
        known = self._decay_filter
        return [path for path, x in flattened(parameters) if known is None or known.decays(path, x)]


def _checked(op: str, learning_rate: Any, betas: Any, eps: Any, bias_correction: Any) -> tuple[Any, list[float], float]:
    """The hyper-parameters as numbers; a learning rate that is a schedule or an array is returned as it is."""
    if not isinstance(bias_correction, int):  # a bool is one; mlx.optimizers takes the string "false" for true
        raise TypeError(f"[{op}] bias_correction must be True or False but got {bias_correction!r}")
    is_array = isinstance(learning_rate, mx.array) or hasattr(learning_rate, "__array__")
    if not (callable(learning_rate) or is_array):
        learning_rate = as_number(op, "learning_rate", learning_rate)
    return learning_rate, list(check_betas(op, betas)), as_number(op, "eps", eps)


def _those_with(gradients: Any, parameters: Any) -> Any:
    """The parameters that have a gradient, in a tree like that of the gradients."""
    try:
        return tree_map(lambda _, x: as_array("parameter", x), gradients, parameters)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        return gradients  # the update names what is missing
