"""Ctrl-C and forks."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import python

import serverless_llm as sllm


def test_ctrl_c_stops_a_conversion_and_the_next_one_succeeds(tmp_path: Path) -> None:
    source = tmp_path / "source"
    sllm.save_dict({f"t{i}": np.full(8 << 20, i, np.uint8) for i in range(48)}, source)
    target = tmp_path / "target"
    # 400 MB and one thread. On a busy machine the signal may come after the end: then again, as a new conversion.
    code = f"""
import os, signal, threading, time
import serverless_llm as sllm
# A process that was started in the background ignores the signal.
signal.signal(signal.SIGINT, signal.default_int_handler)
timer = threading.Timer(0.03, os.kill, (os.getpid(), signal.SIGINT))
outcome = "finished"
try:
    timer.start()
    try:
        sllm.convert({str(source)!r}, {str(target)!r}, threads=1)
    except KeyboardInterrupt:
        outcome = "interrupted"
    time.sleep(0 if outcome == "interrupted" else 10)
except KeyboardInterrupt:
    pass
print(outcome)
"""
    for _ in range(10):
        outcome = python(code).stdout.strip()
        if outcome == "interrupted":
            break
        assert outcome == "finished" and sllm.verify(target).ok
        shutil.rmtree(target)
    assert outcome == "interrupted"
    assert not target.exists()
    sllm.convert(source, target)
    assert sllm.verify(target).ok


# Calls that would wait for long: for a reference that is a pipe to which nobody writes, and for a server that says nothing.
WAITING = {
    "open": "sllm.open('org/m')",
    "load": "sllm.load('org/m', device='cpu', framework='numpy')",
    "server": "sllm.StoreClient(sys.argv[1], timeout=100).list()",
}


@pytest.mark.parametrize("call", WAITING)
def test_ctrl_c_ends_a_call_that_waits_for_others(call: str, tmp_path: Path) -> None:
    refs = tmp_path / "models--org--m" / "refs"
    refs.mkdir(parents=True)
    os.mkfifo(refs / "main")
    code = f"""
import os, signal, sys, threading, time
import serverless_llm as sllm
signal.signal(signal.SIGINT, signal.default_int_handler)
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
start = time.monotonic()
try:
    {WAITING[call]}
except KeyboardInterrupt:
    print(time.monotonic() - start < 50)
"""
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "s"))
        silent.listen()
        run = python(code, f"unix:{tmp_path / 's'}", HF_HUB_CACHE=str(tmp_path))
    assert run.stdout == "True\n"


def test_a_call_that_cannot_have_its_thread_is_an_error(store: Path) -> None:
    # Without room for a stack the system refuses a thread, as it does at a limit of processes, which root has not.
    code = f"""
import resource
import serverless_llm as sllm
pages = int(open("/proc/self/statm").read().split()[0])
limits = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 20), limits[1]))
try:
    sllm.verify({str(store)!r})
    print("verified")
except sllm.ReadWriteError as e:
    print(e)
resource.setrlimit(resource.RLIMIT_AS, limits)
print(sllm.verify({str(store)!r}).ok)
"""
    told, then = python(code).stdout.splitlines()
    assert told.startswith("cannot start a thread for the work: ")
    assert then == "True"


def test_what_ctrl_c_raises_in_the_callback_comes_out(store: Path) -> None:
    def progress(done: int, total: int) -> None:
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            sllm.verify(store, progress=progress)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_that_interrupts_a_call_in_the_work_is_no_error(store: Path) -> None:
    code = f"""
import signal
import serverless_llm as sllm
ticks = 0
def tick(*_):
    global ticks
    ticks += 1
signal.signal(signal.SIGALRM, tick)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
for _ in range(50):
    sllm.verify({str(store)!r})
    sllm.load({str(store)!r}, device="cpu", framework="numpy")
signal.setitimer(signal.ITIMER_REAL, 0)
assert ticks > 10, ticks
"""
    python(code)


def test_a_forked_child_loads_to_the_host(store: Path) -> None:
    code = f"""
import os
import serverless_llm as sllm
checkpoint = sllm.open({str(store)!r})
before = sllm.load(checkpoint, device="cpu", framework="numpy")
child = os.fork()
after = sllm.load(checkpoint, device="cpu", framework="numpy")
assert before["large"].tobytes() == after["large"].tobytes()
if child == 0:
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr


