"""A Llama-type model with random weights, its tokenizer and some text, in files as mlx-lm reads them; nothing is
downloaded.

For tests and for finetuning.py. Run: python bench/llama_files.py FOLDER [--size tiny|smollm-135m] [--dtype
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
from mlx.utils import tree_flatten, tree_map

try:
    from mlx_lm.models import llama
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
except ImportError as error:
    sys.exit(f"llama_files.py: {error}; install what it needs with: pip install '.[cpu,integration]'")

_BYTES = 256
SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(
        hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=_BYTES + 2,
    ),
    "smollm-135m": dict(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
        vocab_size=49152,
    ),
}  # fmt: skip
_WORDS = "one pass over memory in place and safe by default the gradient of each parameter".split()


def write_model(folder: Path, size: str, dtype: str, seed: int = 0) -> None:
    """A model and a tokenizer whose tokens are bytes."""
    folder.mkdir(parents=True, exist_ok=True)
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
        **SIZES[size],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    mx.random.seed(seed)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    weights = tree_map(lambda x: x.astype(getattr(mx, dtype)), model.parameters())
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(weights)), metadata={"format": "mlx"})
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
