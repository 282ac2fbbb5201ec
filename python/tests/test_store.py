"""Convert, open, verify, export and save."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors
from conftest import SHAPES, content

import serverless_llm as sllm


def test_open_is_a_mapping_of_what_was_stored(store: Path) -> None:
    checkpoint = sllm.open(store)
    assert len(checkpoint) == len(SHAPES)
    assert set(checkpoint) == set(checkpoint.names) == set(checkpoint.keys()) == set(SHAPES)
    assert [info.name for info in checkpoint.values()] == list(checkpoint) == [name for name, _ in checkpoint.items()]
    for name, (dtype, shape) in SHAPES.items():
        info = checkpoint[name]
        assert (info.name, info.dtype, list(info.shape), info.nbytes) == (name, dtype, shape, len(content(name)))
        data = (store / info.file).read_bytes()[info.offset : info.offset + info.nbytes]
        assert data == content(name)
    assert "absent" not in checkpoint
    assert 3 not in checkpoint
    assert checkpoint.get("absent") is None
    assert checkpoint.layout == "store"
    assert checkpoint.total_bytes == sum(len(content(name)) for name in SHAPES)
    assert checkpoint.identity is not None and len(checkpoint.identity) == 64
    assert [name for name, _ in checkpoint.files] == ["tensor.data_0"]
    assert dict(checkpoint)["odd"] == checkpoint["odd"]
    assert len({*checkpoint.values(), *checkpoint.tensors}) == len(SHAPES)
    assert {sllm.open(store)["odd"], checkpoint["odd"]} == {checkpoint["odd"]} != {checkpoint["large"]}


def test_export_gives_the_source_back(store: Path, safetensors_file: Path, tmp_path: Path) -> None:
    report = sllm.export(store, tmp_path / "out")
    assert report.tensors == len(SHAPES)
    theirs = dict(safetensors.deserialize(safetensors_file.read_bytes()))
    ours = dict(safetensors.deserialize((tmp_path / "out" / "model.safetensors").read_bytes()))
    assert ours == theirs


def test_reports_are_objects(safetensors_file: Path, tmp_path: Path) -> None:
    report = sllm.convert(safetensors_file, tmp_path / "store")
    assert report.tensors == len(SHAPES)
    assert report.to_dict()["identity"] == report.identity == sllm.open(tmp_path / "store").identity
    assert repr(report).startswith("ConvertReport(path=")
    assert "identity: " in str(report)
    with pytest.raises(AttributeError, match="no 'absent'"):
        _ = report.absent


def test_verify_finds_a_flipped_bit(safetensors_file: Path, tmp_path: Path) -> None:
    sllm.convert(safetensors_file, tmp_path / "store")
    assert sllm.verify(tmp_path / "store").ok
    info = sllm.open(tmp_path / "store")["large"]
    with (tmp_path / "store" / info.file).open("r+b") as file:
        file.seek(info.offset + 1000)
        byte = file.read(1)[0]
        file.seek(info.offset + 1000)
        file.write(bytes([byte ^ 4]))
    report = sllm.verify(tmp_path / "store")
    assert not report.ok
    assert any("large" in fault["tensors"] for fault in report.corrupt)
    with pytest.raises(sllm.CorruptError, match="chunk 0"):
        sllm.load(tmp_path / "store", device="cpu", framework="numpy", verify=True)


def test_save_dict_stores_tied_arrays_once(tmp_path: Path) -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    arrays = {"x": x, "tied": x, "turned": x.T, "big-endian": x.astype(">f4"), "scalar": np.float64(3), "none": x[:0]}
    report = sllm.save_dict(arrays, tmp_path / "store")
    assert report.tensors == 6
    checkpoint = sllm.open(tmp_path / "store")
    assert checkpoint["x"].offset == checkpoint["tied"].offset
    loaded = sllm.load(checkpoint, device="cpu", framework="numpy")
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)
        assert loaded[name].shape == array.shape
    assert np.shares_memory(loaded["x"], loaded["tied"])
    assert not np.shares_memory(loaded["x"], loaded["turned"])


def test_save_dict_refuses_what_it_cannot_store(tmp_path: Path) -> None:
    with pytest.raises(sllm.InvalidError, match="'a': list is neither"):
        sllm.save_dict({"a": [1, 2]}, tmp_path / "store")
    with pytest.raises(sllm.InvalidError, match="complex128 cannot be stored"):
        sllm.save_dict({"a": np.zeros(2, np.complex128)}, tmp_path / "store")
    assert not list(tmp_path.iterdir())


def test_progress_is_told_in_order_and_to_the_end(safetensors_file: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    report = sllm.convert(safetensors_file, tmp_path / "store", progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (report.bytes, report.bytes)
    assert told == sorted(told)


def test_what_the_progress_callback_raises_comes_out(safetensors_file: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def progress(done: int, total: int) -> None:
        raise Stop

    with pytest.raises(Stop):
        sllm.verify(sllm.convert(safetensors_file, tmp_path / "store").path, progress=progress)


def test_prefetch_reads_all_of_it_up_to_a_limit(safetensors_file: Path) -> None:
    told: list[tuple[int, int]] = []
    report = sllm.prefetch(safetensors_file, yields=False, progress=lambda done, total: told.append((done, total)))
    size = safetensors_file.stat().st_size
    assert (report.end, report.bytes, report.read_bytes + report.cached_bytes) == ("complete", size, size)
    assert told[-1] == (size, size)
    assert sllm.prefetch(safetensors_file, limit=1).end == "limit"
    with pytest.raises(sllm.NotFoundError):
        sllm.prefetch(safetensors_file.parent / "nothing")


def test_a_store_tells_when_its_source_was_changed(safetensors_file: Path, tmp_path: Path) -> None:
    source = Path(shutil.copy(safetensors_file, tmp_path))
    store = sllm.open(sllm.convert(source, tmp_path / "store").path)
    store.check_source()
    os.utime(source, ns=(1, 1))
    with pytest.raises(sllm.FormatError, match="convert it again"):
        store.check_source()
    source.unlink()
    store.check_source()
