"""MultiOptimizer: mlx.optimizers' parameter groups, with one global norm, one decision to skip and one step over all
parts. Fused parts take clip factor and decision into their kernels; around other optimizers the same lazy scalars are
applied by MLX's operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import mlx.core as mx

# As it is at import: `install` builds this package's class in its place.
from mlx.optimizers import MultiOptimizer as _MLXMultiOptimizer
from mlx.optimizers import Optimizer
from mlx.utils import tree_map, tree_merge

from ._clipping import RECORDED, Clipping, clipping_of, fit_recorded
from ._optimizers import _Fused, _Option, _those_with
from ._options import Options
from ._tree import flattened

# The result of an update, and what takes the update back.
Update = tuple[Any, Callable[[], None]]


class MultiOptimizer(_MLXMultiOptimizer):
    """``mlx.optimizers.MultiOptimizer`` with one gradient norm, one decision and one checkpoint over all parts.

    Arguments, state tree and errors are those of :class:`mlx.optimizers.MultiOptimizer`: each part updates the
    parameters that its filter is the first to choose, the last part those that are left. An exception leaves every part
    as it was. Example::

        optimizer = fused.MultiOptimizer(
            [optim.Muon(0.02), fused.AdamW(3e-4, state_dtype="int8")],
            [lambda path, x: x.ndim == 2 and "embed" not in path],
            max_grad_norm=1.0,
            skip_nonfinite=True,
        )

    Parts may be fused ones, with any option each, and any other :class:`mlx.optimizers.Optimizer` (Muon, Lion, SGD,
    Adafactor, …), which gets scaled gradients: on a skipped step its parameters and its whole state, step and schedules
    included, keep their bits. It must make all its state in ``init_single``. All of it is lazy and can be compiled.
    Parts with equal seeds of stochastic rounding use equal random bits; give each its own ``seed``.

    ``max_grad_norm`` and ``skip_nonfinite`` belong here or to the parts, not to both. With one of them here, a part
    that has other values of its own is an error, and a part with the same loses them. With none of them here, each part
    goes by its own, and by the norm of its own gradients, as in ``mlx.optimizers.MultiOptimizer``.

    :func:`save_optimizer` and :func:`load_optimizer` take all parts in one file; filters are not part of it.

    Args:
        optimizers (list[Optimizer]): The parts. A part may be a MultiOptimizer again.
        filters (list[callable]): For each part but the last, a callable of path and parameter that returns whether the
            part updates it. It gets the gradient in the parameter's place in updates, so it must not look at values.
            Optimizers whose filters are functions of a module can be pickled.
        max_grad_norm (float, optional): The largest global norm of the gradients of all parts, as in :class:`Adam`. The
            norm before clipping is ``state["grad_norm"]``, beside ``state["states"]``. Default: no clipping.
        skip_nonfinite (bool): Whether to skip a step of all parts if a gradient of any holds NaN or infinity, as in
            :class:`Adam`; ``state["skipped"]`` counts such steps. Default: ``False``.
        shard_group (mlx.core.distributed.Group, optional): The processes that parameters and gradients of all parts are
            sharded over, as in :class:`Adam`. Default: not sharded.

    Raises:
        ValueError: At construction, if the number of filters does not fit, an option's value is not among its choices,
            or a part clips or skips by itself.
        TypeError: At construction, for an option's value of another type.
    """

    max_grad_norm = _Option()
    skip_nonfinite = _Option()
    shard_group = _Option()
    _options: Options
    _state: dict[str, Any]

    def __init__(
        self,
        optimizers: list[Optimizer],
        filters: list[Callable[[str, mx.array], bool]] = [],  # noqa: B006  # as in mlx.optimizers
        *,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        shard_group: mx.distributed.Group | None = None,
    ) -> None:
        options = Options(
            "MultiOptimizer", max_grad_norm=max_grad_norm, skip_nonfinite=skip_nonfinite, shard_group=shard_group
        )
        if not isinstance(optimizers, (list, tuple)) or not optimizers:
            raise TypeError(f"[MultiOptimizer] optimizers must be a list of one or more but got {optimizers!r}")
        super().__init__(optimizers, filters)
        self.filters[-1] = _any  # MLX's lambda cannot be pickled
        # One dict, which a compiled step may capture; `state` puts the parts' in.
        self._state = {"states": []}
        self._change_options(options)

    def __repr__(self) -> str:
        if "_options" not in vars(self):  # not constructed yet
            return object.__repr__(self)
        parts = ", ".join(map(_named, self.optimizers))
        defaults = Options(self._options.op).described()
        options = [f", {k}={x!r}" for k, x in self._options.described().items() if x != defaults[k]]
        return f"{type(self).__name__}([{parts}]{''.join(options)})"

    @property
    def backend(self) -> str:
        """The parts' distinct back ends, as in :attr:`Adam.backend`: ``"cpu, stock (Muon is not fused)"``, say."""
        found = (getattr(part, "backend", f"stock ({type(part).__name__} is not fused)") for part in self.optimizers)
        return ", ".join(dict.fromkeys(found))

    @property
    def state(self) -> dict[str, Any]:
        """``{"states": [...]}``, the parts' states, and what the options record: ``grad_norm``, ``skipped``."""
        self._state["states"] = [part.state for part in self.optimizers]
        return self._state

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        _MLXMultiOptimizer.state.fset(self, state)  # type: ignore[attr-defined]  # a property
        recorded = {name: state[name] for name in RECORDED if isinstance(state.get(name), mx.array)}
        for name in RECORDED:
            self._state.pop(name, None)
        self._state.update(recorded)
        fit_recorded(self._state, self._options)

    @property
    def step(self) -> mx.array:
        """The number of steps of the first part; all parts take them together."""
        first = next(part for part in with_inner(self.optimizers) if not isinstance(part, _MLXMultiOptimizer))
        step: mx.array = first.step
        return step

    def init(self, parameters: Any) -> None:
        """Initialize each part with its parameters; an exception leaves every part as it was.

        Raises:
            ValueError: If a part clips or skips by itself, or a file that was loaded has no state of a parameter, or
                one that no parameter takes; and whatever a part raises.
        """
        self._claim_norm(self._options)
        undos = [undo_of(part) for part in with_inner(self.optimizers)]
        try:
            for part, some in zip(self.optimizers, self._split_dictionary(parameters), strict=True):
                _initialize(part, some, some)
        except BaseException:
            for undo in undos:
                undo()
            raise

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        """Update every parameter that has a gradient; arguments and result as in mlx.optimizers.

        An exception leaves the steps, schedules and states of all parts as they were before.

        Raises:
            ValueError: If something does not fit or is missing, naming the path; if a part clips or skips by itself; if
                a part makes new state in an update that may be skipped.
            TypeError: If a gradient or parameter is no array, naming the path.
        """
        result, _ = self._applied(gradients, parameters)
        return result

    def decayed(self, parameters: Any) -> list[str]:
        """The paths of the parameters that a weight decay applies to, by part: see :meth:`AdamW.decayed`.

        Optimizers that are not fused decay all their parameters, unless their ``weight_decay`` is 0 or missing.
        """
        found: set[str] = set()
        for part, some in zip(self.optimizers, self._split_dictionary(parameters), strict=True):
            if hasattr(part, "decayed"):
                found.update(part.decayed(some))
            elif getattr(part, "weight_decay", 0):
                found.update(path for path, _ in flattened(some))
        return [path for path, _ in flattened(parameters) if path in found]

    def _change_options(self, options: Options) -> None:
        self._claim_norm(options)
        fit_recorded(self._state, options)
        self._options = options

    def _claim_norm(self, options: Options) -> None:
        """Take clipping and skipping from parts that have the same; reject those that have others."""
        if not options.needs_norm:
            return
        claimed = []
        for part in with_inner(self.optimizers):
            own: Options | None = getattr(part, "_options", None)
            if own is None or not own.needs_norm:
                continue
            is_same_norm = own.max_grad_norm in (None, options.max_grad_norm)
            if not is_same_norm or own.skip_nonfinite > options.skip_nonfinite:
                raise ValueError(
                    "[MultiOptimizer] max_grad_norm and skip_nonfinite must be given to MultiOptimizer alone, which "
                    f"goes by the norm of all gradients, but got max_grad_norm={own.max_grad_norm}, "
                    f"skip_nonfinite={own.skip_nonfinite} of its {type(part).__name__} beside its own "
                    f"max_grad_norm={options.max_grad_norm}, skip_nonfinite={options.skip_nonfinite}"
                )
            claimed.append(part)
        for part in claimed:
            part.max_grad_norm, part.skip_nonfinite = None, False

    def _applied(self, gradients: Any, parameters: Any, clipping: Clipping | None = None) -> Update:
        """The result of an update, and what takes it back; ``clipping`` replaces that of the options."""
        recorded = dict(self._state)
        undo_parts: list[Callable[[], None]] = []

        def undo() -> None:
            for undo_part in reversed(undo_parts):
                undo_part()
            self._state.clear()
            self._state.update(recorded)

        try:
            is_shared = clipping is not None
            if clipping is None:
                self._claim_norm(self._options)
                leaves = flattened(gradients)
                clipping = clipping_of([x for _, x in leaves], self._options, lambda: _paths(leaves))
            result, undo_all = _applied_parts(self, gradients, parameters, clipping)
            undo_parts.append(undo_all)
            if clipping and not is_shared:
                clipping.record(self._state)
            return result, undo
        except BaseException:
            undo()
            raise


