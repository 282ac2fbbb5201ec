"""The `sllm-store` command that the wheel installs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import serverless_llm as sllm

COMMAND = Path(sys.executable).parent / "sllm-store"


def test_it_converts_and_inspects(safetensors_file: Path, tmp_path: Path) -> None:
    target = tmp_path / "store"
    subprocess.run([COMMAND, "convert", safetensors_file, target], check=True, capture_output=True)
    told = subprocess.run([COMMAND, "inspect", "--json", target], check=True, capture_output=True, text=True)
    assert json.loads(told.stdout)["identity"] == sllm.open(target).identity


def test_it_says_what_went_wrong(tmp_path: Path) -> None:
    run = subprocess.run([COMMAND, "inspect", tmp_path / "absent"], capture_output=True, text=True)
    assert run.returncode != 0
    assert "absent" in run.stderr and not run.stdout


def test_nothing_that_it_opens_becomes_a_standard_stream_that_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    command = [COMMAND, "start", "--storage-path", tmp_path, "--listen", path]
    with subprocess.Popen(["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command]) as server:
        try:
            deadline = time.monotonic() + 60
            while not path.exists() and server.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            assert sllm.StoreClient(str(path)).health()
            assert [os.readlink(f"/proc/{server.pid}/fd/{number}") for number in range(3)] == ["/dev/null"] * 3
        finally:
            server.terminate()
    assert server.returncode == 0


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_server_ends_well_by_a_signal(tmp_path: Path, sent: signal.Signals) -> None:
    command = [COMMAND, "start", "--storage-path", tmp_path, "--listen", tmp_path / "socket"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        assert "listening" in server.stderr.readline()
        server.send_signal(sent)
        rest = server.stderr.read()
    assert server.returncode == 0, rest
    assert "shut down" in rest and "Traceback" not in rest
