"""The checkpoints that are loaded: their shapes, the files of random weights, and our store of them."""

from __future__ import annotations

import glob
import json
import os
import random
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

GB = 1e9
SHARD_LEN = 4.9e9
BLOCK_LEN = 64 << 20
Shapes = list[tuple[str, tuple[int, ...]]]


def llama8b(layers: int = 32) -> Shapes:
    """Llama-3.1-8B's 291 tensors."""
    hidden, inner, kv, vocab = 4096, 14336, 1024, 128256
    shapes: Shapes = [("model.embed_tokens.weight", (vocab, hidden))]
    for layer in range(layers):
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


def qwen3_30b_a3b(layers: int = 48) -> Shapes:
    """Qwen3-30B-A3B's 18,867 tensors: 128 experts a layer, three matrices each."""
    hidden, inner, heads, kv, head, experts, vocab = 2048, 768, 32, 4, 128, 128, 151936
    shapes: Shapes = [("model.embed_tokens.weight", (vocab, hidden))]
    for layer in range(layers):
        parts: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "mlp.gate": (experts, hidden),
            "post_attention_layernorm": (hidden,),
            "self_attn.k_norm": (head,),
            "self_attn.k_proj": (kv * head, hidden),
            "self_attn.o_proj": (hidden, heads * head),
            "self_attn.q_norm": (head,),
            "self_attn.q_proj": (heads * head, hidden),
            "self_attn.v_proj": (kv * head, hidden),
        }
        for expert in range(experts):
            for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
                parts[f"mlp.experts.{expert}.{name}_proj"] = shape
        shapes += [(f"model.layers.{layer}.{name}.weight", shape) for name, shape in parts.items()]
    return shapes + [("model.norm.weight", (hidden,)), ("lm_head.weight", (vocab, hidden))]


MODELS = {"llama8b": llama8b, "qwen3-30b-a3b": qwen3_30b_a3b}


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
    """The tensors of a model by its name on the command line: `llama8b`, `qwen3-30b-a3b`, either with `:LAYERS` for
    fewer layers; `many:GB`, `many:GB:TENSORS`."""
    parts = model.split(":")
    try:
        if parts[0] in MODELS and len(parts) <= 2:
            return MODELS[parts[0]](*map(int, parts[1:]))
        if parts[0] == "many" and 2 <= len(parts) <= 3:
            return many(float(parts[1]), int(parts[2]) if len(parts) == 3 else None)
    except ValueError:
        pass
    raise SystemExit(f"{model!r} is no model: give llama8b, qwen3-30b-a3b, many:GB or many:GB:TENSORS")


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


def prepare(directory: str, model: str, with_store: bool) -> None:
    """Makes `directory`/source and, where it is wanted, `directory`/store, unless they are there."""
    import serverless_llm

    source, store = os.path.join(directory, "source"), os.path.join(directory, "store")
    if not os.path.isdir(source):
        # Renamed when it is whole, so that a call that was cut off leaves nothing that looks like an input.
        shutil.rmtree(source + ".part", ignore_errors=True)
        os.makedirs(source + ".part")
        write_source(source + ".part", shapes_of(model))
        os.sync()
        os.rename(source + ".part", source)
    if with_store and not os.path.isdir(store):
        print(serverless_llm.convert(source, store), flush=True)


def write_source(directory: str, shapes: Shapes) -> None:
    """Writes random bf16 weights as safetensors shards with an index. The same shapes give the same files each time."""
    shards = list(in_shards(shapes))
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    matrix, vector = random_blocks()
    with ThreadPoolExecutor(16) as pool:
        jobs = [
            pool.submit(write_shard, os.path.join(directory, file), shard, matrix, vector)
            for file, shard in zip(files, shards, strict=True)
        ]
        for job in jobs:
            job.result()
    weight_map = {name: file for file, shard in zip(files, shards, strict=True) for name, _ in shard}
    with open(os.path.join(directory, "model.safetensors.index.json"), "w") as f:
        total = sum(length(shape) for _, shape in shapes)
        # As transformers writes it.
        json.dump({"metadata": {"total_size": total}, "weight_map": weight_map}, f, indent=2, sort_keys=True)


def random_blocks() -> tuple[memoryview, memoryview]:
    """Random bf16 numbers for matrices, 1/128 to 1/32 of either sign, and for vectors, 1 to 1.25: a norm's weights."""
    matrix = bytearray(random.Random(0).randbytes(BLOCK_LEN))
    vector = bytearray(matrix[: BLOCK_LEN // 64])
    # The high byte is the sign and seven bits of the exponent, the low one its last bit and the fraction.
    matrix[1::2] = matrix[1::2].translate(bytes(0x3C | byte & 0x80 for byte in range(256)))
    vector[1::2] = bytes([0x3F]) * (len(vector) // 2)
    vector[::2] = vector[::2].translate(bytes(0x80 | byte & 0x1F for byte in range(256)))
    return memoryview(bytes(matrix)), memoryview(bytes(vector))


def write_shard(path: str, shard: Shapes, matrix: memoryview, vector: memoryview) -> None:
    """Writes one file. Each tensor is cut out of a block at a random place: tensors that change places differ."""
    header, offset = {}, 0
    shard = sorted(shard)  # as the library writes them
    for name, shape in shard:
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + length(shape)]}
        offset += length(shape)
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    places = random.Random(path.rpartition("/")[2])
    with open(path, "wb", buffering=0) as f:
        f.write(len(text).to_bytes(8, "little"))
        f.write(text)
        for _, shape in shard:
            block, left = vector if len(shape) == 1 else matrix, length(shape)
            while left > 0:
                place = 2 * places.randrange(len(block) // 2)
                left -= f.write(block[place : place + left])


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
