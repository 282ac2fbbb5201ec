"""Convert, export, verify, prefetch and save."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from . import _arrays, _native
from ._native import Checkpoint
from .errors import InvalidError
from .reports import ConvertReport, ExportReport, PrefetchReport, VerifyReport

Path = str | os.PathLike[str]
Source = Path | Checkpoint
Progress = Callable[[int, int], object]


def opened(source: Source, revision: str | None = None) -> Checkpoint:
    """The checkpoint itself, or the one at this path."""
    if not isinstance(source, Checkpoint):
        return _native.open(source, revision=revision)
    if revision is not None:
        raise InvalidError(f"{source.path} is open already: a revision goes with a repository id")
    return source


def opening(source: Source, revision: str | None = None) -> Callable[[], Checkpoint]:
    """Begins to open a path in a thread; what this gives waits for the checkpoint."""
    if isinstance(source, Checkpoint):
        checkpoint = opened(source, revision)
        return lambda: checkpoint
    return _native.Opening(source, revision=revision).checkpoint


def convert(
    source: Source,
    target: Path,
    *,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    revision: str | None = None,
) -> ConvertReport:
    """Convert a checkpoint to a store at `target`.

    `source` is a model directory, a safetensors file, a repository id that the Hugging Face cache holds (its
    `revision`), or an opened checkpoint. The store appears as a whole; an interrupted conversion goes on where it was;
    memory does not grow with the model. `progress(done, total)` is called with bytes, in this thread; what it raises
    stops the work.
    """
    checkpoint = opened(source, revision)
    report = _native.convert(checkpoint, target, overwrite=overwrite, threads=threads, progress=progress)
    return ConvertReport._from_json(report)


def export(
    store: Source, target: Path, *, threads: int | None = None, progress: Progress | None = None
) -> ExportReport:
    """Write a checkpoint as safetensors files into the new directory `target`, as they were before conversion."""
    report = _native.export(opened(store), target, threads=threads, progress=progress)
    return ExportReport._from_json(report)


def verify(store: Source, *, threads: int | None = None, progress: Progress | None = None) -> VerifyReport:
    """Compare every chunk of a store with its checksum. Corrupt chunks are listed in the report; they do not raise."""
    report = _native.verify(opened(store), threads=threads, progress=progress)
    return VerifyReport._from_json(report)


def prefetch(
    source: Source,
    *,
    limit: int | None = None,
    yields: bool = True,
    progress: Progress | None = None,
    revision: str | None = None,
) -> PrefetchReport:
    """Read a checkpoint into the page cache, so that a later load finds it there.

    It takes at most `limit` bytes (None: nine tenths of the memory that is free), pauses while others read from the
    disks unless `yields` is false, and ends when a load of the checkpoint begins in any process of this host.
    """
    report = _native.prefetch(opened(source, revision), limit=limit, yields=yields, progress=progress)
    return PrefetchReport._from_json(report)


def save_dict(
    state_dict: Mapping[str, Any],
    path: Path,
    *,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> ConvertReport:
    """Save tensors (torch or NumPy) as a store at `path`.

    Tensors of the same memory are tied and stored once. Those on a GPU are first copied to the host, all of them. The
    tensors must not be changed until it returns.
    """
    kept = {name: _arrays.host_array(name, tensor) for name, tensor in state_dict.items()}
    tensors = [(name, a.dtype, a.shape, a.address, a.nbytes) for name, a in kept.items()]
    report = _native.save(tensors, path, overwrite=overwrite, threads=threads, progress=progress)
    del kept
    return ConvertReport._from_json(report)
