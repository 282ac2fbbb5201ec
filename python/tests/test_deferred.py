"""Deferred tensors do to parameters what ordinary tensors do, and move what is copied out of them by the session."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SHAPES, content, opened, raw

import serverless_llm as sllm
from serverless_llm import _native

torch = pytest.importorskip("torch")
deferred = pytest.importorskip("serverless_llm.deferred")

OPTIONS = {"engine": "auto", "direct": None, "verify": False, "threads": None, "pinned_bytes": None}
ENGINES = ["auto", "pread", "mapped", "uring"]
IN_TORCH = [name for name, (dtype, _) in SHAPES.items() if dtype not in ("F6_E2M3", "F6_E3M2")]
CPU = torch.device("cpu")


def session(**options: Any) -> Any:
    """Deferred tensors with parameters on the host."""
    return deferred.Deferred(CPU, {**OPTIONS, **options})


def sessions_threads() -> int:
    """Threads of sessions in this process."""
    names = (path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))
    return sum(name == "sllm-session" for name in names)


def uring_works(path: Path) -> bool:
    try:
        sllm.load(path, device="cpu", framework="torch", engine="uring")
    except sllm.InvalidError:
        return False
    return True


# --- one thing at a time ---


def test_tensors_may_be_selected(numbers_store: Path) -> None:
    checkpoint = _native.open(numbers_store)
    places = [len(checkpoint) - 1, 1]
    with session() as mode:
        tensors = dict(mode.tensors(checkpoint, places))
        assert list(tensors) == [checkpoint.names[i] for i in places]
        whole = dict(mode.tensors(checkpoint))
        for name, tensor in tensors.items():
            assert torch.equal(tensor, whole[name])


@pytest.mark.parametrize("layout", ["safetensors_file", "store"])
def test_every_dtype_is_moved_to_the_bit(layout: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    checkpoint = _native.open(request.getfixturevalue(layout))
    with pytest.raises(sllm.InvalidError, match=r"all\.F6_E\dM\d.*no type for F6"), session() as mode:
        list(mode.tensors(checkpoint))
    tensors = sllm.load(checkpoint, device="cpu", framework="torch", tensors=IN_TORCH)
    sllm.save_dict(tensors, tmp_path / "in_torch")
    with session() as mode:
        parameters = {}
        for name, tensor in mode.tensors(_native.open(tmp_path / "in_torch")):
            parameters[name] = torch.zeros_like(tensor)
            mode.read_through.clear()  # zeros_like is counted as a use
            parameters[name].copy_(tensor)
            assert not mode.read_through, name
        mode.finish()
    assert set(parameters) == set(IN_TORCH)
    assert all(raw(parameters[name]) == content(name) for name in IN_TORCH)
    assert mode.moved == sum(len(content(name)) for name in IN_TORCH)


def test_the_report_counts_what_moved(numbers_store: Path) -> None:
    with session() as mode:
        tensors = dict(mode.tensors(_native.open(numbers_store)))
        parameter = torch.zeros(40, 48)
        parameter.copy_(tensors["matrix.float32"][:, 48:])
        [report] = mode.finish()
    assert (mode.moved, report.bytes, mode.read_through) == (40 * 48 * 4, 40 * 48 * 4, {})
    assert mode.summary() == "0.00 GB straight into the parameters"
    assert mode.waited_s > 0


@pytest.mark.parametrize("inference", [False, True])
def test_an_operation_waits_for_the_bytes_that_it_meets(inference: bool, numbers: Path) -> None:
    expected = sllm.load(numbers, device="cpu", framework="torch")["matrix.float32"].clone()
    uses: list[Callable[[Any], Any]] = [
        lambda p: p.sum(),
        lambda p: p[3, 5].item(),
        lambda p: p.add_(1),
        lambda p: p.view(torch.int32).clone(),
        lambda p: torch.cat([p, p]),
        lambda p: torch.add(p, 1, out=torch.zeros(40, 96)),
        lambda p: torch._foreach_add([p], 1)[0],
        lambda p: torch.zeros(40, 96).copy_(p),
        lambda p: p.to(torch.float64),
        lambda p: p.t().contiguous(),
        lambda p: p.t().reshape(-1),
        lambda p: p.to(torch.bfloat16),
    ]
    for number, use in enumerate(uses):
        with torch.inference_mode(inference), session() as mode:
            source = dict(mode.tensors(opened(numbers)))["matrix.float32"]
            parameter = torch.full((40, 96), -1.0)
            parameter.copy_(source)
            assert mode.moved == parameter.nbytes
            ours = use(parameter)
            ours = ours.clone() if isinstance(ours, torch.Tensor) else torch.tensor(ours)
            mode.finish()
        theirs = expected.clone()
        result = use(theirs)
        assert raw(ours) == raw(result if isinstance(result, torch.Tensor) else torch.tensor(result)), number
        assert raw(parameter) == raw(theirs), number


def test_the_later_copy_to_a_place_wins_also_of_another_checkpoint(numbers: Path, tmp_path: Path) -> None:
    other = torch.full((40, 96), 9.0)
    sllm.save_dict({"matrix.float32": other}, tmp_path / "store")
    matrix = sllm.load(numbers, device="cpu", framework="torch")["matrix.float32"]
    with session() as mode:
        first = dict(mode.tensors(opened(numbers)))["matrix.float32"]
        second = dict(mode.tensors(_native.open(tmp_path / "store")))["matrix.float32"]
        rows, shifted, turns = torch.zeros(40, 96), torch.zeros(41 * 96), torch.zeros(40, 96)
        rows.copy_(first)
        rows[10:20].copy_(first[20:30])
        rows[15:17].copy_(second[:2])
        shifted[: 40 * 96].copy_(first.view(-1))
        shifted[96:].copy_(first.view(-1))
        for _ in range(20):
            turns.copy_(second)
            turns.copy_(first)
        mode.finish()
        assert not mode.read_through
    expected = matrix.clone()
    expected[10:20] = matrix[20:30]
    expected[15:17] = 9.0
    assert raw(rows) == raw(expected)
    assert raw(shifted) == raw(torch.cat([matrix[0], matrix.flatten()]))
    assert raw(turns) == raw(matrix)


def test_a_changed_source_is_not_read_from_the_file(numbers: Path) -> None:
    with session() as mode:
        tensors = dict(mode.tensors(opened(numbers)))
        source, other = tensors["matrix.float32"], tensors["experts.float32"].view(-1)[:3840].view(40, 96)
        before, after, beside, written = (torch.full((40, 96), -1.0) for _ in range(4))
        plain = source.clone()
        before.copy_(source)
        other.copy_(source)  # a copy from source to source changes a source
        written.copy_(other)
        source[3].add_(1)
        after.copy_(source)
        beside[4:].copy_(source[4:])
        mode.finish()
    changed = plain.clone()
    changed[3] += 1
    assert raw(before) == raw(written) == raw(plain)
    assert raw(after) == raw(changed)
    assert raw(beside[4:]) == raw(plain[4:])
    # Another session sees the file as it is.
    assert raw(sllm.load(numbers, device="cpu", framework="torch")["matrix.float32"]) == raw(plain)


def test_views_that_negate_or_conjugate_are_not_copied_as_they_lie(tmp_path: Path) -> None:
    numbers = torch.complex(torch.arange(100.0), torch.arange(100.0) + 0.5)
    sllm.save_dict({"t": numbers}, tmp_path / "store")
    sllm.save_dict({"t": numbers.real.contiguous()}, tmp_path / "real")
    with session() as mode:
        source = dict(mode.tensors(_native.open(tmp_path / "store")))["t"]
        plain, conjugate, into = (torch.zeros(100, dtype=torch.complex64) for _ in range(3))
        imaginary, negative, into_negative = (torch.zeros(100) for _ in range(3))
        real = dict(mode.tensors(_native.open(tmp_path / "real")))["t"]
        plain.copy_(source)
        conjugate.copy_(source.conj())
        into.conj().copy_(source)
        imaginary.copy_(source.conj().imag)
        negative.copy_(torch._neg_view(real))
        torch._neg_view(into_negative).copy_(real)
        mode.finish()
    assert raw(plain) == raw(numbers)
    assert raw(conjugate) == raw(into) == raw(numbers.conj().resolve_conj())
    assert torch.equal(imaginary, -numbers.imag)
    assert torch.equal(negative, -numbers.real) and torch.equal(into_negative, -numbers.real)


def test_what_is_negated_is_negated_in_inference_mode_too(numbers: Path) -> None:
    # Under a dispatch mode torch itself leaves out the sign there.
    matrix = sllm.load(numbers, device="cpu", framework="torch")["matrix.float32"]
    with torch.inference_mode(), session() as mode:
        source = dict(mode.tensors(opened(numbers)))["matrix.float32"]
        half = torch._neg_view(source).to(torch.float16)
        mode.finish()
    assert torch.equal(half, -matrix.half()) and half.any()


def test_conversion_scalars_and_nothing(numbers: Path) -> None:
    theirs = sllm.load(numbers, device="cpu", framework="torch")
    with session() as mode:
        tensors = dict(mode.tensors(opened(numbers)))
        half, scalar, repeated = torch.zeros(40, 96, dtype=torch.float16), torch.zeros(()), torch.zeros(7, 500)
        half.copy_(tensors["matrix.float32"])
        assert mode.moved == 0
        scalar.copy_(tensors["scalar.float32"])
        repeated.copy_(tensors["row.float32"])
        torch.zeros(0, 9).copy_(tensors["empty.float32"])
        torch.zeros(0, 500).copy_(tensors["row.float32"])
        assert mode.moved == 4 + repeated.nbytes
        with pytest.raises(RuntimeError, match="size"):
            torch.zeros(3, 3).copy_(tensors["matrix.float32"])
        mode.finish()
    assert mode.read_through["aten::copy_"] == 40 * 96 * 4
    assert raw(half) == raw(theirs["matrix.float32"].half())
    assert raw(scalar) == raw(theirs["scalar.float32"])
    assert raw(repeated) == raw(theirs["row.float32"].expand(7, 500))


def test_a_tensor_may_begin_at_any_byte(tmp_path: Path) -> None:
    shapes = {"byte": ("U8", [3]), "one": ("F32", [100]), "two": ("F32", [25, 4]), "half": ("BF16", [])}
    body, header = b"", {}
    for name, (dtype, shape) in shapes.items():
        size = torch.Size(shape).numel() * {"U8": 1, "F32": 4, "BF16": 2}[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + size]}
        body += bytes(random.Random(name).randrange(120) for _ in range(size))
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)
    for use in (lambda p, t: p.copy_(t), lambda p, t: p.add_(t)):
        with session() as mode:
            for name, tensor in mode.tensors(opened(tmp_path)):
                parameter = torch.zeros_like(tensor)
                use(parameter, tensor)
                mode.arrive()
                start, end = header[name]["data_offsets"]
                assert raw(parameter) == body[start:end], name
            mode.finish()


def test_tensors_are_given_out_without_an_operation(numbers: Path) -> None:
    class Seen(torch.utils._python_dispatch.TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    with session() as mode, Seen():
        tensors = list(mode.tensors(opened(numbers)))
        assert len(tensors) == 30 and seen == []
        assert torch.zeros(3).sum() == 0 and seen
        mode.finish()


def test_views_that_are_known_take_no_step_of_python(numbers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    for way in ("_operate", "_operate_uncompiled"):

        def operate(mode: Any, func: Any, args: Any, kwargs: Any, way: Any = getattr(deferred.Deferred, way)) -> Any:
            seen.append(func.name())
            return way(mode, func, args, kwargs)

        monkeypatch.setattr(deferred.Deferred, way, operate)
    with session() as mode:
        tensors = dict(mode.tensors(opened(numbers)))
        parameter = torch.nn.Parameter(torch.full((6, 40, 64), -1.0), requires_grad=False)
        for turn in range(2):
            seen.clear()
            for number, expert in enumerate(tensors["experts.float32"].unsqueeze(0).unbind()[0]):
                parameter.data[2 * number + turn].narrow(0, 3, 20).copy_(expert.view(-1).view(20, 64))
        mode.finish()
        assert seen == 3 * ["aten::copy_"] and mode.moved == 2 * 3 * 20 * 64 * 4
    experts = sllm.load(numbers, device="cpu", framework="torch")["experts.float32"]
    assert raw(parameter.data[:, 3:23]) == raw(experts.repeat_interleave(2, 0))
    assert (parameter.data[:, :3] == -1).all() and (parameter.data[:, 23:] == -1).all()


def test_a_compiled_function_waits_too(numbers: Path) -> None:
    function = torch.compile(lambda p: p + p, backend="eager")
    with session() as mode:
        parameter = torch.full((40, 96), -1.0)
        parameter.copy_(dict(mode.tensors(opened(numbers)))["matrix.float32"])
        twice = function(parameter)
        mode.finish()
    assert mode.moved == parameter.nbytes
    assert raw(twice) == raw(2 * sllm.load(numbers, device="cpu", framework="torch")["matrix.float32"])


# --- what goes wrong ---


@pytest.mark.parametrize("engine", ENGINES)
def test_a_file_that_is_cut_is_an_error_and_no_crash(engine: str, tmp_path: Path) -> None:
    sllm.save_dict({"t": torch.ones(100_000), "u": torch.ones(100_000)}, tmp_path / "store")
    if engine == "uring" and not uring_works(tmp_path / "store"):
        pytest.skip("io_uring is refused here")
    checkpoint = _native.open(tmp_path / "store")
    [data] = (tmp_path / "store").glob("tensor.data_*")
    with session(engine=engine) as mode:
        tensors = dict(mode.tensors(checkpoint))
        os.truncate(data, 500_000)
        parameter = torch.zeros(100_000)
        parameter.copy_(tensors["u"])
        with pytest.raises(sllm.ReadWriteError, match=r"tensor\.data_0.*500000"):
            mode.arrive()
    with session(engine=engine) as mode, pytest.raises(sllm.ReadWriteError, match=r"tensor\.data_0.*500000"):
        list(mode.tensors(checkpoint))


@pytest.mark.parametrize("use", ["move", "read through"])
def test_a_file_that_is_written_to_meanwhile_is_an_error(use: str, tmp_path: Path) -> None:
    sllm.save_dict({"t": torch.ones(100_000)}, tmp_path / "store")
    data = tmp_path / "store" / "tensor.data_0"
    with session() as mode, pytest.raises(sllm.FormatError, match=r"tensor\.data_0.*was changed while it was read"):
        parameter = torch.zeros(100_000)
        source = dict(mode.tensors(_native.open(tmp_path / "store")))["t"]
        parameter.copy_(source) if use == "move" else parameter.add_(source)
        with open(data, "r+b") as file:
            file.write(bytes(1000))
        os.utime(data, ns=(0, 0))  # a clock may be as coarse as this test is fast
        mode.finish()


def test_a_file_that_is_written_to_between_opening_and_mapping_is_an_error(tmp_path: Path) -> None:
    sllm.save_dict({"t": torch.ones(100_000)}, tmp_path / "store")
    data = tmp_path / "store" / "tensor.data_0"
    with session() as mode, pytest.raises(sllm.FormatError, match=r"tensor\.data_0.*was changed while it was read"):
        checkpoint = _native.open(tmp_path / "store")
        with open(data, "r+b") as file:
            file.write(bytes(1000))
        os.utime(data, ns=(0, 0))  # a clock may be as coarse as this test is fast
        torch.zeros(100_000).add_(dict(mode.tensors(checkpoint))["t"])
        mode.finish()


def test_an_operation_on_what_a_file_lost_is_an_error_and_no_crash(tmp_path: Path) -> None:
    sllm.save_dict({"t": torch.ones(100_000), "u": torch.ones(100_000)}, tmp_path / "store")
    with session() as mode:
        tensors = dict(mode.tensors(_native.open(tmp_path / "store")))
        os.truncate(tmp_path / "store" / "tensor.data_0", 500_000)
        assert tensors["t"].sum() == 100_000
        lost: list[Callable[[Any], Any]] = [
            *(lambda t: t.sum(), lambda t: t.numpy(), lambda t: t[9:10].tolist(), lambda t: t.data_ptr()),
            *(lambda t: torch.tensor([t[0], t[1]]), lambda t: t.untyped_storage(), torch.from_dlpack),
        ]
        for use in lost:
            with pytest.raises(sllm.ReadWriteError, match=r"tensor\.data_0.*500000.*was cut"):
                use(tensors["u"][30_000:])


def test_an_exception_stops_the_session(numbers: Path) -> None:
    before = sessions_threads()
    parameter = torch.zeros(40, 96)
    with pytest.raises(KeyError, match="of the caller"), session() as mode:
        parameter.copy_(dict(mode.tensors(opened(numbers)))["matrix.float32"])
        while sessions_threads() == before:  # a thread has its name a little after its start
            os.sched_yield()
        raise KeyError("of the caller")
    assert sessions_threads() == before
    # The copy had not begun: so little gathers until someone waits.
    assert not parameter.any()
    # torch is as before.
    assert torch.ones(3).sum() == 3 and "numpy" not in vars(torch.Tensor)


@pytest.fixture
def flipped(tmp_path: Path) -> Path:
    """A store in which one bit of the tensor `u` is another."""
    sllm.save_dict({"t": torch.ones(3_000_000), "u": torch.ones(1000)}, tmp_path / "store")
    info = sllm.open(tmp_path / "store")["u"]
    with open(tmp_path / "store" / info.file, "r+b") as file:
        file.seek(info.offset + 9)
        byte = file.read(1)[0]
        file.seek(info.offset + 9)
        file.write(bytes([byte ^ 4]))
    return tmp_path / "store"


FOUND_BY: dict[str, Callable[[Any, Any], Any]] = {
    "move": lambda p, t: p.copy_(t),
    "read through": lambda p, t: p.copy_(t + 0),
    "numpy": lambda p, t: p.numpy().__setitem__(slice(None), t.numpy()),
    "tolist": lambda p, t: p.copy_(torch.tensor(t[:5].tolist() + t[5:].tolist())),
    "numbers": lambda p, t: p.copy_(torch.tensor([*t])),
    "storage": lambda p, t: p.untyped_storage().copy_(t.untyped_storage()),
    "dlpack": lambda p, t: p.copy_(torch.from_dlpack(t)),
    "parameter": lambda p, t: setattr(p, "data", torch.nn.Parameter(t, requires_grad=False)),
    "assign": lambda p, t: assigned(p, t),
}


def assigned(parameter: Any, tensor: Any) -> None:
    module = torch.nn.Module()
    module.register_buffer("t", torch.zeros_like(tensor))
    module.load_state_dict({"t": tensor}, assign=True)
    parameter.data = module.t[:]


@pytest.mark.parametrize("use", FOUND_BY)
def test_verification_finds_a_flipped_bit_on_all_ways(flipped: Path, use: str, tmp_path: Path) -> None:
    def load(path: Path, verify: bool) -> Any:
        with session(verify=verify) as mode:
            parameter = torch.zeros(1000)
            for name, tensor in mode.tensors(_native.open(path)):
                if name == "u":
                    FOUND_BY[use](parameter, tensor)
            del tensor
            mode.finish()
            assert mode.moved == (4000 if use == "move" else 0)
            if use not in ("move", "parameter", "assign"):
                assert sum(mode.read_through.values()) >= 4000
        return parameter

    with pytest.raises(sllm.CorruptError, match=r"tensor\.data_0"):
        load(flipped, verify=True)
    assert (load(flipped, verify=False) != 1).sum() == 1
    sllm.save_dict({"t": torch.ones(3_000_000), "u": torch.ones(1000)}, tmp_path / "right")
    assert (load(tmp_path / "right", verify=True) == 1).all()


def test_what_is_not_held_at_the_end_is_not_read_to_be_compared(flipped: Path) -> None:
    with session(verify=True) as mode:
        for _, tensor in mode.tensors(_native.open(flipped)):
            assert tensor.shape
        del tensor
        mode.finish()
        assert not mode._read_bytes()


def test_memory_for_comparisons_is_given_back_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    window = 4 << 20
    monkeypatch.setattr(deferred, "_WINDOW", window)
    theirs = torch.arange(3_000_000, dtype=torch.float32)
    sllm.save_dict({"t": theirs}, tmp_path / "store")
    sizes, waits = [], []

    with session(verify=True) as mode:
        wait = mode._wait
        monkeypatch.setattr(mode, "_wait", lambda of: (waits.append([s.nbytes() for s in mode._held]), wait(of)))
        for _, tensor in mode.tensors(_native.open(tmp_path / "store")):
            for _ in range(2):
                half = torch.zeros(3_000_000, dtype=torch.float64)
                half.copy_(tensor)
                sizes.append(len(mode._held))
                assert torch.equal(half, theirs.double())
        mode.finish()
    assert sizes == [0, 0]
    assert waits[:3] == waits[3:6] == [[window], [window], [12_000_000 - 2 * window]]


def test_verification_needs_checksums(numbers: Path) -> None:
    with pytest.raises(sllm.InvalidError, match="checksums"), session(verify=True) as mode:
        source = dict(mode.tensors(opened(numbers)))["matrix.float32"]
        torch.zeros(40, 96).copy_(source)
        mode.finish()
