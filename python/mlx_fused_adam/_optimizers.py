"""Drop-in Adam and AdamW: MLX's own classes, with the update of all parameters handed to the fused operation at once.

Everything but the update (state tree, schedules, defaults, errors) is inherited from mlx.optimizers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx

# As they are at import: a user may put this package's classes in their place.
from mlx.optimizers import Adam as _StockAdam
from mlx.optimizers import AdamW as _StockAdamW
from mlx.optimizers import Optimizer as _StockOptimizer
from mlx.utils import tree_map, tree_map_with_path

from . import _ext
from ._arguments import as_array, as_number, as_scalar, check_betas, check_ranges
from ._backends import backend_of
from ._clipping import Guard, check_names, fit_guard_state, guard_of
from ._decay import DecayFilter
from ._options import FUSED_DTYPES, Options, check_options, refuse_unknown
from ._state import adopted, dtypes_by_path, fresh
from ._step import Leaves, Step
from ._tree import Walk, flattened


class _Fused(_StockOptimizer):
    """How gradients are applied; stands before mlx.optimizers.Adam or AdamW in the bases."""

    betas: list[float]
    eps: float
    bias_correction: bool
    weight_decay: float
    _options: Options
    _parameter_dtypes: dict[str, str]  # of those that init has seen, by path
    _decay_filter: DecayFilter | None = None

    def _set_options(self, options: Options) -> None:
        check_ranges(options.op, self.betas, self.eps)
        self._options = options
        self._parameter_dtypes = {}
        fit_guard_state(self._state, options)

    @property
    def backend(self) -> str:
        """What updates parameters on the default device, as in ``"cpu"``, ``"metal"`` or ``"stock (<reason>)"``.

        Parameters of other dtypes than float32, bfloat16 and float16 are left to stock in any case.
        """
        return backend_of().description

    def init(self, parameters: Any) -> None:
        """Make the state of parameters that have none, as mlx.optimizers does, and take over what was loaded.

        A state that is not stored as the options ask is converted: one of mlx.optimizers, or of other options.

        Raises:
            ValueError: If part of a state or a parameter does not fit, naming its path; no state is changed then.
        """
        was_initialized = self._initialized
        before = tree_map(lambda x: x, self._state)
        states: list[tuple[dict, dict]] = []

        def take_over(path: str, parameter: mx.array, state: dict) -> None:
            new = adopted(path or "the parameter", parameter, state, self._options)
            states.append((state, new))

        dtypes = self._parameter_dtypes | dtypes_by_path(parameters)
        try:
            check_names(parameters, self._options)
            if self._decay_filter:
                self._decay_filter.check(dtypes)
            fit_guard_state(self._state, self._options)
            super().init(parameters)
            tree_map_with_path(take_over, parameters, self._state)
        except BaseException:
            self._state.clear()
            self._state.update(before)
            self._initialized = was_initialized
            raise
        for state, new in states:
            state.clear()
            state.update(new)
        self._parameter_dtypes = dtypes

    def init_single(self, parameter: mx.array, state: dict) -> None:
        """Give one parameter's state its ``m`` and ``v``, and what the options add: zeros."""
        super().init_single(parameter, state)
        if parameter.dtype in FUSED_DTYPES:
            state.update(fresh(parameter, self._options))

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        """Update every parameter that has a gradient; arguments and result as in mlx.optimizers.

        After an exception, step, schedules and state are as they were before.

        Raises:
            ValueError: If a gradient's shape or dtype does not fit, or there is no such parameter; names the path.
            TypeError: If something among gradients or parameters is no array, naming the path.
        """
        # A subclass or an instance may bring a rule of its own for single parameters, which changes state as it goes.
        has_own_rule = getattr(self.apply_single, "__func__", None) is not _Fused.apply_single
        was_initialized = self._initialized
        copy_all = has_own_rule or not was_initialized
        before = tree_map(lambda x: x, self._state) if copy_all else dict(self._state)
        written: list[tuple[dict, dict]] = []
        try:
            if has_own_rule:
                if self._options.has_guard:
                    raise ValueError(
                        f"[{self._options.op}] apply_single must be the package's own with max_grad_norm and "
                        f"skip_nonfinite but got one of {type(self).__name__}, which would not obey them"
                    )
                return super().apply_gradients(gradients, parameters)
            check_names(gradients, self._options)
            if not was_initialized:
                self.init(_those_with(gradients, parameters))
            step = self.step
            for name, scheduler in self._schedulers.items():
                self.state[name] = scheduler(step)
            self.state["step"] = step + 1
            result, changes, guard = self._updated(gradients, parameters, self.state)
            written = [(state, dict(state)) for state, _ in changes]
            for state, changed in changes:
                state.update(changed)
            if guard:
                guard.record(self.state, before, ("step", *self._schedulers))
            return result
        except BaseException as error:
            # A refused or interrupted update is no step, and leaves no moments of a wrong shape behind.
            for state, old in written:
                state.clear()
                state.update(old)
            self._state.clear()
            self._state.update(before)
            self._initialized = was_initialized
            if isinstance(error, TypeError):
                for path, gradient in flattened(gradients):
                    as_array("gradient", gradient, path)
            raise

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        """Update one parameter with ``state["m"]`` and ``state["v"]``; return the new parameter.

        The options that look at all gradients take this one for all; what they record is not written.
        """
        result: mx.array
        result, changes, _ = self._updated(gradient, parameter, state)
        for old, changed in changes:
            old.update(changed)
        return result

    def _updated(
        self, gradients: Any, parameters: Any, states: Any
    ) -> tuple[Any, list[tuple[dict, dict]], Guard | None]:
        """The new parameters; each state and what is new in it; what the gradients as a whole have said. Changes nothing."""
        walk = Walk(gradients, parameters, states)
        guard = guard_of(walk.gradients, self._options, walk.paths)
        weight_decay = float(getattr(self, "weight_decay", 0.0))
        fused_step = _ext.AdamStep(
            as_scalar("learning_rate", self.learning_rate),
            as_scalar("step", self.step),
            betas=tuple(map(float, self.betas)),
            eps=float(self.eps),
            weight_decay=weight_decay,
            bias_correction=bool(self.bias_correction),
            rounding=self._options.rounding_request,
            seed=self._options.seed,
            gradient_scale=guard and guard.gradient_scale,
            is_applied=guard and guard.is_applied,
        )
        decay_filter = self._decay_filter if weight_decay else None
        step = Step(fused_step, self._options, decay_filter, guard, self._fall_back)
        new, states = step.update(Leaves(walk.gradients, walk.parameters, walk.states, walk.paths))
        walk.fill(new)
        return walk.result(), list(zip(walk.states, states, strict=True)), guard

    def _fall_back(
        self, gradient: mx.array, parameter: mx.array, state: dict, is_decayed: bool
    ) -> mx.array:
        """Update one parameter as mlx.optimizers does; its Adam is its AdamW without decay."""
        update = super().apply_single if is_decayed else partial(_StockAdam.apply_single, self)  # type: ignore[arg-type]  # Adam comes after this class
        return update(gradient, parameter, state)

    def _description(self) -> dict[str, Any]:
        """Hyper-parameters and options, in what JSON can say."""
        has_schedule = "learning_rate" in self._schedulers
        found = {
            # As many digits as a float32 has.
            "learning_rate": "schedule"
            if has_schedule
            else float(f"{self.learning_rate.item():.7g}"),
            "betas": [float(beta) for beta in self.betas],
            "eps": float(self.eps),
            "bias_correction": bool(self.bias_correction),
            **self._options.described(),
        }
        if hasattr(self, "weight_decay"):
            known = self._decay_filter
            found |= {
                "weight_decay": float(self.weight_decay),
                "decay_filter": known and known.described,
            }
        return found

    def _take_description(self, found: dict[str, Any]) -> None:
        """Hyper-parameters and options of another optimizer's description; the learning rate goes with the state."""
        options = self._options.as_described(found)
        decay_filter = self._decay_filter
        if "decay_filter" in found:
            asked = found["decay_filter"]
            decay_filter = None if asked is None else DecayFilter(options.op, asked)
        self._options, self._decay_filter = options, decay_filter
        for name in ("betas", "eps", "bias_correction", "weight_decay"):
            if name in found:
                setattr(self, name, found[name])


