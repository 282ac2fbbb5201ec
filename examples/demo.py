"""Convert a model, verify it, load it, and compare every tensor bit by bit with the safetensors library.

    python examples/demo.py DIRECTORY

Loads to the GPU if there is a CUDA driver and torch sees a device, else to the host. Exits with 1 on any difference.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import safetensors

import serverless_llm as sllm


class Bar:
    """A progress bar on a terminal; nothing otherwise."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __call__(self, done: int, total: int) -> None:
        if sys.stderr.isatty():
            filled = 40 * done // total
            end = "\n" if done == total else ""
            line = f"\r{self.what:>8} [{'#' * filled}{'.' * (40 - filled)}] {done / 1e6:.0f}/{total / 1e6:.0f} MB"
            print(line, end=end, file=sys.stderr, flush=True)


def bytes_of(array: object) -> bytes:
    """The bytes of a NumPy array, or of a torch tensor on any device."""
    if type(array).__module__ == "numpy":
        return array.tobytes()
    import torch

    return array.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def main(source: Path) -> int:
    """Run the demonstration."""
    with tempfile.TemporaryDirectory() as scratch:
        store = Path(scratch) / "store"
        converted = sllm.convert(source, store, progress=Bar("convert"))
        print(f"converted {converted.tensors} tensors, {converted.bytes / 1e6:.1f} MB, in {converted.seconds:.3f} s")

        verified = sllm.verify(store, progress=Bar("verify"))
        print(f"verified {verified.chunks} chunks in {verified.seconds:.3f} s: {len(verified.corrupt)} are corrupt")

        loaded = sllm.load(store, device="auto", progress=Bar("load"))

        compared = different = 0
        for file in sorted(source.glob("*.safetensors")):
            for name, theirs in safetensors.deserialize(file.read_bytes()):
                ours = loaded.pop(name, None)
                compared += 1
                if ours is None or bytes_of(ours) != bytes(theirs["data"]):
                    different += 1
                    print(f"{name} differs", file=sys.stderr)
        different += len(loaded)
        print(f"compared {compared} tensors with the safetensors library: {different} differ")
        print(loaded.report)
        return 1 if different or not compared or not verified.ok else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1])))
