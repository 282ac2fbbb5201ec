"""NumPy: host memory only. Types that NumPy lacks come from ml_dtypes if it is installed, else as raw integers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from . import _native
from ._arrays import TORCH_NAMES, Placed
from .errors import DeviceMemoryError, InvalidError

try:
    import ml_dtypes
except ImportError:
    ml_dtypes = None

_PAGE = 4096
_OWN = {
    "BOOL": "bool",
    "U8": "u1",
    "I8": "i1",
    "U16": "<u2",
    "I16": "<i2",
    "F16": "<f2",
    "U32": "<u4",
    "I32": "<i4",
    "F32": "<f4",
    "U64": "<u8",
    "I64": "<i8",
    "F64": "<f8",
    "C64": "<c8",
}


def device_id(device: Any) -> str:
    """The native name of a device."""
    if device in ("auto", "cpu", "host") or getattr(device, "type", None) == "cpu":
        return "cpu"
    raise InvalidError(f"NumPy arrays live in host memory, not on {device!r}: use torch for it")


def allocate(device: str, nbytes: int) -> tuple[Any, int]:
    """A block of bytes, its first at the start of a page, and its address."""
    _native.check_room(nbytes)
    try:
        room: Any = np.empty(nbytes + _PAGE, np.uint8)
    except MemoryError as e:
        raise DeviceMemoryError(f"{device}: {nbytes} bytes of memory cannot be had: {e}") from e
    start = -room.ctypes.data % _PAGE
    block = room[start : start + nbytes]
    return block, room.ctypes.data + start


def _dtype(name: str) -> Any:
    if name in _OWN:
        return np.dtype(_OWN[name])
    if name in ("F4", "F6_E2M3", "F6_E3M2"):
        return None
    known = getattr(ml_dtypes, TORCH_NAMES[name], None)  # older ones have not all
    return np.dtype(("<u2" if name == "BF16" else "u1") if known is None else known)


def check(name: str, dtype: str) -> None:
    """Every dtype has a form in NumPy."""


def views(blocks: Sequence[Any], placed: Iterable[Placed]) -> Iterator[tuple[str, Any]]:
    """Names and arrays over bytes of blocks. Elements of 4 and 6 bits stay packed, as a flat array of bytes."""
    kinds: dict[str, Any] = {}
    for name, dtype, shape, strides, nbytes, block, offset in placed:
        if dtype not in kinds:
            kinds[dtype] = _dtype(dtype)
        of = kinds[dtype]
        if of is None:
            yield name, blocks[block][offset : offset + nbytes]
        elif not nbytes:
            yield name, np.empty(shape, of)
        elif strides is None:
            yield name, np.ndarray(shape, of, blocks[block], offset)
        else:
            yield name, np.ndarray(shape, of, blocks[block], offset, [step * of.itemsize for step in strides])
