"""The contenders' names, as tables and the JSON file have them."""

OURS, OURS_COMPILED = "ours", "ours, compiled"
STOCK, STOCK_COMPILED = "stock", "stock, compiled"
STOCK_CLIPPED, STOCK_CLIPPED_COMPILED = "stock, clipped", "stock, clipped, compiled"
TORCH, PROBE, PROBE_16_BIT = "torch fused", "probe", "16-bit probe"
FORWARD_BACKWARD = "forward + backward"  # of a whole training step, without any update


def with_threads(count: int) -> str:
    return "ours, 1 thread" if count == 1 else f"ours, {count} threads"
