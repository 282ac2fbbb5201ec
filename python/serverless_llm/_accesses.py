"""Accesses to tensors' memory that torch's dispatcher does not see.

They are methods of torch.Tensor and functions of torch: while somebody watches, each of them tells of its tensors
first, in whatever thread.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

# Takes a tensor, the access, and whether its memory may be used at any time after it.
Watcher = Callable[[torch.Tensor, str, bool], object]

_Tensor, _C = torch.Tensor, torch._C
# What gives the memory of its first argument away. `__array__`, `storage`, `share_memory_`, pickling, a deep copy, and
# a launch by Triton call one of these.
_GIVING = (
    *((_Tensor, name) for name in ("__dlpack__", "const_data_ptr", "data_ptr", "numpy", "untyped_storage")),
    *((owner, "to_dlpack") for owner in (torch, torch.utils.dlpack)),
    *((_C, name) for name in ("_to_dlpack", "_to_dlpack_versioned")),
)
# What reads its first argument. `str` and `format` call the second.
_READING = ((_Tensor, "tolist"), (_Tensor, "__repr__"))
# What calls a function of Python for each element of its tensors, and writes the first of them.
_APPLYING = tuple((_Tensor, name) for name in ("apply_", "map_", "map2_"))
# What reads its other arguments by their addresses, and tensors in lists, as numbers. Not here are classes that do
# so (`torch.Tensor(...)`, `torch.FloatTensor(...)`), and an index of lists in a list.
_TAKING = (
    *((_Tensor, name) for name in ("new", "new_tensor", "tensor_split")),
    *((torch, name) for name in ("as_tensor", "asarray", "tensor", "tensor_split")),
    *((torch, f"sparse_{kind}_tensor") for kind in ("bsc", "bsr", "compressed", "coo", "csc", "csr")),
    (_C._nested, "nested_tensor"),
)
_NUMBERS = frozenset([bool, int, float, complex])

# The methods as they are, for us.
address_of: Callable[[torch.Tensor], int] = _C.TensorBase.data_ptr
storage_of: Callable[[torch.Tensor], torch.UntypedStorage] = _C.TensorBase.untyped_storage

_watchers: tuple[Watcher, ...] = ()
_lock = threading.Lock()
# What was put in another one's place: where, its name, and what was there, or None where it was inherited.
_replaced: list[tuple[Any, str, Any]] = []
# What is put there by what was there, made once: torch's scripts know functions by their addresses.
_made: dict[Any, Any] = {}


def watch(watcher: Watcher) -> None:
    """Has `watcher` called before each access."""
    global _watchers
    with _lock:
        if not _watchers:
            kinds = (
                *((_GIVING, _first, True), (_READING, _first, False)),
                *((_APPLYING, _all, True), (_TAKING, _others, False)),
            )
            for places, told_of, kept in kinds:
                for owner, name in places:
                    method = getattr(owner, name, None)
                    if method is not None:  # not all versions of torch have all of them
                        _replaced.append((owner, name, vars(owner).get(name)))
                        setattr(owner, name, _telling(method, told_of, kept))
        _watchers = (*_watchers, watcher)


def unwatch(watcher: Watcher) -> None:
    global _watchers
    with _lock:
        _watchers = tuple(other for other in _watchers if other != watcher)
        if not _watchers and _replaced:
            for owner, name, before in _replaced:
                if before is None:
                    delattr(owner, name)
                else:
                    setattr(owner, name, before)
            _replaced.clear()
            # torch's compiler, if it came meanwhile, knows what was there then, and nothing of what is there now.
            rules = sys.modules.get("torch._dynamo.trace_rules")
            getattr(rules, "clear_lru_cache", lambda: None)()


def _telling(method: Any, told_of: Callable[..., Iterable[torch.Tensor]], kept: bool) -> Any:
    """What is put in the place of a method."""
    if method in _made:
        return _made[method]
    name = method.__name__

    @functools.wraps(method)
    def told(*args: Any, **kwargs: Any) -> Any:
        for tensor in told_of(args, kwargs):
            for watcher in _watchers:
                watcher(tensor, name, kept)
        return method(*args, **kwargs)

    builtins = torch.jit._builtins
    if (operation := builtins._find_builtin(method)) is not None:
        builtins._register_builtin(told, operation)
    return _made.setdefault(method, told)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterable[torch.Tensor]:
    """The first argument."""
    return [value for value in args[:1] if isinstance(value, torch.Tensor)]


def _all(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterable[torch.Tensor]:
    """All tensors, also those in lists."""
    return _within([*args, *kwargs.values()])


def _others(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterable[torch.Tensor]:
    """All tensors, also those in lists, but for the first argument: if that is a tensor, the dispatcher sees it."""
    return _within([*args[isinstance(next(iter(args), None), torch.Tensor) :], *kwargs.values()])


def _within(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if type(value) in _NUMBERS:  # a list may be long
            continue
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (Sequence, torch.nn.ParameterList)) and not isinstance(value, (str, bytes)):
            yield from _within(value)
