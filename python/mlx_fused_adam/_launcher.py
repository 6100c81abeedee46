"""python -m mlx_fused_adam run: any training script or module, with `install` done first; its child processes too.

This process becomes the one that runs the script (exec), so that its exit status, tracebacks, arguments, signals and
`__main__` are what they are without. _startup/sitecustomize.py brings `start` into it, and into every
Python that inherits its environment.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, NoReturn

from . import __version__, _backends, _ext
from ._install import Installation, install

OPTIONS = "MLX_FUSED_ADAM_OPTIONS"  # the environment variable; JSON
_STARTUP = str(Path(__file__).with_name("_startup"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--adam-options",
        metavar="JSON",
        type=_options,
        help=f"options of Adam and AdamW for code that cannot pass them, as '{{\"max_grad_norm\": 1.0}}'; default: {OPTIONS}",
    )
    parser.add_argument("-m", action="store_true", dest="is_module", help="run a module")
    parser.add_argument("target", metavar="SCRIPT|MODULE")
    parser.add_argument("arguments", metavar="ARGS", nargs=argparse.REMAINDER)


def run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> NoReturn:
    """Become the Python that runs the script, with the environment that has its optimizers replaced."""
    if sys.flags.ignore_environment or sys.flags.no_site:
        parser.error(
            "Python must be started without -E, -I and -S, which keep optimizers as they are"
        )
    environment = dict(os.environ)
    if arguments.adam_options is not None:
        environment[OPTIONS] = json.dumps(arguments.adam_options)
    else:
        try:
            _options(os.environ.get(OPTIONS, "{}"))
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
        command += ["-m", arguments.target]
    else:
        command.append(_script(arguments.target))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [*command, *arguments.arguments], environment)


def start() -> None:
    """Replaces the optimizers of a process that the launcher or its children started; says so, and what came of it."""
    options = _options(os.environ.get(OPTIONS, "{}"))
    installation = install(**options)
    given = ", ".join(f"{name}={x!r}" for name, x in options.items())
    _say(
        f"{__version__}: mlx.optimizers.Adam and AdamW are the fused ones from here on"
        + (f", with {given}" if given else "")
    )
    atexit.register(_say_result, installation)


def _say_result(installation: Installation) -> None:
    built = ", ".join(f"{count} {name}" for name, count in installation.built.items())
    if not built:
        return _say("no Adam or AdamW was built")
    backends = zip((_ext.cpu_backend(), _ext.gpu_backend()), _ext.updated_tensors(), strict=True)
    counts = [f"{name} updated {count:,} tensors" for (name, *_), count in backends if count]
    reasons = _backends.reasons()
    _say("; ".join([f"built {built}", *(counts or ["no kernel has updated anything"]), *reasons]))


def _say(line: str) -> None:
    rank = os.environ.get("MLX_RANK")
    print(f"mlx-fused-adam{f' (rank {rank})' if rank else ''}: {line}", file=sys.stderr, flush=True)


def _options(text: str) -> dict[str, Any]:
    """Options as JSON, checked.

    Raises:
        argparse.ArgumentTypeError: If it is no JSON object, or not of options that there are.
    """
    try:
        options = json.loads(text)
        if not isinstance(options, dict):
            raise ValueError(f"options must be a JSON object but got {text}")
        install(**options).undo()
    except (TypeError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return options


def _flags() -> list[str]:
    """What this Python was given before `-m mlx_fused_adam`."""
    given = sys.orig_argv[1:]
    for i in range(len(given) - 1):
        if given[i : i + 2] == ["-m", __package__]:
            return given[:i]
    return []


def _script(target: str) -> str:
    """A file as it is; else a command that was installed beside this Python, or is on the PATH."""
    if os.path.exists(target) or os.path.dirname(target):
        return target
    beside = os.path.dirname(sys.executable)
    return shutil.which(target, path=beside) or shutil.which(target) or target
