"""Train a small transformer on the characters of a text with fused AdamW: `python examples/train.py [FILE]`.

Pre-norm decoder blocks as in GPT-2 and Llama, built from `mlx.nn`; it needs MLX and this package, nothing else.
`--optimizer mlx` trains with MLX's own AdamW, to compare. With `--checkpoint FOLDER` the training is saved every 100
steps; however it ends, the same command with `--resume` continues from there, bit for bit.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import mlx_fused_adam as fused  # first: where MLX lacks its back end, this says what to install

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
from command_line import at_least, parse, shared_options
from mlx.utils import tree_flatten, tree_unflatten

REPORT_EVERY, SAVE_EVERY = 50, 100  # steps


class Block(nn.Module):
    def __init__(self, dims: int, heads: int):
        super().__init__()
        self.attention_norm = nn.RMSNorm(dims)
        self.attention = nn.MultiHeadAttention(dims, heads)
        self.feed_forward_norm = nn.RMSNorm(dims)
        self.up = nn.Linear(dims, 4 * dims)
        self.down = nn.Linear(4 * dims, dims)

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        y = self.attention_norm(x)
        x = x + self.attention(y, y, y, mask)
        return x + self.down(nn.relu(self.up(self.feed_forward_norm(x))))


class Transformer(nn.Module):
    """Token ids (batch, length), length <= context, to logits (batch, length, vocabulary)."""

    def __init__(self, vocabulary: int, context: int, dims: int, heads: int, layers: int):
        super().__init__()
        self.token = nn.Embedding(vocabulary, dims)
        self.position = nn.Embedding(context, dims)
        self.blocks = [Block(dims, heads) for _ in range(layers)]
        self.norm = nn.RMSNorm(dims)
        self.head = nn.Linear(dims, vocabulary)

    def __call__(self, tokens: mx.array) -> mx.array:
        length = tokens.shape[1]
        x = self.token(tokens) + self.position(mx.arange(length))
        mask = nn.MultiHeadAttention.create_additive_causal_mask(length, x.dtype)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


def make_model(options: argparse.Namespace) -> Transformer:
    mx.random.seed(options.seed)
    vocabulary = len(options.corpus.characters)
    return Transformer(vocabulary, options.context, options.dims, options.heads, options.layers)


def mean_loss(model: Transformer, inputs: mx.array, targets: mx.array) -> mx.array:
    """Cross entropy of the next token in nats, in float32 whatever the model's dtype."""
    logits = model(inputs).astype(mx.float32)
    return nn.losses.cross_entropy(logits, targets, reduction="mean")


def generate(model: Transformer, tokens: list[int], count: int, context: int) -> list[int]:
    """Continue `tokens` by `count` more, drawn at a temperature of 0.7."""
    for _ in range(count):
        logits = model(mx.array([tokens[-context:]]))[0, -1]
        tokens = [*tokens, mx.random.categorical(logits / 0.7).item()]
    return tokens


