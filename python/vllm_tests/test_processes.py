"""vLLM in processes of its own: two ranks, and the server."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest

HERE = Path(__file__).parent


# The models that are laid out in each way, and vLLM's options for it.
BY_TENSOR = ("mixtral", {"tensor_parallel_size": 2})
BY_PIPELINE = ("llama", {"pipeline_parallel_size": 2})
BY_EXPERT = ("mixtral", {**BY_TENSOR[1], "enable_expert_parallel": True, "enable_ep_weight_filter": True})
# On a processor without AVX-512 vLLM's own backend did not start by expert: "list index out of range".
STARTS_BY_EXPERT = "avx512f" in Path("/proc/cpuinfo").read_text()


@pytest.fixture(scope="module")
def on_two_ranks(model: Callable[..., Path], store_of: Callable[..., Path]) -> list[dict[str, Any]]:
    """What two_ranks.py found of each layout. One process, since imports take their time."""
    if (os.cpu_count() or 1) < 2:
        pytest.skip("two ranks want two processors")
    layouts = []
    for name, options in (BY_TENSOR, BY_PIPELINE, BY_EXPERT)[: 3 if STARTS_BY_EXPERT else 2]:
        source, other = str(model(name)), str(model(f"{name}_again"))
        # vLLM's backend for the host dies of expert parallelism at the first word: there the weights are compared.
        layout = {"source": source, "other": other, "store": str(store_of(model(name))), "options": options}
        layouts.append(json.dumps({**layout, "runs": options is not BY_EXPERT[1]}))
    ranks = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_LOGGING_LEVEL": "DEBUG"}
    run = subprocess.run(
        [sys.executable, HERE / "two_ranks.py", *layouts],
        env={**os.environ, **ranks},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-8000:]
    found = [json.loads(line.removeprefix("FOUND ")) for line in run.stdout.splitlines() if line.startswith("FOUND ")]
    for layout in found:
        loaded = layout["ranks"]
        for way in ("deferred", "staging"):
            assert [rank["parameters"] for rank in loaded[way]] == [rank["parameters"] for rank in loaded["theirs"]]
            assert [rank["direct"] for rank in loaded[way]] == [False, False], "the disk gives each byte once"
        assert loaded["theirs"][0] != loaded["theirs"][1], "ranks hold something else"
        if "ours" in layout:
            assert layout["ours"] == layout["theirs"] == layout["again"] != layout["other"]
    return found


def moved(layout: dict[str, Any], road: str) -> list[int]:
    """Bytes that each rank moved."""
    return [rank["moved"] for rank in layout["ranks"][road]]


def sizes(path: Path) -> dict[str, int]:
    return {name: tensor.nbytes for name, tensor in models.weights(path).items()}


def test_by_tensor_a_rank_moves_its_slices(on_two_ranks: list[dict[str, Any]], model: Callable[..., Path]) -> None:
    of = sizes(model("mixtral"))
    # What every rank has whole: norms, and what routes words to experts.
    whole = sum(size for name, size in of.items() if "norm" in name or re.search(r"\.gate\.", name))
    total = sum(of.values())
    assert 0 < whole < total / 20
    assert moved(on_two_ranks[0], "deferred") == [whole + (total - whole) // 2] * 2


def test_by_pipeline_a_rank_moves_its_layers(on_two_ranks: list[dict[str, Any]], model: Callable[..., Path]) -> None:
    of = sizes(model("llama"))
    layers = [sum(size for name, size in of.items() if name.startswith(f"model.layers.{i}.")) for i in (0, 1)]
    ends = [of["model.embed_tokens.weight"], of["model.norm.weight"] + of["lm_head.weight"]]
    assert sum(layers) + sum(ends) == sum(of.values())
    assert moved(on_two_ranks[1], "deferred") == [layers[0] + ends[0], layers[1] + ends[1]]


@pytest.mark.skipif(not STARTS_BY_EXPERT, reason="vLLM does not start by expert on this processor")
def test_by_expert_a_rank_moves_its_experts(on_two_ranks: list[dict[str, Any]], model: Callable[..., Path]) -> None:
    of = sizes(model("mixtral"))
    experts = sum(size for name, size in of.items() if ".experts." in name)
    whole = sum(size for name, size in of.items() if "norm" in name or re.search(r"\.gate\.", name))
    rest = sum(of.values()) - experts - whole
    assert 0 < rest < experts
    assert moved(on_two_ranks[2], "deferred") == [experts // 2 + rest // 2 + whole] * 2
    # Staged tensors are whole, but not one of another rank's experts is read.
    assert moved(on_two_ranks[2], "staging") == [experts // 2 + rest + whole] * 2


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_the_server_completes_a_sentence(smollm2: Path, store_of: Callable[..., Path], tmp_path: Path) -> None:
    port = free_port()
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "SERVERLESS_LLM_VERIFY": "1"}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "auto", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(store_of(smollm2))]
    command += ["--load-format", "serverless_llm", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    command += ["--max-model-len", "256", "--served-model-name", "smollm2", "--kv-cache-memory-bytes", str(64 << 20)]
    command += ["--model-loader-extra-config", '{"engine": "pread"}']
    log = tmp_path / "log"
    with log.open("w") as out:
        server = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
    try:
        while not answers(f"http://127.0.0.1:{port}/health"):
            try:
                server.wait(1)
            except subprocess.TimeoutExpired:
                continue
            pytest.fail(f"the server ended: {log.read_text()[-8000:]}")
        request = {"model": "smollm2", "prompt": "The capital of France is", "max_tokens": 12, "temperature": 0}
        answer = answers(f"http://127.0.0.1:{port}/v1/completions", json.dumps(request).encode())
        assert "Paris" in answer["choices"][0]["text"]
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
    said = log.read_text()
    assert "serverless_llm reads" in said and "(store, identity" in said
    assert re.search(r"serverless_llm loaded 0\.\d\d GB in .* by pread, 0\.\d\d GB straight into the parameters$", said, re.M)


def answers(url: str, data: bytes | None = None) -> Any:
    """What a server answers; None where none listens."""
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.loads(response.read() or "true")
    except urllib.error.HTTPError as e:
        pytest.fail(f"{url}: {e.read().decode()}")
    except (urllib.error.URLError, ConnectionError):
        return None
