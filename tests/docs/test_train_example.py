"""The example that trains a language model: tiny runs as a user starts them, in a terminal too, and bad input."""

import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "train.py"
sys.path.append(str(SCRIPT.parent))
import progress  # noqa: E402
import train as example  # noqa: E402

TINY = ["--steps", "25", "--batch-size", "2", "--context", "16", "--dims", "16", "--heads", "2",
        "--layers", "1", "--sample", "20"]  # fmt: skip
if (
    os.environ.get("DEVICE") == "cpu"
):  # else MLX's own default, or the environment that conftest.py has entered
    TINY += ["--device", "cpu"]

# Runs the script as if the named modules were not installed.
WITHOUT = """
import runpy, sys
for name in {modules}: sys.modules[name] = None
sys.path.insert(0, {folder!r})
sys.argv = {argv}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def command(*arguments: str, without: tuple[str, ...] = ()) -> list[str]:
    command = [str(SCRIPT), *arguments]
    if without:
        code = WITHOUT.format(modules=without, folder=str(SCRIPT.parent), argv=command)
        command = ["-c", code]
    return [sys.executable, *command]


def train(
    folder: Path, *arguments: str, without: tuple[str, ...] = ()
) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*arguments, without=without),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


class Terminal:
    """The script with its stderr on a terminal of so many columns; stdout goes to a file."""

    def __init__(self, folder: Path, columns: int, *arguments: str, without: tuple[str, ...] = ()):
        self.columns = columns
        self.screen, its_end = pty.openpty()
        fcntl.ioctl(its_end, termios.TIOCSWINSZ, struct.pack("4H", 24, columns, 0, 0))
        self.output = folder / "stdout.txt"
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                command(*arguments, without=without), cwd=folder, stdout=output, stderr=its_end
            )
        os.close(its_end)
        self.drawn = ""

    def read(self) -> Iterator[None]:
        """What is drawn, piece by piece, until the script ends."""
        while True:
            if not select.select([self.screen], [], [], 100)[0]:
                raise TimeoutError(f"nothing drawn for 100 s after {self.drawn[-200:]!r}")
            try:
                piece = os.read(self.screen, 1 << 16)
            except OSError:  # Linux's way of saying that nobody writes any more
                piece = b""
            if not piece:
                self.process.wait(timeout=100)
                return
            self.drawn += piece.decode(errors="replace")
            yield

    def finish(self) -> str:
        for _ in self.read():
            pass
        return self.output.read_text()

    def close(self) -> None:
        os.close(self.screen)
        self.process.kill()
        self.process.wait()

    def lines(self) -> list[str]:
        """Every state of the line that the cursor is on, escape sequences left out."""
        plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", self.drawn)
        return [line for line in re.split(r"[\r\n]+", plain) if line.strip()]


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """terminal(columns, arguments…, without=()) starts the script on one; it ends with the test."""
    started = []

    def start(columns: int, *arguments: str, without: tuple[str, ...] = ()) -> Terminal:
        started.append(Terminal(tmp_path, columns, *arguments, without=without))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.mark.parametrize("columns", [40, 60, 80])
@pytest.mark.parametrize("without", [(), ("tqdm",)], ids=["tqdm", "plain"])
def test_progress_fits_the_terminal(
    terminal: Callable[..., Terminal], columns: int, without: tuple[str, ...]
) -> None:
    started = terminal(columns, *TINY, "--compare", without=without)
    started.finish()
    assert started.process.returncode == 0, started.drawn
    widest = max(started.lines(), key=len)
    assert len(widest) < columns, widest
    assert started.drawn.count("\n") <= 2, started.drawn  # after the bar, and its estimate
    last = started.lines()[-1]
    assert "25/25" in last
    if columns >= 60:
        assert re.search(r"loss [\d.]+ / [\d.]+", last)
    if columns == 80:
        assert re.search(r"optimizer [\d.]+% / [\d.]+%", last)


def test_the_plain_bar_draws_ten_times_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    written = []

    class Screen:
        def isatty(self) -> bool:
            return True

        def fileno(self) -> int:
            raise OSError

        def write(self, text: str) -> None:
            written.append(text)

        def flush(self) -> None:
            pass

    clock = iter(i / 1000 for i in range(10_000))
    monkeypatch.setattr(progress, "monotonic", lambda: next(clock))
    monkeypatch.setattr(sys, "stderr", Screen())
    bar = progress.PlainProgress(2000)
    for _ in bar:
        pass
    assert 18 <= len(written) <= 22
    bar.close()
    assert "2000/2000" in written[-2] and written[-1] == "\n"


@pytest.mark.parametrize("extra", [[], ["--compare"]], ids=["alone", "compare"])
def test_ctrl_c_keeps_what_there_is(
    terminal: Callable[..., Terminal], tmp_path: Path, extra: list[str]
) -> None:
    started = terminal(80, *TINY, "--steps", "1000000", *extra)
    for _ in started.read():
        if "loss" in started.drawn:
            started.process.send_signal(signal.SIGINT)
            break
    output = started.finish()
    assert started.process.returncode == 130, started.drawn
    steps = int(re.search(r"of the first (\d+) of 1000000 steps", output).group(1))
    assert 0 < steps < 1000000
    assert "Sample, after the prompt" in output
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    if extra:
        assert f" {steps} steps" in re.search(r"^losses: .*", output, re.M).group()
    assert "Traceback" not in started.drawn


def test_a_second_ctrl_c_leaves_at_once(terminal: Callable[..., Terminal], tmp_path: Path) -> None:
    started = terminal(80, *TINY, "--steps", "1000000", "--sample", "1000000")
    for _ in started.read():
        if "loss" in started.drawn:
            break
    # In the middle of a step, or when the long sample is being generated: nobody knows.
    for _ in range(2):
        started.process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    started.finish()
    assert started.process.returncode == 130, started.drawn
    assert "Traceback" not in started.drawn
    assert not (tmp_path / "loss.png").exists()


@pytest.mark.parametrize("extra", [[], ["--compare"]], ids=["alone", "compare"])
def test_says_once_how_long_it_takes(tmp_path: Path, extra: list[str]) -> None:
    done = train(tmp_path, *TINY, *extra)
    names = "stock and fused" if extra else "fused"
    found = re.findall(rf"^25 steps of {names}: about \d+ (?:s|minutes) to go$", done.stdout, re.M)
    assert len(found) == 1, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        (1.0, 0.998, "0.2 % slower"),
        (0.998, 1.0, "0.2 % faster"),
        (1.0, 1.0, "as fast"),
        (1.0001, 1.0, "as fast"),
        (1.0, 1.9, "47.4 % faster"),
        (1.0, 4.3, "4.3 times as fast"),
        (4.3, 1.0, "4.3 times as slow"),
    ],
)
def test_speeds_in_words(ours: float, theirs: float, words: str) -> None:
    assert example.in_words(ours, theirs) == words


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "1 s"), (42, "42 s"), (99.4, "99 s"), (330, "6 minutes")]
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert example.duration(seconds) == words


def test_default_text(tmp_path: Path, process_backend: str) -> None:
    done = train(tmp_path, *TINY)
    assert done.returncode == 0, done.stderr
    assert f"updates by: {process_backend}\n" in done.stdout
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


def test_compare(tmp_path: Path, process_backend: str) -> None:
    done = train(tmp_path, *TINY, "--compare")
    assert done.returncode == 0, done.stderr
    if process_backend == "cpu":  # a parameter may be a rounding off on a GPU
        assert "losses: bit-identical at each of the 25 steps" in done.stdout
        assert "parameters and state after the last step: bit-identical" in done.stdout
    last = re.findall(r"^(?:stock|fused): loss from [\d.]+ to ([\d.]+)", done.stdout, re.M)
    assert float(last[0]) == pytest.approx(float(last[1]), rel=0.01)
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


def figures(output: str) -> str:
    """What a run prints, but for times and speeds."""
    return re.sub(r"[\d.,]+ (ms|s|tokens/s)\b|\([\d.]+%\)", "", output)


def test_a_resumed_run_ends_as_one_that_did_not_stop(tmp_path):
    """Stopped by Ctrl-C, at whatever step that comes."""
    whole = train(tmp_path, *TINY, "--steps", "400", "--output", "whole.svg")
    file = tmp_path / "run"
    arguments = [*TINY, "--steps", "400", "--checkpoint", str(file)]
    process = subprocess.Popen(
        command(*arguments), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    started = time.monotonic()
    while not file.exists() and time.monotonic() < started + 120:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    first, _ = process.communicate(timeout=120)
    names = sorted(path.name for path in tmp_path.iterdir() if path.name.startswith("run"))
    if process.returncode == example.INTERRUPTED:
        done = int(re.search(r"of the first (\d+) of 400 steps", first)[1])
    else:
        assert process.returncode == 0
        done = 400
    assert names == ["run", f"run.model-{done}.safetensors"]
    again = train(tmp_path, *arguments, "--resume")
    assert again.returncode == 0, again.stderr
    assert f"Going on after step {done}\n" in again.stdout
    rest = again.stdout.replace(f"Going on after step {done}\n", "").replace("loss.png", "")
    assert figures(rest) == figures(whole.stdout.replace("whole.svg", ""))


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    arguments = [*TINY, "--checkpoint", "run"]
    assert train(tmp_path, *arguments).returncode == 0
    for more, message in (
        (["--seed", "3"], "run is of a run with other settings"),
        (["--checkpoint", "none"], "none"),
    ):
        other = train(tmp_path, *arguments, *more, "--resume")
        assert other.returncode != 0 and "Traceback" not in other.stderr
        assert message in other.stderr
    for wrong, message in (
        (["--resume"], "--resume needs --checkpoint FILE"),
        (["--checkpoint", "x", "--compare"], "--checkpoint goes without --compare"),
        (["--checkpoint", "no/x"], "--checkpoint: there is no folder no"),
    ):
        other = train(tmp_path, *TINY, *wrong)
        assert other.returncode == 2 and message in other.stderr
