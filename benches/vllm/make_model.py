"""Makes a directory that vLLM can serve: a model's shape and random weights, the same ones each time.

    python benches/vllm/make_model.py DIR llama8b|qwen3-30b-a3b [--layers N]

Weights are bf16. `--layers` takes fewer of the model's layers. The tokenizer has one word a number and means nothing:
ask with numbers of tokens, as ready.py does. Needs nothing but Python.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "peers"))
import inputs  # noqa: E402

CONFIGS: dict[str, dict[str, Any]] = {
    "llama8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "attention_bias": False,
        "router_aux_loss_coef": 0.001,
    },
}
COMMON = {"hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16"}


def tokenizer(vocab: int) -> dict[str, Any]:
    """A word for each number."""
    words = {f"w{number}": number for number in range(vocab)}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "w0"}
    return {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"}, "model": model}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("shape", choices=sorted(CONFIGS))
    parser.add_argument("--layers", type=int)
    args = parser.parse_args()
    began = time.monotonic()
    config = {**CONFIGS[args.shape], **COMMON}
    config["num_hidden_layers"] = args.layers or config["num_hidden_layers"]
    shapes = inputs.MODELS[args.shape](config["num_hidden_layers"])
    args.directory.mkdir(parents=True)
    inputs.write_source(str(args.directory), shapes)
    files = {
        "config.json": config,
        "tokenizer.json": tokenizer(config["vocab_size"]),
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"},
    }
    for name, content in files.items():
        (args.directory / name).write_text(json.dumps(content))
    size = sum(inputs.length(shape) for _, shape in shapes) / inputs.GB
    print(f"{len(shapes)} tensors, {size:.2f} GB, {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
