"""mlx-lm's own command under `python -m mlx_fused_adam run`: it is executed, and float32 has MLX's bits.

Needs pip install '.[test,integration]'. Model, tokenizer and text are made here (bench/llama_files.py); nothing is
downloaded.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from support.arrays import assert_same_bits
from support.launched import LAUNCH, needs_launch, of_ring

if importlib.util.find_spec("mlx_lm") is None:
    pytest.skip("needs mlx-lm: pip install '.[test,integration]'", allow_module_level=True)

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))
from bench import finetuning  # noqa: E402

ITERATIONS = 6
LAUNCHER = [sys.executable, "-m", "mlx_fused_adam", "run"]
# Not to ask the hub for anything.
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with model, tokenizer and text for each dtype."""
    folders = {}
    for dtype in ("float32", "bfloat16"):
        folder = folders[dtype] = tmp_path_factory.mktemp(dtype)
        command = [
            sys.executable,
            str(ROOT / "bench/llama_files.py"),
            str(folder),
            "--dtype",
            dtype,
        ]
        subprocess.run(command, check=True, env={**os.environ, **OFFLINE})
    return folders


class Run:
    def __init__(self, command: list[str], out: Path) -> None:
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **OFFLINE})
        self.output = done.stdout + done.stderr
        assert done.returncode == 0, self.output
        # As mlx-lm prints them, to three places, without its colours: iteration, "val" or nothing, loss.
        plain = re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", done.stdout)
        self.losses = re.findall(r"^ +(\d+) +(val )? *([\d.]+|nan)\b", plain, re.MULTILINE)
        self.weights = mx.load(str(out / "adapters.safetensors"))
        counts = re.findall(r"ran ([\d,]+) updates of tensors", done.stderr)
        self.updated = sum(int(count.replace(",", "")) for count in counts)


def fine_tune(
    model: Path,
    out: Path,
    *arguments: str,
    launcher: list[str] | None = None,
    config: dict | None = None,
) -> Run:
    out.mkdir()
    (out / "config.yaml").write_text(json.dumps({"optimizer": "adamw", **(config or {})}))
    command = [*(launcher or [sys.executable]), "-m", "mlx_lm", "lora", "-c", str(out / "config.yaml"), "--train",
        "--model", str(model), "--data", str(model), "--adapter-path", str(out), "--iters", str(ITERATIONS),
        "--batch-size", "2", "--num-layers", "-1", "--learning-rate", "1e-3", "--val-batches", "1",
        "--steps-per-report", "1", "--steps-per-eval", "3", *arguments]  # fmt: skip
    return Run(command, out)


WAYS = {
    "LoRA": ["--fine-tune-type", "lora"],
    "DoRA": ["--fine-tune-type", "dora"],
    "full": ["--fine-tune-type", "full"],
    "full, gradient checkpointing": ["--fine-tune-type", "full", "--grad-checkpoint"],
    "LoRA, accumulation": ["--fine-tune-type", "lora", "--grad-accumulation-steps", "2"],
    "full, accumulation": ["--fine-tune-type", "full", "--grad-accumulation-steps", "2"],
}


# Adapters are float32 on a bfloat16 model too.
@pytest.mark.parametrize(("dtype", "way"), [("bfloat16", "LoRA"), *(("float32", way) for way in WAYS)])
def test_float32_has_the_bits_of_mlx_optimizers(models, tmp_path, dtype, way):
    plain = fine_tune(models[dtype], tmp_path / "plain", *WAYS[way])
    fused = fine_tune(models[dtype], tmp_path / "fused", *WAYS[way], launcher=LAUNCHER)
    updates = ITERATIONS // (2 if "accumulation" in way else 1)
    assert plain.updated == 0
    assert fused.updated == updates * len(fused.weights), fused.output
    assert fused.losses == plain.losses and len(fused.losses) == ITERATIONS + 3
    assert_same_bits(fused.weights, plain.weights)


@pytest.mark.parametrize("options", [{}, {"master_weights": True, "master_weight_bits": 24}, {"state_dtype": "int8"}])
def test_full_bfloat16_learns_as_float32_does(models, tmp_path, options):
    reference = fine_tune(models["float32"], tmp_path / "float32", *WAYS["full"])
    launcher = [*LAUNCHER, "--adam-options", json.dumps(options)]
    fused = fine_tune(models["bfloat16"], tmp_path / "fused", *WAYS["full"], launcher=launcher)
    assert fused.updated == ITERATIONS * len(fused.weights), fused.output
    assert {str(x.dtype) for x in fused.weights.values()} == {"mlx.core.bfloat16"}
    losses = [np.array([loss for *_, loss in run.losses], float) for run in (fused, reference)]
    np.testing.assert_allclose(*losses, atol=0.03)
    assert losses[0][-1] < losses[0][0] - 0.1, "nothing was learnt"


