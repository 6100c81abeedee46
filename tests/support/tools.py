"""Tests that need a heavy tool (the extra "tools"): skipped without it, and run alone by `pytest -m tools`."""

import importlib.util
from collections.abc import Callable

import pytest


def why_not(*modules: str) -> str:
    """Why nothing works that needs these modules; empty if all are installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if not missing:
        return ""
    return f"needs {', '.join(missing)}: pip install 'mlx-fused-adam[tools]'"


def needs(*modules: str) -> Callable:
    """Marks a test."""
    reason = why_not(*modules)
    skip = pytest.mark.skipif(bool(reason), reason=reason)
    return lambda test: pytest.mark.tools(skip(test))


def module_needs(*modules: str) -> pytest.MarkDecorator:
    """The mark of a test file that cannot be imported without these modules."""
    __tracebackhide__ = True  # the skip is reported at the caller's line
    if reason := why_not(*modules):
        pytest.skip(reason, allow_module_level=True)
    return pytest.mark.tools
