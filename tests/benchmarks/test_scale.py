"""docs/scale.md: its tables are computed from the bytes that optimizers really hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

import mlx_fused_adam as fused

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))
from bench.tables import documents, scale  # noqa: E402

DOCUMENT = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")


def test_the_document_has_every_computed_table():
    blocks = {match[2].replace("-", "_") for match in documents.BLOCK.finditer(DOCUMENT)}
    assert blocks == set(scale.TABLES)


def held(dtype: str, options: dict) -> scale.Bytes:
    """Of one parameter, by an optimizer that has made a step."""
    model = nn.Linear(256, 512, bias=False)
    model.set_dtype(getattr(mx, dtype))
    optimizer = fused.AdamW(1e-3, **options)
    x = mx.ones((2, 256), getattr(mx, dtype))
    _, gradients = nn.value_and_grad(model, lambda model, x: model(x).sum())(model, x)
    optimizer.update(model, gradients)
    mx.eval(model.parameters(), optimizer.state)
    state = {name: x.nbytes for name, x in optimizer.state["weight"].items()}
    parts = {
        "parameter": model.weight.nbytes,
        "gradient": gradients["weight"].nbytes,
        "m": state.pop("m"),
        "v": state.pop("v"),
        "scales": state.pop("m_scale", 0) + state.pop("v_scale", 0),
        "remainder": state.pop("remainder", 0),
    }
    assert not state, "what the document does not count"
    return scale.Bytes(**{name: x / model.weight.size for name, x in parts.items()})


@pytest.mark.cpu_only
@pytest.mark.parametrize("setup", scale.SETUPS, ids=lambda setup: f"{setup.dtype} {setup.code}")
def test_bytes_of_a_parameter_are_those_that_optimizers_hold(setup):
    with mx.stream(mx.cpu):
        assert held(setup.dtype, setup.options) == setup.bytes


@pytest.mark.cpu_only
@pytest.mark.parametrize("options", [
    {"stochastic_rounding": True, "seed": 1}, {"bias_correction": True}, {"decay_filter": ["weight"]},
    {"max_grad_norm": 1.0, "skip_nonfinite": True, "shard_group": mx.distributed.init()},
], ids=lambda options: ", ".join(options))  # fmt: skip
def test_other_options_take_no_bytes_that_grow_with_the_model(options):
    with mx.stream(mx.cpu):
        assert held("bfloat16", options) == scale.Setup("bfloat16", {}).bytes
    for name in options:
        assert f"`{name}`" in DOCUMENT


@pytest.mark.parametrize("ranks", scale.RANKS)
def test_traffic_is_that_of_a_ring(ranks):
    """Counted piece by piece, as MLX's ring sends them: scatter and gather, each n - 1 pieces of n."""
    elements, item = 1024 * 3, 4
    pieces = [elements // ranks] * ranks
    sent = 0
    for _ in range(2):
        for i in range(ranks - 1):
            sent += pieces[i] * item
    assert scale.SENDINGS[0].of(elements, ranks) == sent


@pytest.mark.parametrize("mac", scale.MACS)
def test_the_largest_model_of_one_mac_just_fits(mac):
    for setup in scale.SETUPS:
        largest = scale.usable(mac) / setup.bytes.total
        assert scale.fewest_ranks(setup, largest, mac, again=False) == 1
        assert scale.fewest_ranks(setup, 1.01 * largest, mac, again=False) != 1


def test_more_macs_are_needed_for_more_parameters_and_fewer_if_larger():
    for setup in scale.SETUPS:
        for again in (False, True):
            counts = [
                [scale.fewest_ranks(setup, size, mac, again) or 10**6 for mac in scale.MACS] for size in scale.BLOCKS_OF
            ]
            assert all(row == sorted(row, reverse=True) for row in counts)
            assert all(list(column) == sorted(column) for column in zip(*counts, strict=True))


def test_own_models_are_shown_by_the_documented_command():
    assert "python bench/scale.py --parameters 7e9" in DOCUMENT
    command = [sys.executable, ROOT / "bench" / "scale.py", "--parameters", "7e9"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("7.00 billion parameters")
    assert "112 GB" in done.stdout  # 16 bytes each
    refused = subprocess.run([*command[:-1], "0"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "--parameters must be at least 1 but got 0" in refused.stderr
