"""The loaders that are compared: ours and its rivals, each as it is meant to be called.

Each takes the checkpoint's directory and a device, and gives its tensors by name and what keeps them alive.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from inputs import data_files

Loaded = tuple[dict[str, Any], Any]


class Skipped(Exception):
    """A loader that does not run here, and why."""


def ours(**options: Any) -> Callable[[str, str], Loaded]:
    def load(path: str, device: str) -> Loaded:
        import serverless_llm

        loaded = serverless_llm.load(path, device=device, **options)
        return loaded, loaded.report

    return load


def safetensors(path: str, device: str, **options: Any) -> Loaded:
    from safetensors.torch import load_file

    tensors = {}
    for file in data_files(path):
        tensors.update(load_file(file, device=device, **options))
    return tensors, None


def safetensors_copied(path: str, device: str) -> Loaded:
    """On the host the tensors are views of mapped files, and nothing is read until somebody does."""
    tensors, keep = safetensors(path, device)
    if device == "cpu":
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    return tensors, keep


def safetensors_touched(path: str, device: str) -> Loaded:
    """A byte of each page is read: the least that brings the mapped files in."""
    import torch

    tensors, keep = safetensors(path, device)
    for tensor in tensors.values():
        tensor.flatten().view(torch.uint8)[::4096].sum()
    return tensors, keep


def safetensors_pread(path: str, device: str) -> Loaded:
    try:
        return safetensors(path, device, backend="pread")
    except TypeError as e:
        raise Skipped("this safetensors has no choice of backends") from e


def safetensors_threads(path: str, device: str) -> Loaded:
    """A thread a file, as vLLM and transformers can be told to."""
    from concurrent.futures import ThreadPoolExecutor

    from safetensors.torch import load_file

    tensors: dict[str, Any] = {}
    with ThreadPoolExecutor(8) as pool:
        for part in pool.map(lambda file: load_file(file, device=device), data_files(path)):
            tensors.update(part)
    return tensors, None


def safetensors_prefetch(path: str, device: str) -> Loaded:
    from safetensors import safe_open

    if not hasattr(safe_open, "prefetch"):
        raise Skipped("needs safetensors 0.9; --prefetch-from names a directory that it is unpacked in")
    handles: list[Any] = [safe_open(file, "pt", device=device) for file in data_files(path)]
    readers: list[Any] = [handle.prefetch(device=device) for handle in handles]
    return {name: tensor for reader in readers for name, tensor in reader}, (handles, readers)


def fastsafetensors(path: str, device: str) -> Loaded:
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    loader = SafeTensorsFileLoader(SingleGroup(), device, nogds=True)
    loader.add_filenames({0: data_files(path)})
    buffers = loader.copy_files_to_device()
    return {key: buffers.get_tensor(key) for key in loader.get_keys()}, (loader, buffers)


def instanttensor(backend: str | None) -> Callable[[str, str], Loaded]:
    def load(path: str, device: str) -> Loaded:
        import instanttensor as it

        options = {}
        if backend:
            backends = getattr(it, "Backend", None)
            if backends is None:
                backends = importlib.import_module("instanttensor._impl").Backend
            options["backend"] = getattr(backends, backend)
        with it.safe_open(data_files(path), framework="pt", device=device, copy=True, **options) as f:
            return dict(f.tensors()), None

    return load


def runai(path: str, device: str) -> Loaded:
    """The documented use: tensors on the host, each moved as it comes. The streamer's buffers are used again."""
    from runai_model_streamer import SafetensorsStreamer

    tensors = {}
    with SafetensorsStreamer() as streamer:
        streamer.stream_files(data_files(path))
        for name, tensor in streamer.get_tensors():
            tensors[name] = tensor.clone() if device == "cpu" else tensor.to(device)
    return tensors, None


@dataclass(frozen=True)
class Loader:
    """One row of the comparison."""

    title: str
    package: str
    load: Callable[[str, str], Loaded]
    module: str
    kind: str = "source"
    """`source`: reads the safetensors; `store`: reads our store of them."""
    states: tuple[str, ...] = ("warm", "cold", "half")
    devices: tuple[str, ...] = ("cpu", "cuda")


_OURS = ("serverless-llm-rs", "serverless_llm")
_CUDA = ("cuda",)
LOADERS: dict[str, Loader] = {
    "ours-store": Loader("ours, store", _OURS[0], ours(), _OURS[1], "store"),
    "ours-safetensors": Loader("ours, safetensors", _OURS[0], ours(), _OURS[1]),
    "ours-verify": Loader("ours, store, verified", _OURS[0], ours(verify=True), _OURS[1], "store"),
    # What a container that refuses io_uring gets, and, warm, what the page cache's threads give.
    "ours-pread": Loader("ours, safetensors, no io_uring", _OURS[0], ours(engine="pread"), _OURS[1]),
    "ours-mapped": Loader(
        "ours, safetensors, pages in place", _OURS[0], ours(engine="mapped"), _OURS[1], states=("warm",), devices=_CUDA
    ),
    "safetensors": Loader("safetensors", "safetensors", safetensors_copied, "safetensors"),
    "safetensors-touched": Loader(
        "safetensors, mapped, a byte a page", "safetensors", safetensors_touched, "safetensors", devices=("cpu",)
    ),
    "safetensors-pread": Loader("safetensors, pread", "safetensors", safetensors_pread, "safetensors"),
    "safetensors-threads": Loader(
        "safetensors, a thread a file", "safetensors", safetensors_threads, "safetensors", devices=_CUDA
    ),
    "safetensors-prefetch": Loader(
        "safetensors, prefetch", "safetensors", safetensors_prefetch, "safetensors", devices=_CUDA
    ),
    "fastsafetensors": Loader("fastsafetensors", "fastsafetensors", fastsafetensors, "fastsafetensors"),
    "instanttensor": Loader("instanttensor", "instanttensor", instanttensor(None), "instanttensor", devices=_CUDA),
    "instanttensor-mmap": Loader(
        "instanttensor, MMAP", "instanttensor", instanttensor("MMAP"), "instanttensor", devices=_CUDA
    ),
    "instanttensor-buffered": Loader(
        "instanttensor, buffered", "instanttensor", instanttensor("URING_BUFFERED"), "instanttensor", devices=_CUDA
    ),
    "runai": Loader("runai-model-streamer", "runai-model-streamer", runai, "runai_model_streamer"),
}


def version(loader: Loader) -> str | None:
    """The version that is imported, which PYTHONPATH may have put before the installed one."""
    module = importlib.import_module(loader.module)
    found = getattr(module, "__version__", None)
    if found is not None:
        return str(found)
    try:
        return importlib.metadata.version(loader.package)
    except importlib.metadata.PackageNotFoundError:
        return None
