"""A Llama-type model with random weights, its tokenizer and some text, in files as mlx-lm reads them; nothing is
downloaded.

For tests and for finetuning.py. Run: python bench/llama_files.py FOLDER [--size tiny|smollm-135m|llama-3.2-1b] [--dtype
float32|bfloat16]. Needs pip install '.[integration]'.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

try:
    from mlx_lm.models import llama
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
except ImportError as error:
    sys.exit(f"llama_files.py: {error}; install what it needs with: pip install '.[cpu,integration]'")

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__" and not __package__:
    sys.path[0] = str(ROOT)  # run as a script: import the package `bench`, not its modules

from bench.speed.shapes import LLAMA3_2_1B, SMOLLM_135M, LlamaSizes  # noqa: E402

_BYTES = 256
SIZES = {
    "tiny": LlamaSizes(_BYTES + 2, 64, 160, 2, 4, 2, 16),
    "smollm-135m": SMOLLM_135M,
    "llama-3.2-1b": LLAMA3_2_1B,
}
_WORDS = "one pass over memory in place and safe by default the gradient of each parameter".split()


def model_of(size: str, dtype: str, seed: int = 0) -> tuple[llama.Model, dict[str, Any]]:
    """A model, not yet evaluated, and its configuration."""
    sizes = SIZES[size]
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": _BYTES,
        "eos_token_id": _BYTES + 1,
        "torch_dtype": dtype,
        "hidden_size": sizes.dims,
        "intermediate_size": sizes.feed_forward,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dims,
        "vocab_size": sizes.vocabulary,
    }
    mx.random.seed(seed)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    model.set_dtype(getattr(mx, dtype))
    return model, config


def write_model(folder: Path, size: str, dtype: str) -> None:
    """A model and a tokenizer whose tokens are bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    model, config = model_of(size, dtype)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {
        "<s>": _BYTES,
        "</s>": _BYTES + 1,
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def write_data(folder: Path, lines: int = 24, words: int = 5, seed: int = 0) -> None:
    """train.jsonl and valid.jsonl, of random words."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for name, count in (("train", lines), ("valid", 4)):
        texts = [" ".join(rng.choice(_WORDS, words)) for _ in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def main() -> None:
    parser = argparse.ArgumentParser(prog="llama_files.py", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = parser.parse_args()
    write_model(options.folder, options.size, options.dtype)
    write_data(options.folder)
    print(f"{options.folder}: a model, its tokenizer, and text in train.jsonl and valid.jsonl")


if __name__ == "__main__":
    main()
