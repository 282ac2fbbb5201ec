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
from conftest import bytes_of

HERE = Path(__file__).parent


def on_two_ranks(path: Path, load_format: str) -> tuple[list[list[int]], str]:
    """The tokens, and what all processes wrote."""
    ranks = {
        "VLLM_CPU_OMP_THREADS_BIND": "0|1",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_LOGGING_LEVEL": "DEBUG",
    }
    run = subprocess.run(
        [sys.executable, HERE / "two_ranks.py", path, load_format],
        env={**os.environ, **ranks},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-8000:]
    [line] = [line for line in run.stdout.splitlines() if line.startswith("TOKENS ")]
    return json.loads(line.removeprefix("TOKENS ")), run.stdout + run.stderr


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="two ranks want two processors")
def test_two_ranks_move_their_own_bytes(model: Callable[..., Path], store_of: Callable[..., Path]) -> None:
    source = model("mixtral")
    theirs, _ = on_two_ranks(source, "safetensors")
    ours, said = on_two_ranks(store_of(source), "serverless_llm")
    assert ours == theirs
    tensors = models.weights(source)
    total = sum(tensor.nbytes for tensor in tensors.values())
    # What every rank has whole: norms, and what routes words to experts.
    whole = sum(tensor.nbytes for name, tensor in tensors.items() if "norm" in name or re.search(r"\.gate\.", name))
    assert 0 < whole < total / 20
    assert bytes_of(said.splitlines()) == ([whole + (total - whole) // 2] * 2, [{}, {}])


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
