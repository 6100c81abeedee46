"""Train the model of train.py on several processes or machines, each with its part of every batch:

    mlx.launch -n 2 --backend ring -- $(which python) $PWD/examples/data_parallel.py

Without mlx.launch it trains on whole batches, with nearly the same losses. Rank 0 prints. At the end the parameters and
optimizer states of all ranks are compared, bit for bit; if they differ, the exit status is 1. (mlx.launch itself exits
0 even if a rank fails; it prints which.)
"""

import sys
from time import perf_counter
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from command_line import parse, shared_options
from mlx.utils import tree_flatten
from train import learning_rate_schedule, make_model, mean_loss

import mlx_fused_adam as fused

REPORT_EVERY = 20  # steps


def differing(tree: Any, group: mx.distributed.Group) -> list[str]:
    """The paths of the arrays whose bits are not the same on all ranks."""
    found = []
    for path, x in tree_flatten(tree):
        of_this_rank = x.reshape(1, -1).view(mx.uint8)
        of_all = mx.distributed.all_gather(of_this_rank, group=group)
        if not mx.all(of_all == of_this_rank).item():
            found.append(path)
    return found


def main(arguments: list[str] | None = None) -> None:
    group = mx.distributed.init()
    rank, ranks = group.rank(), group.size()
    parser = shared_options(__doc__.splitlines()[0].rstrip(":"))
    parser.set_defaults(steps=150)
    options = parse(parser, arguments)
    if options.batch_size % ranks:
        parser.error(f"--batch-size {options.batch_size} is not a multiple of the {ranks} ranks")
    corpus = options.corpus

    def report(text: str) -> None:
        if rank == 0:
            print(text, flush=True)

    # With the same seed, all ranks start from the same parameters and draw the same batches.
    model = make_model(options)
    optimizer = fused.AdamW(
        learning_rate_schedule(options.learning_rate, options.steps),
        betas=[0.9, 0.98],
        weight_decay=options.weight_decay,
        bias_correction=True,
        max_grad_norm=1.0,
        skip_nonfinite=True,
    )
    optimizer.init(model.trainable_parameters())
    loss_and_gradients = nn.value_and_grad(model, mean_loss)
    report(f"ranks: {ranks}, pieces of text on each: {options.batch_size // ranks}, updates by: {optimizer.backend}")
    start = perf_counter()
    # Not compiled: on a CPU the processes of one machine would overwrite each other's compiled kernels.
    for step in range(1, options.steps + 1):
        batch = corpus.batch(corpus.train, options.batch_size)
        inputs, targets = (mx.split(x, ranks)[rank] for x in batch)
        loss, gradients = loss_and_gradients(model, inputs, targets)
        optimizer.update(model, nn.average_gradients(gradients, group))
        loss = mx.distributed.all_sum(loss, group=group) / ranks
        mx.eval(loss, model.parameters(), optimizer.state)
        if step % REPORT_EVERY == 0 or step in (1, options.steps):
            report(f"step {step} of {options.steps}: loss {loss.item():.3f}")
    report(f"{perf_counter() - start:.0f} s")

    different = differing({"parameters": model.parameters(), "state": optimizer.state}, group)
    if ranks == 1:
        report("One rank: no others to compare with")
    elif different:
        report(f"{len(different)} tensors differ between ranks, the first is {different[0]}")
    else:
        report(f"Parameters and state of all {ranks} ranks: bit-identical")
    # mlx.launch ends all ranks as soon as one fails: wait until rank 0 has printed.
    mx.eval(mx.distributed.all_sum(mx.zeros(ranks), group=group))
    if different:
        sys.exit(1)


if __name__ == "__main__":
    main()
