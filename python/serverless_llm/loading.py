"""Load checkpoints into memory of torch or NumPy."""

from __future__ import annotations

import importlib.util
import itertools
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from . import _arrays, _native
from ._native import Checkpoint
from .errors import InvalidError
from .reports import LoadReport
from .staging import Staged
from .store import Progress, Source, opened, opening

Server = str | bool | None

_AT_ONCE = 256  # tensors that are made between two looks at the load


class LoadedDict(dict[str, Any]):
    """Tensors by name, and the `report` of their load. They are views of one block of memory a device."""

    report: LoadReport


def load(
    source: Source,
    *,
    device: Any = "auto",
    tensors: str | Sequence[str] | None = None,
    engine: str = "auto",
    direct: bool | None = None,
    verify: bool = False,
    threads: int | None = None,
    pinned_bytes: int | None = None,
    framework: str = "auto",
    server: Server = None,
    token: str | None = None,
    progress: Progress | None = None,
    revision: str | None = None,
) -> LoadedDict:
    """Load a checkpoint (a store, safetensors, or the original's layout) to a device.

    `device`: `"auto"` (the current CUDA device if torch sees one, else the host), `"cpu"`, `"cuda"`, `"cuda:1"`, a
    number, or a `torch.device`. `tensors`: a name or glob, or a list of them; one that matches nothing is an error.
    `engine`: `"auto"`, `"uring"`, `"pread"` or `"mapped"`. `direct`: whether reads pass the page cache; None chooses.
    `verify` compares the checksums of a store while it loads. `pinned_bytes` bounds the staging memory.
    `framework`: `"torch"`, `"numpy"` (host only), or `"auto"`: torch where it is installed.
    `server`: the address of a store server that moves the bytes, or `"auto"` (or True): the one that
    `SLLM_STORE_ADDRESS` names or that listens at a default socket, if any. Where it fails, files are read, and
    `report.fell_back` says why. `token`: what the server wants of TCP clients; None: `SLLM_STORE_TOKEN`.
    `progress(done, total)` is called with bytes, in this thread; what it raises stops the load.

    A dtype is never changed. Tied tensors share memory.
    """
    options = _options(
        engine=engine,
        direct=direct,
        verify=verify,
        threads=threads,
        pinned_bytes=pinned_bytes,
        server=server,
        token=token,
    )
    checkpoint_of = opening(source, revision)
    arrays = _arrays_of(framework)
    devices = [arrays.device_id(device)]
    loader = _native.Loader(devices, **options)
    checkpoint = checkpoint_of()
    return _fill(arrays, loader, checkpoint, _selected(checkpoint, tensors), devices, None, progress)


def load_dict(
    path: Source,
    device_map: Any = "cpu",
    *,
    verify: bool = False,
    server: Server = None,
    token: str | None = None,
    progress: Progress | None = None,
    revision: str | None = None,
) -> LoadedDict:
    """Load all tensors as torch tensors, each to its device.

    `device_map` is a device as `load` takes it, or a mapping of module names to devices, such as
    `{"": 0, "lm_head": "cpu"}`: the longest name that a tensor's name begins with decides, and `""` fits all.
    `server` and `token` are as in `load`.
    """
    options = _options(verify=verify, server=server, token=token)
    checkpoint_of = opening(path, revision)
    arrays = _arrays_of("torch")
    if not isinstance(device_map, Mapping):
        device_map = {"": device_map}
    ids = {module: arrays.device_id(device) for module, device in device_map.items()}
    devices = sorted(set(ids.values())) or ["cpu"]
    loader = _native.Loader(devices, **options)
    checkpoint = checkpoint_of()
    numbers = None
    if ids.keys() != {""}:
        numbers = [devices.index(_device_of(name, ids)) for name in checkpoint.names]
    return _fill(arrays, loader, checkpoint, None, devices, numbers, progress)


