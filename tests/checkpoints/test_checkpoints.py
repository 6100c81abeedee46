"""An optimizer in a file: exact, atomic, and rejected by name where it does not fit."""

import errno
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
    with pytest.raises(ValueError, match="learning_rate: file 'schedule', optimizer 0.01"):
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


ONE = mx.ones(4)
TREES = {
    "dotted key": {"a.w": ONE}, "int keys": {0: ONE, 1: {2: ONE}}, "digits": {"0": ONE, "1": {"w": ONE}},
    "modules named by digits": {"layers": {"0": {"w": ONE}, "1": {"w": ONE}}}, "list": {"layers": [{"w": ONE}] * 2},
    "tuple": {"a": (ONE, {"b": ONE})}, "empty modules": {"act": {}, "b": [{}, ONE]}, "mixed": {"0": ONE, "a": ONE},
}  # fmt: skip


@pytest.mark.parametrize("form", ["with containers", "of paths alone", "of mlx.optimizers"])
@pytest.mark.parametrize("name", TREES)
def test_a_state_meets_its_parameters_whatever_the_containers(name, form, tmp_path):
    parameters = TREES[name]
    whole = (optim if form == "of mlx.optimizers" else fused).AdamW(1e-2)
    new = whole.apply_gradients(parameters, parameters)
    if form == "of mlx.optimizers":
        mx.save_safetensors(str(tmp_path / "o.safetensors"), dict(tree_flatten(whole.state)))
    else:
        fused.save_optimizer(tmp_path / "o.safetensors", whole)
    if form == "of paths alone":
        with_metadata(tmp_path / "o.safetensors", tree=None)
    resumed = fused.AdamW(1e-2)
    fused.load_optimizer(tmp_path / "o.safetensors", resumed)
    if form == "with containers":
        assert_same_bits(resumed.state, whole.state)
    expected = whole.apply_gradients(parameters, new)
    assert_same_bits(resumed.apply_gradients(parameters, new), expected)
    assert_same_bits(resumed.state, whole.state)


def test_two_parameters_of_one_path_are_rejected(tmp_path):
    optimizer = fused.Adam(1e-2)
    optimizer.init({"a.w": ONE, "a": {"w": ONE}})
    with pytest.raises(ValueError, match="paths must be different but got a.w.m twice"):
        fused.save_optimizer(tmp_path / "o", optimizer)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("count", "message"), [
    (1, "got nothing at layers.1.w, which has a state there; if it is frozen now, call init"),
    (3, "got layers.2.w, which has no state there; to start from zero, call init"),
])  # fmt: skip
def test_a_model_of_another_depth_is_an_error_at_first_use(count, message, tmp_path):
    def layers(count):
        return {"layers": [{"w": ONE}] * count}

    whole = fused.AdamW(1e-2)
    whole.init(layers(2))
    fused.save_optimizer(tmp_path / "o", whole)
    optimizer = fused.AdamW(1e-2)
    fused.load_optimizer(tmp_path / "o", optimizer)
    before = tree_flatten(optimizer.state)
    for use in (optimizer.init, lambda x: optimizer.apply_gradients(x, x)):
        with pytest.raises(ValueError, match=message):
            use(layers(count))
    assert tree_flatten(optimizer.state) == before
    # The ways out that the messages name; of the first layer alone, the second being frozen.
    optimizer.init(layers(2))
    if count > 2:
        optimizer.init(layers(count))
    gradients = layers(min(count, 2))
    optimizer.apply_gradients(gradients, layers(max(count, 2)))
    assert optimizer.step.item() == 1


def test_a_learning_rate_set_by_hand_is_part_of_the_state(tmp_path):
    whole = fused.AdamW(1e-2)
    train(whole, tree(), [1])
    whole.learning_rate = 1e-3
    fused.save_optimizer(tmp_path / "o", whole)
    resumed = fused.AdamW(1e-2)
    fused.load_optimizer(tmp_path / "o", resumed)
    assert resumed.learning_rate.item() == whole.learning_rate.item()
    kept = fused.AdamW(1e-2)
    fused.load_optimizer(tmp_path / "o", kept, hyperparameters="optimizer")
    assert kept.learning_rate.item() == mx.array(1e-2).item()


