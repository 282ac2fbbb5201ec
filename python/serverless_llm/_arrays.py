"""Arrays of NumPy and torch: their bytes, and views of bytes as them. Each library is imported where it is used."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

from . import _native
from .errors import InvalidError

TORCH_NAMES: dict[str, str] = {name: torch for name, torch, _ in _native.dtypes()}


# A tensor's place: name, dtype, shape, strides, bytes, number of its block, first byte there.
Placed = tuple[str, str, tuple[int, ...], tuple[int, ...] | None, int, int, int]


class HostArray(NamedTuple):
    """Contiguous bytes in host memory. `owner` keeps them alive."""

    dtype: str
    shape: list[int]
    address: int
    nbytes: int
    owner: Any


def allocated(arrays: Any, placement: _native.Placement, devices: list[str]) -> tuple[list[Any], list[int]]:
    """Blocks of memory for a placement, and their addresses. `arrays` is the library's module, which must have the dtypes."""
    for name, dtype in placement.dtypes:
        arrays.check(name, dtype)
    blocks = [arrays.allocate(devices[number], nbytes) for number, nbytes in placement.blocks]
    return [block for block, _ in blocks], [address for _, address in blocks]


def host_array(name: str, tensor: Any) -> HostArray:
    """The bytes of a torch tensor or a NumPy array; copied where they are elsewhere or not contiguous."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(tensor, torch.Tensor):
        tensor = tensor.detach()
        if tensor.layout is not torch.strided:
            raise InvalidError(f"tensor {name!r}: a tensor of layout {tensor.layout} cannot be stored")
        if tensor.is_quantized or tensor.is_meta:
            kind = "meta" if tensor.is_meta else "quantized"
            raise InvalidError(f"tensor {name!r}: a {kind} tensor cannot be stored")
        host = tensor.cpu().resolve_conj().resolve_neg().contiguous()
        shape = list(host.shape)
        dtype = str(host.dtype)
        if dtype == "torch.float4_e2m1fn_x2":  # an element of torch's holds two
            shape = shape[:-1] + [2 * shape[-1]] if shape else [2]
        try:
            address = host.data_ptr()
        except RuntimeError:  # as of tensors under a transform
            address = 0
        if host.nbytes and not address:
            kind = type(tensor).__name__
            raise InvalidError(f"tensor {name!r}: {kind} has no memory of its own: give the tensors that it is made of")
        return HostArray(dtype, shape, address, host.nbytes, host)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(tensor, (numpy.ndarray, numpy.generic)):
        shape = list(tensor.shape)
        host = numpy.ascontiguousarray(tensor, dtype=tensor.dtype.newbyteorder("<"))
        return HostArray(host.dtype.name, shape, host.ctypes.data, host.nbytes, host)
    raise InvalidError(f"tensor {name!r}: {type(tensor).__name__} is neither a torch tensor nor a NumPy array")
