"""List a checkpoint's largest tensors, then read all of it through little memory and print a checksum.

    python examples/inspect_and_stream.py PATH

PATH is a store, a safetensors file, or a model directory. Tensors take 16 MB at most, or three times the largest tensor
where that is more.
"""

from __future__ import annotations

import sys
import zlib

import numpy as np

import serverless_llm as sllm


def main(path: str) -> None:
    """Inspect and stream one checkpoint."""
    checkpoint = sllm.open(path)
    print(f"{checkpoint.path}: {checkpoint.layout}, {len(checkpoint)} tensors, {checkpoint.total_bytes} bytes")
    for info in sorted(checkpoint.tensors, key=lambda info: -info.nbytes)[:5]:
        print(f"  {info.name:60} {info.dtype:5} {list(info.shape)}")

    checksum = 0
    for _name, array in sllm.iter_tensors(checkpoint, device="cpu", framework="numpy", max_bytes=16_000_000):
        checksum = zlib.crc32(np.ascontiguousarray(array), checksum)  # its buffer; only strided ones are copied
    print(f"CRC-32 of all tensors: {checksum:08x}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
