"""Cost grows linearly with the number of tensors: counted in graph nodes, edges, calls and bytes, not in seconds."""

import io
import sys

import mlx.core as mx
import pytest

import mlx_fused_adam as fused

pytestmark = pytest.mark.usefixtures("device")

COUNTS = (1, 10, 100, 1000)


def trees(count):
    parameters = {f"layer{i}": {"weight": mx.ones((10,))} for i in range(count)}
    gradients = {f"layer{i}": {"weight": mx.ones((10,))} for i in range(count)}
    return parameters, gradients


def graph_of(results, state) -> str:
    text = io.StringIO()
    mx.export_to_dot(text, *[x["weight"] for x in results.values()], state["step"])
    return text.getvalue()


def measure(count) -> dict[str, int]:
    parameters, gradients = trees(count)
    optimizer = fused.AdamW(1e-3, bias_correction=True)
    optimizer.init(parameters)
    mx.eval(parameters, gradients, optimizer.state)
    assert not optimizer.backend.startswith("stock")  # and the self-check is behind us
    calls = 0

    def count_calls(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count_calls)
    try:
        results = optimizer.apply_gradients(gradients, parameters)
    finally:
        sys.setprofile(None)
    dot = graph_of(results, optimizer.state)
    return {
        "calls": calls,
        "nodes": dot.count('label ="AdamUpdate"'),
        "edges": dot.count("->"),
    }


@pytest.fixture
def per_node(extension) -> int:
    """Small tensors that share a node."""
    is_gpu = mx.default_device().type == mx.gpu
    backend = extension.gpu_backend if is_gpu else extension.cpu_backend
    return backend()[2]


def test_linear_in_the_number_of_tensors(per_node):
    measured = {count: measure(count) for count in COUNTS}
    small, large = measured[100], measured[1000]
    assert large["nodes"] * per_node == 1000 and small["nodes"] * per_node == 100, measured
    for what in ("calls", "edges"):
        assert large[what] <= 10.5 * small[what], f"{what}: {measured}"
        assert measured[1][what] < 100, f"{what}: {measured}"


def test_inputs_of_a_node_are_bounded(per_node):
    """MLX copies a node's inputs to each output, so nodes must stay small however many tensors there are."""
    parameters, gradients = trees(50)
    results = fused.Adam(1e-3).apply_gradients(gradients, parameters)
    dot = graph_of(results, {"step": mx.array(0)})
    assert dot.count('label ="AdamUpdate"') == -(-50 // per_node)


def test_large_tensors_have_nodes_of_their_own():
    parameters = {f"w{i}": mx.ones((70000,)) for i in range(3)}
    results = fused.Adam(1e-3).apply_gradients(parameters, parameters)
    text = io.StringIO()
    mx.export_to_dot(text, *results.values())
    assert text.getvalue().count('label ="AdamUpdate"') == 3
