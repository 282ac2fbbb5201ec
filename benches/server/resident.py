"""Times loads by a store server beside loads from files, each in a fresh process.

    python benches/server/resident.py MODEL OUT.json [--store-command sllm-store] [--device cuda] [--pool 32GB] [--repeat 3]

It starts a server over MODEL's directory and writes: milliseconds until the server answers; seconds of a load to the
device with nothing resident and the page cache dropped (needs root), of one by the same process without a server, of
loads with everything resident, and of the server's memory; beside them the peak of the device's link. With
`--idle-seconds` also of the first load after a time in which the server let its contexts and pins go.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "peers"))
import cache  # noqa: E402


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--store-command", default="sllm-store", help="the command, one word or several")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--pool", default="32GB")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--staging", nargs="*", default=[], help="sizes of staging memory to try, such as 128MiB")
    parser.add_argument("--idle-seconds", type=int, help="let the server's GPUs be idle after so long, and load after that")
    parser.add_argument("--no-cold", action="store_true", help="leave out loads with nothing resident, which take long")
    parser.add_argument("--cold-repeat", type=int, help="rounds of those, if not as many as of the others")
    parser.add_argument("--cold-tensors", default="*", help="a glob of the tensors to load then, which takes less long")
    parser.add_argument("--start-flags", default="", help="further flags of `start`")
    return parser.parse_args()


class Bench:
    """A server and the command that asks it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.command = args.store_command.split()
        self.address = f"unix:{tempfile.mkdtemp()}/store.sock"
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log")
        self.server: subprocess.Popen[str] | None = None

    def start(self) -> float:
        """Starts the server; milliseconds until its socket takes a connection."""
        flags = ["--storage-path", str(self.args.model.parent), "--mem-pool-size", self.args.pool]
        if self.args.idle_seconds is not None:
            flags += ["--gpu-idle-seconds", str(self.args.idle_seconds)]
        began = time.perf_counter()
        self.server = subprocess.Popen(
            [*self.command, "start", "--listen", self.address, *flags, *self.args.start_flags.split()],
            stdout=self.log,
            stderr=self.log,
            text=True,
        )
        path = self.address.removeprefix("unix:")
        while time.perf_counter() - began < 60:
            with socket.socket(socket.AF_UNIX) as client:
                try:
                    client.connect(path)
                    return (time.perf_counter() - began) * 1e3
                except OSError:
                    if self.server.poll() is not None:
                        break
            time.sleep(0.001)
        raise RuntimeError(f"the server does not answer: {Path(self.log.name).read_text()}")

    def ask(self, *words: str) -> Any:
        """A command's answer, as JSON."""
        done = subprocess.run([*self.command, *words, "--json"], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr or done.stdout}")
        return json.loads(done.stdout.strip().splitlines()[-1])

    def load(self, *flags: str) -> dict[str, Any]:
        """One load in a process of its own."""
        report: dict[str, Any] = self.ask("load", str(self.args.model), "--device", self.args.device, *flags)["runs"][0]
        return report

    def be_idle(self) -> None:
        """Waits until the server has unpinned its memory."""
        began = time.perf_counter()
        while self.ask("status", "--address", self.address)["pool"]["page_locked"] > 0:
            if time.perf_counter() - began > self.args.idle_seconds + 60:
                raise RuntimeError("the server's memory stays pinned")
            time.sleep(0.5)

    def stop(self) -> None:
        """Ends the server as a service manager does."""
        if self.server is not None:
            self.server.send_signal(signal.SIGTERM)
            self.server.wait(60)


def link_peak(bench: Bench) -> float | None:
    """The best of five measurements of the device's link, in GB/s; the command remembers one."""
    with tempfile.TemporaryDirectory() as directory:
        header = b'{"w":{"dtype":"U8","shape":[4096],"data_offsets":[0,4096]}}'
        small = Path(directory, "small.safetensors")
        small.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4096))
        peaks = []
        for i in range(5):
            os.environ["XDG_CACHE_HOME"] = str(Path(directory, str(i)))
            run = bench.ask("load", str(small), "--device", bench.args.device)["runs"][0]
            peaks.append(run.get("link_gb_per_s"))
        os.environ.pop("XDG_CACHE_HOME")
    known = [peak for peak in peaks if peak is not None]
    return max(known) if known else None