def iter_tensors(
    source: Source,
    *,
    device: Any = "auto",
    max_bytes: int = 1 << 30,
    tensors: str | Sequence[str] | None = None,
    engine: str = "auto",
    direct: bool | None = None,
    threads: int | None = None,
    pinned_bytes: int | None = None,
    framework: str = "auto",
    server: Server = None,
    token: str | None = None,
    revision: str | None = None,
) -> Iterator[tuple[str, Any]]:
    """Load a checkpoint group by group, and give names and tensors in the order of the files.

    At most `max_bytes` of device memory are held by this, if the caller keeps no tensor longer than until the next
    one: a group takes a third of it, since one is used while the next is loaded, and the caller still holds the last
    tensor of the one before. A tensor larger than that is a group of its own. `server` and `token` are as in
    `load`.
    """
    if max_bytes < 1:
        raise InvalidError(f"max_bytes is {max_bytes}; at least 1 is needed")
    arrays = _arrays_of(framework)
    checkpoint = opened(source, revision)
    selected = _selected(checkpoint, tensors)
    options = _options(
        engine=engine, direct=direct, threads=threads, pinned_bytes=pinned_bytes, server=server, token=token
    )
    staged = Staged(arrays, arrays.device_id(device), max_bytes, options)
    return staged.tensors(checkpoint, selected)


def _fill(
    arrays: Any,
    loader: Any,
    checkpoint: Checkpoint,
    selected: list[int] | None,
    devices: list[str],
    numbers: list[int] | None,
    progress: Progress | None,
) -> LoadedDict:
    if selected is None:  # what is selected may be little
        loader.prepare(checkpoint)
    placement = _native.Placement(checkpoint, selected, numbers)
    start = time.perf_counter()
    blocks, addresses = _arrays.allocated(arrays, placement, devices)
    alloc_s = time.perf_counter() - start
    loaded = LoadedDict()
    # Many tensors take as long to make as to load: they are made while their bytes are under way.
    report, text = loader.fill(
        placement,
        addresses,
        alloc_s=alloc_s,
        progress=progress,
        meanwhile=_make(loaded, arrays, blocks, placement),
    )
    loaded.report = LoadReport._from_json(report, text)
    return loaded


def _make(loaded: LoadedDict, arrays: Any, blocks: list[Any], placement: Any) -> Iterator[None]:
    views = arrays.views(blocks, placement.tensors)
    while some := list(itertools.islice(views, _AT_ONCE)):
        loaded.update(some)
        yield


def _options(
    *,
    engine: str = "auto",
    direct: bool | None = None,
    verify: bool = False,
    threads: int | None = None,
    pinned_bytes: int | None = None,
    server: Server = None,
    token: str | None = None,
) -> dict[str, Any]:
    address = ("auto" if server else None) if isinstance(server, bool) else server
    if token is not None and address is None:
        raise InvalidError("a token is given for no server; give server too")
    options = {"engine": engine, "direct": direct, "verify": verify, "threads": threads, "pinned_bytes": pinned_bytes}
    return {**options, "server": address, "token": token}


def _selected(checkpoint: Checkpoint, tensors: str | Sequence[str] | None) -> list[int] | None:
    """Places of the wanted tensors; None for all."""
    if tensors is None:
        return None
    return _native.select(checkpoint, [tensors] if isinstance(tensors, str) else list(tensors))


def _device_of(name: str, devices: Mapping[str, str]) -> str:
    prefix = name
    while prefix not in devices:
        if not prefix:
            raise InvalidError(f'device_map has no device for tensor {name!r}; add "" for all others')
        prefix = prefix.rpartition(".")[0]
    return devices[prefix]


def _arrays_of(framework: str) -> Any:
    """The module that makes arrays. Importing it imports its library."""
    if framework == "auto":
        found = "torch" in sys.modules or importlib.util.find_spec("torch") is not None
        framework = "torch" if found and sys.modules.get("torch", True) is not None else "numpy"
    if framework == "torch":
        from . import _torch

        return _torch
    if framework == "numpy":
        from . import _numpy

        return _numpy
    raise InvalidError(f"{framework!r} is not a framework: give auto, torch or numpy")