def learning_rate_schedule(peak: float, steps: int) -> Any:
    """Linear warm-up over the first twentieth, then a cosine down to a tenth."""
    warm_up = max(1, steps // 20)
    rise = mlx.optimizers.linear_schedule(peak / 10, peak, warm_up)
    fall = mlx.optimizers.cosine_decay(peak, max(1, steps - warm_up), end=peak / 10)
    return mlx.optimizers.join_schedules([rise, fall], [warm_up])


def train(model: Transformer, optimizer: Any, options: argparse.Namespace) -> None:
    state = [model.state, optimizer.state]
    loss_and_gradients = nn.value_and_grad(model, mean_loss)

    @partial(mx.compile, inputs=state, outputs=state)
    def train_step(inputs: mx.array, targets: mx.array) -> mx.array:
        loss, gradients = loss_and_gradients(model, inputs, targets)
        optimizer.update(model, gradients)
        return loss

    # One key for the batch of each step: a resumed training draws the batches that are left.
    keys = mx.random.split(mx.random.key(options.seed), options.steps)
    first = optimizer.step.item() + 1
    losses, start = [], perf_counter()  # since the last report
    for step in range(first, options.steps + 1):
        batch = options.corpus.batch(options.corpus.train, options.batch_size, keys[step - 1])
        loss = train_step(*batch)
        mx.eval(loss, state)
        losses.append(loss.item())
        if step in (first, 10, options.steps) or step % REPORT_EVERY == 0:
            seconds = (perf_counter() - start) / len(losses)
            speed = f"{options.batch_size * options.context / seconds:,.0f} tokens/s"
            to_go = f"{seconds * (options.steps - step):.0f} s to go"
            pace = f"{speed}, {to_go}" if step > first else f"compiled in {seconds:.0f} s"
            mean = sum(losses) / len(losses)
            print(f"step {step} of {options.steps}: loss {mean:.3f}, {pace}", flush=True)
            losses, start = [], perf_counter()
        if options.checkpoint and (step % SAVE_EVERY == 0 or step == options.steps):
            save(options.checkpoint, model, optimizer, settings(options))


def save(folder: Path, model: Transformer, optimizer: Any, settings: dict[str, str]) -> None:
    """Save the model in a file named after the step, then the optimizer, which holds the step.

    The optimizer's file is replaced atomically. So the two match, whenever the program is killed.
    """
    file = folder / f"model-{optimizer.step.item()}.safetensors"
    mx.save_safetensors(str(file), dict(tree_flatten(model.parameters())), settings)
    fused.save_optimizer(folder / "optimizer.safetensors", optimizer)
    for old in set(folder.glob("model-*.safetensors")) - {file}:
        old.unlink()


def load(folder: Path, model: Transformer, optimizer: Any, settings: dict[str, str]) -> None:
    fused.load_optimizer(folder / "optimizer.safetensors", optimizer)
    file = folder / f"model-{optimizer.step.item()}.safetensors"
    arrays, saved = mx.load(str(file), return_metadata=True)
    if saved != settings:
        names = [name for name in settings | saved if saved.get(name) != settings.get(name)]
        changed = [f"{name} {saved.get(name)}, not {settings.get(name)}" for name in names]
        raise ValueError(f"{file} was saved with other options: {'; '.join(changed)}")
    model.update(tree_unflatten(list(arrays.items())))


def settings(options: argparse.Namespace) -> dict[str, str]:
    """What the steps depend on."""
    others = ("corpus", "device", "sample", "checkpoint", "resume")
    values = {name: value for name, value in vars(options).items() if name not in others}
    values["characters"] = len(options.corpus.text)
    return {name: str(value) for name, value in values.items()}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = shared_options(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--optimizer", choices=["fused", "mlx"], default="fused", help="whose AdamW")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the parameters")
    add("--state-dtype", help="of m and v, such as int8; without it, that of the parameters")
    add("--master-weights", action="store_true", help="keep the low bits of bfloat16 parameters")
    add("--sample", type=at_least(0), default=400, help="characters to generate at the end")
    add("--checkpoint", type=Path, help="folder to save the training in")
    add("--resume", action="store_true", help="continue from the checkpoint")
    options = parse(parser, arguments)
    if options.resume and not options.checkpoint:
        parser.error("--resume needs --checkpoint FOLDER")
    if options.optimizer == "mlx" and (options.state_dtype or options.master_weights or options.checkpoint):
        parser.error("--state-dtype, --master-weights and --checkpoint need --optimizer fused")
    return options


def main() -> None:
    options = parse_arguments()
    corpus = options.corpus
    model = make_model(options)
    model.set_dtype(getattr(mx, options.dtype))
    schedule = learning_rate_schedule(options.learning_rate, options.steps)
    adam = {"betas": [0.9, 0.98], "weight_decay": options.weight_decay, "bias_correction": True}
    try:
        if options.optimizer == "mlx":
            optimizer = mlx.optimizers.AdamW(schedule, **adam)
        else:
            optimizer = fused.AdamW(
                schedule,
                **adam,
                state_dtype=options.state_dtype,
                master_weights=options.master_weights,
            )
        optimizer.init(model.trainable_parameters())
        if options.checkpoint:
            options.checkpoint.mkdir(exist_ok=True)
        if options.resume:
            load(options.checkpoint, model, optimizer, settings(options))
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"train.py: error: {error}")

    parameters, state = ([x for _, x in tree_flatten(tree)] for tree in (model.parameters(), optimizer.state))
    print(
        f"{sum(x.size for x in parameters):,} parameters, {len(corpus.text):,} characters of text, "
        f"updates by: {getattr(optimizer, 'backend', 'mlx.optimizers')}\n"
        f"parameters: {sum(x.nbytes for x in parameters) / 1e6:.2f} MB, "
        f"optimizer state: {sum(x.nbytes for x in state) / 1e6:.2f} MB",
        flush=True,
    )
    if options.resume:
        print(f"Continuing after step {optimizer.step.item()}", flush=True)
    train(model, optimizer, options)

    mx.random.seed(options.seed)
    losses = [mean_loss(model, *corpus.batch(corpus.held_out, 16)).item() for _ in range(8)]
    print(f"held-out loss: {sum(losses) / 8:.3f}, peak memory: {mx.get_peak_memory() / 1e6:.1f} MB")
    prompt = corpus.held_out[: options.context].tolist()
    tokens = generate(model, prompt, options.sample, options.context)
    print(f"\nSample, after a prompt of {options.context} characters:\n{corpus.decode(tokens)}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
