"""Train the transformer of train.py on several processes or machines, each with its part of every batch:

    mlx.launch -n 2 --backend ring -- $(which python) $PWD/examples/data_parallel.py

`python examples/data_parallel.py` alone trains on whole batches, with nearly the same losses. Rank 0 prints. At the end
parameters and optimizer's state of all ranks are compared, bit for bit: if they differ, the exit status is 1. (mlx.launch
itself ends with 0, and says which rank did not.)
"""

import argparse
import sys
from time import perf_counter
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from text_data import BadInput, Corpus, read_text
from train import OneLineParser, learning_rate_schedule, number, whole_number
from transformer import Transformer, mean_loss

import mlx_fused_adam as fused

REPORT_EVERY = 20  # steps


def parse_arguments(arguments: list[str] | None, ranks: int) -> argparse.Namespace:
    parser = OneLineParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add(
        "text",
        nargs="?",
        default=argparse.SUPPRESS,
        help="UTF-8 text file; by default Python's documentation",
    )
    add("--device", choices=["cpu", "gpu"], default=argparse.SUPPRESS, help="by default MLX's own")
    add("--steps", type=whole_number, default=150, help="batches to train on")
    add("--batch-size", type=whole_number, default=8, help="pieces of text, of all ranks together")
    add("--context", type=whole_number, default=64, help="characters the model looks back")
    add("--dims", type=whole_number, default=96, help="width of the model")
    add("--heads", type=whole_number, default=4, help="attention heads of a layer")
    add("--layers", type=whole_number, default=2, help="transformer layers")
    add("--learning-rate", type=number, default=5e-3, help="its peak, after warming up")
    add("--seed", type=int, default=0, help="of parameters and batches, the same on every rank")
    options = parser.parse_args(arguments)
    if options.dims % options.heads:
        parser.error(f"--dims {options.dims} is not a multiple of --heads {options.heads}")
    if options.batch_size % ranks:
        parser.error(f"--batch-size {options.batch_size} is not a multiple of the {ranks} ranks")
    if "device" in options:
        mx.set_default_device({"cpu": mx.cpu, "gpu": mx.gpu}[options.device])
    try:
        options.corpus = Corpus(read_text(getattr(options, "text", None)), options.context)
    except BadInput as error:
        parser.error(str(error))
    return options


def differing(tree: Any, group: mx.distributed.Group) -> list[str]:
    """The paths of those arrays that do not have the same bits on all ranks."""
    found = []
    for path, x in tree_flatten(tree):
        mine = x.reshape(-1).view(mx.uint8)
        of_all = mx.distributed.all_gather(mine, group=group).reshape(group.size(), -1)
        if not mx.all(of_all == of_all[:1]).item():
            found.append(path)
    return found


def main(arguments: list[str] | None = None) -> None:
    group = mx.distributed.init()
    rank, ranks = group.rank(), group.size()
    options = parse_arguments(arguments, ranks)
    corpus = options.corpus

    def say(text: str) -> None:
        if rank == 0:
            print(text, flush=True)

    # The same seed on every rank: all begin with the same parameters, and draw the same batches.
    mx.random.seed(options.seed)
    model = Transformer(
        len(corpus.characters), options.context, options.dims, options.heads, options.layers
    )
    optimizer = fused.AdamW(
        learning_rate_schedule(options.learning_rate, options.steps),
        betas=[0.9, 0.98],
        weight_decay=0.1,
        bias_correction=True,
        max_grad_norm=1.0,
        skip_nonfinite=True,
    )
    optimizer.init(model.trainable_parameters())
    loss_and_gradients = nn.value_and_grad(model, mean_loss)

    # Not compiled: on a CPU the processes of one machine would write MLX's compiled kernels over each other.
    def step(inputs: mx.array, targets: mx.array) -> mx.array:
        loss, gradients = loss_and_gradients(model, inputs, targets)
        optimizer.update(model, nn.average_gradients(gradients, group))
        return mx.distributed.all_sum(loss, group=group) / ranks

    count = sum(x.size for _, x in tree_flatten(model.parameters()))
    each = options.batch_size // ranks
    say(
        f"{count:,} parameters, ranks: {ranks}, pieces of text on each: {each}, updates by: {optimizer.backend}"
    )
    start = perf_counter()
    for i in range(1, options.steps + 1):
        batch = corpus.batch(corpus.train, options.batch_size)
        loss = step(*(mx.split(x, ranks)[rank] for x in batch))
        mx.eval(loss, model.parameters(), optimizer.state)
        if i % REPORT_EVERY == 0 or i in (1, options.steps):
            say(f"step {i} of {options.steps}: loss {loss.item():.3f}")
    say(f"{perf_counter() - start:.0f} s")

    different = differing({"parameters": model.parameters(), "state": optimizer.state}, group)
    if ranks == 1:
        say("One rank: no others to compare its parameters with")
    elif different:
        say(
            f"Parameters and state of the {ranks} ranks: {len(different)} tensors differ, first {different[0]}"
        )
    else:
        say(f"Parameters and state of all {ranks} ranks: bit-equal")
    # Until rank 0 has printed: mlx.launch ends all ranks when one has failed.
    mx.eval(mx.distributed.all_sum(mx.zeros(ranks), group=group))
    if different:
        sys.exit(1)


if __name__ == "__main__":
    main()
