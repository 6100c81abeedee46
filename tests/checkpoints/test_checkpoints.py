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
from support.arrays import assert_same_bits
from support.checkpoints import OPTIONS, SETTINGS, rejected, saved, train, tree, with_metadata
from support.processes import output_of_python

pytestmark = pytest.mark.usefixtures("device")


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
from support import checkpoints as t
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
    with pytest.raises(ValueError, match=r"learning_rate \(file: 'schedule', optimizer: 0.01\)"):
        fused.load_optimizer(tmp_path / "o", fused.AdamW(1e-2, betas=[0.8, 0.9]))


def test_a_step_that_is_compiled_already_takes_the_loaded_state(tmp_path, has_exact_scalars):
    settings = SETTINGS | {"bias_correction": has_exact_scalars}
    whole = fused.AdamW(**settings)
    parameters = train(whole, tree(), [1, 2])
    fused.save_optimizer(tmp_path / "o", whole)
    expected = train(whole, parameters, [3])
    resumed = fused.AdamW(**settings)
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


# ---- What does not fit ----


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


def test_a_header_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "o"
    saved(path)
    data = path.read_bytes()
    for place in (9, data.index(b"learning_rate")):
        path.write_bytes(data[:place] + b"\xa3" + data[place + 1 :])
        rejected(path, "must hold a whole safetensors file but got an error: .*utf-8")


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


@pytest.mark.parametrize(("changes", "message"), [
    ({"format_version": "3"}, "must hold format version 2 or older but got 3"),
    ({"format_version": "one"}, "must hold format version 2 or older but got one"),
    ({"tree": "{"}, "must hold the containers of its state but got metadata that cannot be read"),
    ({"tree": '{"dict": [["a", "b"]]}'}, "must hold the containers of its state but got metadata that cannot be read"),
    ({"tree": '{"dict": [["step", "step"]]}'}, "must hold the containers of its state but got metadata"),
    ({"tree": '{"set": []}'}, "must hold the containers of its state but got metadata that cannot be read"),
    ({"tree": "3"}, "must hold the containers of its state but got metadata that cannot be read"),
    ({"optimizer": "{"}, "must hold the optimizer's hyper-parameters but got metadata that cannot be read"),
    ({"optimizer": "[]"}, "must hold the optimizer's hyper-parameters but got metadata that cannot be read"),
], ids=str)  # fmt: skip
def test_damaged_or_newer_metadata_is_rejected(changes, message, tmp_path):
    saved(tmp_path / "o")
    with_metadata(tmp_path / "o", **changes)
    rejected(tmp_path / "o", message)


def test_a_file_of_another_class_is_rejected(tmp_path):
    saved(tmp_path / "o")
    rejected(tmp_path / "o", "must hold the state of Adam but got that of AdamW", fused.Adam(1e-2))
    for wrong in (optim.AdamW(1e-2), None):
        with pytest.raises(TypeError, match=r"\[load_optimizer\] optimizer must be an Adam, AdamW or Multi"):
            fused.load_optimizer(tmp_path / "o", wrong)
        with pytest.raises(TypeError, match=r"\[save_optimizer\] optimizer must be an Adam, AdamW or Multi"):
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
    ("betas", [0.9, 0.98], r"betas \(file: \[0.9, 0.999\], optimizer: \[0.9, 0.98\]\)"),
    ("eps", 1e-6, r"eps \(file: 1e-08, optimizer: 1e-06\)"),
    ("weight_decay", 0.2, r"weight_decay \(file: 0.1, optimizer: 0.2\)"),
    ("bias_correction", False, r"bias_correction \(file: True, optimizer: False\)"),
    ("seed", 7, r"seed \(file: 0, optimizer: 7\)"),
    ("stochastic_rounding", True, r"stochastic_rounding \(file: None, optimizer: True\)"),
    ("state_dtype", "int8", r"state_dtype \(file: None, optimizer: 'int8'\)"),
    ("master_weights", True, r"master_weights \(file: False, optimizer: True\)"),
    ("decay_filter", "w", r"decay_filter \(file: None, optimizer: \['w'\]\)"),
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


@pytest.mark.parametrize(
    "shapes",
    [{"a.w.m": [64, 71]}, {"a.w.m": [64, 71], "a.w.v": [64, 69]}, {"b.0.m": [3, 3, 2]}],
    ids=str,
)
def test_shapes_that_contradict_the_count_of_bytes_are_rejected(shapes, tmp_path):
    path = tmp_path / "o"
    saved(path)
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    for name, shape in shapes.items():
        header[name]["shape"] = shape
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    rejected(path, "must hold a whole safetensors file but got")


@pytest.mark.parametrize("name", ["step", "learning_rate"])
@pytest.mark.parametrize("version", [1, 2])
def test_a_file_without_step_or_learning_rate_is_rejected(name, version, tmp_path):
    path = tmp_path / "o"
    saved(path)
    arrays, metadata = mx.load(str(path), format="safetensors", return_metadata=True)
    mx.eval(arrays)
    structure = json.loads(metadata.pop("tree"))
    structure["dict"] = [item for item in structure["dict"] if item[0] != name]
    if version == 2:
        metadata["tree"] = json.dumps(structure)
    del arrays[name]
    mx.save_safetensors(f"{path}.safetensors", arrays, metadata)
    rejected(tmp_path / "o.safetensors", f"must hold {name} but got none")


