"""torch: host memory and CUDA. torch allocates, so that its caching allocator knows of the memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from . import _native
from ._arrays import TORCH_NAMES, Placed
from .errors import DeviceError, DeviceMemoryError, InvalidError

_PAGE = 4096
_LONGEST = 16  # bytes of the longest element, complex128


def device_id(device: Any) -> str:
    """The native name of a device: `cpu`, or `cuda:N`."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        # A torch that could not use a device has no need of a driver.
        failure = _native.driver_failure() if device == "cpu" and torch.version.cuda is not None else None
        if failure is not None:
            warnings.warn(f"{failure}; device='auto' takes the host's memory", RuntimeWarning, stacklevel=3)
    elif device == "host":
        device = "cpu"
    elif isinstance(device, int) and not isinstance(device, bool):
        device = f"cuda:{device}"
    try:
        of = torch.device(device)
    except (RuntimeError, TypeError) as e:
        raise InvalidError(f"{device!r} is not a device: {e}") from e
    if of.type == "cpu":
        return "cpu"
    if of.type != "cuda" or torch.version.hip is not None:
        raise InvalidError(f"{device!r} is neither the host nor a CUDA device")
    if torch.cuda._is_in_bad_fork():
        raise DeviceError(f"{of}: this process was forked after CUDA was initialised, which CUDA forbids: use spawn")
    if not torch.cuda.is_available():
        raise DeviceError(f"{of}: torch sees no CUDA device here: is the driver installed, and torch built with CUDA?")
    index = torch.cuda.current_device() if of.index is None else of.index
    if index >= torch.cuda.device_count():
        raise DeviceError(f"there is no device cuda:{index}: {torch.cuda.device_count()} are visible")
    return f"cuda:{index}"


def allocate(device: str, nbytes: int) -> tuple[Any, int]:
    """A block of bytes, as many as elements of any type need, and its address. What was queued on memory that the allocator hands out again is waited for."""
    on_host = device == "cpu"
    if on_host:
        _native.check_room(nbytes)
    length = -(-nbytes // _LONGEST) * _LONGEST
    try:
        block = torch.empty(length + (_PAGE if on_host else 0), dtype=torch.uint8, device=device)
    except torch.cuda.OutOfMemoryError as e:
        raise DeviceMemoryError(f"{device}: {nbytes} bytes are needed: {e}") from e
    except RuntimeError as e:
        kind = DeviceMemoryError if on_host else DeviceError
        raise kind(f"{device}: cannot allocate {nbytes} bytes: {e}") from e
    if on_host:
        block = block.narrow(0, -block.data_ptr() % _PAGE, length)
    else:
        torch.cuda.current_stream(device).synchronize()
    return block, block.data_ptr()


def _dtype(name: str, dtype: str) -> torch.dtype:
    of = getattr(torch, TORCH_NAMES[dtype], None)
    if of is None:
        raise InvalidError(
            f"tensor {name!r}: this torch has no type for {dtype}: leave it out (tensors=...) or use framework='numpy'"
        )
    return of


def check(name: str, dtype: str) -> None:
    """Raises where torch has no such dtype."""
    _dtype(name, dtype)


def form(name: str, dtype: str, shape: Sequence[int]) -> tuple[torch.dtype, Sequence[int]]:
    """torch's dtype and shape of a tensor."""
    of = _dtype(name, dtype)
    if dtype == "F4" and shape:  # an element of torch's holds two
        if shape[-1] % 2:
            raise InvalidError(f"tensor {name!r}: an odd last dimension of F4 has no form in torch")
        shape = (*shape[:-1], shape[-1] // 2)
    return of, shape


def views(blocks: Sequence[Any], placed: Iterable[Placed]) -> Iterator[tuple[str, Any]]:
    """Names and tensors over bytes of blocks.

    An operation of torch takes a microsecond: a tensor is one, and what tensors of a form share is made once.
    """
    forms: dict[Any, Any] = {}
    for name, dtype, shape, strides, nbytes, block, offset in placed:
        key = (dtype, shape, strides, block)
        known = forms.get(key)
        if known is None:
            of, sizes = form(name, dtype, shape)
            base = blocks[block].view(of)
            steps = _contiguous(sizes) if strides is None else strides
            known = forms[key] = base.as_strided, sizes, steps, base.storage_offset(), of.itemsize, base
        view, sizes, steps, start, width, base = known
        if nbytes:
            yield name, view(sizes, steps, start + offset // width)
        else:
            yield name, base.new_empty(sizes)


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    steps = [1] * len(shape)
    for i in range(len(shape) - 1, 0, -1):
        steps[i - 1] = steps[i] * shape[i]
    return tuple(steps)
