"""Fine-tunes a model by mlx-lm's own trainer, and saves adapters and optimizer so that a later run goes on bit for bit.

    python examples/mlx_lm_resume.py --model MODEL --data FOLDER --iters 100 --folder adapters
    python examples/mlx_lm_resume.py --model MODEL --data FOLDER --iters 200 --folder adapters --resume

mlx-lm's command saves adapters alone; with another optimizer's state, its `--resume-adapter-file` begins Adam anew.
Needs `pip install '.[cpu,integration]'`.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

import mlx_fused_adam as fused

try:
    from mlx_lm.tuner.datasets import CacheDataset, load_dataset
    from mlx_lm.tuner.trainer import TrainingArgs, TrainingCallback, iterate_batches, train
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load
except ImportError as error:
    sys.exit(
        f"mlx_lm_resume.py: {error}; install what it needs with: pip install '.[cpu,integration]'"
    )

LORA = {"rank": 8, "scale": 20.0, "dropout": 0.0}


class SaveOptimizer(TrainingCallback):
    """Saves the optimizer whenever mlx-lm reports a loss, which it does in the same iterations as it saves adapters."""

    def __init__(self, optimizer: fused.AdamW, file: Path) -> None:
        self._optimizer = optimizer
        self._file = file

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        fused.save_optimizer(self._file, self._optimizer)


def with_own_random_numbers(batches: Iterator[Any]) -> Iterator[Any]:
    """mlx-lm draws the order of training and of validation from NumPy's one generator; here neither disturbs the other."""
    own = np.random.RandomState(0).get_state()
    while True:
        others = np.random.get_state()
        np.random.set_state(own)
        batch = next(batches, None)
        own = np.random.get_state()
        np.random.set_state(others)
        if batch is None:
            return
        yield batch


def main() -> None:
    parser = argparse.ArgumentParser(prog="mlx_lm_resume.py", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--model", required=True, help="a folder, or a name on the Hugging Face hub"
    )
    parser.add_argument("--data", required=True, help="a folder with train.jsonl and valid.jsonl")
    parser.add_argument("--folder", type=Path, default=Path("adapters"), help="default: adapters")
    parser.add_argument("--fine-tune-type", choices=["lora", "full"], default="lora")
    parser.add_argument("--iters", type=int, default=100, help="in all, resumed ones included")
    parser.add_argument("--save-every", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--resume", action="store_true", help="go on from the folder's files")
    options = parser.parse_args()

    mx.random.seed(0)
    np.random.seed(0)
    model, tokenizer = load(options.model)
    files = types.SimpleNamespace(data=options.data, train=True, test=False)
    train_set, valid_set, _ = load_dataset(files, tokenizer)
    model.freeze()
    if options.fine_tune_type == "full":
        for layer in model.layers:
            layer.unfreeze()
    else:
        linear_to_lora_layers(model, len(model.layers), LORA)

    optimizer = fused.AdamW(options.learning_rate)
    optimizer.init(model.trainable_parameters())
    adapters = options.folder / "adapters.safetensors"
    optimizer_file = options.folder / "optimizer.safetensors"
    done = 0
    if options.resume:
        model.load_weights(str(adapters), strict=False)
        fused.load_optimizer(optimizer_file, optimizer)
        done = int(optimizer.step.item())
        print(f"Going on after iteration {done}.")
    options.folder.mkdir(parents=True, exist_ok=True)

    train_set, valid_set = CacheDataset(train_set), CacheDataset(valid_set)

    def not_yet_seen(dataset: CacheDataset, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """mlx-lm's batches, for training in an order of their own and without those that are done."""
        batches = iterate_batches(dataset, *args, **kwargs)
        if dataset is valid_set:
            return batches
        return itertools.islice(with_own_random_numbers(batches), done, None)

    iterations = options.iters - done
    if iterations < 1:
        sys.exit(f"--iters must be more than the {done} that are done but got {options.iters}")
    train(
        model,
        optimizer,
        train_set,
        valid_set,
        TrainingArgs(
            batch_size=options.batch_size,
            iters=iterations,
            val_batches=1,
            steps_per_report=options.save_every,
            steps_per_eval=iterations,
            steps_per_save=options.save_every,
            adapter_file=adapters,
        ),
        iterate_batches=not_yet_seen,
        training_callback=SaveOptimizer(optimizer, optimizer_file),
    )
    print(
        f"Trained {options.iters} iterations with {optimizer.backend}: {adapters}, {optimizer_file}"
    )


if __name__ == "__main__":
    main()
