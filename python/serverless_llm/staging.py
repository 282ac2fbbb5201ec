"""Ordinary tensors on a device, a group at a time: one group is used while the next is under way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from . import _arrays, _native, _session
from ._native import Checkpoint
from .reports import LoadReport

_PAGE = 4096


class Staged:
    """Gives tensors in memory of its own on `device`, of at most `limit` bytes or the largest tensor's thrice.

    `arrays` makes them. The limit holds if the caller keeps no tensor longer than until the next one. `tick(done)` is
    called while it waits, with the bytes read of all checkpoints.
    """

    def __init__(
        self,
        arrays: Any,
        device: str,
        limit: int,
        options: dict[str, Any],
        tick: Callable[[int], object] = lambda done: None,
    ) -> None:
        self._arrays = arrays
        self._device = device
        self._limit = limit
        self._options = options
        self._tick = tick
        self._reports: list[LoadReport] = []
        # Bytes read of the checkpoints before this one.
        self._read_before = 0

    def tensors(self, checkpoint: Checkpoint, selected: list[int] | None = None) -> Iterator[tuple[str, Any]]:
        """Names and tensors, in the order of the checkpoint's files; all, or those at these places."""
        selected = list(range(len(checkpoint))) if selected is None else selected
        session = _native.Session(checkpoint, _native.Loader([self._device], **self._options))

        def tick() -> None:
            self._tick(self._read_before + session.read_bytes())

        try:
            under_way: list[Any] = []
            # The caller still holds the last tensor of one group while the next is used and another comes.
            for group in (*_groups(checkpoint, selected, self._limit // 3), None):
                _session.wait(session, tick)
                arrived = under_way
                under_way = [] if group is None else self._begin(session, checkpoint, group)
                arrived.reverse()
                while arrived:
                    yield arrived.pop()
            self._read_before += session.read_bytes()
            self._reports += _session.finish(session)
        finally:
            session.close()

    def finish(self) -> list[LoadReport]:
        """A report for each checkpoint that was read to its end."""
        reports, self._reports = self._reports, []
        return reports

    def summary(self) -> str:
        """Which way the bytes went."""
        return f"staged on {self._device}"

    def _begin(self, session: Any, checkpoint: Checkpoint, group: list[int]) -> list[tuple[str, Any]]:
        placement = _native.Placement(checkpoint, group)
        blocks, addresses = _arrays.allocated(self._arrays, placement, [self._device])
        session.place(placement, addresses)
        return list(self._arrays.views(blocks, placement.tensors))


def _groups(checkpoint: Checkpoint, selected: list[int], limit: int) -> Iterator[list[int]]:
    infos = checkpoint.tensors
    group: list[int] = []
    held = 0
    last = None
    for i in selected:
        info = infos[i]
        place = (info.file, info.offset, info.nbytes)
        # Between neighbours there may be a gap of less than a page.
        cost = 0 if place == last else info.nbytes + (_PAGE if group else 0)
        if group and held + cost > limit and place != last:
            yield group
            group, held, cost = [], 0, info.nbytes
        group.append(i)
        held += cost
        last = place
    if group:
        yield group
