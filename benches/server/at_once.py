"""Times loads of one model by several processes at once, from files or by a store server.

    python benches/server/at_once.py MODEL --devices cuda:0,cuda:1 [--server ADDRESS] [--repeat 5] [--cold]

A fresh process a device, named as often as there are to be processes; they begin together once all have imported torch and
made their contexts. Prints a line of JSON a round: each process's seconds, the bytes that all of them loaded by the time
that the last one took, and the bytes that came from disks meanwhile. `--cold` drops the page cache before each round
(needs root).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "peers"))
import cache  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--devices", default="cuda:0,cuda:1")
    parser.add_argument("--server", help="its address; without one, from files")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def child(model: Path, device: str, server: str | None) -> None:
    """One process: says that it is ready, waits for a line, loads, and says how that went."""
    import torch

    import serverless_llm as sllm

    torch.zeros(1, device=device)
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.perf_counter()
    tensors = sllm.load(model, device=device, server=server)
    torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    engines = sorted({engine["engine"] for engine in tensors.report.engines})
    print(json.dumps({"seconds": seconds, "bytes": tensors.report.bytes, "engines": engines}), flush=True)


def disk_bytes() -> int:
    """Bytes that whole disks have read since the system was started."""
    disks = {entry.name for entry in Path("/sys/block").iterdir() if (entry / "device").exists()}
    lines = (line.split() for line in Path("/proc/diskstats").read_text().splitlines())
    return sum(512 * int(line[5]) for line in lines if line[2] in disks)


def one_round(args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, str(args.model), *(["--server", args.server] if args.server else [])]
    devices = args.devices.split(",")
    children = [
        subprocess.Popen([*command, "--child", device], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for device in devices
    ]
    if not all(process.stdout and process.stdout.readline() == "ready\n" for process in children):
        raise RuntimeError("a process did not come up")
    if args.cold:
        cache.drop([str(path) for path in args.model.iterdir() if path.is_file()])
    before = disk_bytes()
    for process in children:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    rows = [json.loads(process.communicate()[0]) for process in children]
    slowest = max(row["seconds"] for row in rows)
    return {
        "devices": devices,
        "server": bool(args.server),
        "cold": args.cold,
        "engines": sorted({engine for row in rows for engine in row["engines"]}),
        "seconds": [round(row["seconds"], 3) for row in rows],
        "gb_per_s": round(sum(row["bytes"] for row in rows) / slowest / 1e9, 2),
        "bytes": rows[0]["bytes"],
        "disk_bytes": disk_bytes() - before,
    }


def main() -> None:
    args = parse_args()
    if args.child:
        child(args.model, args.child, args.server)
        return
    for _ in range(args.repeat):
        print(json.dumps(one_round(args)), flush=True)


if __name__ == "__main__":
    main()
