"""Checkpoints: a safetensors file for `sllm-store convert`, and a directory as the original's writer leaves it."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

# Shape and dtype by name: odd lengths, a scalar, a tensor over several chunks of the pool.
SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "embed.weight": ("bfloat16", (3001, 1000)),
    "layers.0.weight": ("float32", (300, 1001)),
    "layers.0.bias": ("int8", (1001,)),
    "layers.1.weight": ("float16", (2048, 512)),
    "layers.1.scale": ("float64", ()),
    "norm.weight": ("uint8", (4097,)),
}
SIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8, "int8": 1, "uint8": 1}
SAFETENSORS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64", "int8": "I8", "uint8": "U8"}
# The original begins a new file after 10 GiB; its readers go by the files' real sizes.
PARTITION = 7 << 20
# Between two tensors the original leaves what its buffer held before.
STALE = b"\xa5"


@dataclass(frozen=True)
class Tensor:
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def tensors(seed: int) -> dict[str, Tensor]:
    """Made tensors: random, and the same for the same seed."""
    source = random.Random(seed)
    made = {}
    for name, (dtype, shape) in SHAPES.items():
        count = 1
        for dimension in shape:
            count *= dimension
        made[name] = Tensor(dtype, shape, source.randbytes(count * SIZES[dtype]))
    return made


def write_safetensors(path: Path, content: dict[str, Tensor]) -> None:
    header, offset = {}, 0
    for name, tensor in content.items():
        end = offset + len(tensor.data)
        header[name] = {
            "dtype": SAFETENSORS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    body = b"".join(tensor.data for tensor in content.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def write_original(directory: Path, content: dict[str, Tensor], tied: dict[str, str]) -> None:
    """Tensors in their order at multiples of 8, in several files; tied ones have the offset of the one they share."""
    directory.mkdir(parents=True)
    parts, index, total = [bytearray()], {}, 0
    for name, tensor in content.items():
        if parts[-1] and len(parts[-1]) + len(tensor.data) > PARTITION:
            parts.append(bytearray())
        stride, strides = 1, []
        for dimension in reversed(tensor.shape):
            strides.insert(0, stride)
            stride *= dimension
        index[name] = [total, len(tensor.data), list(tensor.shape), strides, f"torch.{tensor.dtype}"]
        record = tensor.data + STALE * (-len(tensor.data) % 8)
        parts[-1] += record
        total += len(record)
    index.update({name: index[source] for name, source in tied.items()})
    for number, part in enumerate(parts):
        (directory / f"tensor.data_{number}").write_bytes(part)
    assert len(parts) > 1, "the model has one data file only"
    with open(directory / "tensor_index.json", "w") as file:
        json.dump(index, file)
