"""Train a small decoder-only transformer on real text: `python examples/train.py [FILE]`.

Shows loss, speed and the optimizer's share while it runs, then a sample of generated text, and
saves the loss curve. `--compare` trains a second copy with mlx.optimizers.AdamW, step for step from
the same seed. `--checkpoint FILE` saves the run every 100 steps and at its end; `--resume` goes on from
there, bit for bit. Ctrl-C ends the training early: sample and curve are then those of the steps so far,
and the exit status is 130. Needs MLX and this package; tqdm and matplotlib
(`pip install '.[examples]'`) make progress and picture nicer.
"""

import argparse
import math
import os
import signal
import statistics
import sys
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import Any, NoReturn

import mlx_fused_adam as fused  # first: it knows the command that mends a missing part of MLX

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as stock
from checkpoint import load, save
from loss_plot import save_loss_plot, smoothed
from mlx.utils import tree_flatten
from progress import progress_bar
from text_data import BadInput, Corpus, read_text
from transformer import Transformer, generate, mean_loss

SPLIT_EVERY = 10  # steps; see Run.split_step
SAVE_EVERY = 100  # steps
ESTIMATE_AFTER = 12  # steps, the first of which compile
INTERRUPTED = 130  # exit status, as a shell gives it for Ctrl-C
PICTURES = (".png", ".svg", ".pdf", ".jpg")


class Run:
    """One model with its optimizer, and the record of its training."""

    def __init__(
        self, name: str, kind: type[stock.AdamW], corpus: Corpus, options: argparse.Namespace
    ):
        mx.random.seed(options.seed)
        self.name = name
        self.model = Transformer(
            len(corpus.characters), options.context, options.dims, options.heads, options.layers
        )
        self.optimizer = kind(
            learning_rate_schedule(options.learning_rate, options.steps),
            betas=[0.9, 0.98],
            weight_decay=options.weight_decay,
            bias_correction=True,
        )
        self.optimizer.init(self.model.trainable_parameters())
        self.loss_and_gradients = nn.value_and_grad(self.model, mean_loss)
        self.state = [self.model.state, self.optimizer.state]
        mx.eval(self.state)
        self._whole = mx.compile(self._train, inputs=self.state, outputs=self.state)
        self._gradients = mx.compile(self._differentiate, inputs=[self.model.state])
        self._update = mx.compile(self._apply, inputs=self.state, outputs=self.state)
        self.losses: list[float] = []
        self.step_seconds: list[float] = []
        self.update_seconds: list[float] = []
        self.split_seconds: list[float] = []

    def _train(self, inputs: mx.array, targets: mx.array) -> mx.array:
        loss, gradients = self.loss_and_gradients(self.model, inputs, targets)
        self.optimizer.update(self.model, gradients)
        return loss

    def _differentiate(self, inputs: mx.array, targets: mx.array) -> tuple[mx.array, Any]:
        parameters = self.model.trainable_parameters()
        result = self.loss_and_gradients(self.model, inputs, targets)
        self.model.update(parameters)  # value_and_grad leaves its tracers in the model
        return result

    def _apply(self, gradients: Any) -> None:
        self.optimizer.update(self.model, gradients)

    def step(self, inputs: mx.array, targets: mx.array, split: bool) -> None:
        start = perf_counter()
        loss = self.split_step(inputs, targets) if split else self.whole_step(inputs, targets)
        self.step_seconds.append(perf_counter() - start)
        self.losses.append(loss.item())

    def whole_step(self, inputs: mx.array, targets: mx.array) -> mx.array:
        loss = self._whole(inputs, targets)
        mx.eval(loss, self.state)
        return loss

    def split_step(self, inputs: mx.array, targets: mx.array) -> mx.array:
        """The same step in two parts, so that the update can be timed.

        A compiled step is one graph, with no moment at which the update begins; hence every tenth
        step evaluates the gradients first and the update, compiled by itself, after them.
        """
        start = perf_counter()
        loss, gradients = self._gradients(inputs, targets)
        mx.eval(loss, gradients)
        middle = perf_counter()
        self._update(gradients)
        mx.eval(self.state)
        end = perf_counter()
        self.update_seconds.append(end - middle)
        self.split_seconds.append(end - start)
        return loss

    @property
    def step_time(self) -> float:
        return statistics.median(_without_compilation(self.step_seconds, 2))

    @property
    def update_time(self) -> float:
        return statistics.median(_without_compilation(self.update_seconds, 1))

    @property
    def is_timed(self) -> bool:
        """Whether there are times other than those of calls that compile."""
        return len(self.update_seconds) > 1 and len(self.step_seconds) > 2

    @property
    def update_share(self) -> float:
        return self.update_time / statistics.median(_without_compilation(self.split_seconds, 1))

    def held_out_loss(self, corpus: Corpus, batches: int = 8, batch_size: int = 16) -> float:
        total = 0.0
        for _ in range(batches):
            total += mean_loss(self.model, *corpus.batch(corpus.held_out, batch_size)).item()
        return total / batches


