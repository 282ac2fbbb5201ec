"""Checkpoint store and loader for large models.

`convert` turns a model into a store, `load` moves a store or plain safetensors to a device, `verify` and `export` check
it and give it back. NumPy and torch are imported only where an array is made or read.
"""

from ._native import Checkpoint, TensorInfo, __version__, open
from .errors import (
    AccessError,
    CancelledError,
    CorruptError,
    DeviceError,
    DeviceMemoryError,
    ExistsError,
    FormatError,
    InvalidError,
    NoSpaceError,
    NotFoundError,
    ReadWriteError,
    SllmError,
    StoreServerError,
    TensorNotFoundError,
)
from .loading import LoadedDict, iter_tensors, load, load_dict
from .reports import ConvertReport, ExportReport, LoadReport, PrefetchReport, VerifyReport
from .store import convert, export, prefetch, save_dict, verify
from .store_server import StoreClient

__all__ = [
    "AccessError",
    "CancelledError",
    "Checkpoint",
    "ConvertReport",
    "CorruptError",
    "DeviceError",
    "DeviceMemoryError",
    "ExistsError",
    "ExportReport",
    "FormatError",
    "InvalidError",
    "LoadReport",
    "LoadedDict",
    "NoSpaceError",
    "NotFoundError",
    "PrefetchReport",
    "ReadWriteError",
    "SllmError",
    "StoreClient",
    "StoreServerError",
    "TensorInfo",
    "TensorNotFoundError",
    "VerifyReport",
    "__version__",
    "convert",
    "export",
    "iter_tensors",
    "load",
    "load_dict",
    "open",
    "prefetch",
    "save_dict",
    "verify",
]
