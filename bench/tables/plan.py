"""Which options fit which model on which Mac, computed as `python -m mlx_fused_adam plan` computes it: the tables of
docs/options.md and docs/scale.md.
"""

from collections.abc import Callable

from mlx_fused_adam._tools.plan import CHOICES, MODELS, Choice, fitting, peaks, usable

from .names import as_code
from .text import NONE, table

MACS = (8, 16, 24, 32, 48, 64, 96, 128, 256, 512)  # GB of memory
SHOWN = [name for name, model in MODELS.items() if 4e8 < model.parameters < 1e11]
LARGE = ("Llama-3.1-8B", "Qwen2.5-32B", "Llama-3.1-70B", "Llama-3.1-405B")
MACS_OF_RANKS = (16, 32, 64, 128, 512)
MOST_RANKS = 1024


def _code(choice: Choice) -> str:
    return f"`{as_code(choice.options)}`" if choice.options else "none"


def choices() -> str:
    rows = [
        [str(i), choice.dtype, _code(choice), *(f"{x:g}" for x in (choice.weight, choice.state, choice.stored))]
        for i, choice in enumerate(CHOICES, 1)
    ]
    return table(["", "parameters", "options", "weights", "state", "B/param"], rows, left=3)


def fits() -> str:
    """The number of the most exact choice that fits, without and with clipping."""
    rows = []
    for name in SHOWN:
        pairs = [fitting(MODELS[name], usable(mac)) for mac in MACS]
        numbers = [[str(CHOICES.index(choice) + 1) if choice else NONE for choice in pair] for pair in pairs]
        rows.append([name, *map(" / ".join, numbers)])
    return table(["model", *(f"{mac} GB" for mac in MACS)], rows)


def fewest_ranks(choice: Choice, name: str, mac: int, case: int) -> int | None:
    """The number of Macs that hold a model, a power of two; None if more than 1024."""
    powers = (2**i for i in range(MOST_RANKS.bit_length()))
    return next((n for n in powers if peaks(choice, MODELS[name], n)[case if n > 1 else 0] <= usable(mac)), None)


def ranks() -> str:
    """For the most exact choice and the smallest of large models."""
    rows = []
    for name in LARGE:
        for choice in (CHOICES[0], CHOICES[-1]):
            pairs = [[fewest_ranks(choice, name, mac, case) for case in (0, 1)] for mac in MACS_OF_RANKS]
            cells = [" / ".join(NONE if n is None else str(n) for n in pair) for pair in pairs]
            rows.append([name, choice.dtype, _code(choice), *cells])
    return table(["model", "parameters", "options", *(f"{mac} GB" for mac in MACS_OF_RANKS)], rows, left=3)


TABLES: dict[str, Callable[[], str]] = {"choices": choices, "fits": fits, "ranks": ranks}
