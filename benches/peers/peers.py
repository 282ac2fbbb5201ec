"""Times this loader and its rivals on the same files, each in a fresh process, beside the limits of the same host.

    python benches/peers/peers.py WORKDIR [--model llama8b|many] [--gb N] [--states warm,cold,half] [--repeat 3]
                                  [--device cuda:0|cpu] [--peers NAME,...] [--out benches/results/NAME]

It makes the checkpoint in WORKDIR (random bf16 weights), converts it to a store, and writes OUT.json and OUT.md. A peer
that is not installed is skipped. Times run from open to device-synchronised; imports and the CUDA context come before.
`--verify` compares every tensor of each peer with the safetensors library, once.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from typing import Any, Callable

GB = 1e9
PIECE = 4 << 20


# --- inputs -------------------------------------------------------------------------------------------------------


def llama8b() -> list[tuple[str, tuple[int, ...]]]:
    """Llama-3.1-8B's 291 tensors."""
    hidden, inner, kv, vocab = 4096, 14336, 1024, 128256
    shapes: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (vocab, hidden))]
    for layer in range(32):
        for name, shape in {
            "input_layernorm": (hidden,),
            "mlp.down_proj": (hidden, inner),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "post_attention_layernorm": (hidden,),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.v_proj": (kv, hidden),
        }.items():
            shapes.append((f"model.layers.{layer}.{name}.weight", shape))
    return shapes + [("model.norm.weight", (hidden,)), ("lm_head.weight", (vocab, hidden))]


def many(gb: float) -> list[tuple[str, tuple[int, ...]]]:
    """Small expert weights, as in a mixture-of-experts model: 3.1 MB each, and norms of 4 KB between them."""
    shapes: list[tuple[str, tuple[int, ...]]] = []
    total = 0
    while total < gb * GB:
        index = len(shapes) // 4
        for name, shape in {"norm": (2048,), "gate": (768, 2048), "up": (768, 2048), "down": (2048, 768)}.items():
            shapes.append((f"experts.{index}.{name}.weight", shape))
            total += 2 * (shape[0] * (shape[1] if len(shape) > 1 else 1))
    return shapes


def make(directory: str, shapes: list[tuple[str, tuple[int, ...]]], device: str) -> None:
    """Writes random bf16 weights as safetensors shards of about 4 GB with an index."""
    import torch
    from safetensors.torch import save_file

    os.makedirs(directory, exist_ok=True)
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for name, shape in shapes:
        length = 2
        for dim in shape:
            length *= dim
        if size + length > 4.9e9 and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append((name, shape))
        size += length
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {n: torch.randn(*s, device=device, dtype=torch.bfloat16).cpu() for n, s in shard}
        save_file(tensors, os.path.join(directory, file), metadata={"format": "pt"})
        weight_map.update({name: file for name, _ in shard})
    with open(os.path.join(directory, "model.safetensors.index.json"), "w") as f:
        json.dump({"metadata": {}, "weight_map": weight_map}, f)


def data_files(directory: str) -> list[str]:
    return sorted(glob.glob(os.path.join(directory, "*.safetensors")) + glob.glob(os.path.join(directory, "tensor.data_*")))


def set_cache(files: list[str], state: str) -> None:
    """Puts files in the page cache (`warm`), out of it (`cold`), or the first half of each in it (`half`)."""
    for path in files:
        with open(path, "rb", buffering=0) as f:
            size = os.path.getsize(path)
            if state != "warm":
                os.fsync(f.fileno())
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            left = {"warm": size, "cold": 0, "half": size // 2}[state]
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_NORMAL)
            while left > 0:
                left -= len(f.read(min(left, 16 << 20))) or left


# --- peers: each returns its tensors and what keeps them alive ----------------------------------------------------


def ours(path: str, device: str, **options: Any) -> tuple[dict[str, Any], Any]:
    import serverless_llm

    loaded = serverless_llm.load(path, device=device, **options)
    return loaded, loaded.report


def safetensors_plain(path: str, device: str) -> tuple[dict[str, Any], Any]:
    from safetensors.torch import load_file

    tensors = {}
    for file in data_files(path):
        tensors.update(load_file(file, device=device))
    if device == "cpu":  # otherwise nothing is read: the tensors are views of mapped files
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    return tensors, None


def safetensors_prefetch(path: str, device: str) -> tuple[dict[str, Any], Any]:
    from safetensors import safe_open

    handles = [safe_open(file, "pt", device=device) for file in data_files(path)]
    loaders = [handle.prefetch(device=device) for handle in handles]
    return {name: tensor for loader in loaders for name, tensor in loader}, (handles, loaders)


