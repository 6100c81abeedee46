"""python -m mlx_fused_adam run: any training script or module, with `install` done first; its child processes too.

This process becomes the one that runs the script (exec), so that its exit status, tracebacks, arguments, signals and
`__main__` are what they are without. startup/sitecustomize.py brings `start` into it, and into every
Python that inherits its environment.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import json
import os
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__, _backends, _ext
from .install import Installation, install

OPTIONS = "MLX_FUSED_ADAM_OPTIONS"  # the environment variable; JSON
_PACKAGE = "mlx_fused_adam"
_STARTUP = str(Path(__file__).with_name("startup"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adam-options",
        metavar="JSON",
        type=_checked,
        help=f"options of Adam and AdamW for code that cannot pass them, as '{{\"max_grad_norm\": 1.0}}'; default: {OPTIONS}",
    )
    parser.add_argument("-m", action="store_true", dest="is_module", help="run a module")
    # One argument takes all: a second one would lose a "--" that stands between them.
    parser.add_argument("command_line", metavar="SCRIPT|MODULE ARGS", nargs=argparse.REMAINDER)


def run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> NoReturn:
    """Become the Python that runs the script, with the environment that has its optimizers replaced."""
    if sys.flags.ignore_environment or sys.flags.no_site:
        parser.error(
            "Python must be started without -E, -I and -S, which keep optimizers as they are"
        )
    given = (
        arguments.command_line
    )  # argparse of some Pythons takes a "--" before it away, that of others leaves it
    target, *rest = given[given[:1] == ["--"] :] or [None]
    if target is None:
        parser.error("SCRIPT or -m MODULE is required")
    if os.pathsep in _STARTUP:
        parser.error(f"{_STARTUP} must have no {os.pathsep!r} in it, which PYTHONPATH divides at")
    environment = dict(os.environ)
    if arguments.adam_options is not None:
        environment[OPTIONS] = json.dumps(arguments.adam_options)
    else:
        try:
            _checked(os.environ.get(OPTIONS) or "{}")
        except argparse.ArgumentTypeError as error:
            parser.error(f"{OPTIONS}: {error}")
    # An empty folder among others is the current one; an empty variable is none.
    others = environment.get("PYTHONPATH")
    folders = (
        [folder for folder in others.split(os.pathsep) if folder != _STARTUP] if others else []
    )
    environment["PYTHONPATH"] = os.pathsep.join([_STARTUP, *folders])
    command = [sys.executable, *_flags()]
    if arguments.is_module:
        command += ["-m", target]
    else:
        command.append(_script(target))
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # closed by whoever started this
            stream.flush()
    os.execve(sys.executable, [*command, *rest], environment)


def start() -> None:
    """Replaces the optimizers of a process that the launcher or its children started; says so, and what came of it."""
    options = _parsed(os.environ.get(OPTIONS) or "{}")
    installation = install(**options)
    given = ", ".join(f"{name}={x!r}" for name, x in options.items())
    _say(
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
    backends = zip((_ext.cpu_backend(), _ext.gpu_backend()), _ext.updated_tensors(), strict=True)
    counts = [f"{name} ran {count:,} updates of tensors" for (name, *_), count in backends if count]
    if installation.built and not counts:
        counts = ["no kernel has updated anything"]
    _say("; ".join([*parts, *counts, *_backends.reasons()]))


def _say(line: str) -> None:
    rank = os.environ.get("MLX_RANK")
    who = f"mlx-fused-adam (rank {rank})" if rank else "mlx-fused-adam"
    if sys.stderr is None:
        return
    # A full disk or a closed pipe is no reason to end a training run; nor to fail at exit, as a line left in a buffer would.
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
        try:
            file = sys.stderr.fileno()
        except (AttributeError, OSError):  # the program has put something else there
            print(f"{who}: {line}", file=sys.stderr, flush=True)
        else:
            os.write(file, f"{who}: {line}\n".encode())


def _parsed(text: str) -> dict[str, Any]:
    """Options as JSON; `install` checks them.

    Raises:
        ValueError: If it is no JSON object.
    """
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        example = '{"max_grad_norm": 1.0}'
        raise ValueError(
            f"options must be JSON in single quotes, as {example!r}, but got {text}: {error}"
        ) from None
    if not isinstance(options, dict):
        raise ValueError(f"options must be a JSON object but got {text}")
    return options


def _checked(text: str) -> dict[str, Any]:
    """The same, before there is a script.

    Raises:
        argparse.ArgumentTypeError: Also if they are not of the options that there are.
    """
    try:
        options = _parsed(text)
        install(**options).undo()
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return options


def _flags() -> list[str]:
    """What this Python was given before `-m mlx_fused_adam`."""
    given = sys.orig_argv[1:]
    for i, word in enumerate(given):
        if word == f"-m{_PACKAGE}":
            return given[:i]
        if re.fullmatch("-[A-Za-z]*m", word) and given[i + 1 : i + 2] == [_PACKAGE]:
            others = word.removesuffix("m")
            return given[:i] + [others] * (others != "-")
    return []


def _script(target: str) -> str:
    """What Python can run as it is; else a command that was installed beside this Python, or is on the PATH."""
    is_runnable = os.path.isfile(target) or os.path.isfile(os.path.join(target, "__main__.py"))
    if is_runnable or os.path.dirname(target):
        return target
    beside = os.path.dirname(sys.executable)
    return shutil.which(target, path=beside) or shutil.which(target) or target
