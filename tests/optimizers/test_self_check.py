"""The self-check on first use: an optimizer falls back where a kernel fails or computes something else than
mlx.optimizers.
"""

import threading
import time
import warnings

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

import mlx_fused_adam as fused
from mlx_fused_adam import _backends, _clipping, _operation, _self_check, _step
from support.extension import use_extension
from support.mlx_release import errors_in_tasks_are_raised, since_mlx
from support.processes import run_python

pytestmark = pytest.mark.usefixtures("device", "unchecked")


@pytest.fixture
def unchecked(device, monkeypatch):
    """Nothing has been checked yet."""
    monkeypatch.setattr(_backends, "_known", {})


class Faulty:
    """Stands in for the extension: results of its kernels pass through a fault, those of the fallback do not."""

    def __init__(self, extension, fault):
        self._extension = extension
        self._fault = fault

    def __getattr__(self, name):
        return getattr(self._extension, name)

    def AdamStep(self, learning_rate, step=None, **kwargs):
        self._step = 0 if step is None else step.item(), kwargs.get("wide_indices", False)
        kwargs |= getattr(self._fault, "settings", {})
        return self._extension.AdamStep(learning_rate, step, **kwargs)

    def adam_update(self, *args, uses_kernel, **kwargs):
        answers = []

        def ask(*dtypes):
            answers.append(uses_kernel(*dtypes))
            return answers[-1]

        parameters, states = self._extension.adam_update(*args, uses_kernel=ask, **kwargs)
        if not any(answers):
            return parameters, states
        moments = ([state[name] for state in states] for name in ("m", "v"))
        parameters, *moments = self._fault([parameters, *moments], *self._step)
        spoiled = getattr(self._fault, "of_state", lambda state: state)
        states = [spoiled(state | {"m": m, "v": v}) for state, m, v in zip(states, *moments, strict=True)]
        return parameters, states


def install(monkeypatch, extension, fault):
    use_extension(monkeypatch, Faulty(extension, fault))


def raise_compile_error(results, step, wide):
    raise RuntimeError("shader does not compile")


def shift(results, where):
    """The last element of the parameters of these shapes, moved a little."""
    parameters, m, v = results

    def shifted(p):
        at = mx.arange(p.size).reshape(p.shape) == p.size - 1
        return mx.where(at, p + 0.01, p).astype(p.dtype) if where(p) else p

    return [shifted(p) for p in parameters], m, v


def give_nan(results, step, wide):
    parameters, m, v = results
    return parameters, [x * mx.nan for x in m], v


def fail_when_evaluated(results, step, wide):
    def bad(x):
        return mx.zeros((3,)) @ mx.zeros((4,))

    return [[bad(x) for x in xs] for xs in results]


FAULTS = {
    "does not compile": raise_compile_error,
    "NaN": give_nan,
    "fails when evaluated": fail_when_evaluated,
    "linear": lambda r, step, wide: shift(r, lambda p: p.shape == (70001,)),
    "group, not aligned": lambda r, step, wide: shift(r, lambda p: p.shape == (599,)),
    "column-major": lambda r, step, wide: shift(r, lambda p: p.shape == (170, 150)),
    "strided": lambda r, step, wide: shift(r, lambda p: p.shape == (130, 70) and not wide),
    "64-bit indices": lambda r, step, wide: shift(r, lambda p: wide),
    "second step": lambda r, step, wide: shift(r, lambda p: step == 4),
}


@pytest.mark.parametrize("lost", ["gradient_scale", "is_applied"])
def test_a_kernel_that_ignores_clipping_or_skipping_fails(extension, monkeypatch, lost):
    def fault(results, step, wide):
        return results

    fault.settings = {lost: None}
    faulty = Faulty(extension, fault)
    assert "kernel is off by" in _self_check.run(faulty, mx.default_device().type, (mx.float32,) * 3)


class Inexact(Faulty):
    """Multiplies the last element of one of the results (0: parameters, 1: m, 2: v) in steps with some settings."""

    def __init__(self, extension, which, factor, where=lambda settings: True):
        super().__init__(extension, self._spoil)
        self._which, self._factor, self._where = which, factor, where

    def AdamStep(self, learning_rate, step=None, **kwargs):
        self._is_wrong = self._where(kwargs)
        return super().AdamStep(learning_rate, step, **kwargs)

    def _spoil(self, results, step, wide):
        if self._is_wrong:
            results[self._which] = [self._spoilt(x) for x in results[self._which]]
        return results

    def _spoilt(self, x):
        factors = mx.where(mx.arange(x.size).reshape(x.shape) == x.size - 1, self._factor, 1.0)
        return (x.astype(mx.float32) * factors).astype(x.dtype)


