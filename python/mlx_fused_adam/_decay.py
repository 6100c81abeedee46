"""The option ``decay_filter``: which parameters weight decay applies to, by a callable or regular expressions on
paths.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import mlx.core as mx

from ._warn import warn

Wanted = Callable[[str, mx.array], bool]


class DecayFilter:
    """A callable or regular expressions, checked; the answer for a path is cached.

    Raises:
        TypeError: If ``wanted`` is neither a callable nor a string or strings.
        ValueError: If a string is not a regular expression, or there is none.
    """

    def __init__(self, op: str, wanted: Any) -> None:
        self._op = op
        self.wanted = wanted
        self._known: dict[str, bool] = {}
        self._warned: set[re.Pattern[str]] = set()
        self._expressions: list[re.Pattern[str]] = []
        if callable(wanted):
            return
        texts = [wanted] if isinstance(wanted, str) else wanted
        if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
            raise TypeError(f"[{op}] decay_filter must be a callable or regular expressions but got {wanted!r}")
        if not texts:
            raise ValueError(
                f"[{op}] decay_filter must have a regular expression but got none; for no decay at all "
                "use weight_decay=0"
            )
        for text in texts:
            try:
                self._expressions.append(re.compile(text))
            except re.error as error:
                raise ValueError(f"[{op}] decay_filter must be regular expressions but got {text!r}: {error}") from None

    @property
    def described(self) -> list[str] | str:
        """The expressions, or ``"callable"``."""
        return [expression.pattern for expression in self._expressions] or "callable"

    def decays(self, path: str, parameter: mx.array) -> bool:
        """Whether weight decay applies to this parameter."""
        if path not in self._known:
            if self._expressions:
                answer: Any = any(e.search(path) for e in self._expressions)
            else:
                answer = self.wanted(path, parameter)
            if not isinstance(answer, bool):
                raise TypeError(f"[{self._op}] decay_filter must return True or False but got {answer!r} for {path}")
            self._known[path] = answer
        return self._known[path]

    def check(self, paths: Iterable[str]) -> None:
        """Warn once of an expression that matches none of the paths: it is misspelt, or its parameters are frozen."""
        paths = list(paths)
        for expression in self._expressions:
            if paths and expression not in self._warned and not any(expression.search(path) for path in paths):
                self._warned.add(expression)
                some = ", ".join(paths[:3]) + (", …" if len(paths) > 3 else "")
                warn(f"[{self._op}] decay_filter {expression.pattern!r} matches none of the parameters' paths: {some}")
