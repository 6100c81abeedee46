"""mlx.optimizers' own Adam and AdamW, to compare with: `install` replaces those that are built by their own names."""

import mlx.optimizers as stock


class Adam(stock.Adam):
    """As in mlx.optimizers."""


class AdamW(stock.AdamW):
    """As in mlx.optimizers."""
