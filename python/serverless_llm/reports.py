"""What an operation did."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

_Of = TypeVar("_Of", bound="Report")


class Report:
    """Named values, as attributes. `print(report)` shows them all; `to_dict()` gives plain Python values."""

    def __init__(self, fields: Mapping[str, Any], text: str | None = None) -> None:
        self._fields = dict(fields)
        self._text = text

    @classmethod
    def _from_json(cls: type[_Of], fields: str, text: str | None = None) -> _Of:
        return cls(json.loads(fields), None if text is None else text.rstrip())

    def to_dict(self) -> dict[str, Any]:
        """The values as a new dictionary, ready for `json.dumps`."""
        copy: dict[str, Any] = json.loads(json.dumps(self._fields))
        return copy

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and name in self._fields:
            return self._fields[name]
        raise AttributeError(
            f"{type(self).__name__} has no {name!r}; it has {', '.join(self.__dict__.get('_fields', ()))}"
        )

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self._fields]

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={_short(v)}' for k, v in self._fields.items())})"

    def __str__(self) -> str:
        return self._text if self._text is not None else "\n".join(f"{k}: {_short(v)}" for k, v in self._fields.items())


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list) and len(value) > 3:
        return f"[{', '.join(map(repr, value[:3]))}, ... {len(value)} in all]"
    return repr(value)


class PrefetchReport(Report):
    """What a prefetch did."""

    path: str
    bytes: int
    cached_bytes: int
    read_bytes: int
    end: str
    seconds: float
    paused_s: float
    gb_per_s: float


class ConvertReport(Report):
    """What a conversion did."""

    path: str
    identity: str
    tensors: int
    files: int
    bytes: int
    resumed_bytes: int
    other_files: int
    skipped: list[str]
    not_removed: str | None
    seconds: float
    gb_per_s: float


class ExportReport(Report):
    """What an export did."""

    path: str
    tensors: int
    files: int
    bytes: int
    resumed_bytes: int
    other_files: int
    skipped: list[str]
    seconds: float
    gb_per_s: float


class VerifyReport(Report):
    """What a verification found; `ok` where every chunk is what was stored."""

    path: str
    identity: str
    chunks: int
    bytes: int
    corrupt: list[dict[str, Any]]
    seconds: float
    gb_per_s: float

    @property
    def ok(self) -> bool:
        """Whether no chunk is corrupt."""
        return not self.corrupt


class LoadReport(Report):
    """What a load moved, by which engine and why, and how fast. Times are seconds, rates 1e9 bytes a second."""

    path: str
    layout: str
    devices: list[str]
    device_names: list[str]
    bytes: int
    read_bytes: int
    cached_bytes: int
    tensors: int
    pieces: int
    copies: int
    verified: bool
    device_verified_bytes: int
    seconds: float
    plan_s: float
    alloc_s: float
    move_s: float
    pinned_bytes: int
    numa_node: int | None
    limit: str
    limit_engine: str
    engines: list[dict[str, Any]]
    fell_back: str | None
    notes: list[str]

    @property
    def engine(self) -> str:
        """The engines that read, joined by `+`; empty where nothing was read."""
        return "+".join(str(share["engine"]) for share in self.engines)

    @property
    def gb_per_s(self) -> float:
        """`bytes` by `seconds`."""
        return self.bytes / 1e9 / self.seconds if self.seconds > 0 else 0.0
