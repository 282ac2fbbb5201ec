"""Fixtures: a checkpoint of every dtype that safetensors can write, and the store made of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

import serverless_llm as sllm
from serverless_llm import _native

# safetensors' name -> the name that its serializer takes.
DTYPES = {name: torch for name, torch, _ in _native.dtypes()}
BITS = {name: bits for name, _, bits in _native.dtypes()}
# Elements of less than a byte, which stay packed in NumPy.
PACKED = {"F4", "F6_E2M3", "F6_E3M2"}
# Shape and dtype by name: all dtypes, odd lengths, scalars, empty ones, names with any characters.
SHAPES: dict[str, tuple[str, list[int]]] = {
    **{f"all.{name}": (name, [3, 8]) for name in DTYPES},
    "large": ("F32", [300, 1001]),
    "odd": ("U8", [4097]),
    "scalar": ("F64", []),
    "empty": ("BF16", [0, 5]),
    "weird [*] name ü/..": ("I16", [7]),
}


def content(name: str) -> bytes:
    """The bytes of a tensor: random, but the same every time, and no NaN in bools."""
    dtype, shape = SHAPES[name]
    count = int(np.prod(shape, dtype=np.int64)) * BITS[dtype] // 8
    random = np.random.default_rng(sorted(SHAPES).index(name)).integers(0, 256, count, dtype=np.uint8)
    return (random % 2 if dtype == "BOOL" else random).tobytes()


def raw(array: Any) -> bytes:
    """The bytes of an array or tensor."""
    if isinstance(array, np.ndarray):
        return array.tobytes()
    import torch

    return bytes(array.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


@pytest.fixture(scope="session")
def safetensors_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that the safetensors library wrote, with every dtype."""
    path = tmp_path_factory.mktemp("source") / "model.safetensors"
    # The library's own serializer takes few dtypes by name, so that the header is written here; the library reads it
    # back, which checks it.
    header: dict[str, Any] = {}
    body = b""
    for name in sorted(SHAPES, key=lambda n: -BITS[SHAPES[n][0]]):
        dtype, shape = SHAPES[name]
        data = content(name)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    assert len(dict(safetensors.deserialize(path.read_bytes()))) == len(SHAPES)
    return path


@pytest.fixture(scope="session")
def store(safetensors_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store made of that file."""
    path = tmp_path_factory.mktemp("store") / "store"
    sllm.convert(safetensors_file, path)
    return path


@pytest.fixture(scope="session")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files of small numbers, which every order of additions gives the same sum of."""
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("numbers")
    generator = torch.Generator().manual_seed(7)
    shapes = {"matrix": (40, 96), "experts": (3, 20, 64), "row": (500,), "scalar": (), "empty": (0, 9), "one": (1, 1)}
    for number, dtypes in enumerate([(torch.float32, torch.bfloat16), (torch.uint8, torch.int64, torch.float64)]):
        tensors = {
            f"{name}.{str(dtype)[6:]}": torch.randint(0, 5, shape, generator=generator).to(dtype)
            for name, shape in shapes.items()
            for dtype in dtypes
        }
        save_file(tensors, folder / f"model-{number}.safetensors")
    names = {name: info.file for name, info in opened(folder).items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


@pytest.fixture(scope="session")
def numbers_store(numbers: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("numbers_store") / "store"
    sllm.convert(numbers, path)
    return path


def opened(path: Path) -> Any:
    """A checkpoint: a store, or all safetensors files of a folder."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    return _native.open_files(path, files) if files else _native.open(path)


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a fresh interpreter, with warnings as errors; it must succeed."""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run


@pytest.fixture
def fake_cuda(tmp_path: Path) -> dict[str, str]:
    """An environment in which the driver is the test double."""
    library = os.environ.get("SLLM_FAKE_CUDA")
    if not library:
        pytest.skip("SLLM_FAKE_CUDA names no test double; make test builds it")
    folder = tmp_path / "driver"
    folder.mkdir()
    (folder / "libcuda.so.1").symlink_to(Path(library).resolve(strict=True))
    return {"LD_LIBRARY_PATH": str(folder)}
