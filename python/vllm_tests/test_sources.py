"""Which files weights come from (several sources, patterns of a model's own, Mistral's layout), and which tensors a
changed configuration wants: all as vLLM's own loader has it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from conftest import start, tokens
from safetensors.torch import save_file
from test_tokens import STAGING, size_of

import serverless_llm as sllm

PREFIX = "model.layers.1."
Tokens = list[tuple[int, ...]]


@pytest.fixture(scope="module")
def of_sources() -> Iterator[dict[str, Any]]:
    """The options for a model of the Llama kind whose weights come from where its configuration says."""
    from vllm import ModelRegistry
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.model_executor.models.llama import LlamaForCausalLM

    class LlamaOfSources(LlamaForCausalLM):
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            config = vllm_config.model_config.hf_config
            self.allow_patterns_overrides = getattr(config, "patterns", None)
            sources = getattr(config, "sources", ())
            self.secondary_weights = [DefaultModelLoader.Source(**{"revision": None, **source}) for source in sources]

    ModelRegistry.register_model("LlamaOfSources", LlamaOfSources)
    yield {"architectures": ["LlamaOfSources"]}


@pytest.fixture(scope="module")
def whole(model: Callable[..., Path]) -> Tokens:
    """What vLLM's own loader makes the model say that the tests take apart."""
    llm = start(model("llama"), "auto")
    try:
        return tokens(llm)
    finally:
        del llm


