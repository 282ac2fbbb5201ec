"""Sets of addresses."""

from __future__ import annotations

import bisect
from collections.abc import Iterator


class Ranges:
    """Ranges of addresses; those that touch are one."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def __bool__(self) -> bool:
        return bool(self._starts)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self._starts, self._ends)

    def add(self, start: int, end: int) -> None:
        first = bisect.bisect_left(self._ends, start)
        after = bisect.bisect_right(self._starts, end, lo=first)
        if first < after:
            start, end = min(start, self._starts[first]), max(end, self._ends[after - 1])
        self._starts[first:after] = [start]
        self._ends[first:after] = [end]

    def meets(self, start: int, end: int) -> bool:
        """Whether they share an address with this range."""
        first = bisect.bisect_right(self._ends, start)
        return first < len(self._starts) and self._starts[first] < end

    def holds(self, start: int, end: int) -> bool:
        """Whether they have all addresses of this range, which is not empty."""
        first = bisect.bisect_right(self._ends, start)
        return first < len(self._starts) and self._starts[first] <= start and end <= self._ends[first]

    def clear(self) -> None:
        self._starts.clear()
        self._ends.clear()
