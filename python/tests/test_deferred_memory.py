"""Whatever reaches the memory of parameters and of deferred tensors finds there what ordinary tensors would have."""

from __future__ import annotations

import collections
import concurrent.futures
import copy
import ctypes
import pickle
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import opened, raw

import serverless_llm as sllm

torch = pytest.importorskip("torch")
deferred = pytest.importorskip("serverless_llm.deferred")
Pair = pytest.importorskip("programs").Pair

OPTIONS = {"engine": "auto", "direct": None, "verify": False, "threads": None, "pinned_bytes": None}


def session() -> Any:
    """Deferred tensors with parameters on the host."""
    return deferred.Deferred(torch.device("cpu"), OPTIONS)


def test_memory_under_way_stays_when_its_tensor_gets_other_memory(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.ones(16 << 20, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    parameter = torch.nn.Parameter(torch.zeros(16 << 20, dtype=torch.uint8), requires_grad=False)
    with session() as mode:
        for _, tensor in mode.tensors(opened(tmp_path)):
            parameter.copy_(tensor)
            memory = weakref.ref(mode._held[-1])
            parameter.data = torch.ones(2, dtype=torch.uint8)
            assert memory() is not None and memory().nbytes() == 16 << 20
        mode.finish()
    assert parameter.tolist() == [1, 1]


def test_memory_that_two_storages_share_is_one_memory(numbers: Path) -> None:
    matrix = sllm.load(numbers, device="cpu", framework="torch")["matrix.float32"].flatten()
    parameter = torch.zeros(40 * 96)
    rest = torch.from_dlpack(parameter[96:])
    with session() as mode:
        source = dict(mode.tensors(opened(numbers)))["matrix.float32"].flatten()
        parameter.copy_(source)
        seen = rest.clone()
        parameter.copy_(source)
        rest[:96].copy_(source[:96])
        mode.finish()
        assert mode.moved == 2 * parameter.nbytes  # what is another one's is filled at once
    assert raw(seen) == raw(matrix[96:])
    assert raw(parameter) == raw(torch.cat([matrix[:96], matrix[:96], matrix[192:]]))


def test_memory_that_is_not_torchs_alone_is_filled_at_once(numbers: Path) -> None:
    matrix = sllm.load(numbers, device="cpu", framework="torch")["matrix.float32"]
    given = torch.zeros(40, 96)
    before = given.numpy()
    with session() as mode:
        source = dict(mode.tensors(opened(numbers)))["matrix.float32"]
        array, buffer = np.zeros((40, 96), np.float32), bytearray(source.nbytes)
        torch.from_numpy(array).copy_(source)
        torch.frombuffer(buffer, dtype=torch.float32).view(40, 96).copy_(source)
        assert array.tobytes() == bytes(buffer) == raw(matrix)
        given.copy_(source)
        assert before.tobytes() == raw(matrix) and mode.moved == 0
        # Parameters are torch's own, and so is memory that processes share.
        for parameter in (torch.nn.Parameter(torch.zeros(40, 96), False), torch.zeros(40, 96).share_memory_()):
            mode.moved = 0
            parameter.data.copy_(source)
            assert mode.moved == source.nbytes
        mode.finish()


def test_memory_that_is_replaced_has_what_was_under_way_to_it(numbers: Path) -> None:
    matrix = sllm.load(numbers, device="cpu", framework="torch")["matrix.float32"].flatten()
    ways: list[Callable[[Any], Any]] = [
        lambda memory: memory[:96].resize_(9000),
        lambda memory: torch.add(torch.ones(9000), 1, out=memory[:0].resize_(0)),
        lambda memory: memory.untyped_storage().resize_(50_000),
    ]
    for number, way in enumerate(ways):
        with session() as mode:
            source = dict(mode.tensors(opened(numbers)))["matrix.float32"].flatten()
            memory = torch.zeros(41 * 96)
            memory[96:].copy_(source)
            assert mode.moved == 40 * 96 * 4
            way(memory)
            mode.finish()
        written = 9000 if number == 1 else 0
        assert raw(memory[max(96, written) :]) == raw(matrix[max(0, written - 96) :]), number


def test_an_operation_may_read_beside_its_tensor(numbers: Path) -> None:
    matrix = sllm.load(numbers, device="cpu", framework="torch")["matrix.float32"].flatten()
    with session() as mode:
        memory = torch.zeros(41 * 96)
        memory[96:].copy_(dict(mode.tensors(opened(numbers)))["matrix.float32"].flatten())
        beside = torch.as_strided_copy(memory[:1], (96,), (1,), 96)
        mode.finish()
        assert mode.moved == matrix.nbytes
    assert raw(beside) == raw(matrix[:96])


PAST_THE_DISPATCHER: dict[str, Callable[[Any], bytes]] = {
    "numpy": lambda t: bytes(t.numpy().tobytes()),
    "tolist": lambda t: raw(torch.tensor(t.tolist())),
    "data_ptr": lambda t: ctypes.string_at(t.data_ptr(), t.nbytes),
    # From torch 2.15 on.
    "const_data_ptr": lambda t: ctypes.string_at(getattr(t, "const_data_ptr", t.data_ptr)(), t.nbytes),
    "storage": lambda t: bytes(t.untyped_storage().tolist()),
    "deepcopy": lambda t: raw(copy.deepcopy(t)),
    "pickle": lambda t: raw(pickle.loads(pickle.dumps(t))),
    "dlpack": lambda t: raw(torch.from_dlpack(t)),
    "apply_": lambda t: raw(t.apply_(lambda x: -x).neg()),
    "map_": lambda t: raw(torch.zeros(40, 96).map_(t, lambda x, y: y)),
    "map2_": lambda t: raw(torch.zeros(40, 96).map2_(torch.ones(40, 96), t, lambda x, y, z: z)),
}


@pytest.mark.parametrize("way", PAST_THE_DISPATCHER)
def test_memory_reached_past_the_dispatcher_has_its_bytes(way: str, numbers: Path) -> None:
    matrix = sllm.load(numbers, device="cpu", framework="torch")["matrix.float32"]
    found = []
    with session() as mode:
        parameter = torch.zeros(40, 96)
        parameter.copy_(dict(mode.tensors(opened(numbers)))["matrix.float32"])
        assert mode.moved == parameter.nbytes
        thread = threading.Thread(target=lambda: found.append(PAST_THE_DISPATCHER[way](parameter)))
        thread.start()
        thread.join()
        mode.finish()
    assert found == [raw(matrix)]


NUMBERS: dict[str, Callable[[Any], Any]] = {
    "tensor": lambda q: torch.tensor([q[0, 1], 0.0]),
    "tensor, nested": lambda q: torch.tensor(data=[[q[0, 1]], (q[0, 2],)]),
    "tensor, a deque": lambda q: torch.tensor(collections.deque([q[0, 1], q[0, 2]])),
    "tensor, a module": lambda q: torch.tensor(torch.nn.ParameterList([torch.nn.Parameter(q[0, 1], False)])),
    "as_tensor": lambda q: torch.as_tensor([q[0, 1]], dtype=torch.float64),
    "asarray": lambda q: torch.asarray([q[0, 1]]),
    "new_tensor": lambda q: torch.zeros(1).new_tensor([q[0, 1]]),
    "new": lambda q: torch.zeros(1).new([q[0, 1], q[0, 2]]),
    "sparse": lambda q: torch.sparse_coo_tensor([[0]], [q[0, 1]], (3,)).to_dense(),
    "nested_tensor": lambda q: torch.nested.nested_tensor([[q[0, 1]], [q[0, 2]]])[1],
    "tensor_split": lambda q: torch.arange(9).tensor_split(q[0, :3].long())[1],
    "to_dlpack": lambda q: torch.from_dlpack(torch.utils.dlpack.to_dlpack(q)),
    "_to_dlpack": lambda q: torch.from_dlpack(torch._C._to_dlpack(q)),
    "a script": lambda q: torch.jit.script(scripted)(q[0, 1]),
}


def scripted(number):  # type: ignore[no-untyped-def]
    return number + torch.tensor([1.0, 2.0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse invariant checks")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("way", NUMBERS)
@pytest.mark.parametrize("inference", [False, True])
def test_numbers_that_are_tensors_in_lists_have_arrived(inference: bool, way: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"w": torch.arange(1.0, 4097.0).view(64, 64)}, tmp_path / "model.safetensors")
    with torch.inference_mode(inference), session() as mode:
        parameter = torch.zeros(64, 64)
        parameter.copy_(dict(mode.tensors(opened(tmp_path)))["w"])
        assert mode.moved == parameter.nbytes
        ours = NUMBERS[way](parameter).clone()
        mode.finish()
    theirs = NUMBERS[way](torch.arange(1.0, 4097.0).view(64, 64))
    assert ours.dtype is theirs.dtype and torch.equal(ours, theirs) and ours.any()


def test_positions_that_are_read_by_their_address_have_arrived(numbers: Path) -> None:
    positions = sllm.load(numbers, device="cpu", framework="torch")["row.int64"][:9]
    ways: list[Callable[[Any, Any], Any]] = [lambda t, at: torch.tensor_split(t, at), lambda t, at: t.tensor_split(at)]
    for split in ways:
        with session() as mode:
            parameter = torch.full((9,), -1)
            parameter.copy_(dict(mode.tensors(opened(numbers)))["row.int64"][:9])
            parts = split(torch.arange(100), parameter)
            mode.finish()
        assert [part.tolist() for part in parts] == [part.tolist() for part in split(torch.arange(100), positions)]


def test_what_only_reads_does_not_keep_later_copies_from_the_session(numbers: Path) -> None:
    with session() as mode:
        source = dict(mode.tensors(opened(numbers)))["matrix.float32"]
        parameter = torch.zeros(40, 96)
        for turn in (1, 2):
            parameter.copy_(source)
            assert mode.moved == turn * parameter.nbytes
            torch.tensor([parameter[0, 0], 1, 2.0]), parameter.tolist()
            torch.tensor([1.0, 2.0]), torch.as_tensor(parameter)
        parameter.copy_(source)
        torch.tensor([[1, 2], [3, 4]]), torch.as_tensor(parameter), torch.asarray(parameter), parameter.tensor_split(3)
        assert mode._pending, "these read no bytes of it"
        mode.finish()


SHOWN: dict[str, Callable[[Any], str]] = {
    "repr": repr,
    "str": str,
    "format": "{}".format,
    "number's format": "{:.3f}".format,
    "of a parameter": lambda t: repr(torch.nn.Parameter(t, requires_grad=False)),
}


# A format of its own is for one number.
@pytest.mark.parametrize(
    ("whole", "way"), [(whole, way) for way in SHOWN for whole in (False, True) if not whole or way != "number's format"]
)
def test_what_is_shown_has_arrived(whole: bool, way: str, numbers: Path) -> None:
    matrix = sllm.load(numbers, device="cpu", framework="torch")["matrix.float32"]
    place = () if whole else divmod(int(matrix.argmax()), 96)
    with session() as mode:
        source = dict(mode.tensors(opened(numbers)))["matrix.float32"]
        parameter = torch.zeros(40, 96)
        parameter.copy_(source)
        shown = SHOWN[way](parameter[place])
        parameter.copy_(source)
        mode.finish()
        assert mode.moved == 2 * parameter.nbytes  # to be shown is to be read, and that is all
    assert shown == SHOWN[way](matrix[place]) != SHOWN[way](torch.zeros(40, 96)[place])


def test_what_a_function_of_python_writes_is_not_lost(numbers: Path) -> None:
    matrix = sllm.load(numbers, device="cpu", framework="torch")["matrix.float32"]
    applied, mapped, twice, changed, again = (torch.zeros(40, 96) for _ in range(5))
    with session() as mode:
        source = dict(mode.tensors(opened(numbers)))["matrix.float32"]
        for parameter in (applied, mapped, twice):
            parameter.copy_(source)
        applied.apply_(lambda x: x + 1)
        mapped.map_(applied, lambda x, y: 10 * x + y)
        twice.map2_(applied, y=mapped, callable=lambda x, y, z: x + 2 * y + z)
        source.apply_(lambda x: x + 3)
        changed.copy_(source)
        again.copy_(applied.clone())
        assert mode.moved == 3 * matrix.nbytes, "what was written is torch's to copy"
        mode.finish()
    assert raw(applied) == raw(again) == raw(matrix + 1)
    assert raw(mapped) == raw(11 * matrix + 1)
    assert raw(twice) == raw(14 * matrix + 3)
    assert raw(changed) == raw(matrix + 3)


def test_torch_is_as_before(numbers: Path) -> None:
    names = ["tensor", "as_tensor", "asarray", "tensor_split", "to_dlpack", "sparse_coo_tensor"]
    before = {name: vars(torch)[name] for name in names}
    shown = vars(torch.Tensor)["__repr__"]
    with session() as mode:
        list(mode.tensors(opened(numbers)))
        torch.compile(lambda p: p + 1, backend="eager")(torch.ones(3))
        assert vars(torch)["tensor"] is not before["tensor"]
        mode.finish()
    assert {name: vars(torch)[name] for name in names} == before
    assert vars(torch.Tensor)["__repr__"] is shown
    inherited = {"apply_", "const_data_ptr", "map_", "map2_", "numpy", "tolist", "new", "new_tensor", "tensor_split"}
    assert not inherited & set(vars(torch.Tensor))
    # Its compiler knows these functions, also where it first looked while others were in their place.
    whole = torch.compile(lambda p: p + torch.tensor([1.0, 2.0]), backend="eager", fullgraph=True)
    assert whole(torch.ones(2)).tolist() == [2, 3]


def test_what_is_written_past_the_dispatcher_is_not_lost(numbers: Path) -> None:
    methods = {name: getattr(torch.Tensor, name) for name in ("numpy", "data_ptr", "__dlpack__")}
    with session() as mode:
        source = dict(mode.tensors(opened(numbers)))["matrix.float32"]
        plain, parameter, other = source.clone(), torch.zeros(40, 96), torch.zeros(40, 96)
        array, seen = parameter.numpy(), []
        source.numpy()[3] = 9
        other.copy_(source)
        parameter.copy_(source)
        seen.append(array.copy())
        array[:] = 7
        mode.finish()
    plain[3] = 9
    assert raw(other) == raw(plain) == seen[0].tobytes()
    assert (parameter == 7).all()
    # torch is as before.
    assert {name: getattr(torch.Tensor, name) for name in methods} == methods
    assert "numpy" not in vars(torch.Tensor)


def test_operations_of_a_subclass_are_seen_part_by_part(numbers: Path) -> None:
    matrix = sllm.load(numbers, device="cpu", framework="torch")["matrix.float32"]
    with session() as mode:
        source = dict(mode.tensors(opened(numbers)))["matrix.float32"]
        first, second, changed = (torch.zeros(40, 96) for _ in range(3))
        Pair(first, second).copy_(source)
        assert mode.moved == 2 * source.nbytes
        total = Pair(first, second).add(1)
        Pair(source, torch.zeros(40, 96)).add_(1)
        changed.copy_(source)
        mode.finish()
    assert raw(first) == raw(second) == raw(matrix)
    assert raw(total.a) == raw(changed) == raw(matrix + 1)


def test_what_is_entered_within_another_one_keeps_its_order(numbers: Path) -> None:
    matrix = sllm.load(numbers, device="cpu", framework="torch")["matrix.float32"]
    parameter, changed = torch.zeros(40, 96), torch.zeros(40, 96)
    with session() as outer:
        source = dict(outer.tensors(opened(numbers)))["matrix.float32"]
        parameter.copy_(source)
        with session() as inner:
            other = dict(inner.tensors(opened(numbers)))["matrix.float32"]
            parameter[:10].copy_(other[10:20])
            source[:10].copy_(other[20:30])
            inner.finish()
        changed.copy_(source)
        outer.finish()
    assert raw(parameter) == raw(torch.cat([matrix[10:20], matrix[10:]]))
    assert raw(changed) == raw(torch.cat([matrix[20:30], matrix[10:]]))


def test_leaving_waits_for_what_is_under_way(numbers: Path) -> None:
    parameter = torch.zeros(40, 96)
    with session() as mode:
        for name, tensor in mode.tensors(opened(numbers)):
            if name == "matrix.float32":
                parameter.copy_(tensor)
                break
    assert raw(parameter) == raw(sllm.load(numbers, device="cpu", framework="torch")["matrix.float32"])


def test_two_threads_load_at_once(numbers: Path, numbers_store: Path) -> None:
    theirs = sllm.load(numbers, device="cpu", framework="torch")

    def load(path: Path) -> dict[str, Any]:
        ours = {}
        with session() as mode:
            for name, tensor in mode.tensors(opened(path)):
                ours[name] = torch.zeros_like(tensor)
                ours[name].copy_(tensor)
                if tensor.numel() > 1000:
                    ours[name][3:5].add_(1)
            mode.finish()
        return ours

    expected = {name: tensor.clone() for name, tensor in theirs.items()}
    for tensor in expected.values():
        if tensor.numel() > 1000:
            tensor[3:5].add_(1)
    with concurrent.futures.ThreadPoolExecutor() as threads:
        for ours in threads.map(load, [numbers, numbers_store] * 4):
            assert {name: raw(tensor) for name, tensor in ours.items()} == {n: raw(t) for n, t in expected.items()}
    assert "numpy" not in vars(torch.Tensor)


def test_an_iterator_that_ends_in_another_thread_forgets_no_copy(numbers: Path) -> None:
    theirs = sllm.load(numbers, device="cpu", framework="torch")["matrix.float32"]
    for _ in range(20):
        with session() as mode:
            tensors = mode.tensors(opened(numbers))
            source = next(tensor for name, tensor in tensors if name == "matrix.float32")
            rest = threading.Thread(target=list, args=(tensors,))
            rest.start()
            parameters = [torch.zeros(40, 96) for _ in range(30)]
            sums = []
            for parameter in parameters:
                parameter.copy_(source)
                sums.append(parameter.sum())
            rest.join()
            mode.finish()
        assert all(total == theirs.sum() for total in sums)