def verdict(extension, *dtypes, rounding="nearest"):
    return _self_check.run(extension, mx.default_device().type, dtypes, rounding)


RESULTS = ("parameter", "m", "v")


@pytest.mark.parametrize("which", range(3), ids=RESULTS)
def test_a_skipped_step_that_changes_one_array_fails(extension, which):
    faulty = Inexact(extension, which, 0.5, lambda settings: settings["is_applied"] is not None)
    assert "linear, skipped kernel is off by inf" in verdict(faulty, *[mx.float32] * 3)


STOCHASTIC = [((mx.bfloat16,) * 3, (0, 2)), ((mx.float32, mx.float32, mx.bfloat16), (2,)),
    ((mx.float16, mx.float32, mx.float32), (0,)), ((mx.bfloat16, mx.bfloat16, mx.int8), (0, 1, 2))]  # fmt: skip


@pytest.mark.parametrize(
    ("dtypes", "which"), [(dtypes, i) for dtypes, some in STOCHASTIC for i in some], ids=lambda x: str(x)[-30:]
)
def test_stochastic_rounding_that_is_wrong_fails(extension, dtypes, which):
    """Where nothing else is."""
    faulty = Inexact(extension, which, 0.5, lambda settings: settings["rounding"] == "parameter_and_v")
    assert verdict(faulty, *dtypes) is None
    assert "linear, stochastic kernel is off by" in verdict(faulty, *dtypes, rounding="parameter_and_v")


@pytest.mark.parametrize("which", range(3), ids=RESULTS)
def test_stochastic_rounding_of_m_that_is_wrong_fails(extension, which):
    faulty = Inexact(extension, which, 0.5, lambda settings: settings["rounding"] == "all")
    assert "linear, stochastic m kernel is off by" in verdict(faulty, *[mx.bfloat16] * 3, rounding="all")


@pytest.mark.parametrize("kernel", ["group", "column-major"])
def test_one_kernel_that_ignores_clipping_fails(extension, kernel):
    class Faulty:
        def __getattr__(self, name):
            return getattr(extension, name)

        def AdamStep(self, *args, gradient_scale, **kwargs):
            self._unclipped = extension.AdamStep(*args, **kwargs)
            return extension.AdamStep(*args, gradient_scale=gradient_scale, **kwargs)

        def adam_update(self, parameters, gradients, states, step, **kwargs):
            met = "group" if len(parameters) > 1 else "column-major" if parameters[0].shape == (170, 150) else ""
            step = self._unclipped if met == kernel else step
            return extension.adam_update(parameters, gradients, states, step, **kwargs)

    assert f"self-check of the {kernel} kernel is off by" in verdict(Faulty(), *[mx.float32] * 3)


# Errors just beyond what rounding explains.
@pytest.mark.parametrize("which", range(3), ids=RESULTS)
@pytest.mark.parametrize(("dtype", "error"), [(mx.float32, 1.7e-5), (mx.bfloat16, 0.01), (mx.float16, 0.0025)], ids=str)
def test_small_errors_fail(extension, dtype, error, which):
    assert "linear kernel is off by" in verdict(Inexact(extension, which, 1 + error), *[dtype] * 3)


@pytest.mark.parametrize("which", range(3), ids=RESULTS)
@pytest.mark.parametrize(("state", "factors"), [(mx.float32, (2, 1, 1)), (mx.bfloat16, (2, 1, 2))], ids=str)
def test_stochastic_rounding_doubles_the_allowance_of_what_it_rounds(extension, state, factors, which):
    """And of nothing else."""
    error = 2.5 * _self_check.TOLERANCE[state if which else mx.bfloat16]
    dtypes = mx.bfloat16, mx.bfloat16, state
    assert "off by" in verdict(Inexact(extension, which, 1 + error), *dtypes, rounding="parameter_and_v")
    tensor = _self_check._tensor(extension, dtypes, mx.ones(40, mx.bfloat16))
    exact, rounded = (tensor.tolerances(rounding) for rounding in ("nearest", "parameter_and_v"))
    assert rounded[which] == factors[which] * exact[which]


