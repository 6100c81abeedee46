"""An optimizer in a file: exact, atomic, and rejected by name where it does not fit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_fused_adam as fused
from support import training
from support.arrays import assert_same_bits, random
from support.processes import output_of_python

pytestmark = pytest.mark.usefixtures("device")

SETTINGS = dict(learning_rate=1e-2, weight_decay=0.1, bias_correction=True)
OPTIONS = {
    "plain": {},
    "bfloat16 state": {"state_dtype": "bfloat16", "seed": 2**64 - 1},
    "int8": {"state_dtype": "int8"},
    "master": {"master_weights": True, "stochastic_rounding": True},
    "master int8": {"master_weights": True, "state_dtype": "int8"},
    "filter": {"decay_filter": ["b", "^a"]},
}


def tree(seed: int = 0):
    rng = np.random.default_rng(seed)
    return {"a": {"w": random(rng, (64, 70))}, "b": [random(rng, (9,)), random(rng, ())]}


def train(optimizer, parameters, seeds):
    return training.train(optimizer, parameters, map(tree, seeds))


@pytest.mark.parametrize("is_initialized", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_training_goes_on_bit_for_bit(name, is_initialized, tmp_path):
    file = tmp_path / "optimizer.ckpt"
    whole = fused.AdamW(**SETTINGS, **OPTIONS[name])
    parameters = train(whole, tree(), [1, 2, 3])
    fused.save_optimizer(file, whole)
    assert os.listdir(tmp_path) == [file.name]
    resumed = fused.AdamW(**SETTINGS, **OPTIONS[name])
    if is_initialized:
        resumed.init(parameters)
    fused.load_optimizer(file, resumed)
    expected = train(whole, parameters, [4, 5])
    assert_same_bits(train(resumed, parameters, [4, 5]), expected)
    assert_same_bits(resumed.state, whole.state)


IN_A_NEW_PROCESS = """
import sys
sys.path.insert(0, {tests!r})
from checkpoints import test_checkpoints as t
import mlx.core as mx, mlx_fused_adam as fused
mx.set_default_device(mx.{device})
optimizer = fused.AdamW(**t.SETTINGS, **t.OPTIONS[{name!r}])
fused.load_optimizer({file!r}, optimizer)
parameters = mx.load({weights!r})
parameters = {{"a": {{"w": parameters["a.w"]}}, "b": [parameters["b.0"], parameters["b.1"]]}}
parameters = t.train(optimizer, parameters, [4, 5])
mx.save_safetensors({out!r}, dict(t.tree_flatten([parameters, optimizer.state])))
"""


@pytest.mark.parametrize("name", ["plain", "master int8"])
def test_training_goes_on_in_a_new_process(name, tmp_path, process_device):
    whole = fused.AdamW(**SETTINGS, **OPTIONS[name])
    parameters = train(whole, tree(), [1, 2, 3])
    paths = {k: str(tmp_path / f"{k}.safetensors") for k in ("file", "weights", "out")}
    fused.save_optimizer(paths["file"], whole)
    mx.save_safetensors(paths["weights"], dict(tree_flatten(parameters)))
    program = IN_A_NEW_PROCESS.format(tests=str(Path(__file__).parents[1]), name=name, device=process_device, **paths)
    output_of_python("-c", program)
    expected = [train(whole, parameters, [4, 5]), whole.state]
    assert_same_bits(mx.load(paths["out"]), dict(tree_flatten(expected)))


def test_schedules_go_on(tmp_path):
    def make():
        return fused.AdamW(optim.cosine_decay(1e-2, 10), betas=[0.8, 0.9])

    whole = make()
    parameters = train(whole, tree(), [1, 2])
    fused.save_optimizer(tmp_path / "o", whole)
    resumed = make()
    fused.load_optimizer(str(tmp_path / "o"), resumed)
    assert_same_bits(train(resumed, parameters, [3]), train(whole, parameters, [3]))
    with pytest.raises(ValueError, match="learning_rate: 'schedule', not 0.01"):
        fused.load_optimizer(tmp_path / "o", fused.AdamW(1e-2, betas=[0.8, 0.9]))


def test_a_step_that_is_compiled_already_takes_the_loaded_state(tmp_path):
    whole = fused.AdamW(**SETTINGS)
    parameters = train(whole, tree(), [1, 2])
    fused.save_optimizer(tmp_path / "o", whole)
    expected = train(whole, parameters, [3])
    resumed = fused.AdamW(**SETTINGS)
    resumed.init(tree())
    found = training.copied(parameters)
    step = training.compiled(resumed, found)
    fused.load_optimizer(tmp_path / "o", resumed)
    step(tree(3))
    assert_same_bits(found, expected)
    assert_same_bits(resumed.state, whole.state)


# ---- What does not fit ----


def saved(path: Path, **options) -> fused.AdamW:
    optimizer = fused.AdamW(**SETTINGS, **options)
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


def test_a_damaged_file_is_rejected(tmp_path):
    path = tmp_path / "o"
    saved(path)
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for end in (0, 1, 7, 8, 9, header - 1, header, header + 1, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:end])
        rejected(path, "must hold a whole safetensors file but got")
    path.write_bytes(data + b"x")
    rejected(path, "must hold a whole safetensors file but got")
    for text in (b"x" * len(data), b"\xff" * 8 + data[8:], (2).to_bytes(8, "little") + b"[]"):
        path.write_bytes(text)
        rejected(path, "must hold a whole safetensors file but got")
    path.write_bytes(data)
    fused.load_optimizer(path, fused.AdamW(**SETTINGS))


@pytest.mark.parametrize(("name", "value"), [
    ("shape", [64, 71]), ("shape", [64, 69]), ("shape", [-64, 70]), ("shape", "x"), ("shape", None), ("dtype", "F32"),
    ("dtype", "F8"), ("data_offsets", [2**40, 2**40 + 17920]), ("data_offsets", [8, 4]), ("data_offsets", None),
], ids=str)  # fmt: skip
def test_a_header_that_contradicts_the_data_is_refused(name, value, tmp_path):
    path = tmp_path / "o"
    saved(path, state_dtype="bfloat16")
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    assert header["a.w.m"]["dtype"] == "BF16" and header["a.w.m"][name] != value
    header["a.w.m"][name] = value
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    rejected(
        path,
        "must hold a whole safetensors file but got",
        fused.AdamW(**SETTINGS | {"state_dtype": "bfloat16"}),
    )


def with_metadata(path: Path, **changes: str | None) -> None:
    arrays, metadata = mx.load(str(path), format="safetensors", return_metadata=True)
    mx.eval(arrays)
    metadata |= changes
    kept = {k: x for k, x in metadata.items() if x is not None}
    mx.save_safetensors(str(path) + ".safetensors", arrays, kept)
    os.replace(str(path) + ".safetensors", path)


@pytest.mark.parametrize(("changes", "message"), [
    ({"format": None}, "must hold what save_optimizer wrote but got a safetensors file of something else"),
    ({"format_version": "2"}, "must hold format version 1 or older but got 2"),
    ({"format_version": "one"}, "must hold format version 1 or older but got one"),
    ({"optimizer": "{"}, "must hold the optimizer's hyper-parameters but got metadata that cannot be read"),
    ({"optimizer": "[]"}, "must hold the optimizer's hyper-parameters but got metadata that cannot be read"),
], ids=str)  # fmt: skip
def test_a_foreign_or_newer_file_is_rejected(changes, message, tmp_path):
    saved(tmp_path / "o")
    with_metadata(tmp_path / "o", **changes)
    rejected(tmp_path / "o", message)


def test_a_file_of_another_class_is_rejected(tmp_path):
    saved(tmp_path / "o")
    rejected(tmp_path / "o", "must hold the state of Adam but got that of AdamW", fused.Adam(1e-2))
    for wrong in (optim.AdamW(1e-2), None):
        with pytest.raises(TypeError, match=r"\[load_optimizer\] optimizer must be an Adam or AdamW"):
            fused.load_optimizer(tmp_path / "o", wrong)
        with pytest.raises(TypeError, match=r"\[save_optimizer\] optimizer must be an Adam or AdamW"):
            fused.save_optimizer(tmp_path / "o", wrong)


def test_other_parameters_are_rejected_by_their_path(tmp_path):
    saved(tmp_path / "o")
    for other, message in (
        ({"a": {"w": mx.ones((64, 71))}, "b": tree()["b"]}, r"a.w.m of shape \(64, 71\) but got shape \(64, 70\)"),
        ({"a": {"w": mx.ones((64, 70))}}, "state of b.0.m but got one that the optimizer lacks"),
        (tree() | {"c": mx.ones(3)}, "the optimizer's state of c.m but got none"),
    ):  # fmt: skip
        optimizer = fused.AdamW(**SETTINGS)
        optimizer.init(other)
        rejected(tmp_path / "o", message, optimizer)


@pytest.mark.parametrize(("name", "value", "told"), [
    ("betas", [0.9, 0.98], r"betas: \[0.9, 0.999\], not \[0.9, 0.98\]"),
    ("eps", 1e-6, "eps: 1e-08, not 1e-06"),
    ("weight_decay", 0.2, "weight_decay: 0.1, not 0.2"),
    ("bias_correction", False, "bias_correction: True, not False"),
    ("learning_rate", 1e-3, "learning_rate: 0.01, not 0.001"),
    ("seed", 7, "seed: 0, not 7"),
    ("stochastic_rounding", True, "stochastic_rounding: None, not True"),
    ("state_dtype", "int8", "state_dtype: None, not 'int8'"),
    ("master_weights", True, "master_weights: False, not True"),
    ("decay_filter", "w", r"decay_filter: None, not \['w'\]"),
], ids=str)  # fmt: skip
def test_hyperparameters_that_differ_are_an_error_unless_told(name, value, told, tmp_path):
    file = tmp_path / "o"
    first = saved(file)
    other = fused.AdamW(**SETTINGS | {name: value})
    other.init(tree())
    rejected(file, f"must hold the optimizer's hyper-parameters but got {told}", other)

    by_file = fused.AdamW(**SETTINGS | {name: value})
    fused.load_optimizer(file, by_file, hyperparameters="file")
    assert by_file._description() == first._description()
    parameters = tree(9)
    assert_same_bits(train(by_file, parameters, [3]), train(first, parameters, [3]))

    own = fused.AdamW(**SETTINGS | {name: value})
    description = own._description()
    fused.load_optimizer(file, own, hyperparameters="optimizer")
    train(own, parameters, [3])
    assert own._description() == description
    assert own.step.item() == 3


def test_a_side_that_there_is_not(tmp_path):
    saved(tmp_path / "o")
    with pytest.raises(ValueError, match="hyperparameters must be one of error, file, optimizer but got 'x'"):
        fused.load_optimizer(tmp_path / "o", fused.AdamW(**SETTINGS), hyperparameters="x")


def test_what_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch):
    optimizer = saved(tmp_path / "o")
    before = (tmp_path / "o").read_bytes()
    train(optimizer, tree(), [3])

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        fused.save_optimizer(tmp_path / "o", optimizer)
    assert os.listdir(tmp_path) == ["o"] and (tmp_path / "o").read_bytes() == before
    with pytest.raises(FileNotFoundError):
        fused.save_optimizer(tmp_path / "nowhere" / "o", optimizer)
    with pytest.raises(FileNotFoundError):
        fused.load_optimizer(tmp_path / "none", optimizer)


SAVING = """
import sys
import mlx.core as mx, mlx_fused_adam as fused
mx.set_default_device(mx.cpu)
optimizer = fused.Adam(1e-3)
parameters = {"w": mx.ones((300, 300))}
parameters = optimizer.apply_gradients(parameters, parameters)
print("ready", flush=True)
while True:
    parameters = optimizer.apply_gradients(parameters, parameters)
    fused.save_optimizer(sys.argv[1], optimizer)
"""


@pytest.mark.cpu_only
def test_killed_at_any_instant_the_file_is_whole(tmp_path):
    """As often as FUSED_ADAM_KILLS says; CONTRIBUTING has the long run."""
    file = tmp_path / "o"
    rng = np.random.default_rng(0)
    last = 0
    for _ in range(int(os.environ.get("FUSED_ADAM_KILLS", "5"))):
        process = subprocess.Popen([sys.executable, "-c", SAVING, file], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0.02, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if not file.exists():
            continue
        optimizer = fused.Adam(1e-3)
        fused.load_optimizer(file, optimizer)
        assert optimizer.step.item() > 1
        last = optimizer.step.item()
    assert last > 1, "no process lived long enough to write"


def test_the_metadata_says_whose_it_is(tmp_path):
    optimizer = saved(tmp_path / "o.safetensors", state_dtype="int8")
    _, metadata = mx.load(str(tmp_path / "o.safetensors"), return_metadata=True)
    told = json.loads(metadata["optimizer"])
    assert metadata["step"] == "2" and metadata["format"] == "mlx_fused_adam.optimizer"
    assert told == {"class": "AdamW", **optimizer._description()}