class Adam(_Fused, _StockAdam):
    """``mlx.optimizers.Adam`` in one pass over memory.

    Arguments, defaults, state tree and methods are those of :class:`mlx.optimizers.Adam`; float32 results on the CPU
    are bit-identical to it. 16-bit parameters are updated in float32 arithmetic with one rounding at each store, and their
    ``m`` and ``v`` are bfloat16. Codes, scales and remainders stand beside ``m`` and ``v`` in the state; gradients and ``vmap``
    of an update are not for them.

    Args:
        learning_rate (float or callable): The learning rate, or a schedule of the step.
        betas (list[float]): Decay rates of ``m`` and ``v``. Default: ``[0.9, 0.999]``.
        eps (float): Added to the denominator. Default: ``1e-8``.
        bias_correction (bool): Whether to divide ``m`` and ``v`` by what they lack in their first steps, having
            started from zero (Kingma & Ba 2015, section 3). Default: ``False``.
        state_dtype (str or Dtype, optional): In which ``m`` and ``v`` are stored: ``"float32"``, ``"bfloat16"``, or ``"int8"``:
            codes of 8 bits, with a scale for each 32 neighbours along the last axis. Parameters of less than 4096 elements,
            or with a last axis below 32, have bfloat16 where int8 is asked for. Default: float32 for float32 parameters,
            bfloat16 for 16-bit ones.
        stochastic_rounding (bool, optional): Which 16-bit values are rounded up or down at random, so that the mean is right:
            ``None``: ``v`` alone, whose small steps rounding to nearest would lose; ``True``: parameters and ``m`` as well;
            ``False``: none, which ``"int8"`` refuses: its codes are always rounded at random. Default: ``None``.
        seed (int): Of that rounding. Equal seeds give equal results, on any device and after a resume. Default: ``0``.
        master_weights (bool): Whether the state of a bfloat16 parameter holds the rest of its float32 value (``remainder``,
            int16), so that training equals that of float32 parameters. The parameter is then the float32 value rounded to
            nearest, ties away from zero. float32 parameters need none; float16 ones are refused. Default: ``False``.
        max_grad_norm (float, optional): The largest global norm of the gradients, greater than 0: larger gradients are scaled
            down inside the update, as by ``mlx.optimizers.clip_grad_norm``, whose norm is here summed in float32. The norm
            before clipping is ``state["grad_norm"]``, a float32 array. Default: no clipping.
        skip_nonfinite (bool): Whether a step whose gradients hold NaN or infinity, or whose squares sum up to more than
            float32 holds (3.4e38), changes nothing: parameters, moments, step and schedules stay bit for bit, and
            ``state["skipped"]``, a uint64 array, counts one more. Default: ``False``.
        shard_group (mlx.core.distributed.Group, optional): The processes that parameters and gradients are sharded over, as
            with ``mlx.nn.fully_shard``: norm and decision are those of all shards, and what :func:`save_optimizer` writes
            is loaded by the same rank of as many processes alone. Default: they are whole.

    Raises:
        ValueError: At construction, for betas outside [0, 1), a negative eps, a number that is not finite, or an option's
            value that is none of those to choose from, or goes ill with another.
        TypeError: At construction, for what is no number, or an option that there is not.
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
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        shard_group: mx.distributed.Group | None = None,
        **unknown: Any,
    ) -> None:
        refuse_unknown("Adam", unknown, _names_of_arguments(Adam))
        super().__init__(
            _learning_rate("Adam", learning_rate),
            list(check_betas("Adam", betas)),
            as_number("Adam", "eps", eps),
            bias_correction,
        )
        self._set_options(
            check_options(
                "Adam",
                state_dtype=state_dtype,
                stochastic_rounding=stochastic_rounding,
                seed=seed,
                master_weights=master_weights,
                max_grad_norm=max_grad_norm,
                skip_nonfinite=skip_nonfinite,
                shard_group=shard_group,
            )
        )


class AdamW(_Fused, _StockAdamW):
    """``mlx.optimizers.AdamW`` in one pass over memory. Arguments and errors are :class:`Adam`'s, and beside them:

    Args:
        weight_decay (float): Decoupled weight decay (Loshchilov & Hutter 2019). Default: ``0.01``.
        decay_filter (callable, str or list[str], optional): What weight decay applies to: a callable of path and parameter
            that returns a bool, asked once for each path; or regular expressions, one of which must be found in the path
            (``"layers.0.mlp.weight"``). Default: everything.
    """

    def __init__(
        self,
        learning_rate: float | Callable[[mx.array], mx.array],
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        bias_correction: bool = False,
        *,
        state_dtype: str | mx.Dtype | None = None,
        stochastic_rounding: bool | None = None,
        seed: int = 0,
        master_weights: bool = False,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        shard_group: mx.distributed.Group | None = None,
        decay_filter: Callable[[str, mx.array], bool] | Sequence[str] | str | None = None,
        **unknown: Any,
    ) -> None:
        refuse_unknown("AdamW", unknown, _names_of_arguments(AdamW))
        super().__init__(
            _learning_rate("AdamW", learning_rate),
            list(check_betas("AdamW", betas)),
            as_number("AdamW", "eps", eps),
            as_number("AdamW", "weight_decay", weight_decay),
            bias_correction,
        )
        self._set_options(
            check_options(
                "AdamW",
                state_dtype=state_dtype,
                stochastic_rounding=stochastic_rounding,
                seed=seed,
                master_weights=master_weights,
                max_grad_norm=max_grad_norm,
                skip_nonfinite=skip_nonfinite,
                shard_group=shard_group,
            )
        )
        if decay_filter is not None:
            self._decay_filter = DecayFilter("AdamW", decay_filter)

    def decayed(self, parameters: Any) -> list[str]:
        """The paths of those parameters that weight decay applies to; all of them without a ``decay_filter``."""
        known = self._decay_filter
        return [path for path, x in flattened(parameters) if known is None or known.decays(path, x)]


def _those_with(gradients: Any, parameters: Any) -> Any:
    """The parameters that have a gradient, in a tree like that of the gradients."""
    try:
        return tree_map(lambda _, x: as_array("parameter", x), gradients, parameters)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        return gradients  # what is missing is named by the update


def _names_of_arguments(kind: type) -> list[str]:
    parameters = inspect.signature(kind).parameters.values()
    return [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]


def _learning_rate(op: str, x: Any) -> Any:
    """A schedule or an array as it is; a number checked."""
    if callable(x) or isinstance(x, mx.array) or hasattr(x, "__array__"):
        return x
    return as_number(op, "learning_rate", x)
