"""A progress bar like vLLM's own."""

from __future__ import annotations

from typing import Any

_FORMAT = "{desc}: {percentage:3.0f}% | {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]\n"


class Bar:
    """Bytes read, of all. Shows nothing unless `shown`."""

    def __init__(self, shown: bool) -> None:
        self._shown = shown
        self._bar: Any = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar, self._shown = None, False

    def grow(self, total: int) -> None:
        """Adds bytes to be read."""
        if not self._shown:
            return
        if self._bar is None:
            from tqdm.auto import tqdm

            form = {"bar_format": _FORMAT, "unit": "B", "unit_scale": True, "mininterval": 1.0}
            self._bar = tqdm(total=0, desc="Loading weights", **form)
        self._bar.total += total

    def show(self, done: int) -> None:
        """Shows so many bytes as read."""
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