def _applied_parts(optimizer: _MLXMultiOptimizer, gradients: Any, parameters: Any, clipping: Clipping | None) -> Update:
    """Update the parts of any MultiOptimizer; an exception takes all of them back."""
    undo_parts: list[Callable[[], None]] = []

    def undo() -> None:
        for undo_part in reversed(undo_parts):
            undo_part()

    result: Any = {}
    try:
        for part, some in zip(optimizer.optimizers, optimizer._split_dictionary(gradients), strict=True):
            new, undo_part = _applied_part(part, some, parameters, clipping)
            undo_parts.append(undo_part)
            result = tree_merge(result, new)
        return result, undo
    except BaseException:
        undo()
        raise


def _applied_part(part: Any, gradients: Any, parameters: Any, clipping: Clipping | None) -> Update:
    # A subclass or an instance may have its own update, which knows nothing of a clipping from outside.
    update = getattr(part.apply_gradients, "__func__", None)
    is_fused = update is _Fused.apply_gradients and not (clipping and part._has_own_rule)
    if is_fused or update is MultiOptimizer.apply_gradients:
        applied: Update = part._applied(gradients, parameters, clipping)
        return applied
    if update is _MLXMultiOptimizer.apply_gradients:
        return _applied_parts(part, gradients, parameters, clipping)
    return _applied_whole(part, gradients, parameters, clipping)


