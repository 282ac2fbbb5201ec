"""What is opened of one of vLLM's sources of weights. The loader and the reading ahead ask the same function."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable
from typing import Any

from .. import _native
from .._native import Checkpoint
from ..errors import FormatError, NotFoundError
from . import _door


def opened(loader: Any, source: Any, tell: Callable[[str], object]) -> list[Checkpoint] | None:
    """The checkpoint of a source, several where a tensor is in more than one file, which `tell` is told of; None where
    the model's own patterns name pickled files. `loader` is one of vLLM's."""
    path = _door.folder_of(source)
    patterns = source.allow_patterns_overrides
    if own_layout(path) and not _any_match(path, patterns):
        # Its data files hold what safetensors of other names held, and nothing of what was pickled.
        if patterns is not None and not any(pattern.endswith(".safetensors") for pattern in patterns):
            raise NotFoundError(f"{path} has no {' or '.join(patterns)}, which the model wants: copy it there")
        return [_native.open(path)]
    try:
        folder, files, safetensors = _door.files_of(loader, source)
    except RuntimeError as e:
        found = f" (files like {' or '.join(patterns)})" if patterns is not None else ""
        reason = f"{e}{found}: neither a store nor safetensors; save the model as safetensors first"
        raise NotFoundError(reason) from e
    return _opened(folder, files, tell) if safetensors else None


def own_layout(path: str) -> bool:
    """Whether a path is a directory that vLLM's loader cannot read and we can: a store, or the original's layout."""
    return os.path.isfile(os.path.join(path, "tensor_index.json"))


def _any_match(folder: str, patterns: list[str] | None) -> bool:
    """Whether a folder has files that a model's own patterns name."""
    return any(glob.glob(pattern, root_dir=folder) for pattern in patterns or ())


def _opened(folder: str, files: list[str], tell: Callable[[str], object]) -> list[Checkpoint]:
    """Files as one checkpoint. It may have a tensor once; vLLM copies each of every file, so that the last one stays.
    Where a name comes again a new checkpoint begins: loaded one after the other they leave the same."""
    try:
        return [_native.open_files(folder, files)]
    except FormatError:
        runs, where = _runs(folder, files)
        if len(runs) < 2:
            raise
    name, *others = [name for name, holders in where.items() if len(holders) > 1]
    more = f", as {len(others)} more are in several files" if others else ""
    found = f"{folder}: tensor {name!r} is in {' and '.join(where[name])}{more}"
    tell(f"{found}: the last file's is used, as by load format auto")
    return [_native.open_files(folder, run) for run in runs]


def _runs(folder: str, files: list[str]) -> tuple[list[list[str]], dict[str, list[str]]]:
    """The longest runs of files in which no tensor comes twice, and the names of the files that each tensor is in."""
    runs: list[list[str]] = [[]]
    where: dict[str, list[str]] = {}
    inside: set[str] = set()
    for file in files:
        checkpoint = _native.open_files(folder, [file])
        names, (holder, _) = checkpoint.names, checkpoint.files[0]
        if not inside.isdisjoint(names):
            runs.append([])
            inside.clear()
        runs[-1].append(file)
        inside.update(names)
        for name in names:
            where.setdefault(name, []).append(holder)
    return runs, where
