"""The pieces of examples/train.py: its model, text, schedule and defaults. The folder of examples is no package."""

import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
if str(EXAMPLES) not in sys.path:
    sys.path.append(str(EXAMPLES))

from loss_plot import smoothed  # noqa: E402
from text_data import Corpus, read_text  # noqa: E402
from train import learning_rate_schedule, parse_arguments  # noqa: E402
from transformer import Transformer, mean_loss  # noqa: E402

__all__ = [
    "Corpus",
    "Transformer",
    "learning_rate_schedule",
    "mean_loss",
    "parse_arguments",
    "read_text",
    "smoothed",
]