CUDA = """
import ctypes, os, sys
import serverless_llm as sllm
from serverless_llm import _native
driver = ctypes.CDLL("libcuda.so.1")
def call(name, *arguments):
    assert getattr(driver, name)(*arguments) == 0, name
def fill(checkpoint, **changed):
    selected = _native.select(checkpoint, None)
    placement = _native.Placement(checkpoint, selected, [i % 2 for i in range(len(selected))])
    addresses = []
    for number, nbytes in placement.blocks:
        address = ctypes.c_uint64()
        context = ctypes.c_void_p()
        call("cuDevicePrimaryCtxRetain", ctypes.byref(context), number)
        call("cuCtxSetCurrent", context)
        call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(nbytes))
        addresses.append(address.value)
    report, text = loader("cuda:0", "cuda:1", **changed).fill(placement, addresses, alloc_s=0.0, progress=None)
    return placement, addresses, report
def loader(*devices, **changed):
    options = dict(engine="auto", direct=None, verify=False, threads=None, pinned_bytes=None)
    return _native.Loader(list(devices), **{**options, **changed})
call("cuInit", 0)
"""


@pytest.mark.parametrize("engine", ["auto", "pread", "mapped"])
def test_cuda_gets_every_byte(store: Path, fake_cuda: dict[str, str], engine: str) -> None:
    code = f"""{CUDA}
checkpoint = sllm.open({str(store)!r})
placement, addresses, report = fill(checkpoint, engine={engine!r})
for name, dtype, shape, strides, nbytes, block, offset in placement.tensors:
    info = checkpoint[name]
    with open({str(store)!r} + "/" + info.file, "rb") as file:
        file.seek(info.offset)
        # The double's device addresses are addresses of the host.
        assert file.read(nbytes) == (ctypes.string_at(addresses[block] + offset, nbytes) if nbytes else b""), name
assert '"cuda:1"' in report
"""
    python(code, **fake_cuda, FAKE_CUDA_DEVICES="2")


def test_auto_says_why_a_driver_that_is_there_is_not_used(store: Path, fake_cuda: dict[str, str]) -> None:
    code = f"""
import sys, warnings, torch, serverless_llm as sllm

def told(cuda):
    torch.version.cuda, torch.cuda.is_available = cuda, lambda: False
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        loaded = sllm.load({str(store)!r}, device="auto", tensors="large")
        assert loaded.report.devices == ["host"]
    return [(str(warning.message), warning.filename) for warning in seen]

if sys.argv[1:] == ["fails"]:
    said = "cuda: cannot initialise the driver: CUDA_ERROR_SYSTEM_NOT_READY (802); device='auto' takes the host's memory"
    assert told("12.8") == [(said, "<string>")]
assert told("12.8") == told(None) == []
"""
    python(code, "fails", **fake_cuda, FAKE_CUDA_FAIL="cuInit:1:802")
    python(code, **fake_cuda, FAKE_CUDA_DEVICES="0")


def test_a_lost_device_is_a_device_error(store: Path, fake_cuda: dict[str, str]) -> None:
    code = f"""{CUDA}
try:
    fill(sllm.open({str(store)!r}), engine="pread")
except sllm.DeviceError as e:
    assert "CUDA_ERROR" in str(e), e
else:
    raise SystemExit("no error")
"""
    python(code, **fake_cuda, FAKE_CUDA_DEVICES="2", FAKE_CUDA_LOST_AFTER="0")


def test_cuda_in_a_forked_child_is_an_error(store: Path, fake_cuda: dict[str, str]) -> None:
    code = f"""{CUDA}
checkpoint = sllm.open({str(store)!r})
fill(checkpoint)
child = os.fork()
if child == 0:
    selected = _native.select(checkpoint, ["odd"])
    placement = _native.Placement(checkpoint, selected, [0])
    try:
        loader("cuda:0").fill(placement, [4096], alloc_s=0.0, progress=None)
    except sllm.DeviceError as e:
        os._exit(0 if "forked" in str(e) else 3)
    os._exit(4)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    run = subprocess.run(
        [sys.executable, "-c", code], env={**fake_cuda, "FAKE_CUDA_DEVICES": "2"}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_a_device_that_is_not_there(store: Path, fake_cuda: dict[str, str]) -> None:
    code = f"""{CUDA}
try:
    fill(sllm.open({str(store)!r}))
except AssertionError:
    pass
try:
    loader("cuda:7")
except sllm.DeviceError as e:
    assert "no device cuda:7: 1 are visible" in str(e), e
else:
    raise SystemExit("no error")
"""
    python(code, **fake_cuda, FAKE_CUDA_DEVICES="1")