def fastsafetensors(path: str, device: str) -> tuple[dict[str, Any], Any]:
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    loader = SafeTensorsFileLoader(SingleGroup(), device, nogds=True)
    loader.add_filenames({0: data_files(path)})
    buffers = loader.copy_files_to_device()
    return {key: buffers.get_tensor(key) for key in loader.get_keys()}, (loader, buffers)


def instanttensor(backend: str | None) -> Callable[[str, str], tuple[dict[str, Any], Any]]:
    def load(path: str, device: str) -> tuple[dict[str, Any], Any]:
        import instanttensor as it

        options = {}
        if backend:
            backends = getattr(it, "Backend", None)
            if backends is None:
                from instanttensor._impl import Backend as backends  # type: ignore[no-redef]
            options["backend"] = getattr(backends, backend)
        with it.safe_open(data_files(path), framework="pt", device=device, copy=True, **options) as f:
            return dict(f.tensors()), None

    return load


PEERS: dict[str, tuple[str, Callable[..., tuple[dict[str, Any], Any]]]] = {
    "ours, store": ("store", ours),
    "ours, store, verified": ("store", lambda path, device: ours(path, device, verify=True)),
    "ours, safetensors": ("source", ours),
    "ours, safetensors, pread": ("source", lambda path, device: ours(path, device, engine="pread")),
    "ours, safetensors, mapped": ("source", lambda path, device: ours(path, device, engine="mapped")),
    "safetensors": ("source", safetensors_plain),
    "safetensors prefetch": ("source", safetensors_prefetch),
    "fastsafetensors": ("source", fastsafetensors),
    "instanttensor": ("source", instanttensor(None)),
    "instanttensor MMAP": ("source", instanttensor("MMAP")),
    "instanttensor buffered": ("source", instanttensor("URING_BUFFERED")),
}


def compare(tensors: dict[str, Any], source: str) -> int:
    """Number of tensors that differ from what the safetensors library reads, or are missing."""
    import torch
    from safetensors import safe_open

    bad = 0
    for file in data_files(source):
        with safe_open(file, "pt") as f:
            for name in f.keys():
                want, got = f.get_tensor(name), tensors.get(name)
                same = got is not None and got.dtype == want.dtype and got.shape == want.shape
                bad += not (same and torch.equal(got.cpu().view(torch.uint8), want.view(torch.uint8)))
    return bad


def one(name: str, work: str, device: str, state: str, verify: bool) -> dict[str, Any]:
    """One measurement, in this process."""
    import torch

    kind, load = PEERS[name]
    path = os.path.join(work, kind)
    cuda = device.startswith("cuda")
    try:
        if name.startswith("ours"):
            import serverless_llm  # noqa: F401
        elif name.startswith("instant"):
            import instanttensor  # noqa: F401
        elif name.startswith("fast"):
            import fastsafetensors  # noqa: F401
        else:
            from safetensors import safe_open

            if "prefetch" in name and not hasattr(safe_open, "prefetch"):
                return {"skipped": "needs safetensors 0.9"}
    except ImportError as e:
        return {"skipped": str(e)}
    set_cache(data_files(path), state)
    if cuda:
        torch.zeros(1, device=device)
        torch.cuda.synchronize()
    start = time.perf_counter()
    tensors, keep = load(path, device)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    result: dict[str, Any] = {"seconds": seconds, "bytes": size, "tensors": len(tensors)}
    if name.startswith("ours"):
        result["report"] = keep.to_dict()
    if verify:
        result["wrong"] = compare(tensors, os.path.join(work, "source"))
    return result


# --- limits -------------------------------------------------------------------------------------------------------


def read_floor(path: str, direct: bool) -> float:
    """GB/s of eight threads that read all files in 4 MiB pieces and do nothing with them."""
    import mmap

    jobs = []
    for file in data_files(path):
        fd = os.open(file, os.O_RDONLY | (os.O_DIRECT if direct else 0))
        jobs += [(fd, offset) for offset in range(0, os.path.getsize(file), PIECE)]
    pending, lock, total = iter(jobs), threading.Lock(), [0]

    def work() -> None:
        buffer = mmap.mmap(-1, PIECE)
        while True:
            with lock:
                job = next(pending, None)
            if job is None:
                return
            n = os.preadv(job[0], [buffer], job[1])
            with lock:
                total[0] += n

    start = time.perf_counter()
    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    for fd in {job[0] for job in jobs}:
        os.close(fd)
    return total[0] / seconds / GB


def copy_peak(device: str) -> float:
    """GB/s of one large copy: pinned host memory to the device, or memory to memory."""
    import torch

    cuda = device.startswith("cuda")
    source = torch.empty(1 << 30, dtype=torch.uint8, pin_memory=cuda).fill_(1)
    target = torch.empty_like(source, device=device)
    best = 0.0
    for _ in range(6):
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        if cuda:
            torch.cuda.synchronize()
        best = max(best, source.numel() / (time.perf_counter() - start) / GB)
    return best


