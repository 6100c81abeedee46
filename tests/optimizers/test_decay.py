"""Weight decay for some parameters: chosen by a callable, or by regular expressions on the path."""

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_fused_adam as fused
from support.arrays import assert_same_bits, random
from support.training import train

pytestmark = pytest.mark.usefixtures("device")

SETTINGS = dict(learning_rate=1e-2, weight_decay=0.3, bias_correction=True)


def tree(rng, dtype=mx.float32):
    return {
        "embed": {"weight": random(rng, (20, 8), dtype)},
        "layers": [
            {"linear": {"weight": random(rng, (8, 9), dtype), "bias": random(rng, (9,), dtype)},
             "norm": {"weight": random(rng, (9,), dtype)}}
            for _ in range(3)
        ],
        "large": random(rng, (300, 301), dtype),
    }  # fmt: skip


def trained(parameters, gradients, **options):
    """AdamW's parameters after these steps, by path."""
    return dict(tree_flatten(train(fused.AdamW(**SETTINGS | options), parameters, gradients)))


FILTERS = {
    "callable": lambda path, x: x.ndim > 1 and "embed" not in path,
    "expressions": [r"linear\.weight$", "^large$"],
    "expression": r"^(?!.*(norm|bias|embed))",
}
DECAYED = ["layers.0.linear.weight", "layers.1.linear.weight", "layers.2.linear.weight", "large"]


@pytest.mark.parametrize("name", FILTERS)
def test_decay_applies_to_what_the_filter_says(name):
    """Each parameter is that of AdamW or of Adam, bit for bit."""
    rng = np.random.default_rng(0)
    parameters, gradients = tree(rng), [tree(rng) for _ in range(3)]
    found = trained(parameters, gradients, decay_filter=FILTERS[name])
    optimizer = fused.AdamW(**SETTINGS, decay_filter=FILTERS[name])
    assert optimizer.decayed(parameters) == DECAYED
    with_decay = trained(parameters, gradients)
    without = trained(parameters, gradients, weight_decay=0.0)
    for path, x in found.items():
        expected = with_decay if path in DECAYED else without
        assert mx.array_equal(x, expected[path]), path
        assert not mx.array_equal(with_decay[path], without[path]), path


@pytest.mark.parametrize("options", [{}, {"stochastic_rounding": True}, {"state_dtype": "int8"},
                                     {"state_dtype": "int4"}, {"master_weights": True}], ids=str)  # fmt: skip
def test_a_filter_changes_no_random_bit(options):
    rng = np.random.default_rng(1)
    parameters, gradients = tree(rng, mx.bfloat16), [tree(rng, mx.bfloat16) for _ in range(2)]
    found = trained(parameters, gradients, **options, decay_filter="large")
    without = trained(parameters, gradients, **options | {"weight_decay": 0.0})
    with_decay = trained(parameters, gradients, **options)
    for path, x in found.items():
        assert mx.array_equal(x, (with_decay if path == "large" else without)[path]), path


@pytest.mark.cpu_only
def test_parameters_that_fall_back_obey_too():
    parameters = {"a": mx.ones(3, mx.float64), "b": mx.ones(3, mx.float64)}
    gradients = {k: x * 0 for k, x in parameters.items()}
    new = fused.AdamW(**SETTINGS, decay_filter="a").apply_gradients(gradients, parameters)
    mx.eval(new)
    assert mx.all(new["a"] < 1) and mx.all(new["b"] == 1)


@pytest.mark.cpu_only
def test_a_filter_reads_the_paths_of_a_tree_whose_leaves_part():
    """Some fall back, some do not; each is asked for by its own path."""
    dtypes = {"a": mx.float64, "b": mx.float32, "c": mx.bfloat16, "d": mx.float64, "e": mx.float32}
    parameters = {k: mx.ones(3, dtype) for k, dtype in dtypes.items()}
    for wanted in dtypes:
        asked = {}
        optimizer = fused.AdamW(
            **SETTINGS, decay_filter=lambda path, x, w=wanted, a=asked: (a.update({path: x.dtype}), path == w)[1]
        )
        new = optimizer.apply_gradients({k: x * 0 for k, x in parameters.items()}, parameters)
        mx.eval(new)
        assert [k for k, x in new.items() if mx.all(x < 1)] == [wanted]
        assert asked == dtypes


def test_compiled_steps_obey(has_exact_scalars):
    settings = SETTINGS | {"bias_correction": has_exact_scalars}
    rng = np.random.default_rng(2)
    start, gradients = tree(rng), [tree(rng) for _ in range(3)]
    expected, found = (
        train(fused.AdamW(**settings, decay_filter="weight"), start, gradients, is_compiled)
        for is_compiled in (False, True)
    )
    assert_same_bits(found, expected)


def test_a_callable_is_asked_once_for_each_path():
    asked = []
    optimizer = fused.AdamW(**SETTINGS, decay_filter=lambda path, x: bool(asked.append(path)))
    rng = np.random.default_rng(3)
    parameters = tree(rng)
    train(optimizer, parameters, [tree(rng) for _ in range(3)])
    assert sorted(asked) == sorted(path for path, _ in tree_flatten(parameters))


def test_an_expression_that_matches_nothing_is_told_once():
    """It is misspelt, or what it is for is frozen."""
    parameters = tree(np.random.default_rng(4))
    message = r"\[AdamW\] decay_filter 'lienar' matches none of the parameters' paths: embed.weight, "
    for by_init in (True, False):
        optimizer = fused.AdamW(**SETTINGS, decay_filter=["weight", "lienar"])
        with pytest.warns(UserWarning, match=message) as told:
            optimizer.init(parameters) if by_init else optimizer.apply_gradients(parameters, parameters)
            optimizer.init(parameters)
        assert len(told) == 1


def test_what_an_earlier_init_has_seen_is_matched_too(recwarn):
    """Parameters that are frozen by now, or trained in a later stage."""
    parameters = tree(np.random.default_rng(5))
    optimizer = fused.AdamW(**SETTINGS, decay_filter="embed")
    optimizer.init(parameters)
    optimizer.init({"large": parameters["large"]})
    assert not [x for x in recwarn if "matches none" in str(x.message)]


def test_adam_has_no_decay_to_filter():
    with pytest.raises(TypeError, match="decay_filter"):
        fused.Adam(1e-3, decay_filter="weight")
    assert fused.AdamW(1e-3).decayed({"a": mx.ones(3)}) == ["a"]
    assert not hasattr(optim.AdamW(1e-3), "decayed")