def parts(model: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors of a model without its second layer, and those of the layer, by their names in it."""
    tensors = models.weights(model)
    layer = {name.removeprefix(PREFIX): tensors.pop(name) for name in list(tensors) if name.startswith(PREFIX)}
    return tensors, layer


def nbytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def test_a_second_source(
    model: Callable[..., Path], load: Any, of_sources: dict[str, Any], whole: Tokens, tmp_path: Path
) -> None:
    rest, layer = parts(model("llama"))
    main = models.copy_with(model("llama"), tmp_path / "main", rest)
    second = models.copy_with(model("llama"), main / "layer", layer)
    store = tmp_path / "layer.store"
    sllm.convert(second, store)
    original = models.write_original(second, tmp_path / "original")

    def overrides(source: dict[str, str]) -> dict[str, Any]:
        return {"hf_overrides": {**of_sources, "sources": [{"prefix": PREFIX, **source}]}}

    sources = [{"model_or_path": str(path)} for path in (second, store, original)]
    sources.append({"model_or_path": str(main), "subfolder": "layer"})
    assert load(main, "auto", **overrides(sources[-1])).tokens == whole
    for source in sources:
        ours = load(main, **overrides(source))
        assert (ours.tokens, ours.moved, ours.read_through) == (whole, [nbytes(rest) + nbytes(layer)], [{}])
        assert sum("serverless_llm reads" in line for line in ours.said) == 2
    assert load(main, **overrides(sources[1]), **STAGING).tokens == whole


def test_a_second_source_that_is_pickled(
    model: Callable[..., Path], load: Any, of_sources: dict[str, Any], whole: Tokens, tmp_path: Path
) -> None:
    rest, layer = parts(model("llama"))
    main = models.copy_with(model("llama"), tmp_path / "main", rest)
    index = {"metadata": {}, "weight_map": dict.fromkeys(rest, "model.safetensors")}
    (main / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save(layer, main / "layer.pt")
    store = tmp_path / "store"
    sllm.convert(main, store)

    def overrides(path: Path) -> dict[str, Any]:
        source = {"model_or_path": str(path), "prefix": PREFIX, "allow_patterns_overrides": ["layer.pt"]}
        return {"hf_overrides": {**of_sources, "sources": [source]}}

    assert load(main, "auto", **overrides(main)).tokens == whole
    # A store has nothing of it, until somebody puts it there.
    with pytest.raises(sllm.NotFoundError, match=r"has no layer\.pt, which the model wants"):
        load(store, **overrides(store))
    shutil.copy(main / "layer.pt", store)
    for path in (main, store):
        ours = load(path, **overrides(path))
        assert (ours.tokens, ours.moved, ours.read_through) == (whole, [nbytes(rest)], [{}])
        assert any(f"leaves layer.pt in {path} to vLLM" in line for line in ours.said)
    assert load(main, **overrides(main), **STAGING).tokens == whole
    # What nobody asked for by name is not unpickled.
    (main / "model.safetensors").unlink()
    (main / "model.safetensors.index.json").unlink()
    with pytest.raises(sllm.NotFoundError, match="neither a store nor safetensors"):
        load(main, **overrides(main))


def test_patterns_of_the_models_own(
    model: Callable[..., Path], load: Any, of_sources: dict[str, Any], whole: Tokens, tmp_path: Path
) -> None:
    rest, layer = parts(model("llama"))
    main = models.copy_with(model("llama"), tmp_path / "main", {"surplus": torch.zeros(5)})
    for folder, tensors in {
        "transformer": rest,
        "vision_encoder": {PREFIX + name: tensor for name, tensor in layer.items()},
        "vae": {"another": torch.zeros(7)},
    }.items():
        (main / folder).mkdir()
        save_file(tensors, main / folder / "weights.safetensors", metadata={"format": "pt"})
    # As that of Cosmos 3.
    overrides = {"hf_overrides": {**of_sources, "patterns": ["[tv]*er/*.safetensors", "*.safetensors"]}}
    assert load(main, "auto", **overrides).tokens == whole
    ours = load(main, **overrides)
    assert (ours.tokens, ours.moved, ours.read_through) == (whole, [size_of(model("llama"))], [{}])
    assert load(main, **overrides, **STAGING).tokens == whole
    # A store's files have other names.
    store = tmp_path / "store"
    sllm.convert(model("llama"), store)
    assert load(store, **overrides).tokens == whole
    overrides = {"hf_overrides": {**of_sources, "patterns": ["none*.safetensors"]}}
    with pytest.raises(sllm.NotFoundError, match=r"files like none\*\.safetensors"):
        load(main, **overrides)


def test_files_of_mistrals_layout_go_first(
    model: Callable[..., Path], load: Any, whole: Tokens, tmp_path: Path
) -> None:
    main, other = models.weights(model("llama")), models.weights(model("llama_again"))
    both = models.copy_with(model("llama_again"), tmp_path / "both", other)
    save_file(main, both / "consolidated.safetensors", metadata={"format": "pt"})
    options = {"config_format": "hf"}
    assert load(both, "auto", **options).tokens == whole
    ours = load(both, **options)
    assert (ours.tokens, ours.moved, ours.read_through) == (whole, [nbytes(main)], [{}])


def test_of_a_tensor_in_several_files_the_last_counts(
    model: Callable[..., Path], load: Any, whole: Tokens, tmp_path: Path
) -> None:
    rest, layer = parts(model("llama"))
    _, other = parts(model("llama_again"))
    found = []
    for name, second, third in ("first", layer, other), ("last", other, layer):
        path = models.copy_with(model("llama"), tmp_path / name, {})
        (path / "model.safetensors").unlink()
        # Names that text and numbers sort differently.
        for number, tensors in {1: rest, 2: second, 10: third}.items():
            prefix = "" if tensors is rest else PREFIX
            named = {prefix + key: tensor for key, tensor in tensors.items()}
            save_file(named, path / f"model-{number}.safetensors", metadata={"format": "pt"})
        found.append(load(path, "auto").tokens)
        ours = load(path)
        assert (ours.tokens, ours.moved, ours.read_through) == (found[-1], [nbytes(rest) + 2 * nbytes(layer)], [{}])
        (warning,) = [line for line in ours.said if "is in" in line]
        names = f"tensor '{PREFIX}.*' is in model-2.safetensors and model-10.safetensors, as {len(layer) - 1} more are"
        assert re.search(names, warning)
        assert load(path, **STAGING).tokens == found[-1]
    assert found[1] == whole != found[0]
    with pytest.raises(sllm.FormatError, match="in two files"):
        sllm.convert(path, tmp_path / "store")


def test_a_configuration_that_wants_less(
    model: Callable[..., Path], store_of: Callable[..., Path], load: Any, whole: Tokens
) -> None:
    source = model("llama")
    overrides = {"hf_overrides": {"tie_word_embeddings": True}}
    theirs = load(source, "auto", **overrides)
    assert theirs.tokens != whole, "it does something"
    ours = load(store_of(source), **overrides)
    head = models.weights(source)["lm_head.weight"].nbytes
    assert (ours.tokens, ours.moved, ours.read_through) == (theirs.tokens, [size_of(source) - head], [{}])
    assert load(source, **overrides, **STAGING).tokens == theirs.tokens


@pytest.mark.parametrize("layers", [1, 3])
def test_a_configuration_of_other_layers(layers: int, model: Callable[..., Path], load: Any) -> None:
    # Fewer than the files have, and more: vLLM refuses both.
    overrides = {"hf_overrides": {"num_hidden_layers": layers}}
    with pytest.raises(ValueError) as theirs:
        load(model("llama"), "auto", **overrides)
    with pytest.raises(ValueError) as ours:
        load(model("llama"), **overrides)
    assert words(ours) == words(theirs)


def words(error: pytest.ExceptionInfo[ValueError]) -> list[str]:
    """What an error says; sets are told in any order."""
    return sorted(str(error.value).replace("{", " ").replace("}", " ").replace(",", " ").split())


def test_weights_are_loaded_again_from_another_layout(
    model: Callable[..., Path],
    store_of: Callable[..., Path],
    engine: Any,
    said: list[str],
    whole: Tokens,
    tmp_path: Path,
) -> None:
    source, other = model("llama"), model("llama_again")
    theirs = tokens(engine(other, "auto"))
    llm = engine(source)
    original = models.write_original(other, tmp_path / "original")
    for path, layout, expected in (
        (store_of(other), "store", theirs),
        (store_of(source), "store", whole),
        (original, "original", theirs),
        (source, "safetensors", whole),
    ):
        said.clear()
        llm.collective_rpc("reload_weights", kwargs={"weights_path": str(path)})
        assert any(f"reads {path} ({layout}" in line for line in said)
        llm.reset_prefix_cache()
        assert tokens(llm) == expected