# ---- What a load leaves behind ----


def test_a_correction_of_before_is_not_kept(tmp_path):
    saved(tmp_path / "o")
    other = fused.AdamW(**SETTINGS, master_weights=True)
    parameters = train(other, tree(), [1, 2, 3])
    assert mx.any(other.state["a"]["w"]["remainder"] != 0)
    fused.load_optimizer(tmp_path / "o", other, hyperparameters="optimizer")
    other.init(parameters)
    for state in (other.state["a"]["w"], *other.state["b"]):
        assert not mx.any(state["remainder"] != 0)


def test_scales_of_before_are_not_kept(tmp_path):
    first = saved(tmp_path / "o")
    other = fused.AdamW(**SETTINGS, state_dtype="int8")
    parameters = train(other, tree(), [1, 2, 3])
    assert "m_scale" in other.state["a"]["w"]
    fused.load_optimizer(tmp_path / "o", other, hyperparameters="file")
    other.init(parameters)
    assert_same_bits(other.state, first.state)


def test_an_initialized_optimizer_converts_what_it_loads(tmp_path):
    saved(tmp_path / "o", state_dtype="float32")
    other = fused.AdamW(**SETTINGS, state_dtype="int8")
    parameters = tree()
    other.init(parameters)
    fused.load_optimizer(tmp_path / "o", other, hyperparameters="optimizer")
    assert other.state["a"]["w"]["m"].dtype == mx.float32
    train(other, parameters, [3])
    assert other.state["a"]["w"]["m"].dtype == mx.int8
    assert other.state["a"]["w"]["v"].dtype == mx.uint8


def test_a_filter_that_a_file_cannot_hold_is_not_taken_from_it(tmp_path):
    saved(tmp_path / "o", decay_filter=lambda path, _: path == "a.w")
    for wanted in (None, "a"):
        other = fused.AdamW(**SETTINGS, decay_filter=wanted)
        message = "must hold a decay_filter that can be read but got a callable: give it to the optimizer"
        rejected(tmp_path / "o", message, other, hyperparameters="file")
        assert other.decayed({"a": mx.ones(1)}) == ["a"]


@pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
def test_a_schedule_that_a_file_cannot_hold_is_not_taken_from_it(name, tmp_path):
    """Its last value would stay for ever."""
    saved(tmp_path / "o", **{name: lambda step: 0.1})
    message = f"must hold a {name} that can be read but got a schedule: give it to the optimizer"
    rejected(tmp_path / "o", message, hyperparameters="file")


def test_the_value_of_a_schedule_is_there_where_the_optimizer_has_one(tmp_path):
    def schedule(step):
        return 0.5

    for file, own, how, is_there in (
        (schedule, 0.1, "optimizer", False),
        (0.1, schedule, "optimizer", True),
        (0.1, schedule, "file", False),
        (schedule, schedule, "file", True),
    ):
        saved(tmp_path / "o", weight_decay=file)
        other = fused.AdamW(**SETTINGS | {"weight_decay": own})
        fused.load_optimizer(tmp_path / "o", other, hyperparameters=how)
        assert ("weight_decay" in other.state) is is_there
        assert float(other.weight_decay) == pytest.approx(0.5 if is_there else 0.1)
        train(other, tree(), [3])


def test_a_count_of_before_is_not_kept(tmp_path):
    saved(tmp_path / "o")
    other = fused.AdamW(**SETTINGS, skip_nonfinite=True, max_grad_norm=1.0)
    other.init(tree())
    other.state["skipped"], other.state["grad_norm"] = mx.array(5, mx.uint64), mx.array(2.0)
    fused.load_optimizer(tmp_path / "o", other, hyperparameters="optimizer")
    assert other.state["skipped"].item() == 0 and other.state["grad_norm"].item() == 0


def test_the_group_of_processes_stays(tmp_path):
    group = mx.distributed.init()
    saved(tmp_path / "o", max_grad_norm=1.0, shard_group=group)
    other = fused.AdamW(**SETTINGS, max_grad_norm=2.0, shard_group=group)
    description = other._description()
    fused.load_optimizer(tmp_path / "o", other, hyperparameters="file")
    assert other._description() == description | {"max_grad_norm": 1.0}
    assert description["shard_group"] == "rank 0 of 1"
    assert other._options.shard_group.group is group


def test_options_are_not_taken_from_a_file_that_does_not_fit(tmp_path):
    saved(tmp_path / "o", max_grad_norm=1.0)
    other = fused.AdamW(**SETTINGS | {"eps": 1e-3, "betas": [0.5, 0.5]})
    other.init(tree() | {"b": [mx.ones(10), mx.ones(())]})
    rejected(tmp_path / "o", "b.0.m of shape", other, hyperparameters="file")
    assert other.eps == 1e-3 and other.betas == [0.5, 0.5]


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
