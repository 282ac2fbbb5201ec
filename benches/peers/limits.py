"""The limits of the host: what a copy to the device, the page cache and the disk give when nothing else asks them."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from inputs import data_files

PIECE = 4 << 20
COPY = 1 << 30
HUGE = 2 << 20


def private_memory(size: int) -> mmap.mmap:
    """Memory as programs have it; Python's default is shared, which gets no huge pages unless the system is told so."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def use_free_memory(size: int) -> None:
    """Uses so much memory once and gives it back, as far as it is free.

    A virtual machine may hand what is free for some seconds to its host; to have it again costs more than reading the
    disk does, and whoever comes first would pay for all.
    """
    with open("/proc/meminfo") as f:
        free = next(int(line.split()[1]) << 10 for line in f if line.startswith("MemFree:"))
    huge_memory(min(size, free // 10 * 8), touched=True)


def copy_peak(device: str) -> dict[str, Any]:
    """One stream copies 1 GiB of pinned memory to the device; on the host, memory to memory that was in use before."""
    import torch

    cuda = device.startswith("cuda")
    source = torch.empty(COPY, dtype=torch.uint8, pin_memory=cuda).fill_(1)
    target = torch.empty_like(source, device=device).fill_(0)
    if cuda:
        torch.cuda.synchronize()
    times = []
    for _ in range(6):
        start = time.perf_counter()
        target.copy_(source, non_blocking=True)
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return {"seconds": min(times), "bytes": COPY}


def copy_fresh(device: str) -> dict[str, Any]:
    """Memory to memory that the system has to give first, as every load to the host needs; small pages or huge ones."""
    import torch

    source = torch.empty(COPY, dtype=torch.uint8, device=device).fill_(1)
    times = []
    for advice in 3 * [mmap.MADV_NOHUGEPAGE, mmap.MADV_HUGEPAGE]:
        start = time.perf_counter()
        memory = private_memory(COPY)
        memory.madvise(advice)
        target = torch.frombuffer(memory, dtype=torch.uint8)
        target.copy_(source)
        times.append(time.perf_counter() - start)
        del target, memory
    return {"seconds": min(times), "bytes": COPY}


def huge_memory(size: int, touched: bool) -> memoryview:
    """Memory in huge pages, where the system has them; used before, or to be given by the system when it is filled.

    A direct read goes to the disk in as many requests as its memory's pages make needful: virtio takes 254 runs of
    memory a request, so that 4 MiB of scattered small pages are five requests.
    """
    memory = private_memory(size + HUGE)
    memory.madvise(mmap.MADV_HUGEPAGE)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % HUGE
    if touched:
        for place in range(start, start + size, mmap.PAGESIZE):
            memory[place] = 0
    return memoryview(memory)[start : start + size]


def read(directory: str, direct: bool, threads: int, fresh: bool, most: float) -> dict[str, Any]:
    """Threads read the files in pieces of 4 MiB, up to `most` bytes in all, and do nothing with them.

    Each thread reads into a buffer of its own, again and again; with `fresh`, every piece into memory that nobody used
    before, as a load to the host does.
    """
    jobs: list[tuple[int, int]] = []
    for file in data_files(directory):
        fd = os.open(file, os.O_RDONLY | (os.O_DIRECT if direct else 0))
        jobs += [(fd, offset) for offset in range(0, os.path.getsize(file), PIECE)]
    descriptors = {fd for fd, _ in jobs}
    jobs = jobs[: int(most // PIECE) + 1]
    memory = huge_memory((len(jobs) if fresh else threads) * PIECE, touched=not fresh)
    pending, lock, total, errors = iter(enumerate(jobs)), threading.Lock(), [0], []

    def work(thread: int) -> None:
        try:
            while True:
                with lock:
                    number, job = next(pending, (0, None))
                if job is None:
                    return
                place = (number if fresh else thread) * PIECE
                n = os.preadv(job[0], [memory[place : place + PIECE]], job[1])
                with lock:
                    total[0] += n
        except OSError as e:
            errors.append(e)

    workers = [threading.Thread(target=work, args=(thread,)) for thread in range(threads)]
    start = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - start
    for fd in descriptors:
        os.close(fd)
    if errors:
        raise errors[0]
    return {"seconds": seconds, "bytes": total[0]}


def register(directory: str, device: str) -> dict[str, Any]:
    """The driver registers cached pages of a file for reading, in windows of 128 MiB; `release_seconds` undoes it."""
    import torch

    torch.zeros(1, device=device)
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    path = data_files(directory)[0]
    window, read_only = 128 << 20, 8
    size = os.path.getsize(path) // window * window
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    fd = os.open(path, os.O_RDONLY)
    address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if size == 0 or address == ctypes.c_void_p(-1).value:
        raise RuntimeError(f"{path} cannot be mapped in windows of 128 MiB")
    windows = range(address, address + size, window)

    def each(call: Callable[[int], Any]) -> float:
        start = time.perf_counter()
        for place in windows:
            if int(call(place)) != 0:
                raise RuntimeError("the driver refuses to register a file's pages")
        return time.perf_counter() - start

    seconds = each(lambda place: runtime.cudaHostRegister(place, window, read_only))
    release = each(runtime.cudaHostUnregister)
    os.close(fd)
    return {"seconds": seconds, "bytes": size, "release_seconds": release}


def limits_of(state: str, cuda: bool, threads: list[int]) -> dict[str, dict[str, Any]]:
    """The limits that stand beside the loads of a state, by name: the function's name and its arguments."""
    copies: dict[str, dict[str, Any]] = {"copy peak": {"call": "copy_peak"}}
    if not cuda:
        copies["copy to fresh memory"] = {"call": "copy_fresh"}
    if state == "warm":
        copies["page cache, 1 thread"] = {"call": "read", "direct": False, "threads": 1, "fresh": False}
        if cuda:
            copies["register file pages"] = {"call": "register"}
        return copies
    floors: dict[str, dict[str, Any]] = {}
    for fresh in (False,) if cuda else (False, True):
        for direct in (False, True):
            for n in threads:
                name = f"floor, {'direct' if direct else 'buffered'}, {n} thread{'s' * (n > 1)}"
                name += ", to fresh memory" * fresh
                floors[name] = {"call": "read", "direct": direct, "threads": n, "fresh": fresh}
    return floors if state == "cold" else {**copies, **floors}


def measure(spec: dict[str, Any], directory: str, device: str, most: float) -> dict[str, Any]:
    """Takes one limit, in this process."""
    match spec["call"]:
        case "copy_peak":
            return copy_peak(device)
        case "copy_fresh":
            return copy_fresh(device)
        case "register":
            return register(directory, device)
        case "read":
            return read(directory, spec["direct"], spec["threads"], spec["fresh"], most)
    raise ValueError(spec["call"])
