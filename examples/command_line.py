"""The options that train.py and data_parallel.py share; bad input is an error of one line."""

import argparse
from collections.abc import Callable
from typing import Any, NoReturn

import mlx.core as mx
from text_data import Corpus, read_text


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


class DefaultsThatAreSet(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        is_unset = action.default is None or action.default is False
        return action.help if is_unset else super()._get_help_string(action)


def at_least(least: int, kind: type = int) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not least <= value < 2**63:
            raise argparse.ArgumentTypeError(f"must be from {least} to 2**63 but got {text}")
        return value

    parse.__name__ = kind.__name__  # for argparse's own message
    return parse


def shared_options(description: str) -> OneLineParser:
    parser = OneLineParser(description=description, formatter_class=DefaultsThatAreSet)
    add = parser.add_argument
    add("text", nargs="?", help="UTF-8 file; without it, Python's documentation")
    add("--device", choices=["cpu", "gpu"], help="without it, MLX's own choice")
    add("--steps", type=at_least(1), default=900, help="batches to train on")
    add("--batch-size", type=at_least(1), default=8, help="pieces of text per batch")
    add("--context", type=at_least(1), default=64, help="characters that the model looks back")
    add("--dims", type=at_least(1), default=96, help="width of the model")
    add("--heads", type=at_least(1), default=4, help="attention heads per layer")
    add("--layers", type=at_least(1), default=2, help="transformer layers")
    add("--learning-rate", type=at_least(0, float), default=5e-3, help="peak, after warm-up")
    add("--weight-decay", type=at_least(0, float), default=0.1, help="of AdamW")
    add("--seed", type=at_least(0), default=0, help="of parameters and batches")
    return parser


def parse(parser: OneLineParser, arguments: list[str] | None) -> argparse.Namespace:
    """Parse the options, set the device, and read the text into `options.corpus`."""
    options = parser.parse_args(arguments)
    if options.dims % options.heads:
        parser.error(f"--dims {options.dims} is not a multiple of --heads {options.heads}")
    if options.device:
        device = {"cpu": mx.cpu, "gpu": mx.gpu}[options.device]
        if not mx.is_available(device):
            parser.error(f"--device: MLX has no {options.device} here")
        mx.set_default_device(device)
    try:
        options.corpus = Corpus(read_text(options.text), options.context)
    except (OSError, ValueError) as error:
        parser.error(f"cannot train on {options.text or 'the default text'}: {error}")
    return options
