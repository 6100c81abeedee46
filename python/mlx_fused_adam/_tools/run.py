"""python -m mlx_fused_adam run: run any training script or module after `install`, in its child processes too.

This process becomes the script's (exec), so that exit status, tracebacks, arguments, signals and `__main__` are those
of a plain run. startup/sitecustomize.py calls `start` in it, and in every Python that inherits its environment.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx

from .. import __version__, _backends, _ext
from .install import Installation, install, log

OPTIONS = "MLX_FUSED_ADAM_OPTIONS"  # the environment variable; JSON
_PACKAGE = "mlx_fused_adam"
_STARTUP = str(Path(__file__).with_name("startup"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adam-options",
        metavar="JSON",
        type=_checked,
        help="options of Adam and AdamW for code that cannot pass them, "
        f"as '{{\"max_grad_norm\": 1.0}}'; default: ${OPTIONS}",
    )
    parser.add_argument("-m", action="store_true", dest="is_module", help="run a module")
    # One argument takes all: with two, argparse would drop a "--" between them.
    parser.add_argument("command_line", metavar="SCRIPT|MODULE ARGS", nargs=argparse.REMAINDER)


def run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> NoReturn:
    """Become the Python that runs the script, in an environment that installs the fused optimizers."""
    if sys.flags.ignore_environment or sys.flags.no_site:
        parser.error("Python must be started without -E, -I and -S, which disable PYTHONPATH or sitecustomize")
    # Some Pythons' argparse removes a leading "--", others keep it.
    given = arguments.command_line
    target, *rest = given[given[:1] == ["--"] :] or [None]
    if target is None:
        parser.error("SCRIPT or -m MODULE is required")
    if os.pathsep in _STARTUP:
        parser.error(f"{_STARTUP} must not contain {os.pathsep!r}, which separates folders of PYTHONPATH")
    environment = dict(os.environ)
    if arguments.adam_options is not None:
        environment[OPTIONS] = json.dumps(arguments.adam_options)
    else:
        try:
            _checked(os.environ.get(OPTIONS) or "{}")
        except argparse.ArgumentTypeError as error:
            parser.error(f"{OPTIONS}: {error}")
    # In PYTHONPATH an empty entry is the current folder; an empty variable is no entry.
    others = environment.get("PYTHONPATH")
    folders = [x for x in others.split(os.pathsep) if x != _STARTUP] if others else []
    environment["PYTHONPATH"] = os.pathsep.join([_STARTUP, *folders])
    command = [sys.executable, *_flags()]
    command += ["-m", target] if arguments.is_module else [_script(target)]
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed by the parent process
            stream.flush()
    os.execve(sys.executable, [*command, *rest], environment)


def start() -> None:
    """Install the fused optimizers in this process; log it, and at exit what they did."""
    options = _parsed(os.environ.get(OPTIONS) or "{}")
    installation = install(**options)
    installation.is_logged = True  # by the line below
    given = ", ".join(f"{name}={x!r}" for name, x in options.items())
    log(
        f"{__version__}: mlx.optimizers.Adam and AdamW are the fused ones from here on"
        + (f", with {given}" if given else "")
    )
    atexit.register(_say_result, installation)


def _say_result(installation: Installation) -> None:
    def counted(what: Counter[str]) -> str:
        return ", ".join(f"{count} {name}" for name, count in what.items())

    parts = [f"built {counted(installation.built) or 'no Adam or AdamW'}"]
    if installation.kept:
        parts.append(f"{counted(installation.kept)} stayed as it was")
    if unused := installation.unused:
        parts.append(f"not used, since no optimizer that was built takes it: {', '.join(unused)}")
    backends = zip((_ext.cpu_backend(), _ext.gpu_backend()), _ext.updated_tensors(), strict=True)
    counts = [f"{name} ran {count:,} updates of tensors" for (name, *_), count in backends if count]
    if installation.built and not counts:
        counts = ["no kernel has updated anything"]
    if installation.built:
        peak = mx.get_peak_memory()
        counts.append(f"peak memory {peak / 1e9:.3g} GB" if peak >= 1e9 else f"peak memory {peak / 1e6:.3g} MB")
    log("; ".join([*parts, *counts, *_backends.reasons()]))


def _parsed(text: str) -> dict[str, Any]:
    """Options from JSON, unchecked.

    Raises:
        ValueError: If the text is not a JSON object.
    """
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        example = '{"max_grad_norm": 1.0}'
        raise ValueError(f"options must be JSON in single quotes, as {example!r}, but got {text}: {error}") from None
    if not isinstance(options, dict):
        raise ValueError(f"options must be a JSON object but got {text}")
    return options


def _checked(text: str) -> dict[str, Any]:
    """Options from JSON, checked by `install`.

    Raises:
        argparse.ArgumentTypeError: If they are not JSON or not valid options.
    """
    try:
        options = _parsed(text)
        install(**options).undo()
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return options


def _flags() -> list[str]:
    """This Python's arguments before `-m mlx_fused_adam`."""
    given = sys.orig_argv[1:]
    for i, word in enumerate(given):
        if word == f"-m{_PACKAGE}":
            return given[:i]
        if re.fullmatch("-[A-Za-z]*m", word) and given[i + 1 : i + 2] == [_PACKAGE]:
            others = word.removesuffix("m")
            return given[:i] + [others] * (others != "-")
    return []


def _script(target: str) -> str:
    """A file or folder that Python can run, or the path of a command beside this Python or on PATH."""
    is_runnable = os.path.isfile(target) or os.path.isfile(os.path.join(target, "__main__.py"))
    if is_runnable or os.path.dirname(target):
        return target
    beside = os.path.dirname(sys.executable)
    return shutil.which(target, path=beside) or shutil.which(target) or target
