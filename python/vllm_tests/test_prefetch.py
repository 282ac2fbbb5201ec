"""Reading ahead takes the files that the loader then opens, whatever lies beside them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
from safetensors.torch import save_file

import serverless_llm as sllm
from serverless_llm.vllm import _prefetch

HERE: tuple[str | None, str | None] = (None, None)  # no revision, no server


@pytest.fixture(scope="module")
def both(model: Callable[..., Path], folder: Path) -> Path:
    """A model of several files with an index, and another one in Mistral's layout beside it."""
    path = folder / "both"
    shutil.copytree(model("llama_again"), path)
    save_file(models.weights(model("llama")), path / "consolidated.safetensors", metadata={"format": "pt"})
    assert (path / "model.safetensors.index.json").exists()
    return path


def opened(path: Any) -> list[list[tuple[str, int]]]:
    """The files that the loader opens of a model, with their bytes: a list a checkpoint."""
    from vllm.config.load import LoadConfig

    from serverless_llm.vllm._loader import ServerlessLLMLoader

    loader = ServerlessLLMLoader(LoadConfig(load_format="serverless_llm"))
    return [checkpoint.files for checkpoint in loader._open(loader.Source(str(path), None)) or ()]


def read(path: Any) -> list[int]:
    """Reads a model ahead; bytes of the files, a number a checkpoint."""
    reports = _prefetch._read(str(path), *HERE)
    for report in reports:
        assert report.end == "complete" and report.cached_bytes + report.read_bytes == report.bytes
    return [report.bytes for report in reports]


def test_mistrals_files_are_read_and_the_others_are_not(both: Path) -> None:
    size = (both / "consolidated.safetensors").stat().st_size
    assert opened(both) == [[("consolidated.safetensors", size)]]
    assert read(both) == [size]
    assert "consolidated.safetensors" not in [name for name, _ in sllm.open(both).files], "the path alone says others"


def test_what_is_read_is_what_is_opened(
    model: Callable[..., Path], store_of: Callable[..., Path], tmp_path: Path
) -> None:
    source = model("llama")
    original = models.write_original(source, tmp_path / "original")
    # Files that no index names, one of which is called as the only one would be.
    more = models.copy_with(source, tmp_path / "more", models.weights(source))
    save_file({"surplus": models.weights(source)["model.norm.weight"]}, more / "adapter_model.safetensors")
    # Two files of the same tensors.
    twice = tmp_path / "twice"
    shutil.copytree(more, twice)
    shutil.copy(more / "model.safetensors", twice / "again.safetensors")
    for path, checkpoints in (source, 1), (store_of(source), 1), (original, 1), (more, 1), (twice, 2):
        files = opened(path)
        assert len(files) == checkpoints
        assert read(path) == [sum(size for _, size in some) for some in files]
    assert len(opened(more)[0]) == 2


def test_a_snapshot_of_the_cache_without_the_files_of_its_index(
    both: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    snapshot = tmp_path / "models--some--model" / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(both, snapshot, ignore=shutil.ignore_patterns("model-*.safetensors"))
    refs = tmp_path / "models--some--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text(snapshot.name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert read("some/model") == [(both / "consolidated.safetensors").stat().st_size]
    monkeypatch.undo()
    assert [report.bytes for report in _prefetch._read("some/model", *HERE, str(tmp_path))] == read(both)
    # Nothing is downloaded, and nothing raised: the loader will.
    assert read("some/other") == read(os.path.join(tmp_path, "none")) == []


def test_the_server_is_asked_for_what_it_would_find(
    both: Path,
    store_of: Callable[..., Path],
    model: Callable[..., Path],
    server: tuple[str, Any],
) -> None:
    reports = _prefetch._read(str(both), None, server[0])
    assert [report.bytes for report in reports] == [(both / "consolidated.safetensors").stat().st_size]
    client = sllm.StoreClient(server[0])
    assert client.status().pool["resident"] == 0
    store = store_of(model("llama"))
    assert _prefetch._read(str(store), None, server[0]) == []
    assert client.status().pool["resident"] >= sllm.open(store).total_bytes
    assert _prefetch._read(str(model("llama")), None, server[0]) == []