def _applied_whole(part: Any, gradients: Any, parameters: Any, clipping: Clipping | None) -> Update:
    """Update by an optimizer's own apply_gradients: scale gradients before it, keep or drop its results after it."""
    undo_part = undo_of(part)
    try:
        scaled = tree_map(clipping.scaled, gradients) if clipping else gradients
        if not getattr(part, "_initialized", True):
            _initialize(part, _those_with(scaled, parameters) if isinstance(part, _Fused) else scaled, parameters)
        if clipping is None or clipping.is_applied is None:
            return part.apply_gradients(scaled, parameters), undo_part
        before = tree_map(lambda x: x, part.state)
        new = part.apply_gradients(scaled, parameters)
        _write(part.state, _kept_state(part, before, clipping))
        return tree_map(lambda x, old: _kept(x, old, clipping), new, parameters), undo_part
    except BaseException:
        undo_part()
        raise


def _initialize(part: Any, trained: Any, parameters: Any) -> None:
    """Initialize a part, of any kind, with the parameters that it trains now.

    Raises:
        ValueError: If a file was loaded that has no state of one of them, or one that none of ``parameters`` takes.
    """
    if getattr(part.init, "__func__", None) is _MLXMultiOptimizer.init:
        for inner, some in zip(part.optimizers, part._split_dictionary(trained), strict=True):
            _initialize(inner, some, parameters)
        return
    if isinstance(part, _Fused):
        part._fit_loaded(trained, parameters)
    loaded = None if isinstance(part, (_Fused, _MLXMultiOptimizer)) else vars(part).pop("_loaded", None)
    if loaded is None or loaded[1] is not part.state:
        part.init(trained)
        return

    def reject(got: str, path: str) -> NoReturn:
        raise ValueError(
            f"[{type(part).__name__}] parameters must be those of {loaded[0]} but got {got} {path}; call init with the "
            "file's parameters first, and then with others"
        )

    before = [path for path, _ in flattened(part.state)]
    owned = tuple(f"{path}." for path, _ in flattened(parameters))
    # Beside the parameters' states an optimizer may keep what it likes.
    names = {path.rpartition(".")[2] for path in before if path.startswith(owned)}
    if unused := [x for x in before if "." in x and not x.startswith(owned) and x.rpartition(".")[2] in names]:
        reject("nothing that takes the state there of", min(unused))
    if all(any(x.startswith(f"{path}.") for x in before) for path, _ in flattened(trained)):
        part._initialized = True  # and MLX's init would not take a part of a list
        return
    part.init(trained)
    if lacking := [path for path, _ in flattened(part.state) if path not in before]:
        reject("no state there for", min(lacking))


