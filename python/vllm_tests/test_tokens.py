"""The same tokens as vLLM's own loader gives, on both roads and from every layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
from conftest import bytes_of, tokens
import torch

STAGING = {"model_loader_extra_config": {"road": "staging"}}


def size_of(path: Path) -> int:
    """Bytes of a model's tensors."""
    return sum(tensor.nbytes for tensor in models.weights(path).values())


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2", "qwen3_moe", "mixtral", "gemma2", "opt", "phi3"])
def test_architectures(name: str, model: Callable[..., Path], store_of: Callable[..., Path], load: Any) -> None:
    source = model(name)
    assert len(list(source.glob("*.safetensors"))) > 1
    theirs = load(source, "safetensors")
    ours = load(store_of(source))
    assert ours.tokens == theirs.tokens
    # Every byte went straight into the parameters, once, and no operation looked at one.
    assert (ours.moved, ours.read_through) == ([size_of(source)], [{}])
    staged = load(source, **STAGING)
    assert staged.tokens == theirs.tokens
    assert staged.moved == [] and any("staged on cpu" in line for line in staged.said)


def test_float32(model: Callable[..., Path], load: Any) -> None:
    source = model("qwen2")
    theirs = load(source, "safetensors", dtype="float32")
    ours = load(source, dtype="float32")
    assert ours.tokens == theirs.tokens == load(source, dtype="float32", **STAGING).tokens
    # Every byte is converted, so that none is moved as it lies.
    assert (ours.moved, ours.read_through) == ([0], [{"aten::copy_": size_of(source)}])


def test_the_originals_layout(model: Callable[..., Path], load: Any, tmp_path: Path) -> None:
    source = model("qwen2")
    original = models.write_original(source, tmp_path / "original")
    assert (original / "tensor.data_1").exists()
    theirs, ours = load(source, "safetensors"), load(original)
    assert (ours.tokens, ours.moved, ours.read_through) == (theirs.tokens, [size_of(source)], [{}])
    assert any("(original)" in line for line in ours.said)
    assert load(original, **STAGING).tokens == theirs.tokens


def test_a_repository_of_the_cache(
    model: Callable[..., Path], load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    source = model("qwen2")
    repository = tmp_path / "models--some--qwen2"
    snapshot = repository / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    for number, file in enumerate(source.iterdir()):
        blob = repository / "blobs" / f"{number:040}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    theirs, ours = load(source, "safetensors"), load("some/qwen2")
    assert (ours.tokens, ours.moved, ours.read_through) == (theirs.tokens, [size_of(source)], [{}])
    assert any(f"reads {snapshot} (safetensors)" in line for line in ours.said)


def test_integers_of_compressed_tensors(model: Callable[..., Path], load: Any, tmp_path: Path) -> None:
    source = models.int8(model("llama"), tmp_path / "int8")
    theirs, ours = load(source, "safetensors"), load(source)
    assert ours.tokens == theirs.tokens == load(source, **STAGING).tokens
    # vLLM holds scales in float32, so that those of the file are converted.
    scales = sum(tensor.nbytes for name, tensor in models.weights(source).items() if name.endswith("_scale"))
    assert (ours.moved, ours.read_through) == ([size_of(source) - scales], [{"aten::copy_": scales}])


def test_fp8(model: Callable[..., Path], load: Any, tmp_path: Path) -> None:
    source = models.fp8(model("draft"), tmp_path / "fp8")
    try:
        theirs = load(source, "safetensors")
    except ValueError as e:
        if "Failed to find a kernel" not in str(e):
            raise
        pytest.skip(f"vLLM itself cannot run it here: {e}")
    ours = load(source)
    assert ours.tokens == theirs.tokens == load(source, **STAGING).tokens
    assert (ours.moved, ours.read_through) == ([size_of(source)], [{}])


@pytest.mark.parametrize("road", ["auto", "staging"])
def test_weights_are_loaded_again(road: str, model: Callable[..., Path], engine: Any, said: list[str]) -> None:

    source, other = model("llama"), model("llama_again")
    theirs = tokens(engine(source, "safetensors")), tokens(engine(other, "safetensors"))
    assert theirs[0] != theirs[1]
    llm = engine(source, model_loader_extra_config={"road": road})
    llm.collective_rpc("reload_weights")
    assert tokens(llm) == theirs[0]
    said.clear()
    llm.collective_rpc("reload_weights", kwargs={"weights_path": str(other)})
    assert any(f"reads {other}" in line for line in said)
    llm.reset_prefix_cache()
    assert tokens(llm) == theirs[1]


def test_a_draft_model(model: Callable[..., Path], store_of: Callable[..., Path], load: Any) -> None:
    source, draft = model("llama"), model("draft")

    def speculative(path: Path) -> dict[str, Any]:
        config = {"method": "draft_model", "model": str(path), "num_speculative_tokens": 3}
        return {"speculative_config": config, "async_scheduling": False}

    theirs = load(source, "safetensors", **speculative(draft))
    assert theirs.tokens == load(source, "safetensors").tokens
    ours = load(source, **speculative(store_of(draft)))
    assert ours.tokens == theirs.tokens
    assert (ours.moved, ours.read_through) == ([size_of(source), size_of(draft)], [{}, {}])


def test_lora(model: Callable[..., Path], engine: Any, tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    source = model("llama")
    request = LoRARequest("some", 1, str(models.lora(source, tmp_path / "lora")))
    said = {}
    for load_format in ("safetensors", "serverless_llm"):
        llm = engine(source, load_format, enable_lora=True, max_lora_rank=8)
        said[load_format] = tokens(llm), tokens(llm, lora_request=request)
    assert said["safetensors"] == said["serverless_llm"]
    assert said["safetensors"][0] != said["safetensors"][1], "the adapter does something"


def test_smollm2_says_the_same(smollm2: Path, store_of: Callable[..., Path], engine: Any, said: list[str]) -> None:
    from vllm import SamplingParams

    def say(path: Path, *load_format: str, **options: Any) -> list[str]:
        llm = engine(path, *load_format, skip_tokenizer_init=False, **options)
        prompts = ["The capital of France is", "Water boils at"]
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
        return [output.outputs[0].text for output in outputs]

    theirs = say(smollm2, "safetensors")
    assert "Paris" in theirs[0]
    assert say(store_of(smollm2), model_loader_extra_config={"verify": True}) == theirs
    assert bytes_of(said) == ([size_of(smollm2)], [{}])
    assert say(smollm2, **STAGING) == theirs
