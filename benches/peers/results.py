"""The file of results: what was measured, on which host, with which versions; and going on with it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

# What one measurement is known by.
KEY = ("model", "state", "cpus", "name", "round")


def _first(path: str, field: str) -> str:
    with open(path) as f:
        return next((line.split(":", 1)[1].strip() for line in f if line.startswith(field)), "")


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]


def host(device: str) -> dict[str, Any]:
    """What the figures depend on: a different one makes them another table. `boot` tells two equal machines apart."""
    import torch

    cuda = device.startswith("cuda")
    boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "cpu": _first("/proc/cpuinfo", "model name") or platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_GiB": round(int(_first("/proc/meminfo", "MemTotal").split()[0]) / 2**20),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "boot": _digest(boot),
    }


def versions() -> dict[str, str]:
    """Ours by its native module's digest, since its version does not change with every build."""
    import serverless_llm
    from serverless_llm import _native

    native = Path(_native.__file__ or "").read_bytes()
    return {
        "torch": importlib.metadata.version("torch"),
        "serverless_llm": f"{serverless_llm.__version__} (build {_digest(native)})",
    }


class Results:
    """Measurements in OUT.json. The file is whole after every one."""

    def __init__(self, out: str, device: str, resume: bool) -> None:
        self.path = out + ".json"
        here: dict[str, Any] = {"host": host(device), "versions": versions()}
        self.data: dict[str, Any] = {**here, "commands": [], "runs": []}
        if resume and os.path.exists(self.path):
            with open(self.path) as f:
                self.data = json.load(f)
            for part, now in here.items():
                for name, value in now.items():
                    was = self.data[part].get(name)
                    if was != value:
                        raise SystemExit(
                            f"{self.path} cannot be resumed: {part} {name} was {was!r} and is {value!r}; "
                            "figures of different hosts or builds are no comparison. Give another --out"
                        )
        elif os.path.exists(self.path):
            raise SystemExit(f"{self.path} is there already: --resume goes on with it, or give another --out")

    @property
    def runs(self) -> list[dict[str, Any]]:
        runs: list[dict[str, Any]] = self.data["runs"]
        return runs

    def has(self, key: tuple[Any, ...]) -> bool:
        return any(tuple(run[k] for k in KEY) == key for run in self.runs)

    def gave_up(self, model: str, state: str, cpus: str | None, name: str) -> bool:
        """Whether it was skipped or failed here: it will again."""
        where = (model, state, cpus, name)
        return any(tuple(run[k] for k in KEY[:4]) == where and "seconds" not in run for run in self.runs)

    def verified(self, model: str, name: str) -> bool:
        return any(run["model"] == model and run["name"] == name and "wrong" in run for run in self.runs)

    def add(self, run: dict[str, Any]) -> None:
        self.runs.append(run)
        self.save()

    def save(self) -> None:
        os.makedirs(os.path.dirname(os.path.abspath(self.path)), exist_ok=True)
        part = self.path + ".part"
        with open(part, "w") as f:
            json.dump(self.data, f, indent=1)
            f.write("\n")
        os.replace(part, self.path)
