"""The example that trains a language model: tiny runs as a user starts them, and bad input."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "examples" / "train.py"
TINY = ["--steps", "25", "--batch-size", "2", "--context", "16", "--dims", "16", "--heads", "2",
        "--layers", "1", "--sample", "20"]  # fmt: skip

# Runs the script as if the named modules were not installed.
WITHOUT = """
import runpy, sys
for name in {modules}: sys.modules[name] = None
sys.path.insert(0, {folder!r})
sys.argv = {argv}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def train(
    folder: Path, *arguments: str, without: tuple[str, ...] = ()
) -> subprocess.CompletedProcess:
    command = [str(SCRIPT), *arguments]
    if without:
        code = WITHOUT.format(modules=without, folder=str(SCRIPT.parent), argv=command)
        command = ["-c", code]
    return subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=300
    )


def test_default_text(tmp_path: Path) -> None:
    done = train(tmp_path, *TINY)
    assert done.returncode == 0, done.stderr
    assert "updates by: cpu" in done.stdout or "updates by: metal" in done.stdout
    first, last = map(float, re.search(r"loss from ([\d.]+) to ([\d.]+)", done.stdout).groups())
    assert last < first
    assert "Sample, after the prompt" in done.stdout
    assert "tokens/s" in done.stderr and "optimizer" in done.stderr
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_any_text_file_and_output(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Ein Käfer läuft über die Straße. 你好，世界。\n" * 40, encoding="utf-8")
    done = train(tmp_path, str(text), *TINY, "--output", "curve.svg")
    assert done.returncode == 0, done.stderr
    assert ET.parse(tmp_path / "curve.svg").getroot().tag.endswith("svg")


def test_compare_is_bit_identical(tmp_path: Path) -> None:
    done = train(tmp_path, *TINY, "--compare")
    assert done.returncode == 0, done.stderr
    assert "losses: bit-identical at each of the 25 steps" in done.stdout
    assert "parameters and state after the last step: bit-identical" in done.stdout
    assert re.search(r"optimizer time: [\d.]+ ms stock, [\d.]+ ms fused", done.stdout)


def test_same_seed_same_run_and_another_seed_another(tmp_path: Path) -> None:
    def result(seed: int) -> str:
        output = train(tmp_path, *TINY, "--seed", str(seed)).stdout
        return (
            output[output.index("Sample") :] + re.search(r"loss from .*? held out", output).group()
        )

    assert result(1) == result(1)
    assert result(1) != result(2)


@pytest.mark.parametrize("compare", [[], ["--compare"]], ids=["alone", "compare"])
def test_mlx_alone_is_enough(tmp_path: Path, compare: list[str]) -> None:
    done = train(tmp_path, *TINY, *compare, without=("tqdm", "matplotlib", "numpy"))
    assert done.returncode == 0, done.stderr
    root = ET.parse(tmp_path / "loss.svg").getroot()
    assert len([e for e in root.iter() if e.tag.endswith("polyline")]) == 1 + len(compare)
    assert "tokens/s" in done.stderr
    assert "Loss curve: loss.svg" in done.stdout


def test_one_step_is_enough(tmp_path: Path) -> None:
    done = train(tmp_path, *TINY, "--steps", "1")
    assert done.returncode == 0, done.stderr


BAD_FILES = {
    "empty": (b"", "is empty"),
    "blank": (b" \n \n", "is empty"),
    "short": (b"too short for a context", "at least|needs"),
    "binary": (b"\xff\xfe\x00\x81" * 500, "not UTF-8"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_file_gives_one_line(tmp_path: Path, kind: str) -> None:
    content, message = BAD_FILES[kind]
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    assert_one_line(train(tmp_path, str(path)), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.txt"], "cannot read missing.txt: No such file"),
        (["."], "cannot read .: Is a directory"),
        (["--steps", "0"], "--steps: must be at least 1 but got 0"),
        (["--steps", "many"], "--steps: invalid"),
        (["--context", "-3"], "--context: must be at least 1"),
        (["--context", "1000000"], "needs"),
        (["--batch-size", "0"], "--batch-size: must be at least 1"),
        (["--learning-rate", "nan"], "--learning-rate: must be positive"),
        (["--learning-rate", "-1"], "--learning-rate: must be positive"),
        (["--temperature", "0"], "--temperature: must be positive"),
        (["--weight-decay", "inf"], "--weight-decay"),
        (["--dims", "10", "--heads", "4"], "--dims 10 is not a multiple of --heads 4"),
        (["--seed", "-1"], "--seed must be"),
        (["--output", "no/such/folder/loss.png"], "there is no folder no/such/folder"),
        (["--output", "loss.xyz"], "--output"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_silly_option_gives_one_line(tmp_path: Path, arguments: list[str], message: str) -> None:
    assert_one_line(train(tmp_path, *arguments), message)


def assert_one_line(done: subprocess.CompletedProcess, message: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert not done.stdout
