"""Optimizers to save and load: a small tree, its training, and loads that must be rejected and change nothing."""

import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_fused_adam as fused

SETTINGS = dict(learning_rate=1e-2, weight_decay=0.1, bias_correction=True)
OPTIONS = {
    "plain": {},
    "bfloat16 state": {"state_dtype": "bfloat16", "seed": 2**64 - 1},
    "int8": {"state_dtype": "int8"},
    "master": {"master_weights": True, "stochastic_rounding": True},
    "master int8": {"master_weights": True, "state_dtype": "int8"},
    "filter": {"decay_filter": ["b", "^a"]},
}


def random(rng, shape, dtype=mx.bfloat16):
    return mx.array(rng.normal(size=shape).astype(np.float32)).astype(dtype)


def tree(seed: int = 0):
    rng = np.random.default_rng(seed)
    return {"a": {"w": random(rng, (64, 70))}, "b": [random(rng, (9,)), random(rng, ())]}


def train(optimizer, parameters, seeds):
    for seed in seeds:
        parameters = optimizer.apply_gradients(tree(seed), parameters)
        mx.eval(parameters, optimizer.state)
    return parameters


def assert_equal_trees(a, b):
    found, expected = dict(tree_flatten(a)), dict(tree_flatten(b))
    assert found.keys() == expected.keys()
    for path, x in expected.items():
        assert found[path].dtype == x.dtype and mx.array_equal(found[path], x), path


def saved(path: Path, **options) -> fused.AdamW:
    optimizer = fused.AdamW(**SETTINGS, **options)
    train(optimizer, tree(), [1, 2])
    fused.save_optimizer(path, optimizer)
    return optimizer


def refused(path: Path, message: str, optimizer=None, **how) -> None:
    optimizer = optimizer or fused.AdamW(**SETTINGS)
    before = tree_flatten(optimizer.state)
    description = optimizer._description()
    with pytest.raises(ValueError, match=message):
        fused.load_optimizer(path, optimizer, **how)
    after = tree_flatten(optimizer.state)
    assert [k for k, _ in before] == [k for k, _ in after]
    assert all(a is b for (_, a), (_, b) in zip(before, after, strict=True))
    assert optimizer._description() == description


def with_metadata(path: Path, **changes: str | None) -> None:
    arrays, metadata = mx.load(str(path), format="safetensors", return_metadata=True)
    mx.eval(arrays)
    metadata |= changes
    kept = {k: x for k, x in metadata.items() if x is not None}
    mx.save_safetensors(str(path) + ".safetensors", arrays, kept)
    os.replace(str(path) + ".safetensors", path)
