"""vLLM beside a store server: the weights come from it, and without it from files."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import serverless_llm as sllm

FELL_BACK = "files are read"


def warnings(said: list[str]) -> list[str]:
    """What the loader warned of a server; reports, which it logs for debugging, have more lines."""
    return [line for line in said if line.endswith(FELL_BACK) and "\n" not in line]


@pytest.mark.parametrize("road", ["auto", "staging"])
@pytest.mark.parametrize("as_store", [False, True])
def test_the_weights_come_from_the_server(
    road: str,
    as_store: bool,
    model: Callable[..., Path],
    store_of: Callable[..., Path],
    load: Any,
    server: tuple[str, subprocess.Popen[bytes]],
) -> None:
    source = model("llama")
    expected = load(source, "auto").tokens
    path = store_of(source) if as_store else source
    size = sllm.StoreClient(server[0]).preload(path)
    result = load(path, model_loader_extra_config={"road": road, "server": server[0]})
    assert result.tokens == expected
    (line,) = [line for line in result.said if "serverless_llm loaded" in line]
    assert "by server" in line and not warnings(result.said)
    status = sllm.StoreClient(server[0]).status()
    assert status.loads_done >= 1 and status.loads_failed == 0 and status.pool["resident"] >= size


@pytest.mark.parametrize("road", ["auto", "staging"])
def test_an_absent_server_is_warned_of_once(
    road: str, model: Callable[..., Path], load: Any, server: tuple[str, subprocess.Popen[bytes]]
) -> None:
    source = model("llama")
    expected = load(source, "auto").tokens
    server[1].kill()
    server[1].wait()
    result = load(source, model_loader_extra_config={"road": road, "server": server[0]})
    assert result.tokens == expected
    (warning,) = warnings(result.said)
    assert "no store server answers" in warning


def test_a_model_that_the_server_does_not_have_comes_from_files(
    model: Callable[..., Path], load: Any, server: tuple[str, subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    source = model("llama")
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(source, elsewhere)
    result = load(elsewhere, model_loader_extra_config={"server": server[0]})
    assert result.tokens == load(source, "auto").tokens
    (warning,) = warnings(result.said)
    assert "refused" in warning


def test_without_a_server_nobody_is_warned(model: Callable[..., Path], load: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/proc/nonexistent")
    monkeypatch.delenv("SLLM_STORE_ADDRESS", raising=False)
    result = load(model("llama"))
    assert not warnings(result.said) and not any("by server" in line for line in result.said)
