"""Numbers as tables show them, Markdown tables, and JSON files."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NONE = "–"


def seconds_text(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.2f} ms" if seconds < 0.01 else f"{seconds * 1e3:.1f} ms"
    return f"{seconds:.2f} s"


def bytes_text(count: float | None) -> str:
    if count is None:
        return NONE
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    if count >= 1e3:
        return f"{count / 1e6:.0f} MB" if count >= 1e8 else f"{count / 1e6:.3g} MB"
    return f"{count:.0f} bytes"


def number(x: float | None) -> str:
    """Three digits or so."""
    if x is None:
        return NONE
    return f"{x:.2f}" if x < 10 else f"{x:.1f}" if x < 100 else f"{x:.0f}"


def percent(x: float | None, digits: int = 0, sign: str = "") -> str:
    return NONE if x is None else f"{100 * x:{sign}.{digits}f} %".replace("-", "−")


def table(columns: list[str], rows: Iterable[list[str]], left: int = 1) -> str:
    """A Markdown table; the columns after the first ``left`` ones hold numbers."""
    lines = [columns, ["---" if i < left else "--:" for i in range(len(columns))], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def save_json(path: Path, results: dict[str, Any]) -> None:
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
