"""Training of the character model with m and v stored in a simulated way (storage.py), for bench/quantized_state.py.

MLX computes gradients, NumPy the update.
"""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..speed.reference import Settings, adam
from .character_model import Text, Transformer, learning_rate_schedule, mean_loss
from .gradients import BLOCK
from .storage import Storage, Stored
from .training_runs import (
    BATCH_SIZE,
    FINE_TUNING,
    FROM_SCRATCH,
    HELD_OUT_BATCH_SIZE,
    HELD_OUT_BATCHES,
    SMALL,
    Regime,
    Weights,
)

HEAVY_TAILS = replace(FROM_SCRATCH, name="heavy tails")  # examples count by a Pareto distribution of infinite variance
REGIMES = (FROM_SCRATCH, HEAVY_TAILS, FINE_TUNING, replace(FINE_TUNING, name="at 2e-5", learning_rate=2e-5))
FEWEST = 4096  # elements of a parameter whose state is quantized


def held_out_loss(regime: Regime, m: Storage, v: Storage, steps: int, start: Weights) -> float:
    """After training; ``start`` has the weights of a model that was trained before."""
    text = Text(SMALL.context, regime.text)
    mx.random.seed(0)
    random = np.random.default_rng(5)
    model = Transformer(text.vocabulary, SMALL)
    if regime.is_trained_before:
        model.load_weights([(path, mx.array(x)) for path, x in start.items()])

    def loss(inputs: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
        return (nn.losses.cross_entropy(model(inputs), targets) * weights).mean()

    gradients_of = mx.compile(nn.value_and_grad(model, loss), inputs=[model.state])
    weights = {path: np.array(x, np.float64) for path, x in tree_flatten(model.parameters())}
    moments = {path: [np.zeros(x.shape), np.zeros(x.shape)] for path, x in weights.items()}
    stores = {
        path: [Stored(s, i == 0, (x.size // BLOCK, BLOCK), seed=i) for i, s in enumerate((m, v))]
        for path, x in weights.items()
        if x.size >= FEWEST
    }
    schedule = learning_rate_schedule(regime.learning_rate, steps)
    for step in range(1, steps + 1):
        rate = schedule(mx.array(step)).item() if regime.falls else regime.learning_rate
        counts = 1 + random.pareto(1.5, (BATCH_SIZE, 1)) if regime is HEAVY_TAILS else np.ones((BATCH_SIZE, 1))
        batch = text.batch(text.train, BATCH_SIZE)
        _, gradients = gradients_of(*batch, mx.array(counts.astype(np.float32)))
        settings = Settings(rate, weight_decay=0.1, bias_correction=True)
        for path, gradient in tree_flatten(gradients):
            g = np.array(gradient, np.float64)
            weights[path], *moments[path] = adam(weights[path], g, *moments[path], step, settings)
            for i, stored in enumerate(stores.get(path, ())):
                stored.put(moments[path][i].astype(np.float32).reshape(-1, BLOCK))
                moments[path][i] = stored.values.reshape(g.shape).astype(np.float64)
        model.load_weights([(path, mx.array(x.astype(np.float32))) for path, x in weights.items()])
    mx.random.seed(0)
    batches = (text.batch(text.held_out, HELD_OUT_BATCH_SIZE) for _ in range(HELD_OUT_BATCHES))
    return float(np.mean([mean_loss(model, *batch).item() for batch in batches]))
