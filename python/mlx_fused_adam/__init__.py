"""Drop-in replacements for mlx.optimizers.Adam and AdamW that update in one pass over memory, in place.

Use: ``import mlx_fused_adam as fused; optimizer = fused.AdamW(learning_rate=1e-3)``.
"""

from importlib.metadata import version as _version

from ._compatibility import check_mlx as _check_mlx

_check_mlx()  # before the extension is loaded: with another mlx it might crash

from . import _backends, _threads  # noqa: E402
from ._checkpoints import load_optimizer, save_optimizer  # noqa: E402
from ._ext import num_threads, set_num_threads  # noqa: E402
from ._multi_optimizer import MultiOptimizer  # noqa: E402
from ._operation import adam_update  # noqa: E402
from ._optimizers import Adam, AdamW  # noqa: E402
from ._state import stock_state  # noqa: E402
from ._tools.install import Installation, install, installed, uninstall  # noqa: E402

# A bad environment variable is an error at import, not in the middle of a training run.
set_num_threads(_threads.default_num_threads())
_backends.forced_backend()

__version__ = _version("mlx-fused-adam")

__all__ = [
    "Adam", "AdamW", "Installation", "MultiOptimizer", "adam_update", "install", "installed", "load_optimizer",
    "num_threads", "save_optimizer", "set_num_threads", "stock_state", "uninstall",
]  # fmt: skip