def finite_at(index, gradients, total):
    """The total without such an element of the second gradient that is not finite."""
    element = gradients[len(gradients) > 1].reshape(-1)[index]
    return mx.where(mx.isfinite(element), total, 1.0)


def most_negative(gradients):
    return mx.min(mx.stack([mx.min(g) for g in gradients if g.size]))


NORM_FAULTS = {
    "raises": lambda gradients, total: 1 / 0,
    "last gradient left out": lambda gradients, total: total - gradients[-1].square().sum(),
    "NaN not seen": lambda gradients, total: mx.where(mx.isnan(total), 1.0, total),
    "infinity not seen": lambda gradients, total: mx.where(mx.isinf(total), 1.0, total),
    "first element not looked at": lambda gradients, total: finite_at(0, gradients, total),
    "last element not looked at": lambda gradients, total: finite_at(-1, gradients, total),
    "-infinity not seen": lambda gradients, total: mx.where(most_negative(gradients) == -mx.inf, 1.0, total),
    "off by 2e-5": lambda gradients, total: total * (1 + 2e-5),
    "NaN": lambda gradients, total: total * mx.nan,
}


@pytest.mark.parametrize("name", NORM_FAULTS)
def test_a_broken_norm_falls_back(extension, backend_name, monkeypatch, name):
    """And updates to their kernel: with a warning, the right norm, and a skipped step where there should be one."""

    class FaultyNorm(Faulty):
        def sum_of_squares(self, gradients, *, uses_kernel, **kwargs):
            answers = []

            def ask(dtype):
                answers.append(uses_kernel(dtype))
                return answers[-1]

            total = self._extension.sum_of_squares(gradients, uses_kernel=ask, **kwargs)
            return NORM_FAULTS[name](gradients, total) if any(answers) else total

    use_extension(monkeypatch, FaultyNorm(extension, lambda results, step, wide: results))
    parameters, gradients = {"w": mx.ones(4)}, {"w": mx.full((4,), 3.0)}
    optimizer = fused.AdamW(0.1, max_grad_norm=1.0, skip_nonfinite=True)
    with pytest.warns(RuntimeWarning, match="norms of float32 gradients on the"):
        parameters = optimizer.apply_gradients(gradients, parameters)
    assert optimizer.state["grad_norm"].item() == 6
    optimizer.apply_gradients({"w": mx.full((4,), mx.inf)}, parameters)
    assert optimizer.state["skipped"].item() == 1
    assert optimizer.backend.startswith(f"{backend_name} (but stock for norms of float32")


@pytest.fixture(params=FAULTS)
def broken(request, extension, monkeypatch):
    install(monkeypatch, extension, FAULTS[request.param])
    return request.param


