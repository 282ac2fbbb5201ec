"""The store server from Python: its client, and loads by it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import content, python, raw

import serverless_llm as sllm
from serverless_llm.deferred import Deferred
from serverless_llm.vllm import _prefetch

COMMAND = "import sys; from serverless_llm._cli import main; sys.exit(main())"


class Server:
    """A server's process, its socket and its models."""

    def __init__(self, folder: Path, *more: str) -> None:
        self.models = folder / "models"
        self.address = f"unix:{folder / 'socket'}"
        words = ["start", "--storage-path", self.models, "--listen", self.address, "--mem-pool-size", "64MB", *more]
        self.process = subprocess.Popen([sys.executable, "-c", COMMAND, *words], stderr=subprocess.DEVNULL)
        while not (folder / "socket").exists():
            assert self.process.poll() is None, "the server ended"
            time.sleep(0.01)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def server(store: Path, tmp_path: Path) -> Iterator[Server]:
    shutil.copytree(store, tmp_path / "models" / "m")
    server = Server(tmp_path)
    yield server
    server.kill()


def test_the_client_changes_what_the_server_holds(server: Server) -> None:
    client = sllm.StoreClient(server.address)
    assert client.address == server.address and client.health()
    told: list[tuple[int, int]] = []
    size = client.preload("m", pin=True, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (size, size)
    (model,) = client.list()
    assert (model.name, model.layout, model.len, model.pinned) == ("m", "store", size, True)
    assert model.resident >= size
    status = client.status()
    assert status.pool["pinned"] >= size and status.jobs == [] and status.clients == 1
    assert not client.unpin(server.models / "m").pinned
    assert client.pin("m").pinned and not client.unpin("m").pinned
    assert client.evict("m") >= size and client.evict_all() == 0


def test_what_the_server_refuses_is_the_exception_that_fits(server: Server) -> None:
    client = sllm.StoreClient(server.address)
    with pytest.raises(sllm.NotFoundError, match="none"):
        client.preload("none")
    with pytest.raises(sllm.InvalidError):
        client.pin("../m")
    with pytest.raises(sllm.InvalidError, match="timeout"):
        sllm.StoreClient(server.address, timeout=0)
    with pytest.raises(sllm.InvalidError, match="not the address"):
        sllm.StoreClient("nowhere")
    server.kill()
    with pytest.raises(sllm.StoreServerError):
        client.list()
    with pytest.raises(ConnectionError, match="sllm-store start"):
        sllm.StoreClient(server.address)


@pytest.mark.parametrize("verify", [False, True])
def test_loads_go_by_the_server(server: Server, verify: bool) -> None:
    for _ in range(2):
        loaded = sllm.load(
            server.models / "m", device="cpu", framework="numpy", tensors="large", server=server.address, verify=verify
        )
        assert loaded["large"].tobytes() == content("large")
        assert loaded.report.engine == "server" and loaded.report.notes == [] and loaded.report.fell_back is None
    assert loaded.report.cached_bytes == loaded.report.read_bytes > 0


def test_every_way_to_load_goes_by_the_server(server: Server) -> None:
    pytest.importorskip("torch")
    path = server.models / "m"
    names = ["large", "odd", "scalar"]
    expected = {name: content(name) for name in names}
    loaded = sllm.load(path, device="cpu", tensors=names, server=server.address)
    assert {name: raw(tensor) for name, tensor in loaded.items()} == expected
    assert loaded.report.engine == "server"
    one_by_one = sllm.iter_tensors(path, device="cpu", tensors=names, server=server.address)
    assert {name: raw(tensor) for name, tensor in one_by_one} == expected
    assert sllm.StoreClient(server.address).status().loads_done >= 2


def test_without_a_server_files_are_read_and_the_report_notes_it_where_one_was_named(store: Path) -> None:
    environment = {"XDG_RUNTIME_DIR": "/proc/nonexistent", "SLLM_STORE_ADDRESS": ""}
    python(
        "import serverless_llm as sllm\n"
        f"load = lambda server: sllm.load({str(store)!r}, device='cpu', framework='numpy', tensors='odd', server=server)\n"
        "for server in (None, False):\n"
        "    assert load(server).report.notes == []\n"
        "report = load('unix:/nonexistent/s').report\n"
        "assert report.engine != 'server' and 'no store server answers' in report.notes[0], report\n"
        "try:\n"
        "    load('nowhere')\n"
        "except sllm.InvalidError:\n"
        "    pass\n"
        "else:\n"
        "    raise AssertionError\n",
        **environment,
    )


def test_auto_finds_the_server_of_the_environment(server: Server) -> None:
    code = (
        "import serverless_llm as sllm\n"
        f"report = sllm.load({str(server.models / 'm')!r}, device='cpu', framework='numpy', tensors='odd', server=True).report\n"
        "print(report.engine, report.notes)\n"
    )
    assert python(code, SLLM_STORE_ADDRESS=server.address).stdout == "server []\n"
    folder = str(Path(server.address.removeprefix("unix:")).parent)
    os.rename(f"{folder}/socket", f"{folder}/sllm-store.sock")
    assert python(code, SLLM_STORE_ADDRESS="", XDG_RUNTIME_DIR=folder).stdout == "server []\n"


def test_a_token_is_sent_by_tcp_and_told_to_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    token = "0123456789abcdef-right"
    array: Any = np.arange(1001, dtype=np.int16)
    (tmp_path / "models").mkdir()
    sllm.save_dict({"w": array}, tmp_path / "models" / "m")
    (tmp_path / "token").write_text(token)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = Server(tmp_path, "--port", str(port), "--token-file", str(tmp_path / "token"))
    path, address = server.models / "m", f"127.0.0.1:{port}"
    monkeypatch.delenv("SLLM_STORE_TOKEN", raising=False)
    try:
        with pytest.raises(sllm.AccessError, match="token"):
            sllm.StoreClient(address).list()
        client = sllm.StoreClient(address, token=token)
        assert client.list() == [] and token not in repr(client) + repr(vars(client))

        def note(token: str | None) -> str:
            loaded = sllm.load(path, device="cpu", framework="numpy", server=address, token=token)
            assert np.array_equal(loaded["w"], array) and len(loaded.report.notes) == 1
            assert (token or "none") not in str(loaded.report.to_dict())
            return str(loaded.report.notes[0])

        # Memory of the host does not go by TCP, which the client says once the server has let it in.
        assert "token" in note(None) and "token" in note("0123456789abcdef-wrong")
        assert "token" not in note(token) and "TCP" in note(token)
        loaded = sllm.load_dict(path, "cpu", server=address, token=token)
        assert "TCP" in loaded.report.notes[0] and raw(loaded["w"]) == array.tobytes()
        tensors = dict(sllm.iter_tensors(path, device="cpu", server=address, token=token))
        assert raw(tensors["w"]) == array.tobytes()
        monkeypatch.setenv("SLLM_STORE_TOKEN", token)
        assert "TCP" in note(None) and "token" in note("0123456789abcdef-wrong")
        with pytest.raises(sllm.InvalidError, match="server") as raised:
            sllm.load(path, device="cpu", token=token)
        assert token not in str(raised.value)
    finally:
        server.kill()
    assert token not in "".join(capfd.readouterr())


def test_a_server_that_is_killed_is_missed_by_nobody(server: Server) -> None:
    path = server.models / "m"
    checkpoint = sllm.open(path)
    server.kill()
    loaded = sllm.load(checkpoint, device="cpu", framework="numpy", tensors="large", server=server.address)
    assert np.asarray(loaded["large"]).tobytes() == content("large")
    assert loaded.report.fell_back and loaded.report.notes == [f"{loaded.report.fell_back}; files are read"]


def test_vllm_has_the_server_read_ahead_and_reads_itself_where_there_is_none(server: Server, tmp_path: Path) -> None:
    checkpoints = [sllm.open(server.models / "m")]
    assert _prefetch._preload(checkpoints, server.address)
    (model,) = sllm.StoreClient(server.address).list()
    assert model.resident >= model.len
    shutil.copytree(server.models / "m", tmp_path / "elsewhere")
    assert not _prefetch._preload([sllm.open(tmp_path / "elsewhere")], server.address)
    assert not _prefetch._preload([], server.address)
    server.kill()
    assert not _prefetch._preload(checkpoints, server.address)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))]


