"""Characters as token ids, and batches of them; a tenth of the text is held out.

The default text is the prose of Python's language reference, which every CPython carries (`pydoc_data.topics`).
"""

import textwrap
from pathlib import Path

import mlx.core as mx


def read_text(path: str | None) -> str:
    return _python_prose() if path is None else Path(path).read_text(encoding="utf-8")


def _python_prose() -> str:
    """The paragraphs that are sentences, not code, grammar or tables."""
    from pydoc_data.topics import topics

    def is_prose(paragraph: str) -> bool:
        letters = sum(c.isalpha() or c.isspace() for c in paragraph)
        is_sentence = paragraph[:1].isupper() and paragraph.count(" ") >= 5
        return is_sentence and letters > 0.85 * len(paragraph)

    paragraphs = (textwrap.dedent(p) for topic in topics.values() for p in topic.split("\n\n"))
    return "\n\n".join(filter(is_prose, paragraphs))


class Corpus:
    """A text as ids: `train`, `held_out`, and batches of either."""

    def __init__(self, text: str, context: int):
        held_out = len(text) // 10
        if held_out <= context:
            raise ValueError(
                f"{len(text)} characters are too few: a context of {context} needs {10 * (context + 1)} "
                "(a tenth is held out)"
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

    def batch(self, tokens: mx.array, size: int, key: mx.array | None = None) -> tuple[mx.array, mx.array]:
        """Inputs and targets, one character apart: `size` windows at random places."""
        starts = mx.random.randint(0, tokens.size - self.context, (size, 1), key=key)
        windows = tokens[starts + mx.arange(self.context + 1)]
        return windows[:, :-1], windows[:, 1:]
