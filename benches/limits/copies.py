"""Times copies of several sizes from pinned memory to a GPU: one by one, by several streams, and in batches of one call.

    python benches/limits/copies.py [--device 0] [--ring-mib 72] [--gb 8]

Prints GB/s, the best and the median of six, by the device's own clock. The source is a ring that fits the processor's cache.
An event is recorded after every copy, or batch, as loads do. Needs torch; batches need a driver of CUDA 12.8 or newer.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
from collections.abc import Callable
from typing import Any

import torch

MIB = 1 << 20
STREAM_ORDER = 1


class Attributes(ctypes.Structure):
    """CUmemcpyAttributes: the order of accesses, two hints of (kind, number), and flags."""

    _fields_ = [("order", ctypes.c_int), ("hints", ctypes.c_int * 4), ("flags", ctypes.c_uint)]


class Driver:
    """The calls of the CUDA driver that loads make."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL("libcuda.so.1")
        word, size = ctypes.c_uint64, ctypes.c_size_t
        self.library.cuMemcpyHtoDAsync_v2.argtypes = [word, ctypes.c_void_p, size, ctypes.c_void_p]
        self.library.cuEventRecord.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
        self.events = [self.event() for _ in range(64)]
        self.marks = 0

    def check(self, code: int) -> None:
        if code:
            raise RuntimeError(f"the driver refused: error {code}")

    def event(self) -> Any:
        event = ctypes.c_void_p()
        self.check(self.library.cuEventCreate(ctypes.byref(event), 2))
        return event

    def mark(self, stream: Any) -> None:
        self.check(self.library.cuEventRecord(self.events[self.marks % len(self.events)], stream))
        self.marks += 1

    def copy(self, to: int, source: int, size: int, stream: Any) -> None:
        self.check(self.library.cuMemcpyHtoDAsync_v2(to, source, size, stream))

    def batch(self, to: list[int], sources: list[int], size: int, stream: Any) -> None:
        count = len(to)
        words, sizes = ctypes.c_uint64 * count, ctypes.c_size_t * count
        attributes = Attributes(STREAM_ORDER, (ctypes.c_int * 4)(), 0)
        first, failed = (ctypes.c_size_t * 1)(0), ctypes.c_size_t()
        self.check(
            self.library.cuMemcpyBatchAsync(
                words(*to), words(*sources), sizes(*[size] * count), ctypes.c_size_t(count), ctypes.byref(attributes),
                first, ctypes.c_size_t(1), ctypes.byref(failed), stream,
            )
        )  # fmt: skip


def rates(stream: torch.cuda.Stream, run: Callable[[], int]) -> str:
    found = []
    for _ in range(6):
        torch.cuda.synchronize()
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record(stream)
        copied = run()
        ended.record(stream)
        ended.synchronize()
        found.append(copied / began.elapsed_time(ended) / 1e6)
    return f"{max(found):.2f} {statistics.median(found):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=int, default=0)
    parser.add_argument("--ring-mib", type=int, default=72)
    parser.add_argument("--gb", type=float, default=8)
    args = parser.parse_args()
    torch.cuda.set_device(args.device)
    total = int(args.gb * 1e9)
    target = torch.empty(total, dtype=torch.uint8, device="cuda")
    ring = torch.empty(args.ring_mib * MIB, dtype=torch.uint8).pin_memory()
    large = torch.empty(1 << 30, dtype=torch.uint8).pin_memory()
    driver = Driver()
    streams = [torch.cuda.Stream() for _ in range(5)]
    main_stream, handles = streams[0], [ctypes.c_void_p(stream.cuda_stream) for stream in streams]

    def copies(source: torch.Tensor, size: int, batch: int = 1, others: int = 0) -> Callable[[], int]:
        places = source.numel() // size

        def run() -> int:
            for stream in streams[1 : others + 1]:
                stream.wait_stream(main_stream)
            done = turn = 0
            while done + batch * size <= total:
                handle = handles[1 + turn % others] if others else handles[0]
                to = [target.data_ptr() + done + i * size for i in range(batch)]
                sources = [source.data_ptr() + (turn * batch + i) % places * size for i in range(batch)]
                if batch == 1:
                    driver.copy(to[0], sources[0], size, handle)
                else:
                    driver.batch(to, sources, size, handle)
                driver.mark(handle)
                done, turn = done + batch * size, turn + 1
            for stream in streams[1 : others + 1]:
                main_stream.wait_stream(stream)
            return done

        return run

    print(f"1 GiB: {rates(main_stream, copies(large, 1 << 30))}")
    for size in (1, 2, 3, 4, 6, 8, 12, 16, 24, 36):
        print(f"{size} MiB: {rates(main_stream, copies(ring, size * MIB))}", flush=True)
    for size, batch in ((1, 8), (2, 4), (3, 2), (3, 4), (3, 8), (4, 4)):
        print(f"{size} MiB, batches of {batch}: {rates(main_stream, copies(ring, size * MIB, batch))}", flush=True)
    for others in (2, 4):
        print(f"3 MiB by {others} streams: {rates(main_stream, copies(ring, 3 * MIB, 1, others))}", flush=True)


if __name__ == "__main__":
    main()