def test_the_kernel_passes(backend_name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend = fused.Adam(0.1).backend
    assert backend == backend_name


@pytest.mark.parametrize("dtypes", [
    (mx.float32, mx.bfloat16, mx.float32), (mx.bfloat16,) * 3, (mx.float16, mx.float16, mx.bfloat16),
    (mx.float32, mx.float32, mx.int8), (mx.bfloat16, mx.bfloat16, mx.int8),
    (mx.float32, mx.float32, mx.uint8), (mx.bfloat16, mx.float16, mx.uint8, mx.int8),
    (mx.bfloat16, mx.bfloat16, mx.bfloat16, mx.int16), (mx.bfloat16, mx.float32, mx.int8, mx.int16),
    (mx.bfloat16, mx.bfloat16, mx.float32, mx.int8), (mx.bfloat16, mx.bfloat16, mx.int8, mx.int8),
], ids=_self_check.names)  # fmt: skip
@pytest.mark.parametrize("rounding", ["nearest", "parameter_and_v", "all"])
def test_kernels_pass_in_16_bits(extension, dtypes, rounding):
    assert verdict(extension, *dtypes, rounding=rounding) is None


# Dtypes, and what is left of the requests "parameter_and_v" and "all" for them.
ASKED = [
    ((mx.float32, mx.bfloat16, mx.float32), "nearest", "nearest"),
    ((mx.bfloat16, mx.bfloat16, mx.float32, mx.int16), "nearest", "nearest"),
    ((mx.bfloat16, mx.bfloat16, mx.float32, mx.int8), "parameter_and_v", "parameter_and_v"),
    ((mx.float32, mx.float32, mx.int8), "parameter_and_v", "parameter_and_v"),
    ((mx.float32, mx.float32, mx.bfloat16), "parameter_and_v", "all"),
]


@pytest.mark.parametrize(("dtypes", "v", "every"), ASKED, ids=str)
def test_rounding_that_rounds_the_same_is_checked_once(extension, dtypes, v, every):
    tensor = _self_check._tensor(extension, dtypes, mx.ones((3, 32), dtypes[1]))
    asked = []
    for rounding in ("nearest", "parameter_and_v", "all"):
        step = extension.AdamStep(mx.array(0.1), mx.array(1, mx.uint64), rounding=rounding)
        lists = ([x] for x in tensor)
        extension.adam_update(*lists, step, uses_kernel=lambda *key: asked.append(key) or True, name=str)
    remainder = dtypes[3] if len(dtypes) > 3 else None
    assert asked == [(*dtypes[:3], remainder, rounding) for rounding in ("nearest", v, every)]


def test_a_broken_kernel_falls_back(broken):
    """One warning with the reason; results, state and derivatives as if nothing had been replaced."""
    parameters, gradients = {"w": mx.ones((3, 4))}, {"w": mx.full((3, 4), 0.2)}
    optimizer, reference = fused.AdamW(0.1), optim.AdamW(0.1)
    with pytest.warns(RuntimeWarning, match="updates of float32 on the .pu fall back to mlx.optimizers"):
        new = optimizer.apply_gradients(gradients, parameters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            expected = reference.apply_gradients(gradients, parameters)
            assert mx.array_equal(new["w"], expected["w"]).item()
            parameters = new
            new = optimizer.apply_gradients(gradients, parameters)
        assert optimizer.backend.startswith("stock (self-check ")
        (reason,) = _backends.reasons()
        assert reason.startswith(f"{mx.default_device().type.name}: self-check ")
        if broken == "does not compile":
            assert "shader does not compile" in optimizer.backend
        x = mx.ones(3)
        w, m, v = fused.adam_update(x, x, x, x, 0.1)
    np.testing.assert_allclose(np.array(w), 0.9, rtol=1e-6)


def test_only_the_dtypes_that_fail_fall_back(extension, backend_name, monkeypatch):
    """As on a GPU without bfloat: float32 still runs fused, in the same tree."""

    def no_bfloat(results, step, wide):
        if any(x.dtype == mx.bfloat16 for x in results[0]):
            raise RuntimeError("unknown type name 'bfloat'")
        return results

    install(monkeypatch, extension, no_bfloat)
    optimizer = fused.AdamW(0.1)
    parameters = {"half": mx.ones(5, mx.bfloat16), "single": mx.ones(5)}
    optimizer.init(parameters)
    gradients = {k: mx.full((5,), 0.25, p.dtype) for k, p in parameters.items()}
    assert optimizer.backend == backend_name
    with pytest.warns(RuntimeWarning, match="updates of bfloat16 on the"):
        # Asked apart, since the stand-in spoils all of a call.
        half = optimizer.apply_gradients({"half": gradients["half"]}, parameters)
    backend = _backends.backend_of()
    assert backend.check((mx.bfloat16,) * 3, "parameter_and_v") and backend.uses_kernel(*[mx.float32] * 3)
    assert optimizer.backend.startswith(f"{backend_name} (but stock for bfloat16: self-check")
    monkeypatch.undo()
    assert half["half"].dtype == optimizer.state["half"]["v"].dtype == mx.bfloat16
    # 0.9, to bfloat16's nearest: the update of 16-bit tensors is float32 arithmetic without a kernel too.
    np.testing.assert_allclose(np.array(half["half"].astype(mx.float32)), 0.6836, atol=2e-3)


def lose(name):
    """Set one auxiliary array of each state to zeros."""

    def fault(results, step, wide):
        return results

    fault.of_state = lambda state: state | {name: state[name] * 0}
    return fault


@pytest.mark.parametrize(("remainder", "m"), [(mx.int16, mx.int8), (mx.int8, mx.int8), (mx.int8, mx.uint8)], ids=str)
@pytest.mark.parametrize("name", ["remainder", "m_scale", "v_scale"])
def test_a_kernel_that_stores_scales_or_corrections_wrongly_fails(extension, name, m, remainder):
    dtypes = (mx.bfloat16, mx.bfloat16, m, remainder)
    faulty = Faulty(extension, lose(name))
    assert "kernel is off by" in _self_check.run(faulty, mx.default_device().type, dtypes)


OPTIONS = [
    {"state_dtype": "int8"},
    {"state_dtype": "int4"},
    {"master_weights": True},
    {"master_weights": True, "master_weight_bits": 24},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_mlx_cannot_store_falls_back_to_the_cpu(monkeypatch, options):
    """As on a GPU whose kernel for it fails; the stand-in is a back end of another name."""
    parameters = {"w": mx.ones((64, 64), mx.bfloat16)}
    gradients = {"w": mx.full((64, 64), 0.25, mx.bfloat16)}
    expected = fused.AdamW(0.1, **options).apply_gradients(gradients, parameters)
    gpu = _backends.Backend("metal", None, mx.gpu)
    gpu.place = lambda asked: asked
    monkeypatch.setattr(_step, "backend_of", lambda: gpu)
    find = _backends.Backend._find
    monkeypatch.setattr(_self_check, "run", lambda ext, kind, *_: "it is broken" if kind == mx.gpu else None)
    monkeypatch.setattr(_backends.Backend, "_find", find)
    optimizer = fused.AdamW(0.1, **options)
    with pytest.warns(RuntimeWarning, match="updates of bfloat16 .* fall back to the CPU: it is broken"):
        new = optimizer.apply_gradients(gradients, parameters)
    assert mx.array_equal(new["w"], expected["w"])
    gpu.verdicts[(mx.float32,) * 3, "nearest"] = None
    assert gpu.description.startswith("metal (but the CPU for bfloat16 ")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_no_device_can_store_is_an_error(monkeypatch, options):
    """The CPU is checked before tensors of a GPU fall back to it."""
    gpu = _backends.Backend("metal", None, mx.gpu)
    gpu.place = lambda asked: asked
    monkeypatch.setattr(_step, "backend_of", lambda: gpu)
    monkeypatch.setattr(_self_check, "run", lambda ext, kind, *_: f"it is broken on the {kind.name}")
    parameters = {"w": mx.ones((64, 64), mx.bfloat16)}
    optimizer = fused.AdamW(0.1, **options)
    with (
        pytest.warns(RuntimeWarning, match="fall back to the CPU: it is broken on the gpu"),
        pytest.raises(RuntimeError, match="must have a kernel, .* but got: it is broken on the cpu"),
    ):
        optimizer.apply_gradients(parameters, parameters)
    assert optimizer.step.item() == 0


@errors_in_tasks_are_raised
def test_a_check_that_failed_leaves_no_error_to_the_next(extension, device, monkeypatch):
    if device == "gpu":
        pytest.skip("MLX factorizes matrices on the CPU only")

    class Failing(Faulty):
        def sum_of_squares(self, gradients, **kwargs):
            # The task fails once async_eval has returned, which would else raise its error itself.
            slow = mx.ones((500, 500))
            mx.async_eval(mx.linalg.inv((slow @ slow)[:3, :3] * 0))
            raise RuntimeError("broken")

    monkeypatch.setattr(_self_check, "_streams", {})
    assert verdict(Failing(extension, None), mx.float32) == "self-check failed: broken"
    assert verdict(extension, mx.float32) is None


def test_the_description_says_what_has_no_kernel():
    backend = _backends.Backend("cpu", None, mx.cpu)
    verdicts = {(mx.float32,) * 3: None, (mx.float32, mx.float32, mx.int8): "it is broken"}
    backend.verdicts = {(dtypes, "nearest"): verdict for dtypes, verdict in verdicts.items()}
    what = "float32 with float32 gradients and int8 moments"
    assert backend.description == f"cpu (but no kernel for {what}: it is broken)"
    backend.verdicts |= {((mx.bfloat16,) * 3, rounding): "it is, too" for rounding in ("nearest", "all")}
    assert backend.description == f"cpu (but stock for bfloat16 and no kernel for {what}: it is broken)"


def test_what_is_known_of_the_back_end_is_what_has_been_checked(backend_name, monkeypatch):
    """Of any dtypes: nothing else is compiled to answer."""
    assert _backends.known_backend() is None
    backend = _backends.backend_of()
    assert backend.uses_norm_kernel(mx.float32) and _backends.known_backend() is None
    assert backend.uses_kernel(*[mx.bfloat16] * 3)
    assert fused.Adam(0.1).backend == _backends.known_backend() == backend_name
    assert list(backend.verdicts) == [((mx.float32,), "nearest"), ((mx.bfloat16,) * 3, "nearest")]
    monkeypatch.setattr(_backends, "_known", {})
    assert fused.Adam(0.1).backend == backend_name
    assert list(_backends.backend_of().verdicts) == [((mx.float32,) * 3, "nearest")]
    stock = _backends.Backend(None, "as asked", mx.cpu)
    monkeypatch.setattr(_backends, "_known", {mx.default_device().type: stock})
    assert _backends.known_backend() == "stock (as asked)"


def run_in_threads(function, count=4):
    """The results of as many calls that begin together."""
    barrier = threading.Barrier(count)
    results = []

    def call():
        barrier.wait()
        results.append(function())

    threads = [threading.Thread(target=call) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_threads_share_one_check(monkeypatch):
    calls = []

    def check(extension, kind, dtypes, rounding):
        calls.append(dtypes)
        time.sleep(0.2)

    monkeypatch.setattr(_self_check, "run", check)
    backend = _backends.Backend("cpu", None, mx.cpu)
    assert run_in_threads(lambda: backend.uses_kernel(*[mx.float32] * 3)) == [True] * 4
    assert calls == [(mx.float32,) * 3]


def test_threads_share_one_back_end(monkeypatch):
    def slow(kind):
        time.sleep(0.1)
        return "cpu", None

    monkeypatch.setattr(_backends, "kernel_of", slow)
    found = run_in_threads(lambda: _backends.backend_of(mx.cpu))
    assert len(found) == 4 and len(set(map(id, found))) == 1


def test_updates_and_norms_run_where_the_back_end_says(extension, monkeypatch):
    """As a forced one does, which may be another device's."""
    asked = []
    backend = _backends.Backend("cpu", None, mx.cpu, is_forced=True)
    monkeypatch.setattr(backend, "place", lambda place: asked.append(place) or mx.cpu)
    for module in (_step, _clipping, _operation):
        monkeypatch.setattr(module, "backend_of", lambda place=None: backend)
    places = []

    class Watched(Faulty):
        def sum_of_squares(self, gradients, *, stream, **kwargs):
            places.append(stream)
            return self._extension.sum_of_squares(gradients, stream=stream, **kwargs)

        def adam_update(self, *args, stream=None, **kwargs):
            places.append(stream)
            return self._extension.adam_update(*args, stream=stream, **kwargs)

    backend.verdicts = {((mx.float32,) * 3, "nearest"): None, ((mx.float32,), "nearest"): None}
    use_extension(monkeypatch, Watched(extension, None))
    x = mx.ones(3)
    fused.AdamW(0.1, max_grad_norm=1.0).apply_gradients({"w": x}, {"w": x})
    fused.adam_update(x, x, x, x, 0.1, stream=mx.cpu)
    assert places == [mx.cpu] * 3 and asked == [None, None, mx.cpu]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_mlx_cannot_store_is_an_error_where_the_fallback_is_forced(monkeypatch, options):
    forced = _backends.Backend(None, "MLX_FUSED_ADAM_BACKEND=stock", mx.cpu, is_forced=True)
    monkeypatch.setattr(_step, "backend_of", lambda: forced)
    parameters = {"w": mx.ones((64, 64), mx.bfloat16)}
    optimizer = fused.AdamW(0.1, **options)
    with pytest.raises(RuntimeError, match="must have a kernel, since MLX's operations cannot store"):
        optimizer.apply_gradients(parameters, parameters)
    assert optimizer.step.item() == 0
    assert fused.AdamW(0.1).apply_gradients(parameters, parameters)["w"].dtype == mx.bfloat16


def test_classes_put_in_the_place_of_mlx_s_are_not_the_reference(monkeypatch):
    monkeypatch.setattr(optim, "Adam", fused.Adam)
    monkeypatch.setattr(optim, "AdamW", fused.AdamW)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = optim.AdamW(0.1)
        new = optimizer.apply_gradients({"w": mx.ones(3)}, {"w": mx.ones(3)})
    assert mx.all(new["w"] < 1).item() and not optimizer.backend.startswith("stock")


PROGRAM = """
import warnings
warnings.simplefilter("error")
import mlx.core as mx
import mlx_fused_adam as fused
"""
USERS_ERROR = """
mx.set_default_device(mx.cpu)
slow = mx.ones((500, 500))
mx.eval(slow)
# The error comes once async_eval has returned, which would else raise it itself.
bad = mx.linalg.inv((slow @ slow)[:3, :3] * 0)
mx.async_eval(bad)
import time
time.sleep(2)
print(fused.Adam(0.1).backend)
try:
    mx.synchronize()
except RuntimeError as error:
    print("LU factorization failed" in str(error))
"""


def run(program, **environment):
    return run_python("-c", PROGRAM + program, timeout=120, **environment)


@since_mlx("0.32.2", "mx.synchronize raises what a task of the CPU has thrown")
def test_an_earlier_error_of_the_user_is_left_to_the_user(device):
    """It is no fault of the kernel's, and whoever waits for that work is told."""
    if device == "gpu":
        pytest.skip("MLX factorizes matrices on the CPU only")
    result = run(USERS_ERROR)
    assert (result.returncode, result.stdout.split("\n")[1]) == (0, "True"), result.stderr
    assert not result.stdout.startswith("stock")


UPDATE = """
optimizer = fused.AdamW(0.1)
new = optimizer.apply_gradients({"w": mx.full((4,), 0.2)}, {"w": mx.ones(4)})
print(optimizer.backend, new["w"].tolist())
"""


def test_the_environment_forces_the_fallback():
    result = run(UPDATE, MLX_FUSED_ADAM_BACKEND="stock")
    assert result.returncode == 0, result.stderr  # and no warning
    expected = optim.AdamW(0.1).apply_gradients({"w": mx.full((4,), 0.2)}, {"w": mx.ones(4)})
    assert result.stdout.startswith("stock (MLX_FUSED_ADAM_BACKEND=stock)")
    assert str(expected["w"].tolist()) in result.stdout


def test_a_forced_fallback_runs_where_it_is_asked_to():
    backend = _backends.Backend(None, "forced", mx.gpu, is_forced=True)
    assert backend.place(mx.cpu) == mx.cpu and backend.place(None) is None
    assert _backends.Backend("cpu", None, mx.cpu, is_forced=True).place(mx.gpu) == mx.cpu


@pytest.mark.parametrize("asked", ["cpu", "metal"])
def test_the_environment_forces_a_back_end(asked):
    result = run(UPDATE, MLX_FUSED_ADAM_BACKEND=asked)
    name = run("print(fused.Adam(0.1).backend)").stdout.strip()
    if asked == name.split()[0] or (asked == "cpu" and mx.is_available(mx.gpu)):
        assert result.returncode == 0 and result.stdout.startswith(asked), result.stderr
    else:
        assert result.returncode != 0
        assert "[MLX_FUSED_ADAM_BACKEND] must be one of stock, " in result.stderr


def test_an_unknown_back_end_is_an_error_at_import():
    result = run("", MLX_FUSED_ADAM_BACKEND="cuda")
    assert result.returncode != 0
    assert "MLX_FUSED_ADAM_BACKEND] must be one of stock, " in result.stderr
    assert "but got 'cuda'" in result.stderr


def test_a_forced_back_end_does_not_fall_back(extension, monkeypatch, backend_name):
    install(monkeypatch, extension, give_nan)
    monkeypatch.setenv("MLX_FUSED_ADAM_BACKEND", backend_name.split()[0])
    parameters = {"w": mx.ones(3)}
    optimizer = fused.Adam(0.1)
    optimizer.init(parameters)
    with pytest.raises(RuntimeError, match="is forced but its self-check of the linear kernel"):
        optimizer.apply_gradients({"w": mx.ones(3)}, parameters)
    assert optimizer.step.item() == 0


def test_the_first_use_may_be_inside_compile():
    optimizer = fused.Adam(0.1)
    state = {"w": mx.ones(3)}
    optimizer.init(state)

    def step(g):
        state.update(optimizer.apply_gradients({"w": g}, state))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mx.compile(step, inputs=[state, optimizer.state], outputs=[state, optimizer.state])(mx.ones(3))
    assert not optimizer.backend.startswith("stock")
    assert mx.all(state["w"] < 1).item()


def test_the_first_use_may_be_inside_grad():
    def f(x):
        return fused.adam_update(x, x, mx.zeros(3), mx.zeros(3), 0.1)[0].sum()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mx.grad(f)(mx.ones(3)).shape == (3,)


def test_the_first_use_may_be_inside_vmap():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f = mx.vmap(lambda x: fused.adam_update(x, x, x, x, 0.1)[0])
        assert f(mx.ones((2, 3))).shape == (2, 3)