@pytest.mark.parametrize("device", DEVICES)
def test_tensors_larger_than_staging_memory_and_the_pool_come_whole_and_in_columns(tmp_path: Path, device: str) -> None:
    random = np.random.default_rng(1)
    arrays = {
        name: random.integers(0, 256, shape, np.uint8)
        for name, shape in {"large": (9001, 9003), "wide": (70, 300_001), "tall": (50_257, 33), "odd": (3, 5)}.items()
    }
    (tmp_path / "models").mkdir()
    sllm.save_dict(arrays, tmp_path / "models" / "m")
    server = Server(tmp_path)
    try:
        loaded = sllm.load(server.models / "m", device=device, server=server.address)
        assert [engine["engine"] for engine in loaded.report.engines] == ["server"] and not loaded.report.notes
        columns = {}
        options = {"engine": "auto", "direct": None, "verify": False, "threads": None, "pinned_bytes": None}
        with Deferred(torch.device(device), {**options, "server": server.address}) as mode:
            for name, tensor in mode.tensors(sllm.open(server.models / "m")):
                half = tensor.shape[1] // 2
                columns[name] = torch.zeros(tensor.shape[0], half + 3, dtype=tensor.dtype, device=device)
                columns[name][:, 3:].copy_(tensor[:, :half])
            (report,) = mode.finish()
        assert "server" in {engine["engine"] for engine in report.engines} and not report.notes
        for name, array in arrays.items():
            assert np.array_equal(loaded[name].cpu().numpy(), array), name
            half = array.shape[1] // 2
            assert np.array_equal(columns[name].cpu().numpy()[:, 3:], array[:, :half]), name
            assert not columns[name][:, :3].any(), name
    finally:
        server.kill()
