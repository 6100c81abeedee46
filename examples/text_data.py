"""Text as token ids: one id per distinct character, the last tenth of the text held out.

The default text is the English prose of the language reference that every CPython carries
(`pydoc_data.topics`).
"""

import textwrap
from pathlib import Path

import mlx.core as mx


class BadInput(ValueError):
    """Input that cannot be trained on; the message says why in one line."""


def read_text(path: str | None) -> str:
    if path is None:
        return _python_prose()
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text (byte {error.start})") from error


def _python_prose() -> str:
    """The paragraphs of the language reference that are sentences, not code, grammar or tables."""
    from pydoc_data.topics import topics

    paragraphs = (textwrap.dedent(p) for topic in topics.values() for p in topic.split("\n\n"))
    return "\n\n".join(p for p in paragraphs if _is_prose(p))


def _is_prose(paragraph: str) -> bool:
    letters = sum(c.isalpha() or c.isspace() for c in paragraph)
    return paragraph[:1].isupper() and paragraph.count(" ") >= 5 and letters > 0.85 * len(paragraph)


class Corpus:
    """Characters mapped to ids, and batches of (inputs, targets) one character apart."""

    def __init__(self, text: str, context: int):
        if not text.strip():
            raise BadInput("the text is empty")
        held_out = len(text) // 10
        if held_out <= context:
            raise BadInput(
                f"the text has {len(text)} characters, but a context of {context} needs "
                f"{10 * (context + 1)} (a tenth is held out): give a longer text or less --context"
            )
        self.text = text
        self.context = context
        self.characters = sorted(set(text))
        self.ids = {character: i for i, character in enumerate(self.characters)}
        tokens = mx.array(self.encode(text), mx.uint32)
        self.train, self.held_out = tokens[:-held_out], tokens[-held_out:]

    def encode(self, text: str) -> list[int]:
        return [self.ids[character] for character in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join(self.characters[token] for token in tokens)

    def batch(self, tokens: mx.array, size: int) -> tuple[mx.array, mx.array]:
        """`size` windows from random places in `tokens`."""
        starts = mx.random.randint(0, tokens.size - self.context, (size, 1))
        windows = tokens[starts + mx.arange(self.context + 1)]
        return windows[:, :-1], windows[:, 1:]