# --- the run ------------------------------------------------------------------------------------------------------


def child_env() -> dict[str, str]:
    """Some rivals look for an unversioned libcudart.so, which torch's wheels do not have."""
    import torch

    env = dict(os.environ)
    root = os.path.dirname(os.path.dirname(torch.__file__))
    found = sorted(glob.glob(root + "/nvidia/cu*/lib/libcudart.so.*") + glob.glob(root + "/nvidia/cuda_runtime/lib/libcudart.so.*"))
    if found:
        link_dir = os.path.join(os.path.expanduser("~"), ".cache", "sllm-peers")
        os.makedirs(link_dir, exist_ok=True)
        link = os.path.join(link_dir, "libcudart.so")
        if not os.path.lexists(link):
            os.symlink(found[-1], link)
        env["LD_LIBRARY_PATH"] = ":".join(filter(None, [link_dir, os.path.dirname(found[-1]), env.get("LD_LIBRARY_PATH")]))
    return env


def child(args: list[str], env: dict[str, str]) -> Any:
    run = subprocess.run([sys.executable, __file__, *args], env=env, capture_output=True, text=True, timeout=600)
    if run.returncode != 0:
        return {"failed": run.stderr.strip().splitlines()[-1:] or run.returncode}
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work")
    parser.add_argument("--model", choices=["llama8b", "many"], default="llama8b")
    parser.add_argument("--gb", type=float, default=8.0, help="size of `many`")
    parser.add_argument("--states", default="warm,cold")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--peers", default=",".join(name.replace(", ", "/") for name in PEERS))
    parser.add_argument("--out", default="benches/results/peers")
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--one", nargs=2, metavar=("PEER", "STATE"), help=argparse.SUPPRESS)
    parser.add_argument("--limit", choices=["peak", "buffered", "direct"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    source, store = os.path.join(args.work, "source"), os.path.join(args.work, "store")
    if args.one:
        print(json.dumps(one(args.one[0], args.work, args.device, args.one[1], args.verify)))
        return
    if args.limit:
        print(json.dumps(copy_peak(args.device) if args.limit == "peak" else read_floor(source, args.limit == "direct")))
        return

    import serverless_llm
    import torch

    cuda = args.device.startswith("cuda")
    if not data_files(source):
        make(source, llama8b() if args.model == "llama8b" else many(args.gb), args.device)
    if not data_files(store):
        print(serverless_llm.convert(source, store), flush=True)
    env = child_env()
    result: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "card": torch.cuda.get_device_name(args.device) if cuda else None,
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "model": args.model,
        "rows": [],
    }
    base = [args.work, "--device", args.device]
    result["peak_GBps"] = child([*base, "--limit", "peak"], env)
    lines = [f"{'host' if not cuda else result['card']}, {os.cpu_count()} CPUs; copy peak {result['peak_GBps']:.1f} GB/s", ""]
    for state in args.states.split(","):
        floors = {}
        if state == "cold":
            for kind in ("buffered", "direct"):
                set_cache(data_files(source), "cold")
                floors[kind] = child([*base, "--limit", kind], env)
            result["floor_GBps"] = floors
        lines += [f"| {state} | GB/s, median (each) | of the copy peak |", "|---|---|---|"]
        lines += [f"| floor: {kind} reads, 8 threads | {value:.2f} | |" for kind, value in floors.items()]
        for name in [name.replace("/", ", ") for name in args.peers.split(",")]:
            runs = []
            for number in range(args.repeat):
                extra = ["--verify"] if args.verify and number == 0 and state == args.states.split(",")[0] else []
                run = child([*base, "--one", name, state, *extra], env)
                runs.append(run)
                if "seconds" not in run:
                    break
            result["rows"].append({"state": state, "peer": name, "runs": runs})
            rates = [run["bytes"] / run["seconds"] / GB for run in runs if "seconds" in run]
            if rates:
                median = statistics.median(rates)
                wrong = "".join(f"; {run['wrong']} of {run['tensors']} tensors wrong" for run in runs if "wrong" in run)
                each = " ".join(f"{rate:.2f}" for rate in rates)
                lines.append(f"| {name} | **{median:.2f}** ({each}){wrong} | {median / result['peak_GBps']:.2f} |")
            else:
                lines.append(f"| {name} | {runs[-1]} | |")
            print(lines[-1], flush=True)
        lines.append("")
    os.makedirs(os.path.dirname(args.out) or ".", exist_ok=True)
    with open(args.out + ".json", "w") as f:
        json.dump(result, f, indent=1)
    with open(args.out + ".md", "w") as f:
        f.write("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
