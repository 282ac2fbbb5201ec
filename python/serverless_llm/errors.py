"""Exceptions. Each is also the built-in exception that fits, and its message holds the whole chain of causes."""


class SllmError(Exception):
    """Any failure of this package."""


class ReadWriteError(SllmError, OSError):
    """The system refused an operation on a file, or a file ended early."""


class AccessError(SllmError, PermissionError):
    """Permission denied."""


class FormatError(SllmError, ValueError):
    """A checkpoint is invalid; the message names the file, the tensor and the offset."""


class NotFoundError(SllmError, FileNotFoundError):
    """There is no checkpoint at this path or under this name."""


class TensorNotFoundError(SllmError, KeyError):
    """The checkpoint has no such tensor, or a pattern matches none."""

    __str__ = Exception.__str__


class CorruptError(SllmError):
    """Stored bytes changed: a checksum differs."""


class ExistsError(SllmError, FileExistsError):
    """The target is there already."""


class NoSpaceError(SllmError, OSError):
    """Too little room on the disk."""


class DeviceError(SllmError, RuntimeError):
    """A device failed, or is not there."""


class DeviceMemoryError(DeviceError, MemoryError):
    """Too little memory on the device; said before anything moves."""


class InvalidError(SllmError, ValueError):
    """An argument makes no sense, or a forced choice cannot be used here."""


class CancelledError(SllmError):
    """The work was asked to stop."""


class StoreServerError(SllmError, ConnectionError):
    """No store server answers, or it failed."""
