"""mlx-lm's own command under `python -m mlx_fused_adam run`: the fused path is executed; float32 is stock's.

Needs pip install '.[test,integration]'. Model, tokenizer and text are made here (bench/llama_files.py); nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

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
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, **OFFLINE}
        )
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


def assert_same_weights(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for path, x in expected.items():
        assert actual[path].dtype == x.dtype, path
        as_bits = [np.array(y.reshape(-1).view(mx.uint8)) for y in (actual[path], x)]
        np.testing.assert_array_equal(*as_bits, err_msg=path)


WAYS = {
    "LoRA": ["--fine-tune-type", "lora"],
    "DoRA": ["--fine-tune-type", "dora"],
    "full": ["--fine-tune-type", "full"],
    "full, gradient checkpointing": ["--fine-tune-type", "full", "--grad-checkpoint"],
    "LoRA, accumulation": ["--fine-tune-type", "lora", "--grad-accumulation-steps", "2"],
    "full, accumulation": ["--fine-tune-type", "full", "--grad-accumulation-steps", "2"],
}


@pytest.mark.parametrize("way", WAYS)
def test_float32_is_stock_s_bit_for_bit(models, tmp_path, way):
    stock = fine_tune(models["float32"], tmp_path / "stock", *WAYS[way])
    ours = fine_tune(models["float32"], tmp_path / "ours", *WAYS[way], launcher=LAUNCHER)
    updates = ITERATIONS // (2 if "accumulation" in way else 1)
    assert stock.updated == 0
    assert ours.updated == updates * len(ours.weights), ours.output
    assert ours.losses == stock.losses and len(ours.losses) == ITERATIONS + 3
    assert_same_weights(ours.weights, stock.weights)


def test_lora_on_a_bfloat16_model_is_stock_s_too(models, tmp_path):
    """Adapters are float32 there."""
    stock = fine_tune(models["bfloat16"], tmp_path / "stock", *WAYS["LoRA"])
    ours = fine_tune(models["bfloat16"], tmp_path / "ours", *WAYS["LoRA"], launcher=LAUNCHER)
    assert ours.updated == ITERATIONS * len(ours.weights), ours.output
    assert ours.losses == stock.losses
    assert_same_weights(ours.weights, stock.weights)


@pytest.mark.parametrize("options", [{}, {"master_weights": True}, {"state_dtype": "int8"}])
def test_full_bfloat16_learns_as_float32_does(models, tmp_path, options):
    reference = fine_tune(models["float32"], tmp_path / "float32", *WAYS["full"])
    launcher = [*LAUNCHER, "--adam-options", json.dumps(options)]
    ours = fine_tune(models["bfloat16"], tmp_path / "ours", *WAYS["full"], launcher=launcher)
    assert ours.updated == ITERATIONS * len(ours.weights), ours.output
    assert {str(x.dtype) for x in ours.weights.values()} == {"mlx.core.bfloat16"}
    losses = [np.array([loss for *_, loss in run.losses], float) for run in (ours, reference)]
    np.testing.assert_allclose(*losses, atol=0.03)
    assert losses[0][-1] < losses[0][0] - 0.1, "nothing was learnt"


def test_options_reach_ours_by_each_way(models, tmp_path):
    """In mlx-lm's optimizer_config, and by the launcher; both cut the step, so that weights differ from those without."""
    options = {"max_grad_norm": 1e-3, "weight_decay": 0.1}
    config = {"optimizer_config": {"adamw": options}}
    plain = fine_tune(models["float32"], tmp_path / "plain", *WAYS["full"], launcher=LAUNCHER)
    by_config = fine_tune(
        models["float32"], tmp_path / "config", *WAYS["full"], launcher=LAUNCHER, config=config
    )
    launcher = [*LAUNCHER, "--adam-options", json.dumps(options)]
    by_launcher = fine_tune(
        models["float32"], tmp_path / "launcher", *WAYS["full"], launcher=launcher
    )
    assert_same_weights(by_config.weights, by_launcher.weights)
    same = [mx.array_equal(x, plain.weights[path]).item() for path, x in by_config.weights.items()]
    assert not all(same)


def test_an_unknown_option_ends_the_run_with_our_words(models, tmp_path):
    config = {"optimizer_config": {"adamw": {"max_gradnorm": 1.0}}}
    with pytest.raises(AssertionError, match="unexpected keyword argument 'max_gradnorm'"):
        fine_tune(
            models["float32"], tmp_path / "ours", *WAYS["full"], launcher=LAUNCHER, config=config
        )


@pytest.mark.parametrize("way", ["lora", "full"])
def test_a_resumed_run_ends_as_an_uninterrupted_one(models, tmp_path, way):
    def train(folder: str, iterations: int, *more: str) -> Run:
        command = [sys.executable, str(ROOT / "examples/mlx_lm_resume.py"), "--model", str(models["float32"]),
            "--data", str(models["float32"]), "--folder", str(tmp_path / folder), "--fine-tune-type", way,
            "--save-every", "5", "--batch-size", "4", "--learning-rate", "1e-3", "--iters", str(iterations)]  # fmt: skip
        return Run([*command, *more], tmp_path / folder)

    whole = train("whole", 15)
    train("parts", 5)
    resumed = train("parts", 15, "--resume")
    assert "Going on after iteration 5." in resumed.output
    assert_same_weights(resumed.weights, whole.weights)
    states = [mx.load(str(tmp_path / x / "optimizer.safetensors")) for x in ("parts", "whole")]
    assert_same_weights(*states)


@needs_launch
def test_the_ranks_of_mlx_launch_train_as_one(models, tmp_path, monkeypatch):
    """mlx-lm's data parallel: two processes, each with half of every batch."""
    # On one Linux machine the ranks would write MLX's compiled kernels over each other.
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
    stock = fine_tune(
        models["float32"], tmp_path / "stock", *WAYS["LoRA"], launcher=[LAUNCH, *of_ring(2)]
    )
    launch = ["mlx.launch", *of_ring(2)]
    ours = fine_tune(
        models["float32"], tmp_path / "ours", *WAYS["LoRA"], launcher=[*LAUNCHER, *launch]
    )
    assert "(rank 1)" in ours.output, ours.output
    assert_same_weights(ours.weights, stock.weights)


def test_the_benchmark_of_memory_runs_what_it_says(models):
    peaks = {
        name: finetuning.peak_bytes(models["bfloat16"], 2, name)
        for name in (finetuning.STOCK, finetuning.OURS)
    }
    # Of so small a model the self-check takes more.
    assert all(peak > 0 for peak in peaks.values())


def test_the_lines_of_readme_do_what_they_say(tmp_path):
    """From nothing to LoRA and full fine-tuning; all but the installation is run as it is printed."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("## mlx-lm")[2].partition("\n## ")[0]
    lines = "\n".join(re.findall(r"```sh\n(.*?)```", section, re.DOTALL)).replace("\\\n", " ")
    commands = [line for line in lines.splitlines() if line.startswith("python ")]
    assert len(commands) == 3 and lines.count("pip install") == 1
    (tmp_path / "bench").symlink_to(ROOT / "bench")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for command in commands:
        done = subprocess.run(
            command,
            shell=True,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env={**os.environ, **OFFLINE, "PATH": path},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "run -m" not in command or re.search(r"ran [\d,]+ updates of tensors", done.stderr)
    assert "stochastic_rounding=True" in done.stderr and "Trainable" in done.stdout
