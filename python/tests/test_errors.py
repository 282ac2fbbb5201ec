"""Exceptions: their classes, the built-in ones they also are, and their messages."""

from __future__ import annotations

import json
import os
import pickle
from inspect import ismodule
from pathlib import Path

import pytest

import serverless_llm as sllm
from serverless_llm import errors


@pytest.mark.parametrize(
    ("ours", "builtin"),
    [
        (sllm.ReadWriteError, OSError),
        (sllm.AccessError, PermissionError),
        (sllm.FormatError, ValueError),
        (sllm.NotFoundError, FileNotFoundError),
        (sllm.TensorNotFoundError, KeyError),
        (sllm.ExistsError, FileExistsError),
        (sllm.NoSpaceError, OSError),
        (sllm.DeviceError, RuntimeError),
        (sllm.DeviceMemoryError, MemoryError),
        (sllm.InvalidError, ValueError),
        (sllm.CorruptError, sllm.SllmError),
        (sllm.CancelledError, sllm.SllmError),
    ],
)
def test_each_is_a_builtin_too(ours: type[Exception], builtin: type[Exception]) -> None:
    assert issubclass(ours, builtin) and issubclass(ours, sllm.SllmError)
    again = pickle.loads(pickle.dumps(ours("what went wrong")))
    assert type(again) is ours and str(again) == "what went wrong"


def test_all_are_exported() -> None:
    ours = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert ours <= set(sllm.__all__)


def test_everything_the_package_offers_is_exported() -> None:
    """Type checkers take only what `__all__` names as a part of a typed package."""
    public = {name for name, value in vars(sllm).items() if not name.startswith("_") and not ismodule(value)}
    assert public <= set(sllm.__all__)
    assert sllm.__all__ == sorted(sllm.__all__)


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(sllm.NotFoundError, match="no checkpoint at"):
        sllm.open(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="no manifest.json"):
        sllm.open(tmp_path)


def test_no_such_tensor(store: Path) -> None:
    with pytest.raises(sllm.TensorNotFoundError, match='no tensor "absent" in'):
        sllm.open(store)["absent"]
    with pytest.raises(KeyError, match="absent"):
        sllm.load(store, device="cpu", framework="numpy", tensors="absent.*")


def test_a_bad_file_is_named_with_tensor_and_offset(tmp_path: Path) -> None:
    header = b'{"t":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}'
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(sllm.FormatError, match=r'model\.safetensors: tensor "t"'):
        sllm.open(path)


def test_the_target_exists(safetensors_file: Path, store: Path, tmp_path: Path) -> None:
    with pytest.raises(sllm.ExistsError, match="overwrite=True"):
        sllm.convert(safetensors_file, store)
    sllm.convert(safetensors_file, tmp_path / "store")
    sllm.convert(safetensors_file, tmp_path / "store", overwrite=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_permission_denied(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    path.chmod(0)
    with pytest.raises(sllm.AccessError, match="(?i)permission denied"):
        sllm.open(path)


def test_the_cause_is_in_the_message(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(sllm.ReadWriteError, match="cannot open: .*symbolic links"):
        sllm.open(loop)


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_what_does_not_fit_the_memory_of_the_host_is_refused_before_it_is_read(tmp_path: Path, framework: str) -> None:
    pytest.importorskip(framework)
    size = 1 << 43  # a hole
    header = json.dumps({"t": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + size)
    message = rf"^host: {size} bytes are needed and \d+ are free"
    with pytest.raises(sllm.DeviceMemoryError, match=message):
        sllm.load(path, device="cpu", framework=framework)
    with pytest.raises(MemoryError, match=message):
        list(sllm.iter_tensors(path, device="cpu", framework=framework))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engine": "magic"}, "not an engine"),
        ({"framework": "jax"}, "not a framework"),
        ({"device": "cuda:0"}, "NumPy arrays live in host memory"),
        ({"threads": 0}, "1 to 256 threads"),
        ({"pinned_bytes": 5}, "fewer than a page"),
        ({"tensors": []}, "list of globs is empty"),
    ],
)
def test_arguments_that_make_no_sense(store: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(sllm.InvalidError, match=message):
        sllm.load(store, **{"device": "cpu", "framework": "numpy", **arguments})  # type: ignore[arg-type]


def test_only_stores_have_checksums(safetensors_file: Path) -> None:
    with pytest.raises(sllm.InvalidError, match="checksums"):
        sllm.verify(safetensors_file)


@pytest.mark.parametrize("number", [-1, 1 << 64])
def test_numbers_that_cannot_be_make_no_sense(store: Path, tmp_path: Path, number: int) -> None:
    host = {"device": "cpu", "framework": "numpy"}
    for call in (
        lambda: sllm.load(store, threads=number, **host),
        lambda: sllm.load(store, pinned_bytes=number, **host),
        lambda: list(sllm.iter_tensors(store, pinned_bytes=number, **host)),
        lambda: sllm.convert(store, tmp_path / "other", threads=number),
        lambda: sllm.verify(store, threads=number),
        lambda: sllm.export(store, tmp_path / "other", threads=number),
        lambda: sllm.prefetch(store, limit=number),
    ):
        with pytest.raises(sllm.InvalidError, match=f"^{number} is no number of "):
            call()
    with pytest.raises(TypeError):
        sllm.verify(store, threads="two")  # type: ignore[arg-type]


def test_a_revision_goes_with_a_repository_only(store: Path) -> None:
    with pytest.raises(sllm.InvalidError, match="has no revisions"):
        sllm.open(store, revision="v2")
    with pytest.raises(sllm.InvalidError, match="has no revisions"):
        sllm.load(store, device="cpu", framework="numpy", revision="v2")
    with pytest.raises(sllm.InvalidError, match="is open already"):
        sllm.load(sllm.open(store), device="cpu", framework="numpy", revision="v2")


def test_a_path_that_is_not_utf8_has_a_report(safetensors_file: Path, tmp_path: Path) -> None:
    target = tmp_path / os.fsdecode(b"store\xff")
    assert sllm.convert(safetensors_file, target).path.endswith("store\ufffd")
    assert sllm.verify(target).ok and sllm.load(target, device="cpu", framework="numpy", tensors="scalar")
