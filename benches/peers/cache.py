"""The page cache: which part of a file is in it, and how to put files in it, out of it, or half in it."""

from __future__ import annotations

import ctypes
import mmap
import os

DROP = "/proc/sys/vm/drop_caches"
STATES = ("warm", "cold", "half")
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]


def refusal() -> str | None:
    """Why the page cache cannot be dropped here."""
    if os.access(DROP, os.W_OK):
        return None
    return f"cold and half need to drop the page cache, and {DROP} is not writable: run as root, or give --states warm"


def cached_share(files: list[str]) -> float:
    """Part of the files' pages that are in the page cache, 0 to 1."""
    pages = cached = 0
    for path in files:
        size = os.path.getsize(path)
        if size == 0:
            continue
        fd = os.open(path, os.O_RDONLY)
        try:
            count = -(-size // mmap.PAGESIZE)
            seen = ctypes.create_string_buffer(count)
            address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
            if address == ctypes.c_void_p(-1).value:
                raise OSError(ctypes.get_errno(), f"cannot map {path}")
            failed = _libc.mincore(address, size, seen)
            _libc.munmap(address, size)
            if failed:
                raise OSError(ctypes.get_errno(), f"cannot ask what of {path} is cached")
            pages += count
            cached += count - seen.raw.count(b"\0")
        finally:
            os.close(fd)
    return cached / max(pages, 1)


def set_state(files: list[str], state: str) -> float:
    """Puts files in the page cache (`warm`), out of it (`cold`), or the first half of each in it (`half`).

    Gives the part that is cached then; raises where the state could not be had.
    """
    if state != "warm":
        drop(files)
    for path in files:
        left = {"warm": os.path.getsize(path), "cold": 0, "half": os.path.getsize(path) // 2}[state]
        if left == 0 or (state == "warm" and cached_share([path]) == 1):
            continue
        with open(path, "rb", buffering=0) as f:
            if state == "half":  # no reading ahead into the other half
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            while left > 0:
                left -= len(f.read(min(left, 16 << 20))) or left
    share = cached_share(files)
    low, high = {"warm": (0.999, 1), "cold": (0, 0.001), "half": (0.48, 0.52)}[state]
    if not low <= share <= high:
        raise RuntimeError(f"the files should be {state}, but {share:.1%} of them are in the page cache")
    return share


def drop(files: list[str]) -> None:
    """Takes files out of the page cache.

    File by file, since the next process would otherwise wait for its own libraries; all there is where that is not
    enough.
    """
    for path in files:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    if cached_share(files) > 0:
        os.sync()
        with open(DROP, "w") as f:
            f.write("3\n")
