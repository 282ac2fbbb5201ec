"""Times direct reads by threads that do nothing else, with more and with less memory that is read into.

    python benches/limits/disk.py FILE... [--rounds 3] [--gb 2.4]

Each line is a number of threads, of MiB a read, and of buffers that each thread fills in turn; its rates in GB/s, a round
each. The cases take turns, in another order each round. Files should be of several GB and not in any cache. Needs Linux.
"""

from __future__ import annotations

import argparse
import itertools
import mmap
import os
import random
import threading
import time
from pathlib import Path

MIB = 1 << 20
ROOM = 1 << 30
CASES = [
    (1, 4, 1), (2, 4, 1), (4, 4, 1), (8, 4, 1), (16, 4, 1), (4, 4, 8),
    (2, 1, 1), (4, 1, 1), (8, 1, 1), (4, 1, 16), (4, 2, 1), (1, 16, 1), (4, 16, 1),
]  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gb", type=float, default=2.4, help="read a case at most")
    return parser.parse_args()


def rate(file: Path, memory: memoryview, case: tuple[int, int, int], most: int) -> float:
    """GB/s of one case over the beginning of a file. Threads take the next place of the file in turn."""
    threads, size, buffers = case[0], case[1] * MIB, case[2]
    places = itertools.count(0, size)
    end = min(most, file.stat().st_size) // size * size
    fd = os.open(file, os.O_RDONLY | os.O_DIRECT)

    short = []

    def work(number: int) -> None:
        for turn, place in enumerate(places):
            if place >= end:
                return
            at = (number * buffers + turn % buffers) * size
            if os.preadv(fd, [memory[at : at + size]], place) != size:
                short.append(place)
                return

    began = time.perf_counter()
    workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    os.close(fd)
    if short:
        raise OSError(f"{file} ended early")
    return end / (time.perf_counter() - began) / 1e9


def main() -> None:
    args = parse_args()
    # Private: Python's default is shared, which gets no huge pages unless the system is told so.
    room = mmap.mmap(-1, ROOM, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    room.madvise(mmap.MADV_HUGEPAGE)
    memory = memoryview(room)
    for place in range(0, ROOM, 2 * MIB):
        memory[place] = 1
    rates: dict[tuple[int, int, int], list[float]] = {case: [] for case in CASES}
    files = itertools.cycle(args.files)
    for number in range(args.rounds):
        for case in random.Random(number).sample(CASES, len(CASES)):
            rates[case].append(rate(next(files), memory, case, int(args.gb * 1e9)))
    for (threads, size, buffers), found in rates.items():
        total = threads * size * buffers
        each = " ".join(f"{one:.2f}" for one in found)
        print(f"{threads:2} threads, {size:2} MiB, {buffers:2} buffers each, {total:3} MiB in all: {each}")


if __name__ == "__main__":
    main()
