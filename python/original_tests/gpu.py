"""Device memory of this process on the double of the CUDA driver, as the original's `_C` gives it to its client."""

from __future__ import annotations

import ctypes
import os
import uuid
from pathlib import Path
from typing import Any

# What memory is filled with before anything is loaded into it.
UNTOUCHED = 0x5C


class IpcHandle(ctypes.Structure):
    """`CUipcMemHandle`."""

    _fields_ = [("bytes", ctypes.c_ubyte * 64)]


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(Path(os.environ["SLLM_FAKE_CUDA"]).resolve(strict=True)))


class Gpu:
    """A device of the double, which exists in all processes under the same UUID."""

    def __init__(self, ordinal: int = 0) -> None:
        self._cuda = _library()
        self._call("cuInit", 0)
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(device), ordinal)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._context = context
        raw = (ctypes.c_ubyte * 16)()
        self._call("cuDeviceGetUuid_v2", raw, device)
        # Lower case, 8-4-4-4-12, no `GPU-` before it.
        self.uuid = str(uuid.UUID(bytes=bytes(raw)))

    def _call(self, symbol: str, *arguments: Any) -> None:
        code = getattr(self._cuda, symbol)(*arguments)
        assert code == 0, f"{symbol}: CUDA error {code}"

    def _enter(self) -> None:
        self._call("cuCtxSetCurrent", self._context)

    def alloc(self, size: int) -> Memory:
        """Memory in which every byte is `UNTOUCHED`."""
        self._enter()
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        self._call("cuMemsetD8_v2", address, ctypes.c_ubyte(UNTOUCHED), ctypes.c_size_t(size))
        return Memory(self, address, size)


class Memory:
    """An allocation of a device."""

    def __init__(self, gpu: Gpu, address: ctypes.c_uint64, size: int) -> None:
        self._gpu, self._address, self._size = gpu, address, size

    @property
    def handle(self) -> bytes:
        """Its IPC handle, 64 bytes."""
        self._gpu._enter()
        handle = IpcHandle()
        self._gpu._call("cuIpcGetMemHandle", ctypes.byref(handle), self._address)
        return bytes(handle.bytes)

    def read(self) -> bytes:
        """All its bytes."""
        self._gpu._enter()
        target = ctypes.create_string_buffer(self._size)
        self._gpu._call("cuMemcpyDtoH_v2", target, self._address, ctypes.c_size_t(self._size))
        return target.raw

    def free(self) -> None:
        """Gives it back."""
        self._gpu._enter()
        self._gpu._call("cuMemFree_v2", self._address)
