"""The `sllm-store` command that the wheel installs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
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
