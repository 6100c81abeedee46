"""Writes tables into README.md and docs/, between `<!-- bench:NAME -->` and `<!-- end -->`, from bench/results.

`python bench/write_tables.py` writes them all; a command with `--publish` does so after its run. Prose is written by
hand.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from . import finetuning, plan, precision, quantized_state, speed, text

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "bench" / "results"
BLOCK = re.compile(r"(<!-- bench:([a-z0-9-]+) -->).*?(<!-- end -->)", re.DOTALL)


class Table(NamedTuple):
    """The content of a block: a function of published results, and the command that makes these."""

    make: Callable[..., str]
    results: tuple[str, ...]  # names of JSON files
    command: str


def _of(command: str, *results: str, **makers: Callable[..., str]) -> dict[str, Table]:
    return {name.replace("_", "-"): Table(make, results, command) for name, make in makers.items()}


TABLES: dict[str, Table] = {
    **_of(
        "bench/finetuning.py --publish",
        "finetuning",
        headline=finetuning.headline,  # README.md
        finetuning=finetuning.markdown,
    ),
    **_of(
        "bench/run.py --publish",
        "cpu",
        training=speed.training,
        summary=speed.summary,
        falls_short=speed.worst_cases,
        clipping=speed.clipping,
        origin=speed.origin,
    ),
    **_of("bench/precision.py --publish", "precision", "cpu", options=precision.options),
    **_of("bench/quantized_state.py --publish", "int8_state", int8_state=quantized_state.markdown),
    **_of("bench/quantized_state.py --bits 4 --publish", "int4_state", int4_state=quantized_state.markdown),
    **_of("bench/write_tables.py", **plan.TABLES),
}


def load(name: str) -> dict[str, Any]:
    return text.load_json(RESULTS / f"{name}.json")


def filled(document: str, load: Callable[[str], dict[str, Any]] = load) -> str:
    """The text with every block filled. An unknown name is a KeyError."""

    def made(match: re.Match) -> str:
        table = TABLES[match[2]]
        content = table.make(*map(load, table.results))
        if content.startswith("|"):  # else one line within a paragraph
            content = f"\n<!-- made by: python {table.command} -->\n\n{content}\n\n"
        return match[1] + content + match[3]

    return BLOCK.sub(made, document)


def documents() -> list[Path]:
    """All that may have blocks."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def write(check: bool = False) -> list[Path]:
    """The documents whose tables were out of date; unless this is a ``check``, they are written."""
    changed = []
    for document in documents():
        old = document.read_text(encoding="utf-8")
        new = filled(old)
        if new != old:
            changed.append(document)
            if not check:
                document.write_text(new, encoding="utf-8")
    return changed
