"""Optimizers to save and load: a small tree, its training, and loads that must be rejected and change nothing."""

import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

import mlx_fused_adam as fused
from support import training
from support.arrays import random

SETTINGS = dict(learning_rate=1e-2, weight_decay=0.1, bias_correction=True)
OPTIONS = {
    "plain": {},
    "bfloat16 state": {"state_dtype": "bfloat16", "seed": 2**64 - 1},
    "int8": {"state_dtype": "int8"},
    "master": {"master_weights": True, "stochastic_rounding": True},
    "master int8": {"master_weights": True, "state_dtype": "int8"},
    "24-bit master": {"master_weights": True, "master_weight_bits": 24},
    "int4": {"state_dtype": "int4"},
    "filter": {"decay_filter": ["b", "^a"]},
}


def tree(seed: int = 0):
    rng = np.random.default_rng(seed)
    shapes = {"a": {"w": (64, 70)}, "b": [(9,), ()]}
    return tree_map(lambda x: random(rng, x, mx.bfloat16), shapes, is_leaf=lambda x: isinstance(x, tuple))


def train(optimizer, parameters, seeds):
    return training.train(optimizer, parameters, map(tree, seeds))


def saved(path: Path, **options) -> fused.AdamW:
    optimizer = fused.AdamW(**SETTINGS | options)
    train(optimizer, tree(), [1, 2])
    fused.save_optimizer(path, optimizer)
    return optimizer


def rejected(path: Path, message: str, optimizer=None, **how) -> None:
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
