"""Names of the implementations and of the package's options, as tables and results have them."""

from typing import Any

FUSED, FUSED_COMPILED = "fused", "fused, compiled"
MLX, MLX_COMPILED = "mlx.optimizers", "mlx.optimizers, compiled"
MLX_CLIPPED, MLX_CLIPPED_COMPILED = "mlx.optimizers, clipped", "mlx.optimizers, clipped, compiled"
TORCH = "torch"
COPY = "copy"  # a plain copy that moves as many bytes as the fused update
FORWARD_BACKWARD = "forward + backward"  # a training step without any update

BF16_STATE = "fused, bfloat16 state"
INT8_STATE = "fused, int8 state"
INT4_STATE = "fused, int4 state"
NEAREST = "fused, rounding to nearest"
MASTER = "fused, master weights"
MASTER_FP32 = "fused, master weights, float32 state"
MASTER_INT8 = "fused, master weights, int8 state"
MASTER_24 = "fused, 24-bit master weights"
MASTER_24_INT8 = "fused, 24-bit master weights, int8 state"
MASTER_24_INT4 = "fused, 24-bit master weights, int4 state"
CLIPPING = "fused, clipping + skipping"

# What Adam or AdamW is given for each.
OPTIONS: dict[str, dict[str, Any]] = {
    BF16_STATE: {"state_dtype": "bfloat16"},
    INT8_STATE: {"state_dtype": "int8"},
    INT4_STATE: {"state_dtype": "int4"},
    NEAREST: {"stochastic_rounding": False},
    MASTER: {"master_weights": True},
    MASTER_FP32: {"master_weights": True, "state_dtype": "float32"},
    MASTER_INT8: {"master_weights": True, "state_dtype": "int8"},
    MASTER_24: {"master_weights": True, "master_weight_bits": 24},
    MASTER_24_INT8: {"master_weights": True, "master_weight_bits": 24, "state_dtype": "int8"},
    MASTER_24_INT4: {"master_weights": True, "master_weight_bits": 24, "state_dtype": "int4"},
    # So large a norm clips nothing: results are those of a plain step.
    CLIPPING: {"max_grad_norm": 1e6, "skip_nonfinite": True},
}

# The storage options that make sense for parameters of a dtype.
OF_FLOAT32 = (BF16_STATE, INT8_STATE)
OF_BFLOAT16 = (MASTER, INT8_STATE, MASTER_INT8)
ALL_OF_BFLOAT16 = (
    NEAREST, INT8_STATE, INT4_STATE, MASTER, MASTER_FP32, MASTER_INT8, MASTER_24, MASTER_24_INT8, MASTER_24_INT4,
)  # fmt: skip


def with_threads(count: int) -> str:
    return "fused, 1 thread" if count == 1 else f"fused, {count} threads"


def as_code(options: dict[str, Any]) -> str:
    """The options as they are typed in a call."""

    def typed(x: Any) -> str:
        return f'"{x}"' if isinstance(x, str) else f"{x:g}" if isinstance(x, float) else str(x)

    return ", ".join(f"{name}={typed(x)}" for name, x in options.items())


def in_markdown(name: str) -> str:
    """An implementation in a table: its options as code, or its name."""
    return f"`{as_code(OPTIONS[name])}`" if name in OPTIONS else name
