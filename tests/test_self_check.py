"""The guard on first use: what an optimizer does where the kernel fails or computes something else than stock."""

import warnings

import mlx.core as mx
import mlx.optimizers as stock
import numpy as np
import pytest

import mlx_fused_adam as fused
from mlx_fused_adam import _backends, _operation, _optimizers

pytestmark = pytest.mark.usefixtures("device")


class Faulty:
    """Stands in for the extension, with another adam_update."""

    def __init__(self, extension, fault):
        self._extension = extension
        self._fault = fault

    def __getattr__(self, name):
        return getattr(self._extension, name)

    def adam_update(self, *args, fused=True, **kwargs):
        results = self._extension.adam_update(*args, fused=fused, **kwargs)
        return self._fault(results) if fused else results


def raise_compile_error(results):
    raise RuntimeError("shader does not compile")


def shift_one_element(results):
    parameters, m, v = results
    return [p + (0.01 if p.shape == (3, 10) else 0) for p in parameters], m, v


def give_nan(results):
    parameters, m, v = results
    return parameters, [x * mx.nan for x in m], v


def fail_when_evaluated(results):
    def bad(x):
        return mx.zeros((3,)) @ mx.zeros((4,))

    return [[bad(x) for x in xs] for xs in results]


@pytest.fixture(params=[raise_compile_error, shift_one_element, give_nan, fail_when_evaluated])
def broken(request, extension, monkeypatch):
    faulty = Faulty(extension, request.param)
    for module in (_backends, _operation, _optimizers):
        monkeypatch.setattr(module, "_ext", faulty)
    return request.param


def test_the_kernel_passes(device):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend = fused.Adam(0.1).backend
    assert backend == {"cpu": "cpu", "gpu": "metal", "emulated": "metal (emulated)"}[device]


def test_a_broken_kernel_leaves_the_work_to_stock(broken):
    """One warning with the reason; results, state and derivatives as if nothing had been replaced."""
    parameters, gradients = {"w": mx.ones((3, 4))}, {"w": mx.full((3, 4), 0.2)}
    optimizer, reference = fused.AdamW(0.1), stock.AdamW(0.1)
    with pytest.warns(RuntimeWarning, match="leaves updates on the .pu to mlx.optimizers"):
        new = optimizer.apply_gradients(gradients, parameters)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            expected = reference.apply_gradients(gradients, parameters)
            assert mx.array_equal(new["w"], expected["w"]).item()
            parameters = new
            new = optimizer.apply_gradients(gradients, parameters)
        assert optimizer.backend.startswith("stock (self-check ")
        if broken is raise_compile_error:
            assert "shader does not compile" in optimizer.backend
        x = mx.ones(3)
        w, m, v = fused.adam_update(x, x, x, x, 0.1)
    np.testing.assert_allclose(np.array(w), 0.9, rtol=1e-6)


def test_the_first_use_may_be_inside_compile():
    optimizer = fused.Adam(0.1)
    state = {"w": mx.ones(3)}
    optimizer.init(state)

    def step(g):
        state.update(optimizer.apply_gradients({"w": g}, state))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mx.compile(step, inputs=[state, optimizer.state], outputs=[state, optimizer.state])(
            mx.ones(3)
        )
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
