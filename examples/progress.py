"""A progress bar on one line: tqdm's where it is installed, else one of our own.

So that the example needs nothing but MLX and this package. What is said beside the bar is cut to
the terminal's width, since a line that wraps cannot be drawn over again.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from time import monotonic

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None

SECONDS_BETWEEN_DRAWINGS = 0.1
SMALLEST_BAR = 10


def terminal_columns() -> int | None:
    """Columns that a line may fill, or None where the progress goes to a file."""
    if not sys.stderr.isatty():
        return None
    try:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    except OSError:
        columns = 0
    # A terminal that does not say has 80. Some wrap as soon as the last column is filled.
    return max(1, (columns or 80) - 1)


def joined(parts: Sequence[str], room: int | None) -> str:
    """As many of the parts, the most important first, as fit into `room` characters."""
    text = ""
    for i, part in enumerate(parts):
        longer = f"{text}, {part}" if i else part
        if room is not None and len(longer) > room:
            break
        text = longer
    return text


class PlainProgress:
    """The little of tqdm's interface that `train.py` uses."""

    def __init__(self, total: int, start: int = 0):
        self.total = total
        self.done = start
        self.parts: Sequence[str] = ()
        self.last_drawn = -1.0

    def __iter__(self) -> Iterator[int]:
        for step in range(self.done, self.total):
            yield step
            self.done = step + 1
            self._draw()

    def show(self, parts: Sequence[str]) -> None:
        self.parts = parts

    def say(self, text: str) -> None:
        """Print a line of its own, above the bar."""
        sys.stderr.write("\r\x1b[K" if sys.stderr.isatty() else "")
        print(text, flush=True)

    def close(self) -> None:
        if sys.stderr.isatty():
            self._draw(at_once=True)
            sys.stderr.write("\n")

    def _draw(self, at_once: bool = False) -> None:
        columns = terminal_columns()
        count = f"{self.done}/{self.total}"
        if columns is None:
            # In a log file each drawing would be a line of its own: ten are enough there.
            if self.done % max(1, self.total // 10) == 0:
                sys.stderr.write(f"{count}  {joined(self.parts, None)}\n")
                sys.stderr.flush()
            return
        now = monotonic()
        if not at_once and now - self.last_drawn < SECONDS_BETWEEN_DRAWINGS:
            return
        self.last_drawn = now
        room = columns - len(count) - len("[] ")
        text = joined(self.parts, room - SMALLEST_BAR - len("  "))
        width = max(1, min(30, room - len(text) - len("  ")))
        filled = width * self.done // self.total
        line = f"[{'#' * filled}{'.' * (width - filled)}] {count}  {text}"
        sys.stderr.write(f"\r{line[:columns]}\x1b[K")
        sys.stderr.flush()


if tqdm is not None:

    class TqdmProgress(tqdm):
        def __init__(self, total: int, start: int = 0):
            # Without the percentage and the rate, which leaves room for the loss.
            form = "{bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
            columns = terminal_columns()
            steps = range(start, total)
            super().__init__(steps, initial=start, total=total, bar_format=form, ncols=columns)

        def show(self, parts: Sequence[str]) -> None:
            columns = terminal_columns()
            count = f" {self.total}/{self.total} [00:00<00:00], "
            room = None if columns is None else columns - SMALLEST_BAR - len(count)
            self.ncols = columns  # the user may have changed the window
            self.set_postfix_str(joined(parts, room), refresh=False)

        def say(self, text: str) -> None:
            """Print a line of its own, above the bar."""
            self.write(text)
            sys.stdout.flush()


def progress_bar(total: int, start: int = 0) -> "TqdmProgress | PlainProgress":
    return PlainProgress(total, start) if tqdm is None else TqdmProgress(total, start)