@pytest.mark.parametrize("kinds", [(fused.Adam, fused.AdamW), (fused.AdamW, fused.Adam)])
def test_a_state_may_go_to_the_other_class_if_asked(kinds, tmp_path):
    whole, other = (kind(1e-2) for kind in kinds)
    parameters = train(whole, tree(), [1, 2])
    fused.save_optimizer(tmp_path / "o", whole)
    rejected(tmp_path / "o", f"the state of {kinds[1].__name__} but got that of {kinds[0].__name__}", kinds[1](1e-2))
    fused.load_optimizer(tmp_path / "o", other, hyperparameters="optimizer")
    assert_same_bits(other.state, whole.state)
    train(other, parameters, [3])


# ---- File systems ----


def test_the_file_s_mode_is_the_umask_s_or_kept(tmp_path):
    before = os.umask(0o027)
    try:
        saved(tmp_path / "new")
        (tmp_path / "old").write_text("")
        os.chmod(tmp_path / "old", 0o604)
        saved(tmp_path / "old")
    finally:
        os.umask(before)
    assert {name: oct((tmp_path / name).stat().st_mode & 0o777) for name in ("new", "old")} == {
        "new": "0o640", "old": "0o604",
    }  # fmt: skip


def test_a_symbolic_link_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk/file")
    for _ in range(2):  # a dangling link first
        saved(tmp_path / "link")
        assert (tmp_path / "link").is_symlink() and os.listdir(tmp_path / "disk") == ["file"]
    fused.load_optimizer(tmp_path / "link", fused.AdamW(**SETTINGS))


def test_a_name_may_have_255_characters(tmp_path):
    name = "o" * 255
    saved(tmp_path / name)
    assert os.listdir(tmp_path) == [name]


def test_a_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="No such folder.*nowhere'$"):
        saved(tmp_path / "nowhere" / "o")


def test_a_folder_that_cannot_be_flushed_is_no_failure(tmp_path, monkeypatch):
    """The order counts: the file is flushed before it is renamed, its folder after."""
    calls, fsync, replace = [], os.fsync, os.replace

    def flush(handle):
        is_folder = (
            os.path.isdir(f"/proc/self/fd/{handle}") if os.path.isdir("/proc") else os.fstat(handle).st_nlink > 1
        )
        calls.append("folder" if is_folder else "file")
        if is_folder:
            raise OSError(errno.EINVAL, "as network shares say")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("rename"), replace(*paths)))
    saved(tmp_path / "o")
    assert calls == ["file", "rename", "folder"] and os.listdir(tmp_path) == ["o"]


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
    ({"format": None}, "must hold what save_optimizer wrote, or a state with step .* but got a safetensors file"),
    ({"format_version": "2"}, "must hold format version 1 or older but got 2"),
    ({"format_version": "one"}, "must hold format version 1 or older but got one"),
    ({"tree": "{"}, "must hold a whole safetensors file but got metadata that cannot be read"),
    ({"tree": '{"dict": [["a", "b"]]}'}, "must hold a whole safetensors file but got metadata that cannot be read"),
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
    ("betas", [0.9, 0.98], r"betas: file \[0.9, 0.999\], optimizer \[0.9, 0.98\]"),
    ("eps", 1e-6, "eps: file 1e-08, optimizer 1e-06"),
    ("weight_decay", 0.2, "weight_decay: file 0.1, optimizer 0.2"),
    ("bias_correction", False, "bias_correction: file True, optimizer False"),
    ("seed", 7, "seed: file 0, optimizer 7"),
    ("stochastic_rounding", True, "stochastic_rounding: file None, optimizer True"),
    ("state_dtype", "int8", "state_dtype: file None, optimizer 'int8'"),
    ("master_weights", True, "master_weights: file False, optimizer True"),
    ("decay_filter", "w", r"decay_filter: file None, optimizer \['w'\]"),
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
