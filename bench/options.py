"""Ours with its options: each one's name in tables and files, and what Adam or AdamW is given for it."""

from typing import Any

BF16_STATE = "ours, bfloat16 state"
INT8_STATE = "ours, int8 state"
STOCHASTIC = "ours, stochastic rounding"
INT8_STOCHASTIC = "ours, int8 state, stochastic rounding"
MASTER = "ours, master weights"
MASTER_FP32 = "ours, master weights + float32 state"
MASTER_INT8 = "ours, master weights + int8"
GUARDED = "ours, clipping + guard"

OPTIONS: dict[str, dict[str, Any]] = {
    BF16_STATE: {"state_dtype": "bfloat16"},
    INT8_STATE: {"state_dtype": "int8"},
    STOCHASTIC: {"stochastic_rounding": True},
    INT8_STOCHASTIC: {"state_dtype": "int8", "stochastic_rounding": True},
    MASTER: {"master_weights": True},
    MASTER_FP32: {"master_weights": True, "state_dtype": "float32"},
    MASTER_INT8: {"master_weights": True, "state_dtype": "int8"},
    # So large a norm that nothing is clipped, and results are those of a plain step.
    GUARDED: {"max_grad_norm": 1e6, "skip_nonfinite": True},
}

# Those about storage that make sense for parameters of a dtype.
OF_FLOAT32 = (BF16_STATE, INT8_STATE)
OF_BFLOAT16 = (MASTER, INT8_STATE, MASTER_INT8)
ALL_OF_BFLOAT16 = (STOCHASTIC, INT8_STATE, INT8_STOCHASTIC, MASTER, MASTER_FP32, MASTER_INT8)


def as_code(options: dict[str, Any]) -> str:
    """As they are typed in a call."""

    def typed(x: Any) -> str:
        return f'"{x}"' if isinstance(x, str) else f"{x:g}" if isinstance(x, float) else str(x)

    return ", ".join(f"{name}={typed(x)}" for name, x in options.items())
