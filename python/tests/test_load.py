"""Loads to the host, as NumPy arrays and torch tensors."""

from __future__ import annotations

import os
import signal
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import PACKED, SHAPES, content, python, raw

import serverless_llm as sllm
from serverless_llm import _native

torch = pytest.importorskip("torch")
# torch has no packed 6-bit type.
IN_TORCH = [name for name, (dtype, _) in SHAPES.items() if dtype not in ("F6_E2M3", "F6_E3M2")]
HALF = [name for name, (dtype, _) in SHAPES.items() if dtype == "F4"]


@pytest.fixture(params=["store", "safetensors_file"])
def source(request: pytest.FixtureRequest) -> Path:
    """Both layouts."""
    path: Path = request.getfixturevalue(request.param)
    return path


@pytest.mark.parametrize("engine", ["auto", "pread", "mapped"])
def test_numpy_gets_every_byte(source: Path, engine: str) -> None:
    loaded = sllm.load(source, device="cpu", framework="numpy", engine=engine)
    assert set(loaded) == set(SHAPES)
    for name, (dtype, shape) in SHAPES.items():
        array = loaded[name]
        assert isinstance(array, np.ndarray)
        assert raw(array) == content(name), name
        assert list(array.shape) == ([array.nbytes] if dtype in PACKED else shape)
        array[...] = np.zeros_like(array)


