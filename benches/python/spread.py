"""Times loads of one model whose layers go to several devices in turn, by one process.

    python benches/python/spread.py MODEL [--devices cuda:0,cuda:1] [--repeat 5] [--compare]

Each load is a fresh process, which imports torch and makes its contexts first. Prints a line of JSON a load. `--compare`
compares every tensor of the first one, bit by bit, with what the safetensors library reads from MODEL's files.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a directory of safetensors, with config.json")
    parser.add_argument("--devices", default="cuda:0,cuda:1")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def child(args: argparse.Namespace) -> None:
    """One load."""
    import torch

    import serverless_llm as sllm

    devices = args.devices.split(",")
    for device in devices:
        torch.zeros(1, device=device)
    layers = json.loads((args.model / "config.json").read_text())["num_hidden_layers"]
    spread = {f"model.layers.{layer}": devices[layer % len(devices)] for layer in range(layers)}
    began = time.perf_counter()
    tensors = sllm.load_dict(args.model, {"": devices[0], **spread})
    for device in devices:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    row = {
        "seconds": round(seconds, 3),
        "gb_per_s": round(tensors.report.bytes / seconds / 1e9, 2),
        "bytes": {d: sum(t.nbytes for t in tensors.values() if t.device == torch.device(d)) for d in devices},
        "engines": sorted({engine["engine"] for engine in tensors.report.engines}),
    }
    if args.compare:
        row |= compare(args.model, tensors)
    print(json.dumps(row), flush=True)


def compare(model: Path, tensors: Mapping[str, Any]) -> dict[str, object]:
    """How many tensors have the bits of the files, and which have not."""
    import torch
    from safetensors import safe_open

    different, count = [], 0
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                count += 1
                ours, theirs = tensors[name].cpu(), file.get_tensor(name)
                if not torch.equal(ours.reshape(-1).view(torch.uint8), theirs.reshape(-1).view(torch.uint8)):
                    different.append(name)
    return {"tensors": count, "different": different}


def main() -> None:
    args = parse_args()
    if args.child:
        child(args)
        return
    for number in range(args.repeat):
        command = [sys.executable, __file__, str(args.model), "--devices", args.devices, "--child"]
        subprocess.run([*command, *(["--compare"] if args.compare and number == 0 else [])], check=True)


if __name__ == "__main__":
    main()
