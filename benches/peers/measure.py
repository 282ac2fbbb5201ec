"""One measurement in a process of its own: `python measure.py TASK`, a JSON object, answers with one line of JSON.

Imports, the CUDA context and the page cache's state come before the clock; it stops when the device is synchronised.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from typing import Any

import cache
import limits
from inputs import data_files
from loaders import LOADERS, Skipped, version


def load(task: dict[str, Any]) -> dict[str, Any]:
    """Times one loader."""
    import torch

    loader = LOADERS[task["name"]]
    device, path = task["device"], os.path.join(task["directory"], loader.kind)
    cuda = device.startswith("cuda")
    try:
        found = version(loader)
    except ImportError as e:
        return {"skipped": str(e)}
    # The library makes its context in the first call; so that no loader has to.
    if cuda:
        torch.zeros(1, device=device)
        torch.cuda.synchronize()
    files = data_files(path)
    share = cache.set_state(files, task["state"])
    if not cuda:
        limits.use_free_memory(2 * sum(map(os.path.getsize, files)))
    free = torch.cuda.mem_get_info(device)[0] if cuda else 0
    start = time.perf_counter()
    try:
        tensors, keep = loader.load(path, device)
    except Skipped as e:
        return {"skipped": str(e)}
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    result: dict[str, Any] = {
        "seconds": seconds, "bytes": size, "tensors": len(tensors), "version": found, "cached": round(share, 4)
    }
    if cuda:  # what is held beside the weights, by whoever
        result["device_extra"] = free - torch.cuda.mem_get_info(device)[0] - size
    if loader.module == "serverless_llm":
        result["report"] = {**keep.to_dict(), "path": loader.kind}
    if task["verify"]:
        result["wrong"] = compare(tensors, os.path.join(task["directory"], "source"))
    return result


def compare(tensors: dict[str, Any], source: str) -> int:
    """Tensors that differ from what the safetensors library reads, are missing, or should not be there."""
    import torch
    from safetensors import safe_open

    def raw(tensor: Any) -> Any:
        return tensor.cpu().contiguous().flatten().view(torch.uint8)

    bad = seen = 0
    for file in data_files(source):
        with safe_open(file, "pt") as f:
            for name in f.keys():
                want, got = f.get_tensor(name), tensors.get(name)
                same = got is not None and got.dtype == want.dtype and got.shape == want.shape
                bad += not (same and torch.equal(raw(got), raw(want)))
                seen += got is not None
    return bad + len(tensors) - seen


def limit(task: dict[str, Any]) -> dict[str, Any]:
    """Takes one limit."""
    source = os.path.join(task["directory"], "source")
    if task["limit"]["call"] in ("read", "register"):
        cache.set_state(data_files(source), "cold" if task["state"] != "warm" else "warm")
        if task["device"] == "cpu":
            limits.use_free_memory(2 * int(task["most"]))
    return limits.measure(task["limit"], source, task["device"], task["most"])


def main() -> None:
    task = json.loads(sys.argv[1])
    try:
        result = limit(task) if "limit" in task else load(task)
    except Exception as e:
        traceback.print_exc()
        result = {"failed": f"{type(e).__name__}: {e}"[:300]}
    print("\n" + json.dumps(result), flush=True)
    # Some rivals hang or crash while the interpreter ends; the figures are out.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
