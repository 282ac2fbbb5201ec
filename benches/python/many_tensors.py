"""Times what a tensor costs a Python program, where a checkpoint has many: dense loads, and deferred tensors.

    python benches/python/many_tensors.py [--tensors 18864] [--device cpu] [--repeat 7] [--only open torch]

Tensors are of 8 KiB, so that their bytes cost little. Each figure is of the first load of a process of its own, in
microseconds a tensor: by the clock, and of the processor in the thread that calls. `open` opens the same tensors in two
shards with an index, all sorted, and loads nothing: no byte moves before that is done. `deferred`
copies each tensor to its place in a parameter as vLLM does for experts, by seven operations of torch; `mapped` does the
same without this package.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROWS = COLUMNS = 64
OPTIONS = {"engine": "auto", "direct": None, "verify": False, "threads": None, "pinned_bytes": None}


def names(count: int) -> list[str]:
    """Names of experts' weights, in the order of a model."""
    parts = ("gate", "up", "down")
    return [f"layers.{i // 384}.experts.{i // 3 % 128}.{parts[i % 3]}_proj.weight" for i in range(count)]


def write(path: Path, names: list[str]) -> None:
    """A safetensors file of such weights, a hole."""
    size = ROWS * COLUMNS * 2
    tensors = {
        name: {"dtype": "BF16", "shape": [ROWS, COLUMNS], "data_offsets": [i * size, (i + 1) * size]}
        for i, name in enumerate(names)
    }
    header = json.dumps(tensors).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(file.tell() + len(names) * size)


def write_shards(folder: Path, names: list[str]) -> None:
    """The same in two files, with an index, sorted by name as the library and transformers write them."""
    folder.mkdir()
    half = len(names) // 2
    shards = {"model-00001-of-00002.safetensors": names[:half], "model-00002-of-00002.safetensors": names[half:]}
    for file, part in shards.items():
        write(folder / file, sorted(part))
    weight_map = {name: file for file, part in shards.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map}, indent=2, sort_keys=True)
    )


def copies(tensors: Iterator[tuple[str, Any]], count: int, device: str) -> None:
    """Each tensor to its half of an expert."""
    import torch

    parameter = torch.nn.Parameter(
        torch.empty(count // 2 + 1, 2 * ROWS, COLUMNS, dtype=torch.bfloat16, device=device), requires_grad=False
    )
    for number, (_, tensor) in enumerate(tensors):
        tensor = tensor.unsqueeze(0).unbind()[0].narrow(0, 0, ROWS)
        parameter.data[number // 2].narrow(0, number % 2 * ROWS, ROWS).copy_(tensor)


def once(what: str, path: str, count: int, device: str) -> None:
    """One load. Prints both times."""
    import safetensors
    import torch

    import serverless_llm as sllm
    from serverless_llm import _native
    from serverless_llm.deferred import Deferred

    torch.zeros(1, device=device)

    def deferred() -> None:
        with Deferred(torch.device(device), OPTIONS) as mode:
            copies(mode.tensors(_native.open(path)), count, device)
            mode.finish()

    def mapped() -> None:
        with safetensors.safe_open(path, "pt") as file:
            copies(((name, file.get_tensor(name)) for name in file.keys()), count, device)

    calls: dict[str, Callable[[], object]] = {
        "open": lambda: _native.open(path),
        "numpy": lambda: sllm.load(path, device=device, framework="numpy"),
        "torch": lambda: sllm.load(path, device=device, framework="torch"),
        "deferred": deferred,
        "mapped": mapped,
    }
    clock, processor = time.perf_counter(), time.thread_time()
    kept = calls[what]()
    print(json.dumps([time.perf_counter() - clock, time.thread_time() - processor]))
    del kept


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=18864)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--only", nargs="+", metavar="LOAD", help="of open, torch, deferred, mapped, numpy")
    parser.add_argument("--once", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        what, path = args.once
        once(what, path, args.tensors, args.device)
        return
    loads = args.only or ["open", "torch", "deferred", "mapped"] + ["numpy"] * (args.device == "cpu")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        write(file, names(args.tensors))
        write_shards(Path(folder) / "shards", names(args.tensors))
        command = [sys.executable, __file__, f"--tensors={args.tensors}", f"--device={args.device}", "--once"]
        times: dict[str, list[list[float]]] = {what: [] for what in loads}
        for _ in range(args.repeat):
            for what in loads:
                path = file.with_name("shards") if what == "open" else file
                run = subprocess.run([*command, what, str(path)], check=True, capture_output=True, text=True)
                times[what].append([1e6 * seconds / args.tensors for seconds in json.loads(run.stdout)])
    print(f"{args.tensors} tensors to {args.device}, us a tensor, median (each round)")
    for what, rounds in times.items():
        for kind, values in zip(("clock", "thread"), zip(*rounds)):
            print(f"{what:9}{kind:7} {statistics.median(values):6.2f}  ({' '.join(f'{v:.2f}' for v in values)})")


if __name__ == "__main__":
    main()