def _kept_state(part: Any, before: Any, clipping: Clipping) -> Any:
    """The state of a part after an update, or the one before it if the step is skipped."""
    new, old = dict(flattened(part.state)), dict(flattened(before))
    for path in [*new, *old]:
        shapes = [getattr(state.get(path), "shape", ()) for state in (new, old)]
        if path not in new or path not in old or shapes[0] != shapes[1]:
            raise ValueError(
                f"[MultiOptimizer] state of {type(part).__name__} must have the same arrays before and after an update "
                f"for skip_nonfinite but got another at {path}: make it in init_single, or do without skip_nonfinite"
            )
    return tree_map(lambda x, old: _kept(x, old, clipping), part.state, before)


def _kept(new: Any, old: Any, clipping: Clipping) -> Any:
    """A leaf after the update, or the one before it if the step is skipped; in the dtype after it."""
    if new is old or not all(isinstance(x, (mx.array, int, float)) for x in (new, old)):
        return new
    new, old = (x if isinstance(x, mx.array) else mx.array(x) for x in (new, old))
    return clipping.kept(new, old if old.dtype == new.dtype else old.astype(new.dtype))


def undo_of(part: Any) -> Callable[[], None]:
    """What returns an optimizer's attributes and state to those of now."""
    state, attributes = part.state, dict(vars(part))
    before = tree_map(lambda x: x, state)

    def undo() -> None:
        vars(part).clear()
        vars(part).update(attributes)
        _write(state, before)

    return undo


def _write(tree: Any, values: Any) -> Any:
    """Write values of the same structure into a tree's own containers; what is none of them is replaced."""
    if isinstance(tree, dict) and isinstance(values, dict):
        new = {key: _write(tree.get(key), x) for key, x in values.items()}
        tree.clear()
        tree.update(new)
        return tree
    if isinstance(tree, list) and isinstance(values, list):
        tree[:] = [_write(*pair) for pair in zip(tree + [None] * len(values), values, strict=False)]
        return tree
    return values


def with_inner(optimizers: Iterable[Any]) -> Iterator[Any]:
    """Optimizers, each MultiOptimizer followed by its parts."""
    for optimizer in optimizers:
        yield optimizer
        if isinstance(optimizer, _MLXMultiOptimizer):
            yield from with_inner(optimizer.optimizers)


def _any(*_: Any, **__: Any) -> bool:
    return True


def _named(part: Any) -> str:
    has_own = type(part).__repr__ is not object.__repr__  # type: ignore[comparison-overlap]
    return repr(part) if has_own else type(part).__name__


def _paths(leaves: list[tuple[str, Any]]) -> list[str]:
    return [path or "the parameter" for path, _ in leaves]
