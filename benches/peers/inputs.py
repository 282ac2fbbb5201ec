"""The checkpoints that are loaded: their shapes, the files of random weights, and our store of them."""

from __future__ import annotations

import glob
import json
import os
import shutil
from collections.abc import Iterator

GB = 1e9
SHARD_LEN = 4.9e9
Shapes = list[tuple[str, tuple[int, ...]]]


def llama8b() -> Shapes:
    """Llama-3.1-8B's 291 tensors."""
    hidden, inner, kv, vocab = 4096, 14336, 1024, 128256
    shapes: Shapes = [("model.embed_tokens.weight", (vocab, hidden))]
    for layer in range(32):
        for name, shape in {
            "input_layernorm": (hidden,),
            "mlp.down_proj": (hidden, inner),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "post_attention_layernorm": (hidden,),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.v_proj": (kv, hidden),
        }.items():
            shapes.append((f"model.layers.{layer}.{name}.weight", shape))
    return shapes + [("model.norm.weight", (hidden,)), ("lm_head.weight", (vocab, hidden))]


def many(gb: float, count: int | None) -> Shapes:
    """Expert weights as in a mixture-of-experts model, three matrices and a norm each.

    A matrix has 3.1 MB unless `count` says how many tensors share the `gb`.
    """
    width = 2048
    if count is None:
        inner = 768
        groups = max(1, round(gb * GB / (2 * width * (3 * inner + 1))))
    else:
        groups = max(1, count // 4)
        inner = max(1, round(gb * GB / groups / (2 * width) / 3))
    shapes: Shapes = []
    parts = {"norm": (width,), "gate": (inner, width), "up": (inner, width), "down": (width, inner)}
    for group in range(groups):
        for name, shape in parts.items():
            shapes.append((f"experts.{group}.{name}.weight", shape))
    return shapes


def shapes_of(model: str) -> Shapes:
    """The tensors of a model by its name on the command line: `llama8b`, `many:GB`, `many:GB:TENSORS`."""
    if model == "llama8b":
        return llama8b()
    parts = model.split(":")
    try:
        if parts[0] == "many" and 2 <= len(parts) <= 3:
            return many(float(parts[1]), int(parts[2]) if len(parts) == 3 else None)
    except ValueError:
        pass
    raise SystemExit(f"{model!r} is no model: give llama8b, many:GB or many:GB:TENSORS")


def length(shape: tuple[int, ...]) -> int:
    """Bytes of a bf16 tensor."""
    n = 2
    for dim in shape:
        n *= dim
    return n


def data_files(directory: str) -> list[str]:
    """The files with weights of a checkpoint or a store."""
    patterns = ("*.safetensors", "tensor.data_*")
    return sorted(file for pattern in patterns for file in glob.glob(os.path.join(directory, pattern)))


def prepare(directory: str, model: str, device: str) -> None:
    """Makes `directory`/source and `directory`/store, unless they are there."""
    import serverless_llm

    source, store = os.path.join(directory, "source"), os.path.join(directory, "store")
    if not os.path.isdir(source):
        # Renamed when it is whole, so that a call that was cut off leaves nothing that looks like an input.
        shutil.rmtree(source + ".part", ignore_errors=True)
        os.makedirs(source + ".part")
        write_source(source + ".part", shapes_of(model), device)
        os.rename(source + ".part", source)
    if not os.path.isdir(store):
        print(serverless_llm.convert(source, store), flush=True)


def write_source(directory: str, shapes: Shapes, device: str) -> None:
    """Writes random bf16 weights as safetensors shards with an index."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    shards = list(in_shards(shapes))
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: torch.randn(*shape, device=device, dtype=torch.bfloat16).cpu() for name, shape in shard}
        save_file(tensors, os.path.join(directory, file), metadata={"format": "pt"})
        weight_map.update({name: file for name, _ in shard})
    with open(os.path.join(directory, "model.safetensors.index.json"), "w") as f:
        json.dump({"metadata": {}, "weight_map": weight_map}, f)
    os.sync()


def in_shards(shapes: Shapes) -> Iterator[Shapes]:
    """Tensors in runs of at most SHARD_LEN bytes."""
    shard: Shapes = []
    size = 0
    for name, shape in shapes:
        if shard and size + length(shape) > SHARD_LEN:
            yield shard
            shard, size = [], 0
        shard.append((name, shape))
        size += length(shape)
    yield shard