def _without_compilation(seconds: list[float], compiling: int) -> list[float]:
    """The first calls compile; they are left out as long as there are others."""
    return seconds[compiling:] or seconds


def learning_rate_schedule(peak: float, steps: int) -> Any:
    """Linear warm-up over the first twentieth, then a cosine down to a tenth."""
    warm_up = max(1, steps // 20)
    return stock.join_schedules(
        [
            stock.linear_schedule(peak / 10, peak, warm_up),
            stock.cosine_decay(peak, max(1, steps - warm_up), end=peak / 10),
        ],
        [warm_up],
    )


class StopOnInterrupt:
    """While entered, the first Ctrl-C asks for an end after the step; the second ends the program.

    So that no step is left half done: one model a step ahead of the other, or a graph half traced,
    which is also why the second raises nothing.
    """

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "StopOnInterrupt":
        self.previous = signal.signal(signal.SIGINT, self._interrupted)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.previous)

    def _interrupted(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(INTERRUPTED)
        self.requested = True


def train(runs: list[Run], corpus: Corpus, options: argparse.Namespace) -> bool:
    """Every run takes each step in turn, on the same batch: the machine's moods hit both.

    Returns whether all steps were done, that is, not ended early by Ctrl-C.
    """
    tokens_per_step = options.batch_size * options.context
    first = len(runs[0].losses)
    for _ in range(first):  # the batches before: drawn again, so that the next ones are the same
        corpus.batch(corpus.train, options.batch_size)
    bar = progress_bar(options.steps, first)
    with StopOnInterrupt() as stop:
        for i in bar:
            batch = corpus.batch(corpus.train, options.batch_size)
            mx.eval(batch)
            for run in runs if i % 2 else reversed(runs):
                # The second step too, since the first one's time is that of compiling.
                run.step(*batch, split=i % SPLIT_EVERY == 0 or i == first + 1)
            if i + 1 == first + ESTIMATE_AFTER < options.steps:
                seconds = (options.steps - i) * sum(run.step_time for run in runs)
                names = " and ".join(run.name for run in runs)
                bar.say(f"{options.steps} steps of {names}: about {duration(seconds)} to go")
            if i % 5 == 0 or i == options.steps - 1:
                bar.show(progress_of(runs, tokens_per_step))
            is_last = stop.requested or i == options.steps - 1
            if options.checkpoint and (is_last or i % SAVE_EVERY == SAVE_EVERY - 1):
                ours = runs[-1]
                save(options.checkpoint, ours.model, ours.optimizer, ours.losses, label_of(options))
            if stop.requested:
                break
    bar.close()
    return len(runs[0].losses) == options.steps


def label_of(options: argparse.Namespace) -> str:
    """What must be alike for one run to go on where another ended."""
    names = "steps batch_size context dims heads layers learning_rate weight_decay seed".split()
    settings = ", ".join(f"{name} {getattr(options, name)}" for name in names)
    return f"{settings}, {len(options.corpus.text)} characters"


def duration(seconds: float) -> str:
    return f"{max(1, seconds):.0f} s" if seconds < 100 else f"{seconds / 60:.0f} minutes"


def progress_of(runs: list[Run], tokens_per_step: int) -> list[str]:
    """What to say beside the bar, the most important first; of two runs, their figures in turn."""

    def each(form: str, figures: list[float]) -> str:
        return " / ".join(form.format(figure) for figure in figures)

    parts = [f"loss {each('{:.3f}', [smoothed(run.losses[-100:])[-1] for run in runs])}"]
    if all(run.is_timed for run in runs):
        parts.append(f"optimizer {each('{:.2%}', [run.update_share for run in runs])}")
        speeds = [tokens_per_step / run.step_time for run in runs]
        parts.append(f"{each('{:,.0f}', speeds)} tokens/s")
    return parts


def report(runs: list[Run], corpus: Corpus, options: argparse.Namespace) -> None:
    for run in runs:
        mx.random.seed(options.seed)
        times = "too few steps to time"
        if run.is_timed:
            times = (
                f"{1e3 * run.step_time:.1f} ms a step, {1e3 * run.update_time:.2f} ms of it "
                f"optimizer ({100 * run.update_share:.2f}%)"
            )
        print(
            f"{run.name}: loss from {run.losses[0]:.3f} to {smoothed(run.losses)[-1]:.3f}, "
            f"{run.held_out_loss(corpus):.3f} held out; {times}; "
            f"{sum(run.step_seconds):.0f} s in all"
        )
        if not math.isfinite(run.losses[-1]):
            print(f"{run.name}: training diverged; try a lower --learning-rate")


def report_comparison(ours: Run, theirs: Run) -> None:
    different = [
        i
        for i, pair in enumerate(zip(ours.losses, theirs.losses, strict=True), 1)
        if pair[0] != pair[1]
    ]
    steps = len(ours.losses)
    if different:
        print(f"losses: {len(different)} of {steps} steps differ, the first is step {different[0]}")
    else:
        print(f"losses: bit-identical at each of the {steps} steps")
    unequal = [
        path
        for (path, a), (_, b) in zip(
            *(tree_flatten(run.state) for run in (ours, theirs)), strict=True
        )
        if not mx.array_equal(a, b)
    ]
    print(
        f"parameters and state after the last step: {len(unequal)} tensors differ"
        if unequal
        else "parameters and state after the last step: bit-identical"
    )
    if not (ours.is_timed and theirs.is_timed):
        return
    print(
        f"optimizer time: {1e3 * theirs.update_time:.2f} ms {theirs.name}, "
        f"{1e3 * ours.update_time:.2f} ms {ours.name}: "
        f"{in_words(ours.update_time, theirs.update_time)}; "
        f"whole step: {in_words(ours.step_time, theirs.step_time)}"
    )


def in_words(ours: float, theirs: float) -> str:
    """How our time compares with theirs: in percent of theirs, or as a factor from 2 on."""
    if ours >= 2 * theirs:
        return f"{ours / theirs:.1f} times as slow"
    if theirs >= 2 * ours:
        return f"{theirs / ours:.1f} times as fast"
    percent = round(100 * (ours / theirs - 1), 1)
    if percent == 0:
        return "as fast"
    return f"{abs(percent)} % {'slower' if percent > 0 else 'faster'}"


def show_sample(run: Run, corpus: Corpus, options: argparse.Namespace) -> None:
    """Continue the first words of the held-out text, which the model has not seen."""
    prompt = corpus.text[corpus.train.size :].partition("\n\n")[2][: options.context]
    prompt = prompt.rpartition(" ")[0] or corpus.text[: options.context]
    mx.random.seed(options.seed)
    tokens = generate(
        run.model, corpus.encode(prompt), options.sample, options.context, options.temperature
    )
    print(f"\nSample, after the prompt {prompt!r}:\n{corpus.decode(tokens)}\n")


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def whole_number(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1 but got {value}")
    return value


def number(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive but got {text}")
    return value


def number_or_zero(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be at least 0 but got {text}")
    return value


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add(
        "text",
        nargs="?",
        default=argparse.SUPPRESS,
        help="UTF-8 text file; by default Python's documentation",
    )
    add("--compare", action="store_true", help="also train with mlx.optimizers.AdamW")
    add("--device", choices=["cpu", "gpu"], default=argparse.SUPPRESS, help="by default MLX's own")
    add("--steps", type=whole_number, default=900, help="batches to train on")
    add("--batch-size", type=whole_number, default=8, help="pieces of text in a batch")
    add("--context", type=whole_number, default=64, help="characters the model looks back")
    add("--dims", type=whole_number, default=96, help="width of the model")
    add("--heads", type=whole_number, default=4, help="attention heads of a layer")
    add("--layers", type=whole_number, default=2, help="transformer layers")
    add("--learning-rate", type=number, default=5e-3, help="its peak, after warming up")
    add("--weight-decay", type=number_or_zero, default=0.1, help="of AdamW")
    add("--seed", type=int, default=0, help="of parameters, batches and sample")
    add("--sample", type=whole_number, default=400, help="characters to generate at the end")
    add("--temperature", type=number, default=0.7, help="of the sample")
    add("--checkpoint", type=Path, default=argparse.SUPPRESS, help="file to save the run in")
    add("--resume", action="store_true", help="go on from the --checkpoint")
    add("--output", type=Path, default=Path("loss.png"), help="picture of the loss curve")
    options = parser.parse_args(arguments)
    if options.dims % options.heads:
        parser.error(f"--dims {options.dims} is not a multiple of --heads {options.heads}")
    if not 0 <= options.seed < 2**64:
        parser.error(f"--seed must be from 0 to 2**64 - 1 but got {options.seed}")
    options.checkpoint = getattr(options, "checkpoint", None)
    if options.resume and not options.checkpoint:
        parser.error("--resume needs --checkpoint FILE")
    if options.checkpoint and options.compare:
        parser.error("--checkpoint goes without --compare")
    if options.checkpoint and not options.checkpoint.parent.is_dir():
        parser.error(f"--checkpoint: there is no folder {options.checkpoint.parent}")
    if options.output.suffix.lower() not in PICTURES:
        parser.error(f"--output: {options.output} must end in one of {', '.join(PICTURES)}")
    if not options.output.parent.is_dir():
        parser.error(f"--output: there is no folder {options.output.parent}")
    if options.output.is_dir() or not os.access(options.output.parent, os.W_OK):
        parser.error(f"--output: {options.output} cannot be written")
    if "device" in options:
        device = {"cpu": mx.cpu, "gpu": mx.gpu}[options.device]
        if not mx.is_available(device):
            parser.error(f"--device: this MLX has no {options.device} here")
        mx.set_default_device(device)
    try:
        options.corpus = Corpus(read_text(getattr(options, "text", None)), options.context)
    except BadInput as error:
        parser.error(str(error))
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    corpus = options.corpus
    runs = [Run("fused", fused.AdamW, corpus, options)]
    if options.compare:
        runs.insert(0, Run("stock", stock.AdamW, corpus, options))
    ours = runs[-1]
    count = sum(x.size for _, x in tree_flatten(ours.model.parameters()))
    print(
        f"{count:,} parameters, {len(corpus.text):,} characters of text, "
        f"updates by: {ours.optimizer.backend}"
    )
    if options.compare:
        print("Beside the bar, figures are those of stock / fused", flush=True)
    mx.random.seed(options.seed)
    if options.resume:
        try:
            ours.losses = load(options.checkpoint, ours.model, ours.optimizer, label_of(options))
        except BadInput as error:
            sys.exit(f"train.py: error: {error}")
        print(f"Going on after step {len(ours.losses)}", flush=True)
    completed = train(runs, corpus, options)
    if not completed:
        steps = len(ours.losses)
        print(f"\nInterrupted: what follows is of the first {steps} of {options.steps} steps")
    report(runs, corpus, options)
    if options.compare:
        report_comparison(ours, runs[0])
    show_sample(ours, corpus, options)
    try:
        picture = save_loss_plot(options.output, {run.name: run.losses for run in runs})
    except OSError as error:
        sys.exit(f"train.py: the loss curve could not be saved: {error}")
    print(f"Loss curve: {picture}")
    if not completed:
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