def drop() -> None:
    """Empties the page cache."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def row(name: str, runs: list[dict[str, Any]], peak: float | None) -> dict[str, Any]:
    """Medians of loads. Allocating the destination is part of their seconds."""
    seconds = statistics.median(run["seconds"] for run in runs)
    return {
        "name": name,
        "seconds": round(seconds, 4),
        "all_s": [round(run["seconds"], 4) for run in runs],
        "gb_per_s": round(runs[0]["bytes"] / 1e9 / seconds, 2),
        "of_link": round(runs[0]["bytes"] / 1e9 / seconds / peak, 3) if peak else None,
        "engines": sorted({engine["engine"] for run in runs for engine in run["engines"]}),
        "stages": {key: round(statistics.median(run[key] for run in runs), 4) for key in ("plan_s", "alloc_s", "move_s")},
        "moved_s": [round(sum(engine["seconds"] for engine in run["engines"]), 4) for run in runs],
        "notes": sorted({note for run in runs for note in run["notes"]}),
    }


def cold_rounds(
    bench: Bench, rounds: int, flags: list[str], server: list[str]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Loads with nothing resident and nothing cached, by the server and from files, who begins in turn."""
    pairs = []
    for number in range(rounds):
        pair = {}
        for by_server in (number % 2 == 0, number % 2 == 1):
            bench.ask("evict", "--all", "--address", bench.address)
            drop()
            pair[by_server] = bench.load(*flags, *(server if by_server else []))
        pairs.append((pair[True], pair[False]))
    return pairs


def main() -> None:
    args = parse_args()
    bench = Bench(args)
    model = str(args.model)
    files = [str(file) for file in sorted(args.model.iterdir()) if file.is_file()]
    server = [f"--server={bench.address}"]
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {"model": model, "device": args.device, "pool": args.pool, "rows": rows}

    def add(name: str, runs: list[dict[str, Any]]) -> None:
        rows.append(row(name, runs, result["link_gb_per_s"]))
        print(rows[-1], flush=True)
        args.out.write_text(json.dumps(result, indent=1))

    cache.set_state(files, "warm")
    bench.load()
    result["link_gb_per_s"] = link_peak(bench)
    add("from files, page cache warm", [bench.load() for _ in range(args.repeat)])
    result["answers_ms"] = round(bench.start(), 1)
    try:
        add("by the server, first load, page cache warm", [bench.load(*server)])
        result["status"] = bench.ask("status", "--address", bench.address)
        add("by the server, resident", [bench.load(*server) for _ in range(args.repeat)])
        for size in args.staging:
            runs = [bench.load(*server, "--pinned", size) for _ in range(args.repeat)]
            add(f"by the server, resident, {size} of staging memory", runs)
        if args.idle_seconds is not None:
            idle = []
            for _ in range(args.repeat):
                bench.be_idle()
                idle.append(bench.load(*server))
            add("by the server, resident, GPUs idle before", idle)
        drop()
        add("by the server, resident, page cache dropped", [bench.load(*server) for _ in range(args.repeat)])
        if not args.no_cold:
            cold = cold_rounds(bench, args.cold_repeat or args.repeat, ["--tensors", args.cold_tensors], server)
            add("by the server, nothing resident, page cache dropped", [by_server for by_server, _ in cold])
            add("from files, page cache dropped", [by_files for _, by_files in cold])
            ratios = [by_files["seconds"] / by_server["seconds"] for by_server, by_files in cold]
            result["cold_of_files"] = {"median": statistics.median(ratios), "all": [round(ratio, 3) for ratio in ratios]}
            print(result["cold_of_files"], flush=True)
        result["status_after"] = bench.ask("status", "--address", bench.address)
    finally:
        bench.stop()
        result["log"] = Path(bench.log.name).read_text()[-4000:]
        args.out.write_text(json.dumps(result, indent=1))
    print("| load | s | GB/s | of the link |\n|---|---|---|---|")
    for r in rows:
        print(f"| {r['name']} | {r['seconds']} ({', '.join(map(str, r['all_s']))}) | {r['gb_per_s']} | {r['of_link']} |")
    print(f"answers after {result['answers_ms']} ms")


if __name__ == "__main__":
    main()
