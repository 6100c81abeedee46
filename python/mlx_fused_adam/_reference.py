"""mlx.optimizers' own Adam and AdamW under names that `install` leaves alone, for comparisons."""

import mlx.optimizers as optim


class Adam(optim.Adam):
    """As in mlx.optimizers."""


class AdamW(optim.AdamW):
    """As in mlx.optimizers."""
