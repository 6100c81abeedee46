"""The example that trains a language model: tiny trainings as a user starts them, resuming, and bad input."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "train.py"
TINY = ["--batch-size", "2", "--context", "16", "--dims", "16", "--heads", "2", "--layers", "1"]
if os.environ.get("DEVICE") == "cpu":
    # Otherwise MLX's own default, or the environment that conftest.py has entered.
    TINY += ["--device", "cpu"]
SHORT = [*TINY, "--steps", "25", "--sample", "20"]

# Runs the script as if only MLX and this package were installed.
ONLY_MLX = f"""
import runpy, sys
for name in ("matplotlib", "numpy", "tqdm"): sys.modules[name] = None
sys.path.insert(0, {str(SCRIPT.parent)!r})
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


def train(folder: Path, *arguments: str, code: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(code or [str(SCRIPT)]), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def train_well(folder: Path, *arguments: str, code: tuple[str, ...] = ()) -> str:
    done = train(folder, *arguments, code=code)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    return done.stdout


def untimed(output: str) -> str:
    """The output without its first line (updates by), speeds and memory."""
    output = re.sub(r"compiled in \d+ s|[\d,]+ tokens/s, \d+ s to go|[\d.]+ MB", "", output)
    return output.partition("\n")[2]


def test_mlx_alone_is_enough_and_the_loss_falls(tmp_path: Path, process_backend: str) -> None:
    output = train_well(tmp_path, *SHORT, code=("-c", ONLY_MLX))
    assert f"updates by: {process_backend}\n" in output
    found = re.findall(r"^step (\d+) of 25: loss ([\d.]+), (.*)$", output, re.M)
    assert [int(step) for step, _, _ in found] == [1, 10, 25]
    losses = [float(loss) for _, loss, _ in found]
    assert losses[2] < losses[1] < losses[0]
    assert re.fullmatch(r"compiled in \d+ s", found[0][2])
    assert all(re.fullmatch(r"[\d,]+ tokens/s, \d+ s to go", pace) for *_, pace in found[1:])
    assert found[-1][2].endswith(" 0 s to go")
    peak = re.search(r"^held-out loss: [\d.]+, peak memory: ([\d.]+) MB$", output, re.M)
    assert float(peak[1]) > 0
    sample = output.partition("Sample, after a prompt of 16 characters:\n")[2]
    assert len(sample) == 16 + 20 + 1
    assert not list(tmp_path.iterdir())


def test_any_text_file(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Ein Käfer läuft über die Straße. 你好，世界。\n" * 40, encoding="utf-8")
    assert "1,600 characters of text" in train_well(tmp_path, str(text), *SHORT)


def test_mlx_s_own_optimizer_trains_alike(tmp_path: Path, process_backend: str) -> None:
    ours, theirs = (train_well(tmp_path, *SHORT, "--optimizer", x) for x in ("fused", "mlx"))
    assert "updates by: mlx.optimizers\n" in theirs
    if process_backend == "cpu":  # a GPU may round a parameter differently
        assert untimed(ours) == untimed(theirs)
    losses = [float(re.search(r"held-out loss: ([\d.]+)", x)[1]) for x in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def test_options_of_the_optimizer_change_the_bytes_of_its_state(tmp_path: Path) -> None:
    def bytes_per_parameter(*options: str) -> tuple[float, float]:
        output = train_well(tmp_path, *TINY, "--dims", "64", "--steps", "1", "--sample", "0", *options)
        count = int(re.search(r"^([\d,]+) parameters,", output)[1].replace(",", ""))
        found = re.search(r"^parameters: ([\d.]+) MB, optimizer state: ([\d.]+) MB$", output, re.M)
        return tuple(float(x) * 1e6 / count for x in found.groups())

    in_bfloat16 = ["--dtype", "bfloat16"]
    assert bytes_per_parameter() == pytest.approx((4, 8), abs=0.2)
    assert bytes_per_parameter(*in_bfloat16) == pytest.approx((2, 4), abs=0.2)
    with_master_weights = bytes_per_parameter(*in_bfloat16, "--master-weights")
    assert with_master_weights == pytest.approx((2, 6), abs=0.2)
    assert bytes_per_parameter("--state-dtype", "int8") == pytest.approx((4, 2.2), abs=0.4)


def test_the_seed_decides(tmp_path: Path) -> None:
    first, again, other = (untimed(train_well(tmp_path, *SHORT, "--seed", x)) for x in "112")
    assert first == again != other


def test_one_step_is_enough(tmp_path: Path) -> None:
    assert "step 1 of 1: loss" in train_well(tmp_path, *SHORT, "--steps", "1")


def test_help_shows_the_defaults(tmp_path: Path) -> None:
    text = " ".join(train_well(tmp_path, "--help").split())
    assert "batches to train on (default: 900)" in text and "batches (default: 0)" in text
    assert "None" not in text and "False" not in text


def saved(folder: Path) -> dict[str, np.ndarray]:
    model, optimizer = sorted(folder.iterdir())
    assert re.fullmatch(r"model-\d+\.safetensors", model.name)
    assert optimizer.name == "optimizer.safetensors"
    arrays = {f"{file.name}: {k}": x for file in (model, optimizer) for k, x in mx.load(str(file)).items()}
    return {k: np.array(x.reshape(-1).view(mx.uint8)) for k, x in arrays.items()}


def test_a_killed_and_resumed_training_ends_as_one_that_was_not(tmp_path: Path) -> None:
    options = [*TINY, "--steps", "1000", "--sample", "20", "--checkpoint"]
    whole = train_well(tmp_path, *options, "whole")
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *options, "parts"], cwd=tmp_path, stdout=subprocess.DEVNULL
    )
    file = tmp_path / "parts" / "optimizer.safetensors"
    end = time.monotonic() + 120
    while not file.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    process.kill()
    process.wait()
    resumed = train_well(tmp_path, *options, "parts", "--resume")
    assert re.search(r"^Continuing after step [1-9]00$", resumed, re.M), resumed
    ends = [output[output.index("held-out loss") :] for output in (whole, resumed)]
    assert untimed("\n" + ends[0]) == untimed("\n" + ends[1])
    ours, theirs = (saved(tmp_path / x) for x in ("whole", "parts"))
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        np.testing.assert_array_equal(theirs[name], x, err_msg=name)


def test_ctrl_c_ends_without_a_traceback(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *TINY, "--steps", "1000000"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while "tokens/s" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and not errors, errors


BAD_FILES = {
    "empty": (b"", "text.txt: 0 characters are too few"),
    "short": (b"too short for a context", "text.txt: 23 characters are too few: .* needs 650"),
    "binary": (b"\xff\xfe\x00\x81" * 500, "text.txt: 'utf-8' codec can't decode"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_gives_one_line(tmp_path: Path, kind: str) -> None:
    content, message = BAD_FILES[kind]
    (tmp_path / "text.txt").write_bytes(content)
    assert_one_line(train(tmp_path, "text.txt"), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.txt"], "cannot train on missing.txt: .*No such file"),
        (["."], "cannot train on .: .*Is a directory"),
        (["--steps", "0"], "--steps: must be from 1 to .* but got 0"),
        (["--steps", "many"], "--steps: invalid int value: 'many'"),
        (["--context", "-3"], "--context: must be from 1"),
        (["--context", "1000000"], "needs 10000010"),
        (["--batch-size", "0"], "--batch-size: must be from 1"),
        (["--learning-rate", "nan"], "--learning-rate: must be from 0 .* but got nan"),
        (["--learning-rate", "-1"], "--learning-rate: must be from 0"),
        (["--weight-decay", "inf"], "--weight-decay: must be from 0"),
        (["--dims", "10", "--heads", "4"], "--dims 10 is not a multiple of --heads 4"),
        (["--seed", "-1"], "--seed: must be from 0"),
        (["--seed", str(2**64)], "--seed: must be from 0"),
        (["--state-dtype", "int3"], "state_dtype must be .* but got 'int3'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--resume"], "--resume needs --checkpoint FOLDER"),
        (["--checkpoint", "no/x"], "No such file or directory: 'no/x'"),
        (["--checkpoint", "x", "--optimizer", "mlx"], "--checkpoint need --optimizer fused"),
        (["--state-dtype", "int8", "--optimizer", "mlx"], "need --optimizer fused"),
        (["--checkpoint", "empty", "--resume"], "empty/optimizer.safetensors"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_option_gives_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    assert_one_line(train(tmp_path, *arguments), message)


def test_a_checkpoint_of_another_training_is_rejected(tmp_path: Path) -> None:
    arguments = [*SHORT, "text.txt", "--checkpoint", "saved"]
    text = tmp_path / "text.txt"
    text.write_text("To be trained on. " * 50)
    train_well(tmp_path, *arguments)
    other_seed = train(tmp_path, *arguments, "--resume", "--seed", "3")
    assert_one_line(other_seed, "was saved with other options: seed 0, not 3")
    text.write_text("To be trained on. " * 51)
    other_text = train(tmp_path, *arguments, "--resume")
    assert_one_line(other_text, "was saved with other options: characters 900, not ")
    wider = train(tmp_path, *arguments, "--resume", "--dims", "32")
    assert_one_line(wider, "saved/optimizer.safetensors")


def assert_one_line(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode in (1, 2), done.stdout + done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert done.stderr.startswith("train.py: error: ") and done.stderr.count("\n") == 1, done.stderr
    assert not done.stdout
