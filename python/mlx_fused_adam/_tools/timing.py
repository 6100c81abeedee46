"""Time several implementations side by side: warm-up, turns, median and quartiles. Used by the report and bench/.

Each implementation takes a turn in every round, in random order, so that drift of the machine affects all alike. A turn
is a pause, an untimed step and some timed ones: torch's OpenMP threads spin for about 10 ms after a step and would slow
the next implementation; after the pause an implementation's own threads must wake before its times count.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

Step = Callable[[], object]

PAUSE_SECONDS = 0.02
TURN_SECONDS = 0.04  # fast steps are repeated until a turn takes about this long
MOST_REPEATS = 50
MOST_ROUNDS = 15
LONG_STEP_SECONDS = 0.5  # a step this long needs no untimed one before it


@dataclass(frozen=True)
class Timing:
    """Seconds per step."""

    median: float
    low: float  # the quartiles: half of all samples lie between
    high: float
    samples: int

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0], 1)
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(statistics.median(seconds), low, high, len(seconds))


def measure(
    steps: Mapping[str, Step],
    seconds: float,
    fewest_rounds: int,
    on_round: Callable[[float], None] = lambda fraction: None,
) -> dict[str, Timing]:
    """Time each step. All together take about ``seconds``, or longer if ``fewest_rounds`` of slow steps need it."""
    with _no_garbage_collection():
        cost = {name: _warm_up(step) for name, step in steps.items()}
        is_long = {name: cost[name] > LONG_STEP_SECONDS for name in steps}
        repeats = {name: min(MOST_REPEATS, max(1, round(TURN_SECONDS / cost[name]))) for name in steps}
        round_seconds = sum(PAUSE_SECONDS + (1 + repeats[name]) * cost[name] for name in steps)
        rounds = max(fewest_rounds, min(MOST_ROUNDS, int(seconds / round_seconds)))

        # The first call of a long step counts, and it sits out the last round.
        samples = {name: [cost[name]] if is_long[name] else [] for name in steps}
        for done, order in enumerate(_orders(list(steps), rounds)):
            for name in order:
                if is_long[name]:
                    if done + 1 < rounds:
                        samples[name].append(_seconds_of(steps[name]))
                    continue
                time.sleep(PAUSE_SECONDS)
                steps[name]()
                samples[name] += [_seconds_of(steps[name]) for _ in range(repeats[name])]
            on_round((done + 1) / rounds)
    return {name: Timing.of(values) for name, values in samples.items()}


def _orders(names: list[str], rounds: int) -> Iterator[list[str]]:
    generator = random.Random(0)
    for _ in range(rounds):
        yield generator.sample(names, len(names))


def _warm_up(step: Step) -> float:
    """The seconds of a warm step; of a long one, those of its first call."""
    seconds = _seconds_of(step)
    if seconds < LONG_STEP_SECONDS:
        seconds = min(_seconds_of(step) for _ in range(3))
    return seconds


def _seconds_of(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
