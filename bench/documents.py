"""Documents whose figures are made, not typed: what stands between `<!-- bench:NAME -->` and `<!-- end -->`.

Used by readme.py, for what was measured, and by scale.py, for what is computed.
"""

import re
from collections.abc import Callable
from pathlib import Path

BLOCK = re.compile(r"(<!-- bench:([a-z-]+) -->).*?(<!-- end -->)", re.DOTALL)


def filled(text: str, content_of: Callable[[str], str]) -> str:
    """The text with every block made anew, by its name."""

    def made(match: re.Match) -> str:
        content = content_of(match[2])
        if "\n" in content:
            content = f"\n\n{content}\n\n"
        return match[1] + content + match[3]

    return BLOCK.sub(made, text)


def rewrite(document: Path, content_of: Callable[[str], str], check: bool) -> bool:
    """Whether its figures were others; they are made anew unless this is a `check`."""
    old = document.read_text(encoding="utf-8")
    new = filled(old, content_of)
    if new != old and not check:
        document.write_text(new, encoding="utf-8")
    return new != old