def test_options_reach_the_optimizer_each_way(models, tmp_path):
    """In mlx-lm's optimizer_config, and by the launcher; both cut the step, so that weights differ from those
    without.
    """
    options = {"max_grad_norm": 1e-3, "weight_decay": 0.1}
    config = {"optimizer_config": {"adamw": options}}
    plain = fine_tune(models["float32"], tmp_path / "plain", *WAYS["full"], launcher=LAUNCHER)
    by_config = fine_tune(models["float32"], tmp_path / "config", *WAYS["full"], launcher=LAUNCHER, config=config)
    launcher = [*LAUNCHER, "--adam-options", json.dumps(options)]
    by_launcher = fine_tune(models["float32"], tmp_path / "launcher", *WAYS["full"], launcher=launcher)
    assert_same_bits(by_config.weights, by_launcher.weights)
    same = [mx.array_equal(x, plain.weights[path]).item() for path, x in by_config.weights.items()]
    assert not all(same)


def test_an_unknown_option_ends_the_run_with_our_words(models, tmp_path):
    config = {"optimizer_config": {"adamw": {"max_gradnorm": 1.0}}}
    with pytest.raises(AssertionError, match="unexpected keyword argument 'max_gradnorm'"):
        fine_tune(models["float32"], tmp_path / "fused", *WAYS["full"], launcher=LAUNCHER, config=config)


@pytest.mark.parametrize("way", ["lora", "full"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(models, tmp_path, way):
    """In the second epoch of six batches, with validation batches that could change the order of its batches."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train.jsonl", "valid.jsonl"):
        shutil.copy(models["float32"] / "train.jsonl", data / name)

    def train(folder: str, iterations: int, *more: str) -> Run:
        command = [sys.executable, str(ROOT / "examples/mlx_lm_resume.py"), "--model", str(models["float32"]),
            "--data", str(data), "--folder", str(tmp_path / folder), "--fine-tune-type", way,
            "--save-every", "5", "--batch-size", "4", "--learning-rate", "1e-3",
            "--iters", str(iterations)]  # fmt: skip
        return Run([*command, *more], tmp_path / folder)

    whole = train("whole", 15)
    train("parts", 10)
    resumed = train("parts", 15, "--resume")
    assert "Continuing after iteration 10\n" in resumed.output
    assert_same_bits(resumed.weights, whole.weights)
    states = [mx.load(str(tmp_path / x / "optimizer.safetensors")) for x in ("parts", "whole")]
    assert_same_bits(*states)


@needs_launch
def test_the_ranks_of_mlx_launch_train_as_one(models, tmp_path, monkeypatch):
    """mlx-lm's data parallel: two processes, each with half of every batch."""
    # On one Linux machine the ranks would write MLX's compiled kernels over each other.
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
    plain = fine_tune(models["float32"], tmp_path / "plain", *WAYS["LoRA"], launcher=[LAUNCH, *of_ring(2)])
    launch = ["mlx.launch", *of_ring(2)]
    fused = fine_tune(models["float32"], tmp_path / "fused", *WAYS["LoRA"], launcher=[*LAUNCHER, *launch])
    assert "(rank 1)" in fused.output, fused.output
    assert_same_bits(fused.weights, plain.weights)


def test_the_benchmark_of_memory_runs_what_it_says(models, monkeypatch):
    monkeypatch.setattr(finetuning, "CHOICES", [finetuning.CHOICES[-1]])
    rows = finetuning.measure(finetuning.Console(quiet=True), finetuning.TRIAL)
    assert [row["options"] for row in rows] == [None, finetuning.CHOICES[-1].options]
    for row in rows:  # so small a model that the package's self-check, among "gradients", takes more
        assert sum(row["parts"].values()) == row["peak_bytes"]
        assert min(row["parts"].values()) > 0


def test_the_benchmark_of_memory_counts_the_state_of_what_mlx_lm_trains(models, tmp_path):
    trained = fine_tune(models["bfloat16"], tmp_path / "out", *WAYS["full"]).weights
    counted = finetuning.stored_bytes("tiny", "bfloat16", {})
    assert counted["state"] == 2 * sum(x.nbytes for x in trained.values()) + 12  # step and learning rate
    assert counted["weights"] == sum(x.nbytes for x in mx.load(str(models["bfloat16"] / "model.safetensors")).values())


def commands(document, heading):
    """The lines of the section's shell snippets that start Python."""
    text = (ROOT / document).read_text(encoding="utf-8")
    section = text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = "\n".join(re.findall(r"```sh\n(.*?)```", section, re.DOTALL)).replace("\\\n", " ")
    return [line for line in lines.splitlines() if line.startswith("python ")]


def test_the_lines_of_the_documents_do_what_they_say(tmp_path):
    """From nothing to LoRA and full fine-tuning, run as printed; README's, with the trial's model and data."""
    printed = commands("docs/mlx-lm.md", "Try it")
    (of_readme,) = commands("README.md", "Use with mlx-lm")
    assert len(printed) == 3 and "--model MODEL --data DATA" in of_readme
    of_readme = of_readme.replace("MODEL", "trial").replace("DATA", "trial")
    of_readme += " --num-layers -1 --iters 20 --adapter-path trial/readme"
    (tmp_path / "bench").symlink_to(ROOT / "bench")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for command in (*printed, of_readme):
        done = subprocess.run(
            command,
            shell=True,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, **OFFLINE, "PATH": path},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        if "mlx_lm" in command:
            assert re.search(r"ran [\d,]+ updates of tensors", done.stderr), done.stderr
            assert "Trainable" in done.stdout
        for name in ("stochastic_rounding", "state_dtype"):
            assert (f'"{name}": ' in command) == (f"{name}=" in done.stderr)
