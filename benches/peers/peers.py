"""Times this loader and its rivals on the same files, each in a fresh process, beside the limits of the same host.

    python benches/peers/peers.py WORKDIR [--models llama8b,many:8] [--states warm,cold,half] [--repeat 3]
                                  [--device cuda:0|cpu] [--cpus 0,1] [--out benches/results/NAME] [--resume]

It makes the checkpoints in WORKDIR (random bf16 weights), converts them, and measures in rounds: in each, every limit
and every loader once a model, so that a drift of the host meets them all. A loader that is not installed is skipped. Every
loader's tensors are compared bit by bit with the safetensors library once a model. OUT.json and OUT.md are written
after every measurement; OUT.svg and OUT.png at the end (where matplotlib is, or by plot.py elsewhere). After `--budget`
seconds no measurement begins, and the status is 3; `--resume` goes on from OUT.json on the same host.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import subprocess
import sys
import time
from typing import Any

import cache
import inputs
import limits
import table
from loaders import LOADERS
from results import Results

UNFINISHED = 3
TIMEOUT_S = 180
HERE = os.path.dirname(os.path.abspath(__file__))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", metavar="WORKDIR")
    models = "llama8b, qwen3-30b-a3b, these with :LAYERS for fewer layers, many:GB, many:GB:TENSORS; several by commas"
    parser.add_argument("--models", default="llama8b", help=models)
    parser.add_argument("--states", default="warm,cold,half")
    parser.add_argument("--repeat", type=int, default=3, help="rounds")
    parser.add_argument("--limit-rounds", type=int, help="rounds that take the limits too; all, if not given")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--cpus", help="processors that the measured processes may use, as taskset takes them")
    parser.add_argument("--peers", default=",".join(LOADERS), help="of: " + ", ".join(LOADERS))
    parser.add_argument("--out", default="benches/results/peers")
    parser.add_argument("--resume", action="store_true", help="go on from OUT.json")
    parser.add_argument("--budget", type=float, help="seconds after which no measurement begins")
    parser.add_argument("--floor-threads", default="1,4,8,16", help="threads of the raw reads")
    parser.add_argument("--floor-gb", type=float, default=4.0, help="GB of one raw read")
    parser.add_argument("--prefetch-from", metavar="DIR", help="where a safetensors 0.9 is unpacked, for its prefetch")
    args = parser.parse_args()
    args.states = args.states.split(",")
    args.peers = args.peers.split(",")
    args.models = args.models.split(",")
    if unknown := [state for state in args.states if state not in cache.STATES]:
        parser.error(f"{unknown[0]!r} is no state: give {', '.join(cache.STATES)}")
    if unknown := [peer for peer in args.peers if peer not in LOADERS]:
        parser.error(f"{unknown[0]!r} is no loader: give {', '.join(LOADERS)}")
    for model in args.models:
        inputs.shapes_of(model)
    why = cache.refusal()
    if why and set(args.states) != {"warm"}:
        parser.error(why)
    return args


def child_env(work: str) -> dict[str, str]:
    """Some rivals look for an unversioned libcudart.so, which torch's wheels do not have: a link stands for it."""
    import torch

    env = dict(os.environ)
    root = os.path.dirname(os.path.dirname(torch.__file__))
    found = sorted(
        glob.glob(root + "/nvidia/cu*/lib/libcudart.so.*") + glob.glob(root + "/nvidia/cuda_runtime/lib/libcudart.so.*")
    )
    if found:
        links = os.path.join(os.path.abspath(work), ".cudart")
        os.makedirs(links, exist_ok=True)
        link = os.path.join(links, "libcudart.so")
        if not os.path.lexists(link):
            os.symlink(found[-1], link)
        path = [links, os.path.dirname(found[-1]), env.get("LD_LIBRARY_PATH")]
        env["LD_LIBRARY_PATH"] = ":".join(filter(None, path))
    return env


def run_child(task: dict[str, Any], cpus: str | None, env: dict[str, str]) -> dict[str, Any]:
    """One measurement in a fresh process."""
    command = [sys.executable, os.path.join(HERE, "measure.py"), json.dumps(task)]
    if cpus:
        command = ["taskset", "-c", cpus, *command]
    try:
        run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {TIMEOUT_S} s"}
    lines = run.stdout.strip().splitlines()
    try:
        found: dict[str, Any] = json.loads(lines[-1])
        return found
    except (IndexError, json.JSONDecodeError):
        said = (run.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return {"failed": f"ended with {run.returncode}: {said[:200]}"}


def tasks(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Everything to be measured, in turn."""
    kind = "cuda" if args.device.startswith("cuda") else "cpu"
    threads = [int(n) for n in args.floor_threads.split(",")]
    found = []
    for state in args.states:
        for number in range(args.repeat):
            for model in args.models:
                common = {"model": model, "state": state, "cpus": args.cpus, "round": number}
                common |= {"directory": os.path.join(args.work, model.replace(":", "-")), "device": args.device}
                takes_limits = args.limit_rounds is None or number < args.limit_rounds
                for name, spec in limits.limits_of(state, kind == "cuda", threads).items() if takes_limits else ():
                    found.append({**common, "name": name, "limit": spec, "most": args.floor_gb * inputs.GB})
                for name in args.peers:
                    if state in LOADERS[name].states and kind in LOADERS[name].devices:
                        found.append({**common, "name": name, "verify": False})
    return found


def write_tables(results: Results, out: str) -> None:
    results.save()
    with open(out + ".md", "w") as f:
        f.write(table.markdown(results.data))


def main() -> int:
    args = parse()
    began = time.monotonic()
    results = Results(args.out, args.device, args.resume)
    # Paths of this host tell nobody anything.
    told = [os.path.basename(a) if a == args.out else a for a in sys.argv[1:] if a != args.work]
    results.data["commands"].append(" ".join(["peers.py", "WORKDIR", *told]))
    with_store = any(LOADERS[peer].kind == "store" for peer in args.peers)
    for model in args.models:
        inputs.prepare(os.path.join(args.work, model.replace(":", "-")), model, with_store)
    env = child_env(args.work)
    env_prefetch = dict(env)
    if args.prefetch_from:
        env_prefetch["PYTHONPATH"] = ":".join(filter(None, [args.prefetch_from, env.get("PYTHONPATH")]))
    for task in tasks(args):
        where = (task["model"], task["state"], task["cpus"], task["name"])
        if results.has((*where, task["round"])) or results.gave_up(*where):
            continue
        if args.budget and time.monotonic() - began > args.budget:
            print("unfinished: run it again with --resume", flush=True)
            return UNFINISHED
        if "limit" not in task:
            task["verify"] = not results.verified(task["model"], task["name"])
        run = run_child(task, args.cpus, env_prefetch if task["name"] == "safetensors-prefetch" else env)
        results.add({**{key: task[key] for key in ("model", "state", "cpus", "name", "round")}, **run})
        write_tables(results, args.out)
        said = f"{run['bytes'] / run['seconds'] / inputs.GB:.2f} GB/s" if "seconds" in run else str(run)
        wrong = f", {run['wrong']} of {run['tensors']} tensors wrong" if "wrong" in run else ""
        print(f"{task['model']} {task['state']} round {task['round']}: {task['name']}: {said}{wrong}", flush=True)
    write_tables(results, args.out)
    try:
        import plot

        plot.draw(results.data, args.out)
    except ImportError:
        print(f"no matplotlib here: draw it elsewhere by plot.py {args.out}.json", flush=True)
    print(table.markdown(results.data))
    return 1 if any(run.get("wrong") for run in results.runs) else 0


if __name__ == "__main__":
    sys.exit(main())
