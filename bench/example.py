"""The pieces of examples/train.py: its model, text, schedule and defaults. The folder of examples is no package."""

import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
if str(EXAMPLES) not in sys.path:
    sys.path.append(str(EXAMPLES))

from text_data import Corpus, read_text  # noqa: E402
from train import (  # noqa: E402
    Transformer,
    learning_rate_schedule,
    mean_loss,
    parse_arguments,
)

__all__ = [
    "Corpus",
    "Transformer",
    "learning_rate_schedule",
    "mean_loss",
    "parse_arguments",
    "read_text",
    "smoothed",
]


def smoothed(losses: list[float], memory: float = 0.95) -> list[float]:
    """A running mean that forgets; its first values are means of what there is."""
    mean, weight, result = 0.0, 0.0, []
    for loss in losses:
        mean = memory * mean + (1 - memory) * loss
        weight = memory * weight + (1 - memory)
        result.append(mean / weight)
    return result