@pytest.mark.parametrize("engine", ["auto", "pread", "mapped"])
def test_torch_gets_every_byte(source: Path, engine: str) -> None:
    loaded = sllm.load(source, device="cpu", tensors=IN_TORCH, engine=engine)
    assert set(loaded) == set(IN_TORCH)
    dtypes = {name: torch_name for name, torch_name, _ in sllm._native.dtypes()}
    for name in IN_TORCH:
        dtype, shape = SHAPES[name]
        tensor = loaded[name]
        assert tensor.dtype is getattr(torch, dtypes[dtype])
        assert list(tensor.shape) == (shape if name not in HALF else [shape[0], shape[1] // 2])
        assert raw(tensor) == content(name), name


def test_torch_has_no_six_bit_floats(store: Path) -> None:
    with pytest.raises(sllm.InvalidError, match=r"all\.F6_E\dM\d.*no type for F6"):
        sllm.load(store, device="cpu")


def test_it_is_what_the_safetensors_library_loads(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    kinds = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64]
    kinds += [torch.bool, torch.complex64, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.float64]
    saved = {str(kind): torch.arange(35).reshape(5, 7).to(kind) for kind in kinds}
    save_file(saved, tmp_path / "model.safetensors")
    theirs = load_file(tmp_path / "model.safetensors")
    sllm.convert(tmp_path / "model.safetensors", tmp_path / "store")
    for source in (tmp_path / "model.safetensors", tmp_path / "store"):
        ours = sllm.load(source, device="cpu")
        assert set(ours) == set(theirs)
        for name, tensor in theirs.items():
            assert ours[name].dtype is tensor.dtype and ours[name].shape == tensor.shape
            assert raw(ours[name]) == raw(tensor)
    save_file(dict(ours), tmp_path / "again.safetensors")
    assert all(raw(load_file(tmp_path / "again.safetensors")[name]) == raw(t) for name, t in theirs.items())


def test_save_dict_and_load_dict_are_inverse(tmp_path: Path) -> None:
    base = torch.randn(64, 65)
    saved = {
        "w": base,
        "tied": base,
        "turned": base.t(),
        "part": base[3:5],
        "bf16": base.to(torch.bfloat16),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(base.clone()),
    }
    if hasattr(torch, "float4_e2m1fn_x2"):
        saved["f4"] = torch.arange(24, dtype=torch.uint8).reshape(2, 12).view(torch.float4_e2m1fn_x2)
    sllm.save_dict(saved, tmp_path / "store")
    assert sllm.verify(tmp_path / "store").ok
    loaded = sllm.load_dict(tmp_path / "store")
    assert set(loaded) == set(saved)
    for name, tensor in saved.items():
        assert loaded[name].dtype is tensor.dtype and loaded[name].shape == tensor.shape
        assert raw(loaded[name]) == raw(tensor.detach())
    assert loaded["w"].data_ptr() == loaded["tied"].data_ptr()
    assert loaded["part"].data_ptr() != loaded["w"].data_ptr()


def test_load_dict_takes_a_device_map(tmp_path: Path) -> None:
    sllm.save_dict({"model.a.w": torch.ones(3), "head.w": torch.zeros(3)}, tmp_path / "store")
    loaded = sllm.load_dict(tmp_path / "store", {"model": "cpu", "": torch.device("cpu")})
    assert set(loaded) == {"model.a.w", "head.w"}
    with pytest.raises(sllm.InvalidError, match="no device for tensor 'head.w'"):
        sllm.load_dict(tmp_path / "store", {"model": "cpu"})
    with pytest.raises(sllm.InvalidError, match="neither the host nor a CUDA device"):
        sllm.load_dict(tmp_path / "store", "meta")


def test_globs_and_names(store: Path) -> None:
    def names(tensors: Any) -> set[str]:
        return set(sllm.load(store, device="cpu", framework="numpy", tensors=tensors))

    assert names("all.F8_*") == {name for name in SHAPES if name.startswith("all.F8_")}
    assert names(["odd", "weird [*] name ü/.."]) == {"odd", "weird [*] name ü/.."}
    assert names(("all.U?", "odd")) == {"all.U8", "odd"}


def test_all_to_one_device_is_what_it_is_tensor_by_tensor(source: Path) -> None:
    checkpoint = sllm.open(source)
    every = _native.select(checkpoint, None)
    told = _native.Placement(checkpoint, every, [0] * len(every))
    for placement in (_native.Placement(checkpoint, None), _native.Placement(checkpoint, every, None)):
        assert placement.tensors == told.tensors
        assert placement.blocks == told.blocks
    assert len(told.tensors) == len(SHAPES)


def test_the_report_tells_what_was_done(store: Path) -> None:
    checkpoint = sllm.open(store)
    loaded = sllm.load(checkpoint, device="cpu", framework="numpy", engine="pread", verify=True)
    report = loaded.report
    assert report.tensors == len(SHAPES)
    assert report.bytes >= checkpoint.total_bytes
    assert report.engine == "pread"
    assert report.verified
    assert report.seconds >= report.alloc_s > 0
    assert report.to_dict()["engines"][0]["reason"] == "it was asked for"
    assert str(report).startswith("loaded ") and "GB/s" in str(report)
    assert repr(report).startswith("LoadReport(path=")


def test_progress_reaches_the_end(store: Path) -> None:
    told: list[tuple[int, int]] = []
    sllm.load(
        store, device="cpu", framework="numpy", tensors="large", progress=lambda done, total: told.append((done, total))
    )
    assert told and told[-1][0] == told[-1][1] > 0


def test_several_threads_load_at_once(store: Path) -> None:
    barrier = threading.Barrier(8)
    checkpoint = sllm.open(store)

    def work(number: int) -> bool:
        barrier.wait()
        loaded = sllm.load(checkpoint if number % 2 else store, device="cpu", framework=["numpy", "torch"][number // 4],
                           tensors=IN_TORCH)  # fmt: skip
        return all(raw(array) == content(name) for name, array in loaded.items())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


def test_other_threads_run_while_it_loads(tmp_path: Path) -> None:
    sllm.save_dict({"w": np.ones(32 << 20, np.uint8)}, tmp_path / "store")
    ticks = 0
    done = threading.Event()

    def count() -> None:
        nonlocal ticks
        while not done.wait(0.001):
            ticks += 1

    counter = threading.Thread(target=count)
    counter.start()
    for _ in range(5):
        sllm.load(tmp_path / "store", device="cpu", framework="numpy", verify=True)
    done.set()
    counter.join()
    assert ticks > 3


def test_iter_tensors_gives_all_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    from serverless_llm import _numpy

    live: dict[int, int] = {}
    peak = groups = 0
    allocate = _numpy.allocate

    def counted(device: str, nbytes: int) -> tuple[Any, int]:
        nonlocal peak, groups
        block, address = allocate(device, nbytes)
        groups += 1
        live[groups] = nbytes
        weakref.finalize(block.base, live.pop, groups)
        peak = max(peak, sum(live.values()))
        return block, address

    monkeypatch.setattr(_numpy, "allocate", counted)
    sizes = np.random.default_rng(1).integers(1, 40_000, 100)
    saved = {f"t{i:03}": np.full(size, i, np.uint8) for i, size in enumerate(sizes)}
    saved["tied"] = saved["t007"]
    sllm.save_dict(saved, tmp_path / "store")
    seen = {}
    bound = 200_000
    for name, array in sllm.iter_tensors(tmp_path / "store", device="cpu", framework="numpy", max_bytes=bound):
        seen[name] = array.copy()
    assert groups > 10
    assert peak <= bound
    assert set(seen) == set(saved)
    for name, expected in saved.items():
        np.testing.assert_array_equal(seen[name], expected)
    one_each = list(sllm.iter_tensors(tmp_path / "store", device="cpu", framework="numpy", max_bytes=1))
    assert len(one_each) == len(saved)
    with pytest.raises(sllm.InvalidError, match="max_bytes is 0"):
        sllm.iter_tensors(tmp_path / "store", max_bytes=0)


def test_numpy_alone_is_enough(store: Path) -> None:
    code = f"""
import sys
sys.modules["torch"] = sys.modules["ml_dtypes"] = None
import serverless_llm as sllm
assert "numpy" not in sys.modules
loaded = sllm.load({str(store)!r}, device="auto")
assert type(loaded["large"]).__name__ == "ndarray"
assert loaded["all.BF16"].dtype == "uint16" and loaded["all.F8_E4M3"].dtype == "uint8"
"""
    python(code)


def test_neither_is_needed_without_arrays(safetensors_file: Path, tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["torch"] = sys.modules["numpy"] = None
import serverless_llm as sllm
sllm.convert({str(safetensors_file)!r}, {str(tmp_path / "store")!r})
assert sllm.verify({str(tmp_path / "store")!r}).ok
"""
    python(code)


def test_types_that_an_older_ml_dtypes_lacks_are_as_without_it(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from serverless_llm import _numpy

    older = types.SimpleNamespace(float8_e4m3fn=np.dtype("i1"))  # stands for a type of its own
    monkeypatch.setattr(_numpy, "ml_dtypes", older)
    loaded = sllm.load(store, device="cpu", framework="numpy")
    found = {name: loaded[f"all.{name}"].dtype for name in ("F8_E4M3", "F8_E8M0", "F8_E5M2", "BF16")}
    assert found == {"F8_E4M3": "i1", "F8_E8M0": "u1", "F8_E5M2": "u1", "BF16": "<u2"}
    assert all(raw(array) == content(name) for name, array in loaded.items())


def test_ml_dtypes_are_used_where_they_are(store: Path, tmp_path: Path) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    loaded = sllm.load(store, device="cpu", framework="numpy")
    assert loaded["all.BF16"].dtype == ml_dtypes.bfloat16
    assert loaded["all.F8_E8M0"].dtype == ml_dtypes.float8_e8m0fnu
    kept = {name: array for name, array in loaded.items() if SHAPES[name][0] not in PACKED}
    sllm.save_dict(kept, tmp_path / "again")
    again = sllm.open(tmp_path / "again")
    assert all(again[name].dtype == SHAPES[name][0] for name in kept)


class Wrapper(torch.Tensor):
    """A tensor that is made of others."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapper:
        wrapper = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        wrapper.inner = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*[arg.inner if isinstance(arg, cls) else arg for arg in args], **(kwargs or {}))
        return cls(result) if isinstance(result, torch.Tensor) else result


def test_torch_tensors_that_cannot_be_stored(tmp_path: Path) -> None:
    for tensor, why in [
        (Wrapper(torch.ones(3)), "'t': Wrapper has no memory of its own"),
        (torch.empty(2, device="meta"), "a meta tensor"),
        (torch.eye(3).to_sparse(), "of layout torch.sparse_coo"),
        (torch.zeros(2, dtype=torch.complex128), "torch.complex128 cannot be stored"),
    ]:
        with pytest.raises(sllm.InvalidError, match=why):
            sllm.save_dict({"t": tensor}, tmp_path / "store")
    assert not list(tmp_path.iterdir())


def test_too_little_memory_is_said_before_anything_moves(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from serverless_llm import _torch

    def full(*_: object, **__: object) -> None:
        raise torch.cuda.OutOfMemoryError("no room")

    monkeypatch.setattr(_torch.torch, "empty", full)
    monkeypatch.setattr(sllm.loading, "_make", None)
    with pytest.raises(sllm.DeviceMemoryError, match=r"cpu: \d+ bytes are needed: no room"):
        sllm.load(store, device="cpu", framework="torch", tensors="large")


@pytest.mark.parametrize("framework", ["torch", "numpy"])
def test_what_is_raised_while_arrays_are_made_comes_out(
    framework: str, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are made while their bytes are under way."""
    import importlib

    arrays = importlib.import_module(f"serverless_llm._{framework}")

    def views(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(arrays, "views", views)
            sllm.load(store, device="cpu", framework=framework, tensors="large")
    finally:
        signal.signal(signal.SIGINT, before)
    loaded = sllm.load(store, device="cpu", framework=framework, tensors="large")
    assert raw(loaded["large"]) == content("large")


def test_no_array_is_given_out_of_a_load_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from serverless_llm import _torch

    made: list[str] = []
    views = _torch.views
    sllm.save_dict({"t": torch.ones(1000), "u": torch.ones(1000)}, tmp_path / "store")
    checkpoint = sllm.open(tmp_path / "store")
    os.truncate(tmp_path / "store" / "tensor.data_0", 5000)
    # When the load ends, all arrays are made.
    monkeypatch.setattr(_torch, "views", lambda *of: [made.append(name) or (name, t) for name, t in views(*of)])
    with pytest.raises(sllm.ReadWriteError, match=r"tensor\.data_0"):
        sllm.load(checkpoint, device="cpu", framework="torch")
    assert made == ["t", "u"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_no_cuda_device(store: Path) -> None:
    for device in ("cuda", 0, torch.device("cuda:1")):
        with pytest.raises(sllm.DeviceError, match="torch sees no CUDA device"):
            sllm.load(store, device=device)
    assert sllm.load(store, tensors="odd")["odd"].device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_cuda(store: Path) -> None:
    loaded = sllm.load(store, device="cuda", tensors=IN_TORCH)
    assert all(raw(loaded[name]) == content(name) and loaded[name].is_cuda for name in IN_TORCH)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_a_device_map_splits_a_model(tmp_path: Path) -> None:
    w = torch.randn(1000, 33)
    sllm.save_dict({"a.w": w, "a.tied": w, "b.w": w + 1, "b.tied": w}, tmp_path / "store")
    loaded = sllm.load_dict(tmp_path / "store", {"": "cpu", "b": 0})
    assert {name: tensor.is_cuda for name, tensor in loaded.items()} == {
        "a.w": False, "a.tied": False, "b.w": True, "b.tied": True,
    }  # fmt: skip
    assert torch.equal(loaded["a.w"], w) and torch.equal(loaded["b.tied"].cpu(), w)
    assert loaded["a.w"].data_ptr() == loaded["a.tied"].data_ptr()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_too_little_device_memory(tmp_path: Path) -> None:
    sllm.save_dict({"w": np.zeros(256 << 20, np.uint8)}, tmp_path / "store")
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.001)
    try:
        with pytest.raises(sllm.DeviceMemoryError, match="cuda:0: 268435456 bytes are needed"):
            sllm.load(tmp_path / "store", device="cuda:0")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
def test_memory_that_torch_hands_out_again_is_not_overwritten_later(tmp_path: Path) -> None:
    w = torch.randn(64 << 20)
    sllm.save_dict({"w": w}, tmp_path / "store")
    for _ in range(5):
        # Work is queued on a block that is then free, so that the next load gets it while the work may still run.
        block = torch.empty(w.numel(), device="cuda")
        for _ in range(20):
            block.fill_(1.0)
        del block
        assert torch.equal(sllm.load(tmp_path / "store", device="cuda")["w"].cpu(), w)
