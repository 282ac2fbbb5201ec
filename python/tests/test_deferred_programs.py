"""Random programs do to deferred tensors what they do to those that the safetensors library reads, to the bit."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import raw

import serverless_llm as sllm
from serverless_llm import _native

torch = pytest.importorskip("torch")
deferred = pytest.importorskip("serverless_llm.deferred")
programs = pytest.importorskip("programs")

OPTIONS = {"direct": None, "threads": None, "pinned_bytes": None}
ENGINES = ["auto", "pread", "mapped", "uring"]
CPU = torch.device("cpu")
NAMES = {getattr(torch, of, None): name for name, of, _ in _native.dtypes()}
STEPS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file whose tensors begin at any byte, and a store of the same: small numbers, which every order of additions
    gives the same sum of."""
    generator = torch.Generator().manual_seed(7)
    header, body = {}, b""
    forms = [(shape, dtype) for shape in programs.SHAPES for dtype in programs.DTYPES]
    random.Random(3).shuffle(forms)
    for number, (shape, dtype) in enumerate(forms):
        small = torch.randint(0, 2 if dtype is torch.bool else 5, shape, generator=generator)
        data = raw(torch.complex(small.float(), small.float() + 1) if dtype.is_complex else small.to(dtype))
        offsets = [len(body), len(body) + len(data)]
        header[str(number)] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": offsets}
        body += data
    text = json.dumps(header).encode()
    folder = tmp_path_factory.mktemp("programs")
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + body)
    sllm.convert(folder / "model.safetensors", folder / "store")
    return folder


def state(value: Any) -> Any:
    """What is compared of a result."""
    if isinstance(value, programs.Pair):
        return state(value.a), state(value.b)
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach().to_dense()
    form = (value.dtype, value.shape, value.stride())
    return form, raw(torch.zeros(value.shape, dtype=value.dtype).copy_(value))


def compare(seed: int, folder: Path, steps: int = STEPS) -> Any:
    """Runs a program both ways; the mode of the deferred way."""
    from safetensors.torch import load_file

    store, number = seed % 2 == 1, seed // 2
    engine, inference = ENGINES[number % 4], torch.inference_mode(number % 5 == 1)
    verify = store and engine != "mapped" and number % 3 == 1
    checkpoint = _native.open(folder / ("store" if store else "model.safetensors"))
    with inference:
        ordinary = [(name, tensor.clone()) for name, tensor in load_file(folder / "model.safetensors").items()]
        theirs = programs.Program(seed, ordinary, steps)
    with inference, deferred.Deferred(CPU, {**OPTIONS, "engine": engine, "verify": verify}) as mode:
        ours = programs.Program(seed, mode.tensors(checkpoint), steps)
        mode.finish()
    assert ours.log == theirs.log, f"seed {seed}"
    for number, (a, b) in enumerate(zip(theirs.results, ours.results, strict=True)):
        made = number - (len(theirs.results) - steps)
        assert state(a) == state(b), f"seed {seed}, result of step {made} of\n" + "\n".join(ours.log)
    return mode


@pytest.mark.filterwarnings("ignore")  # torch's, of what a program does
@pytest.mark.parametrize("part", range(4))
def test_random_programs_do_the_same(part: int, folder: Path) -> None:
    try:
        sllm.load(folder / "store", device="cpu", framework="torch", engine="uring")
    except sllm.InvalidError:
        if part == 3:
            pytest.skip("io_uring is refused here")
    modes = [compare(seed, folder) for seed in range(320) if seed // 2 % 4 == part]
    # Both ways were gone.
    assert sum(mode.moved for mode in modes) > 80 * 2000
    assert sum(sum(mode.read_through.values()) for mode in modes) > 80 * 2000
