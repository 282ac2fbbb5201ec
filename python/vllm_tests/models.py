"""Tiny models with random weights, and other layouts of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers
from safetensors.torch import load_file, save_file

_COMMON = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "head_dim": 32,
}
_OPT = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "ffn_dim": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "word_embed_proj_dim": 128,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_COMMON, "tie_word_embeddings": False}),
    "llama_tied": ("LlamaConfig", {**_COMMON, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", _COMMON),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**_COMMON, "moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2},
    ),
    "mixtral": ("MixtralConfig", {**_COMMON, "num_local_experts": 4}),
    "gemma2": ("Gemma2Config", _COMMON),
    "opt": ("OPTConfig", _OPT),
    "phi3": ("Phi3Config", {**_COMMON, "pad_token_id": 0}),
    # Those with other weights.
    "llama_again": ("LlamaConfig", {**_COMMON, "tie_word_embeddings": False}),
    "mixtral_again": ("MixtralConfig", {**_COMMON, "num_local_experts": 4}),
    # A smaller one of the same words, to draft for `llama`.
    "draft": (
        "LlamaConfig",
        {**_COMMON, "num_hidden_layers": 1, "num_key_value_heads": 4, "tie_word_embeddings": False},
    ),
}


def make(name: str, path: Path) -> None:
    """Writes a model of an architecture, in several files, whose tokens depend on all weights."""
    kind, config = ARCHITECTURES[name]
    made = getattr(transformers, kind)(**config, dtype="bfloat16")
    model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)
    for part, parameter in model.named_parameters():
        # The same whatever versions there are: what torch and transformers make differs between theirs.
        random = numpy.random.default_rng([*f"{name} {part}".encode()])
        noise = torch.from_numpy(random.standard_normal(tuple(parameter.shape), dtype=numpy.float32))
        if parameter.dim() == 1:
            parameter.data.add_(noise * 0.15)
        else:
            # Were embeddings large, a model of tied weights would say the last word again and again.
            parameter.data.copy_(noise * (0.005 if "embed" in part else 0.2))
    model.save_pretrained(path, max_shard_size="400KB")


def weights(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model."""
    return {name: t for file in sorted(path.glob("*.safetensors")) for name, t in load_file(file).items()}


def copy_with(path: Path, target: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """A copy of a model with other weights, in one file."""
    target.mkdir()
    for file in path.glob("*.json"):
        if not file.name.endswith(".index.json"):
            shutil.copy(file, target)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    if config:
        known = json.loads((target / "config.json").read_text())
        (target / "config.json").write_text(json.dumps({**known, **config}))
    return target


def write_original(path: Path, target: Path) -> Path:
    """A model as the original ServerlessLLM lays it out: data files, one after another, and an index."""
    target.mkdir()
    shutil.copy(path / "config.json", target)
    index = {}
    files = [bytearray()]
    before = 0
    for name, tensor in weights(path).items():
        if len(files[-1]) > 500_000:
            before += len(files[-1])
            files.append(bytearray())
        data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        index[name] = [before + len(files[-1]), len(data), list(tensor.shape), list(tensor.stride()), str(tensor.dtype)]
        files[-1] += data + bytes(-len(data) % 8)
    for number, file in enumerate(files):
        (target / f"tensor.data_{number}").write_bytes(file)
    (target / "tensor_index.json").write_text(json.dumps(index))
    return target


def int8(path: Path, target: Path) -> Path:
    """A model in 8-bit integers, with a scale a row, as compressed-tensors writes it; activations are quantised as they
    come."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in weights(path).items():
        if name.endswith("_proj.weight"):
            scale = tensor.float().abs().amax(1, keepdim=True) / 127
            tensors[name] = (tensor.float() / scale).round().to(torch.int8)
            tensors[f"{name}_scale"] = scale.to(torch.bfloat16)
        else:
            tensors[name] = tensor
    integers = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**integers, "strategy": "channel", "dynamic": False},
        "input_activations": {**integers, "strategy": "token", "dynamic": True},
    }
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    return copy_with(path, target, tensors, quantization_config=quantization)


def fp8(path: Path, target: Path) -> Path:
    """A model in 8-bit floats, with a scale a block of 128 by 128, as DeepSeek writes it. Its shapes are multiples."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in weights(path).items():
        if name.endswith("_proj.weight"):
            blocks = tensor.float().unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
            scale = blocks.abs().amax((1, 3)) / 448
            tensors[name] = (blocks / scale[:, None, :, None]).reshape(tensor.shape).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale
        else:
            tensors[name] = tensor
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    return copy_with(path, target, tensors, quantization_config=quantization)


def lora(path: Path, target: Path) -> Path:
    """An adapter for a model of the Llama kind, as peft writes it."""
    target.mkdir()
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, tensor in weights(path).items():
        if name.endswith(("q_proj.weight", "v_proj.weight")):
            out, into = tensor.shape
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(8, into, generator=generator)
            tensors[f"{stem}.lora_B.weight"] = torch.randn(out, 8, generator=generator)
    save_file(tensors, target / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 16, "bias": "none"}
    config |= {"target_modules": ["q_proj", "v_proj"], "base_model_name_or_path": str(path)}
    (target / "adapter_config.json").write_text(json.dumps(config))
    return target


def smollm2(folder: str, target: Path) -> None:
    """SmolLM2-135M-Instruct with its tokenizer, made of the GGUF file in a folder."""
    gguf = "SmolLM2-135M-Instruct.Q4_1.gguf"
    auto = transformers.AutoModelForCausalLM
    read = auto.from_pretrained(folder, gguf_file=gguf, dtype=torch.bfloat16)
    # What was read from a GGUF file is not saved by transformers; a model of the same weights is.
    known = {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    model = auto.from_config(type(read.config).from_dict(known), dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(target, max_shard_size="100MB")
    transformers.AutoTokenizer.from_pretrained(folder, gguf_file=gguf).save_pretrained(target)
