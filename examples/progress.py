"""A progress bar: tqdm's where it is installed, else a line that rewrites itself.

So that the example needs nothing but MLX and this package.
"""

import sys
from collections.abc import Iterator

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None


class PlainProgress:
    """The little of tqdm's interface that `train.py` uses."""

    def __init__(self, total: int):
        self.total = total
        self.done = 0
        self.postfix = ""

    def __iter__(self) -> Iterator[int]:
        for step in range(self.total):
            yield step
            self.done = step + 1
            self._draw()
        sys.stderr.write("\n")

    def set_postfix_str(self, text: str, refresh: bool = False) -> None:
        self.postfix = text

    def _draw(self) -> None:
        # In a log file each rewriting would be a line of its own: ten are enough there.
        if sys.stderr.isatty():
            start, end = "\r", "\x1b[K"
        elif self.done % max(1, self.total // 10) == 0 and self.done < self.total:
            start, end = "", "\n"
        else:
            return
        filled = 30 * self.done // self.total
        bar = "#" * filled + "." * (30 - filled)
        sys.stderr.write(f"{start}[{bar}] {self.done}/{self.total}  {self.postfix}{end}")
        sys.stderr.flush()


def progress_bar(total: int) -> "tqdm | PlainProgress":
    if tqdm is None:
        return PlainProgress(total)
    return tqdm(range(total), unit="step", dynamic_ncols=True)
