"""Loads a model by a store server and compares every tensor, bit by bit, with what the safetensors library reads.

    python benches/server/compare.py MODEL --server ADDRESS [--device cuda] [--parts]

With --parts the tensors are not loaded as a whole: the left half of each goes into columns of a tensor of its own, as an
engine's parameters are filled, which for small tensors is memory that the server writes to itself. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

import serverless_llm as sllm
from serverless_llm.deferred import Deferred


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a directory of safetensors")
    parser.add_argument("--server", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", action="store_true")
    return parser.parse_args()


def expected(model: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor, on the host."""
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bytes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def half(tensor: torch.Tensor) -> torch.Tensor:
    """The left half of a matrix, all of anything else."""
    return tensor[:, : tensor.shape[1] // 2] if tensor.dim() == 2 else tensor


def load_parts(args: argparse.Namespace) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Halves by name, each in a tensor that has three columns more, and the engines that brought them."""
    parts = {}
    options = {"engine": "auto", "direct": None, "verify": False, "threads": None, "pinned_bytes": None}
    with Deferred(torch.device(args.device), {**options, "server": args.server}) as mode:
        for name, tensor in mode.tensors(sllm.open(args.model)):
            tensor = half(tensor)
            wider = (*tensor.shape[:-1], tensor.shape[-1] + 3) if tensor.dim() else ()
            place = torch.full(wider, 1, dtype=tensor.dtype, device=args.device)
            parts[name] = place[..., 3:] if tensor.dim() else place
            parts[name].copy_(tensor)
        (report,) = mode.finish()
    return parts, [engine["engine"] for engine in report.engines]


def main() -> None:
    args = parse_args()
    if args.parts:
        loaded, engines = load_parts(args)
    else:
        tensors = sllm.load(args.model, device=args.device, server=args.server)
        loaded, engines = dict(tensors), [engine["engine"] for engine in tensors.report.engines]
    names, differ = set(loaded), []
    for name, tensor in expected(args.model):
        names.remove(name)
        tensor = half(tensor) if args.parts else tensor
        differ += [] if torch.equal(raw(loaded[name]), raw(tensor.to(args.device))) else [name]
    print(json.dumps({"tensors": len(loaded), "differ": differ, "surplus": sorted(names), "engines": sorted(set(engines))}))
    raise SystemExit(bool(differ or names))


if __name__ == "__main__":
    main()
