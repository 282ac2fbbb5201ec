"""What users see when a model cannot be loaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest

import serverless_llm as sllm


def without(model: Path, lost: str, target: Path) -> Path:
    """A copy of a model that lacks a tensor."""
    tensors = models.weights(model)
    del tensors[lost]
    return models.copy_with(model, target, tensors)


@pytest.mark.parametrize("road", ["auto", "staging"])
def test_a_missing_tensor_is_named(road: str, model: Callable[..., Path], load: Any, tmp_path: Path) -> None:
    lost = "model.layers.1.input_layernorm.weight"
    with pytest.raises(ValueError, match=lost):
        load(without(model("llama"), lost, tmp_path / "lost"), model_loader_extra_config={"road": road})


@pytest.mark.parametrize("road", ["auto", "staging"])
def test_a_missing_weight_of_a_layer_is_named(
    road: str, model: Callable[..., Path], engine: Any, said: list[str], tmp_path: Path
) -> None:
    # vLLM's own loader says nothing of these.
    lost = "model.layers.1.mlp.down_proj.weight"
    source = without(model("llama"), lost, tmp_path / "lost")
    with pytest.raises(sllm.FormatError, match=f"nothing for these parameters: {lost}: is it complete"):
        engine(source, model_loader_extra_config={"road": road})
    engine(source, model_loader_extra_config={"road": road, "missing": "warn"})
    assert any(f"nothing for these parameters: {lost}" in line for line in said)


@pytest.mark.parametrize("road", ["auto", "staging"])
def test_a_tensor_too_many_is_named(road: str, model: Callable[..., Path], load: Any, tmp_path: Path) -> None:
    tensors = models.weights(model("llama"))
    tensors["model.layers.1.surplus.weight"] = tensors["model.norm.weight"].clone()
    source = models.copy_with(model("llama"), tmp_path / "surplus", tensors)
    with pytest.raises((ValueError, KeyError), match="surplus"):
        load(source, model_loader_extra_config={"road": road})


@pytest.mark.parametrize("road", ["auto", "staging"])
def test_a_tensor_of_another_shape(road: str, model: Callable[..., Path], load: Any, tmp_path: Path) -> None:
    tensors = models.weights(model("llama"))
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    source = models.copy_with(model("llama"), tmp_path / "shape", tensors)
    with pytest.raises((AssertionError, RuntimeError), match="127"):
        load(source, model_loader_extra_config={"road": road})


def test_a_shard_that_is_cut(model: Callable[..., Path], load: Any, tmp_path: Path) -> None:
    shutil.copytree(model("llama"), tmp_path / "cut")
    shard = sorted((tmp_path / "cut").glob("*.safetensors"))[1]
    with open(shard, "r+b") as file:
        file.truncate(shard.stat().st_size - 1000)
    with pytest.raises(sllm.FormatError, match=shard.name):
        load(tmp_path / "cut")


def test_a_shard_that_is_missing(model: Callable[..., Path], load: Any, tmp_path: Path) -> None:
    shutil.copytree(model("llama"), tmp_path / "missing")
    shard = sorted((tmp_path / "missing").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        load(tmp_path / "missing")


def test_a_store_whose_data_are_cut(
    model: Callable[..., Path], store_of: Callable[..., Path], load: Any, tmp_path: Path
) -> None:
    shutil.copytree(store_of(model("llama")), tmp_path / "cut")
    with open(tmp_path / "cut" / "tensor.data_0", "r+b") as file:
        file.truncate(100_000)
    with pytest.raises(sllm.FormatError, match=r"tensor\.data_0"):
        load(tmp_path / "cut")


def test_a_directory_without_weights(model: Callable[..., Path], load: Any, tmp_path: Path) -> None:
    shutil.copy(model("llama") / "config.json", tmp_path)
    with pytest.raises(sllm.NotFoundError, match="neither a store nor safetensors; save the model as safetensors"):
        load(tmp_path)


def test_a_directory_that_is_no_model(load: Any, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"config\.json|Invalid repository ID"):
        load(tmp_path)


def test_an_unknown_option(model: Callable[..., Path], load: Any) -> None:
    with pytest.raises(sllm.InvalidError, match="unknown key 'engin'; did you mean 'engine'?"):
        load(model("llama"), model_loader_extra_config={"engin": "pread"})


@pytest.mark.parametrize("options", [{}, {"road": "staging"}])
def test_a_flipped_bit(
    options: Any, model: Callable[..., Path], store_of: Callable[..., Path], load: Any, tmp_path: Path
) -> None:
    store = tmp_path / "flipped"
    shutil.copytree(store_of(model("llama")), store)
    info = sllm.open(store)["model.layers.1.mlp.down_proj.weight"]
    with open(store / info.file, "r+b") as file:
        file.seek(info.offset + 100)
        byte = file.read(1)[0]
        file.seek(info.offset + 100)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(sllm.CorruptError, match=info.file):
        load(store, model_loader_extra_config={"verify": True, **options})
    load(store, model_loader_extra_config=options)


def test_a_store_whose_source_was_changed(model: Callable[..., Path], load: Any, tmp_path: Path) -> None:
    shutil.copytree(model("llama"), tmp_path / "model")
    store = tmp_path / "store"
    sllm.convert(tmp_path / "model", store)
    load(store)
    shard = sorted((tmp_path / "model").glob("*.safetensors"))[0]
    os.utime(shard, ns=(1, 1))
    with pytest.raises(sllm.FormatError, match=f'{shard.name}.*convert it again.*"changed_source": "warn"'):
        load(store)
    loaded = load(store, model_loader_extra_config={"changed_source": "warn"})
    assert any("convert it again" in line for line in loaded.said)
