"""Fine-tune a model with mlx-lm's trainer; save adapters and optimizer, so that a later run continues bit for bit.

    python examples/mlx_lm_resume.py --model MODEL --data FOLDER --iters 100 --folder adapters
    python examples/mlx_lm_resume.py --model MODEL --data FOLDER --iters 200 --folder adapters --resume

mlx-lm's own command saves the adapters alone, so its `--resume-adapter-file` restarts Adam.
Needs `pip install '.[cpu,integration]'`.
"""

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
    sys.exit(f"mlx_lm_resume.py: {error}; install what it needs: pip install '.[cpu,integration]'")

LORA = {"rank": 8, "scale": 20.0, "dropout": 0.0}
VALIDATION_BATCHES = 1


class SaveOptimizer(TrainingCallback):
    """Saves the optimizer whenever mlx-lm reports a loss; here it saves the adapters in the same iterations."""

    def __init__(self, optimizer: fused.AdamW, file: Path) -> None:
        self._optimizer = optimizer
        self._file = file

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        fused.save_optimizer(self._file, self._optimizer)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--model", required=True, help="a folder, or a name on the Hugging Face hub")
    add("--data", required=True, help="a folder with train.jsonl and valid.jsonl")
    add("--folder", type=Path, default="adapters", help="where to save (default: %(default)s)")
    add("--fine-tune-type", choices=["lora", "full"], default="lora", help="default: %(default)s")
    add("--iters", type=int, default=100, help="in all, with those before (default: %(default)s)")
    add("--save-every", type=int, default=10, help="iterations (default: %(default)s)")
    add("--batch-size", type=int, default=4, help="default: %(default)s")
    add("--learning-rate", type=float, default=1e-5, help="default: %(default)s")
    add("--resume", action="store_true", help="continue from the files in the folder")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    mx.random.seed(0)
    np.random.seed(0)
    model, tokenizer = load(options.model)
    files = types.SimpleNamespace(data=options.data, train=True, test=False)
    train_set, valid_set, _ = load_dataset(files, tokenizer)
    train_set, valid_set = CacheDataset(train_set), CacheDataset(valid_set)
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
        done = optimizer.step.item()
        print(f"Continuing after iteration {done}")
    iterations = options.iters - done
    if iterations < 1:
        sys.exit(f"--iters must be more than the {done} that are done but got {options.iters}")
    options.folder.mkdir(parents=True, exist_ok=True)

    def batches(dataset: CacheDataset, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """mlx-lm's batches: for training those not done yet, in an order that validation does not change."""
        drawn = iterate_batches(dataset, *args, **kwargs)
        if dataset is train_set:
            return itertools.islice(drawn, done, None)
        order = np.random.get_state()
        for_validation = list(itertools.islice(drawn, VALIDATION_BATCHES))
        np.random.set_state(order)
        return iter(for_validation)

    train(
        model,
        optimizer,
        train_set,
        valid_set,
        TrainingArgs(
            batch_size=options.batch_size,
            iters=iterations,
            val_batches=VALIDATION_BATCHES,
            steps_per_report=options.save_every,
            steps_per_eval=iterations,
            steps_per_save=options.save_every,
            adapter_file=adapters,
        ),
        iterate_batches=batches,
        training_callback=SaveOptimizer(optimizer, optimizer_file),
    )
    print(f"Trained {options.iters} iterations by {optimizer.backend}: {adapters}, {optimizer_file}")


if __name__ == "__main__":
    main()
