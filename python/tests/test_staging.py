"""Tensors in memory of bounded size, a group at a time."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
from conftest import raw

import serverless_llm as sllm
from serverless_llm import _native
from serverless_llm.staging import Staged

torch = pytest.importorskip("torch")

OPTIONS = {"engine": "auto", "direct": None, "verify": False, "threads": None, "pinned_bytes": None}
LARGEST = 300_000


class Block(bytearray):
    """Memory whose end can be seen."""


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """What torch's blocks hold: bytes now, at most at once, and how many were made."""
    from serverless_llm import _torch

    counts = {"now": 0, "peak": 0, "blocks": 0}

    def freed(nbytes: int) -> None:
        counts["now"] -= nbytes

    def allocate(device: str, nbytes: int) -> tuple[Any, int]:
        memory = Block(nbytes + 4096)
        weakref.finalize(memory, freed, nbytes)
        counts["now"] += nbytes
        counts["peak"] = max(counts["peak"], counts["now"])
        counts["blocks"] += 1
        block = torch.frombuffer(memory, dtype=torch.uint8)
        block = block.narrow(0, -block.data_ptr() % 4096, nbytes)
        return block, block.data_ptr()

    monkeypatch.setattr(_torch, "allocate", allocate)
    return counts


@pytest.fixture(scope="module")
def saved() -> dict[str, Any]:
    """Tensors of all sizes, a tied one, one much larger than the bounds, and empty ones."""
    generator = torch.Generator().manual_seed(3)
    sizes = torch.randint(1, 9000, (120,), generator=generator).tolist()
    tensors = {f"t{i:03}": torch.randn(size, generator=generator) for i, size in enumerate(sizes)}
    tensors["large"] = torch.randn(LARGEST // 4, generator=generator)
    tensors["tied"] = tensors["t007"]
    tensors["empty"] = torch.zeros(0, 3)
    return tensors


@pytest.fixture(scope="module")
def path(saved: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("staged") / "store"
    sllm.save_dict(saved, path)
    return path


@pytest.mark.parametrize("bound", [1, 100_000, 1_000_000, 100_000_000])
def test_memory_is_bounded(bound: int, path: Path, saved: dict[str, Any], live: dict[str, int]) -> None:
    names = []
    for name, tensor in sllm.iter_tensors(path, device="cpu", framework="torch", max_bytes=bound):
        names.append(name)
        assert tensor.dtype is saved[name].dtype and tensor.shape == saved[name].shape
        assert raw(tensor) == raw(saved[name]), name
        del tensor
    assert set(names) == set(saved)
    # In the order of the files, and tied tensors beside each other.
    places = [(sllm.open(path)[name].file, sllm.open(path)[name].offset) for name in names if name != "empty"]
    assert places == sorted(places)
    assert live["peak"] <= max(bound, 3 * LARGEST)
    assert live["now"] == 0
    total = sllm.open(path).total_bytes
    assert live["blocks"] == 1 if bound > 3 * total else live["blocks"] > total / max(bound, LARGEST)


def test_one_group_is_under_way_while_another_is_used(path: Path, live: dict[str, int]) -> None:
    tensors = sllm.iter_tensors(path, device="cpu", framework="torch", max_bytes=100_000)
    next(tensors)
    assert live["blocks"] == 2
    # Left in the middle, all memory is given back.
    del tensors
    assert live["now"] == 0


def test_all_groups_share_one_session(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A session keeps its staging memory from group to group.
    made = []
    session = _native.Session

    def counted(*args: Any, **options: Any) -> Any:
        made.append(session(*args, **options))
        return made[-1]

    monkeypatch.setattr(_native, "Session", counted)
    from serverless_llm import _torch

    staged = Staged(_torch, "cpu", 100_000, OPTIONS)
    checkpoint = _native.open(path)
    assert len(list(staged.tensors(checkpoint))) == len(checkpoint)
    [report] = staged.finish()
    assert len(made) == 1
    assert report.bytes >= checkpoint.total_bytes
    with pytest.raises(sllm.InvalidError, match="closed"):
        made[0].read_bytes()


def test_what_is_told_of_several_checkpoints_grows(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from serverless_llm import _session, _torch

    def wait(session: Any, tick: Any) -> None:
        while not session.wait(0.1):
            pass
        tick()

    monkeypatch.setattr(_session, "wait", wait)
    told: list[int] = []
    staged = Staged(_torch, "cpu", 1_000_000, OPTIONS, told.append)
    for _ in range(2):
        for _, tensor in staged.tensors(_native.open(path)):
            del tensor
    first, second = staged.finish()
    assert len(told) > 4 and told == sorted(told)
    assert first.read_bytes in told and told[-1] == first.read_bytes + second.read_bytes > 0


def test_what_is_selected_comes_alone(path: Path, saved: dict[str, Any]) -> None:
    some = dict(sllm.iter_tensors(path, device="cpu", framework="torch", tensors=["t00?", "tied"], max_bytes=50_000))
    assert set(some) == {f"t00{i}" for i in range(10)} | {"tied"}
    assert all(raw(tensor) == raw(saved[name]) for name, tensor in some.items())


def test_a_file_that_is_cut_is_an_error(path: Path, tmp_path: Path, saved: dict[str, Any]) -> None:
    sllm.save_dict(saved, tmp_path / "store")
    checkpoint = sllm.open(tmp_path / "store")
    with open(tmp_path / "store" / "tensor.data_0", "r+b") as file:
        file.truncate(checkpoint.total_bytes // 2)
    given = 0
    with pytest.raises(sllm.ReadWriteError, match=r"tensor\.data_0: the file ends at byte \d+"):
        for name, tensor in sllm.iter_tensors(checkpoint, device="cpu", framework="torch", max_bytes=100_000):
            assert raw(tensor) == raw(saved[name])
            given += 1
    assert given < len(saved)
