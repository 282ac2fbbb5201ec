"""Accesses to a tensor's memory that torch's dispatcher does not see.

They are methods of torch.Tensor: while somebody watches, each of them tells of its tensor first, in whatever thread.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch

Watcher = Callable[[torch.Tensor], object]

# All others (`__array__`, `storage`, `share_memory_`, pickling, a deep copy, a launch by Triton) call one of these.
_METHODS = ("__dlpack__", "data_ptr", "numpy", "tolist", "untyped_storage")
# The methods as they are, for us.
address_of: Callable[[torch.Tensor], int] = torch._C.TensorBase.data_ptr
storage_of: Callable[[torch.Tensor], torch.UntypedStorage] = torch._C.TensorBase.untyped_storage

_watchers: tuple[Watcher, ...] = ()
_lock = threading.Lock()
# What torch.Tensor itself has of these names; the others it inherits.
_own: dict[str, Any] = {}


def watch(watcher: Watcher) -> None:
    """Has `watcher` called before each access."""
    global _watchers
    with _lock:
        if not _watchers:
            _own.update((name, vars(torch.Tensor)[name]) for name in _METHODS if name in vars(torch.Tensor))
            for name in _METHODS:
                setattr(torch.Tensor, name, _telling(getattr(torch.Tensor, name)))
        _watchers = (*_watchers, watcher)


def unwatch(watcher: Watcher) -> None:
    global _watchers
    with _lock:
        _watchers = tuple(other for other in _watchers if other != watcher)
        if not _watchers:
            for name in _METHODS:
                if name in _own:
                    setattr(torch.Tensor, name, _own[name])
                else:
                    delattr(torch.Tensor, name)
            _own.clear()


def _telling(method: Any) -> Any:
    @functools.wraps(method)
    def told(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        for watcher in _watchers:
            watcher(tensor)
        return method(tensor, *args, **kwargs)

    return told
