"""Times loads of one model whose layers go to several devices in turn, by one process.

    python benches/python/spread.py MODEL [--devices cuda:0,cuda:1] [--repeat 5] [--compare] [--verify]

Each load is a fresh process, which imports torch and makes its contexts first. Prints a line of JSON a load: seconds
until all is there, GB/s, bytes on each device, and what read. `--compare` compares every tensor of the first one, bit
by bit, with what the safetensors library reads from MODEL's files, and ends with an error where one differs.
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
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a directory of safetensors, with config.json")
    parser.add_argument("--devices", default="cuda:0,cuda:1", help="as torch names them; `cpu` is one too")
    parser.add_argument("--repeat", type=int, default=5, help="loads")
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--verify", action="store_true", help="compare checksums; of a store")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def child(args: argparse.Namespace) -> None:
    """One load: prints its line."""
    import torch

    import serverless_llm as sllm

    devices = args.devices.split(",")
    for device in devices:
        torch.zeros(1, device=device)
    layers = json.loads((args.model / "config.json").read_text())["num_hidden_layers"]
    spread = {f"model.layers.{layer}": devices[layer % len(devices)] for layer in range(layers)}
    began = time.perf_counter()
    tensors = sllm.load_dict(args.model, {"": devices[0], **spread}, verify=args.verify)
    for device in devices:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    held = {(str(t.device), t.data_ptr()): t.nbytes for t in tensors.values()}  # tied tensors once
    row: dict[str, object] = {
        "seconds": round(seconds, 3),
        "gb_per_s": round(tensors.report.bytes / seconds / 1e9, 2),
        "bytes": {device: sum(size for (of, _), size in held.items() if of == device) for device in devices},
        "numa_node": tensors.report.numa_node,
        "verified_by_devices": tensors.report.device_verified_bytes,
        "engines": sorted({engine["engine"] for engine in tensors.report.engines}),
    }
    different = compare(args.model, tensors) if args.compare else []
    if args.compare:
        row |= {"tensors": len(tensors), "different": different}
    print(json.dumps(row), flush=True)
    if different:
        sys.exit(f"{len(different)} tensors differ from what the files have")


def compare(model: Path, tensors: Mapping[str, Any]) -> list[str]:
    """Names of the tensors that have not the bits of the files, or are not there."""
    import torch
    from safetensors import safe_open

    def bits(tensor: Any) -> Any:
        return tensor.cpu().reshape(-1).view(torch.uint8)

    names, right = set(tensors), set[str]()
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                names.add(name)
                if name in tensors and torch.equal(bits(tensors[name]), bits(file.get_tensor(name))):
                    right.add(name)
    return sorted(names - right)


def main() -> None:
    """The command."""
    args = parse_args()
    if args.child:
        child(args)
        return
    for number in range(args.repeat):
        flags = [*(["--compare"] if args.compare and number == 0 else []), *(["--verify"] if args.verify else [])]
        command = [sys.executable, __file__, str(args.model), "--devices", args.devices, "--child"]
        subprocess.run([*command, *flags], check=True)


if __name__ == "__main__":
    main()
