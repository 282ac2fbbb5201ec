"""Waiting for native sessions."""

from __future__ import annotations

from collections.abc import Callable

from ._native import Session
from .reports import LoadReport

_TICK = 0.1


def wait(session: Session, tick: Callable[[], object]) -> None:
    """Waits until all that was added has arrived; `tick` is called ten times a second meanwhile."""
    while not session.wait(_TICK):
        tick()


def finish(session: Session) -> list[LoadReport]:
    """Closes a session of which all has arrived. Its report; none where nothing was added."""
    report = session.finish()
    return [] if report is None else [LoadReport._from_json(*report)]
