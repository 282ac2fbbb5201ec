"""A client of the store server, which keeps models in pinned host memory (`sllm-store start`)."""

from __future__ import annotations

import json
import os
from typing import Any

from . import _native
from .reports import Report
from .store import Progress

_Model = str | os.PathLike[str]


class ModelState(Report):
    """A model as the server has it; sizes are bytes."""

    name: str
    layout: str
    len: int
    resident: int
    pinned: bool
    loads: int
    idle_s: float


class ServerStatus(Report):
    """What the server does. `pool` has its memory in bytes, `jobs` the loads that run."""

    version: str
    storage_path: str
    uptime_s: float
    pool: dict[str, Any]
    jobs: list[dict[str, Any]]
    loads_done: int
    loads_failed: int
    clients: int


class StoreClient:
    """A connection to a store server.

    `address`: `"unix:/path"`, a path, or `"host:port"`; None: `SLLM_STORE_ADDRESS`, else the socket where a server
    listens that was not told where. `token`: what a server wants of TCP clients; None: `SLLM_STORE_TOKEN`. `timeout`:
    seconds that a call may take which moves no bytes. A model is named by its path below the server's storage path, or
    by an absolute path inside it.

    Where no server answers, and where it fails, `StoreServerError` is raised.
    """

    def __init__(self, address: str | None = None, *, token: str | None = None, timeout: float = 10.0) -> None:
        self._client = _native.StoreClient(address, token=token, timeout=timeout)

    @property
    def address(self) -> str:
        """The server's address."""
        return self._client.address

    def health(self) -> bool:
        """Whether the server says that it serves."""
        return self._client.health()

    def list(self) -> list[ModelState]:
        """The models that the server knows of."""
        return [ModelState(model) for model in json.loads(self._client.list())]

    def status(self) -> ServerStatus:
        """What the server does."""
        return ServerStatus(json.loads(self._client.status()))

    def preload(self, model: _Model, *, pin: bool = False, progress: Progress | None = None) -> int:
        """Read a model into the server's memory, keep it there if `pin`, and wait; its bytes.

        `progress(done, total)` is called with bytes, in this thread; what it raises stops the work.
        """
        return self._client.preload(os.fspath(model), pin=pin, progress=progress)

    def pin(self, model: _Model) -> ModelState:
        """Keep a model in the server's memory: what is there of it, and what comes."""
        return ModelState(json.loads(self._client.pin(os.fspath(model))))

    def unpin(self, model: _Model) -> ModelState:
        """Let a model go when its room is wanted."""
        return ModelState(json.loads(self._client.unpin(os.fspath(model))))

    def evict(self, model: _Model) -> int:
        """Drop a model from the server's memory; how many bytes that were."""
        return self._client.evict(os.fspath(model))

    def evict_all(self) -> int:
        """Drop all models from the server's memory; how many bytes that were."""
        return self._client.evict(None)

    def __repr__(self) -> str:
        return f"StoreClient({self.address!r})"
