"""A server of models, one as a store and one in the original's layout, and the original's client of it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import checkpoints
import pytest
from checkpoints import Tensor
from gpu import Gpu
from sllm_store.client import SllmStoreClient

STORE = "store"
ORIGINAL = "vllm/original/rank_0"
MODELS = (STORE, ORIGINAL)
TIED = {"lm_head.weight": "embed.weight"}
DEVICES = 2
CHUNK = 4 << 20
POOL = 64 << 20


@dataclass
class Server:
    """A running `sllm-store start`."""

    process: subprocess.Popen[str]
    port: int
    storage: Path
    sockets: tempfile.TemporaryDirectory[str]
    report: Path
    clients: list[SllmStoreClient] = field(default_factory=list)

    def client(self) -> SllmStoreClient:
        client = SllmStoreClient(f"127.0.0.1:{self.port}")
        self.clients.append(client)
        return client


def _environment(folder: Path) -> dict[str, str]:
    """An environment in which the driver is the double."""
    folder.mkdir()
    (folder / "libcuda.so.1").symlink_to(Path(os.environ["SLLM_FAKE_CUDA"]).resolve(strict=True))
    return {**os.environ, "LD_LIBRARY_PATH": str(folder), "FAKE_CUDA_DEVICES": str(DEVICES)}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def fill(storage: Path) -> None:
    """Makes the models below a storage path."""
    (storage / "source").mkdir(parents=True)
    checkpoints.write_safetensors(storage / "source" / "model.safetensors", checkpoints.tensors(1))
    command = [os.environ["SLLM_STORE"], "convert", storage / "source", storage / STORE, "--quiet"]
    subprocess.run(command, check=True, timeout=60)
    checkpoints.write_original(storage / ORIGINAL, checkpoints.tensors(2), TIED)


@pytest.fixture
def content() -> dict[str, dict[str, Tensor]]:
    """Tensors by model and name."""
    original = checkpoints.tensors(2)
    original.update({name: original[source] for name, source in TIED.items()})
    return {STORE: checkpoints.tensors(1), ORIGINAL: original}


@pytest.fixture(scope="session")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage path that no test changes."""
    path = tmp_path_factory.mktemp("storage") / "models"
    fill(path)
    return path


@pytest.fixture
def start(tmp_path: Path, storage: Path) -> Iterator[Callable[..., Server]]:
    """Starts servers with these flags; all of them must end well."""
    servers: list[Server] = []

    def start(*flags: str, pool: str = f"{POOL >> 20}MB", storage: Path = storage) -> Server:
        folder = tmp_path / f"server-{len(servers)}"
        folder.mkdir()
        port = _free_port()
        command = [os.environ["SLLM_STORE"], "start", "--storage-path", str(storage), "--host", "127.0.0.1"]
        command += ["--port", str(port), "--mem-pool-size", pool, *flags]
        # The default socket belongs to whoever else runs a server here, and its path cannot be long.
        sockets = tempfile.TemporaryDirectory()
        environment = {
            **_environment(folder / "driver"),
            "XDG_RUNTIME_DIR": sockets.name,
            "FAKE_CUDA_REPORT": str(folder / "report.json"),
        }
        with open(folder / "log", "w") as log:
            process = subprocess.Popen(command, env=environment, stderr=log, text=True)
        servers.append(Server(process, port, storage, sockets, folder / "report.json"))
        deadline = time.monotonic() + 30
        while True:
            assert process.poll() is None, (folder / "log").read_text()
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                return servers[-1]
            except ConnectionRefusedError:
                assert time.monotonic() < deadline, "the server does not listen"
                time.sleep(0.005)

    yield start
    for server in servers:
        for client in server.clients:
            client.channel.close()
        server.process.send_signal(signal.SIGTERM)
    try:
        assert [server.process.wait(timeout=20) for server in servers] == [0] * len(servers)
        for server in servers:
            # Written where the driver was used.
            if server.report.exists():
                assert json.loads(server.report.read_text())["imports"] == 0, "memory of clients is still open"
    finally:
        for server in servers:
            server.process.kill()
            server.sockets.cleanup()


@pytest.fixture
def server(start: Callable[..., Server]) -> Server:
    return start()


@pytest.fixture
def client(server: Server) -> SllmStoreClient:
    return server.client()


@pytest.fixture(scope="session")
def gpus() -> list[Gpu]:
    os.environ["FAKE_CUDA_DEVICES"] = str(DEVICES)
    return [Gpu(ordinal) for ordinal in range(DEVICES)]
