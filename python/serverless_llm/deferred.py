"""Deferred tensors: a checkpoint's tensors, of which only the bytes that are asked for are moved, straight to their place.

An engine that slices weights itself is given tensors that lie in mapped files. It takes views of them, and copies those
into its parameters. `Deferred` sees every operation of torch while it is active: such a copy becomes a copy by the
native session (file to device, no staging memory, no second copy), which runs while the engine goes on. An operation on
memory whose bytes are still under way waits for them first. An operation other than a copy finds the bytes in the mapped
file.

Memory that is reached past torch's dispatcher (`data_ptr()`, `numpy()`, a storage, `apply_()`) is waited for too, and from
then on torch itself copies from it and to it, at once. What only reads (`tolist()`, `repr()`, `torch.tensor` of a list of
tensors) waits, and that is all. Not seen are other threads' operations, what was reached so before, and the few accesses that
`_accesses` names.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import mmap
import operator
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

from . import _accesses, _native, _session, _torch
from ._accesses import address_of, storage_of
from ._arrays import Placed
from ._native import Checkpoint
from ._ranges import Ranges
from .errors import FormatError, ReadWriteError
from .reports import LoadReport

_COPY = torch.ops.aten.copy_.default
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_LAZY = torch._C.DispatchKeySet(torch._C.DispatchKey.Negative) | torch._C.DispatchKeySet(torch._C.DispatchKey.Conjugate)
_DENSE = (1,)  # the strides of elements one after another
_NORESERVE = 0x4000  # the system's MAP_NORESERVE: private pages are written only if an operation changes a tensor
_AT_ONCE = 256  # tensors that are made at once
_CHUNK = 4 << 20  # bytes of a store that have a checksum
_WINDOW = 64 << 20  # bytes that are read at once to be compared, whole chunks
_START = operator.itemgetter(0)  # of a range

_entering = threading.Lock()

Tick = Callable[[int], object]


class _Mapping:
    """A checkpoint whose files are mapped, as tensors."""

    def __init__(self, checkpoint: Checkpoint, verify: bool) -> None:
        self.checkpoint = checkpoint
        # What is to be compared if it is still held at the end: memory of tensors, and file, offset and length.
        self._given: list[tuple[weakref.ref[memoryview], int, int, int]] | None = [] if verify else None
        self._descriptors = checkpoint.descriptors
        flags = mmap.MAP_PRIVATE | _NORESERVE
        files = zip(self._descriptors, checkpoint.files)
        # Private and writable: what an operation changes in place stays in this process.
        self._maps = []
        for number, (fd, (_, size)) in enumerate(files):
            self.check(number, size)
            try:
                self._maps.append(mmap.mmap(fd, size, flags=flags) if size else None)
            except OSError as e:
                path = os.path.join(checkpoint.path, checkpoint.files[number][0])
                raise ReadWriteError(f"{path}: cannot be mapped: {e}") from e
        # First and last address, and number, of each file.
        self.ranges: list[tuple[int, int, int]] = []
        for number, mapped in enumerate(self._maps):
            if mapped is not None:
                start = address_of(torch.frombuffer(mapped, dtype=torch.uint8))
                self.ranges.append((start, start + len(mapped), number))

    def check(self, number: int, end: int) -> None:
        """Raises where a file does not reach so far any more: a read of what it lost would end the process."""
        size = os.fstat(self._descriptors[number]).st_size
        if size < end:
            path = os.path.join(self.checkpoint.path, self.checkpoint.files[number][0])
            raise ReadWriteError(f"{path}: ends at byte {size}, before byte {end}: it was cut after it was opened")

    def check_unwritten(self) -> None:
        """Raises where a file was written to since it was opened. Sessions look at what they move themselves."""
        for fd, time_ns, (name, size) in zip(self._descriptors, self.checkpoint.modified, self.checkpoint.files):
            now = os.fstat(fd)
            if (now.st_mtime_ns, now.st_size) != (time_ns, size):
                path = os.path.join(self.checkpoint.path, name)
                raise FormatError(f"{path}: it was changed while it was read; start again")

    def held(self) -> Iterator[tuple[int, int, int]]:
        """File, offset and length of tensors that somebody holds; neighbours are one, in whole chunks of a store."""
        files = self.checkpoint.files
        ranges = [Ranges() for _ in files]
        for memory, file, offset, nbytes in self._given or ():
            if memory() is not None:
                end = offset + nbytes
                ranges[file].add(offset - offset % _CHUNK, min(files[file][1], end + -end % _CHUNK))
        for file, of_file in enumerate(ranges):
            yield from ((file, start, end - start) for start, end in of_file)

    def tensors(self, selected: list[int] | None) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and tensors, in the order of the files; all, or those at these places."""
        placed = self.checkpoint.placed
        tensors = self._made(placed if selected is None else [placed[i] for i in selected])
        while True:
            with torch._C._DisableTorchDispatch():  # no mode needs to see this
                some = list(itertools.islice(tensors, _AT_ONCE))
            if not some:
                return
            yield from some

    def _made(self, placed: Sequence[Placed]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, dtype, shape, strides, nbytes, number, offset in placed:
            of, sizes = _torch.form(name, dtype, shape)
            mapped = self._maps[number]
            if nbytes == 0 or mapped is None:
                yield name, torch.empty(sizes, dtype=of, device="cpu")
                continue
            # A storage of its own: whoever keeps or copies a tensor's storage has its bytes, not the file's.
            count = nbytes // of.itemsize
            if self._given is None:
                flat = torch.frombuffer(mapped, dtype=of, count=count, offset=offset)
            else:  # memory that tells when nobody has the tensor any more; it costs 5 us
                memory = memoryview(mapped)[offset : offset + nbytes]
                self._given.append((weakref.ref(memory), number, offset, nbytes))
                flat = torch.frombuffer(memory, dtype=of, count=count)
            yield name, flat.view(sizes) if strides is None else flat.as_strided(sizes, strides)


class Deferred(_native.ViewsFirst, TorchDispatchMode):
    """Moves what is copied out of its tensors by a native session. A context manager.

    Destinations are on `device` or on the host. `options` are those of a load (engine, direct, verify, threads,
    pinned_bytes). `finish` waits for all bytes and gives the report; leaving it waits for them too. Leaving it by an
    exception stops the session: nothing is written after that.
    """

    # Those that are entered, in all threads.
    _entered: tuple[Deferred, ...] = ()

    def __init__(self, device: torch.device, options: dict[str, Any], tick: Tick = lambda done: None) -> None:
        super().__init__()
        self._options = options
        self._tick = tick
        self._sources: list[tuple[_Mapping, Any]] = []
        # Mapped files by their addresses: the first one, the one after the last, number, session.
        self._ranges: list[tuple[int, int, int, Any, _Mapping]] = []
        self._ids = [_torch.device_id("cpu")]
        self._devices = {torch.device("cpu"): 0}
        self._cuda: torch.device | None = None
        if device.type == "cuda":
            self._ids.append(_torch.device_id(device))
            self._cuda = torch.device(self._ids[1])
            self._devices[self._cuda] = 1
        # Accesses past the dispatcher, which may be another thread's, change what follows too.
        self._lock = threading.RLock()
        # What is under way, and the storages that it goes to: their lengths by their addresses, their memory, and
        # themselves, since a tensor may be given another one meanwhile.
        self._pending = Ranges()
        self._lengths: dict[int, int] = {}
        self._memory = Ranges()
        self._held: list[torch.UntypedStorage] = []
        # Memory that torch itself copies from and to: what an operation has changed of the mapped files, and what was
        # reached past the dispatcher, and may be at any time.
        self._left = Ranges()
        # Whether an error of a session was raised.
        self._failed = False
        # The session of the last copy.
        self._latest: Any = None
        # Whether torch may have queued work, which could be on memory that is copied to.
        self._queued = True
        # Addresses of the storages that something was written to.
        self.written: set[int] = set()
        self.moved = 0
        # Time in which the caller stood still until bytes had arrived.
        self.waited_s = 0.0
        self.read_through: dict[str, int] = {}

    # --- tensors ---

    def tensors(
        self, checkpoint: Checkpoint, selected: list[int] | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """The checkpoint's names and tensors, in the order of its files; all, or those at these places. At its end all
        copies have arrived."""
        mapping = _Mapping(checkpoint, self._options["verify"])
        session = _native.Session(checkpoint, _native.Loader(self._ids, **self._options))
        self._sources.append((mapping, session))
        self._ranges.extend((start, end, number, session, mapping) for start, end, number in mapping.ranges)
        self._ranges.sort(key=_START)
        yield from mapping.tensors(selected)
        self.arrive()

    # --- the way of an operation that is not known for a view ---

    def _wrapped(self, func: Any) -> None:
        """Called before an operation on tensors of a kind of their own, which is then theirs: its parts come one by
        one. What of their memory they use otherwise is not seen."""
        if not _is_view(func):
            self.arrive()

    def _operate(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is _COPY and self._move(args[0], args[1]):
            return args[0]
        if _is_composite(func):  # in inference mode they come whole: look at what they are made of
            super().__enter__()
            try:
                # Not `decompose`: that takes a decomposition in Python, where there is one, which may round otherwise.
                with _negating(args, kwargs):
                    return func._op_dk(_COMPOSITE, *args, **kwargs)
            finally:
                super().__exit__(None, None, None)
        if _is_view(func):
            self.add_view(func, _direct.get(func, func))
        else:
            self._queued = True
            self._before(func, args, kwargs)
        return func(*args, **kwargs)

    _operate_uncompiled = torch._disable_dynamo(_operate)

    def _move(self, dst: torch.Tensor, src: torch.Tensor) -> bool:
        """Takes a copy out of a mapped file over; False where it is another kind of copy."""
        if not src.is_cpu or src.dtype is not dst.dtype:
            return False
        if src.layout is not torch.strided or dst.layout is not torch.strided:
            return False
        address, target = address_of(src), address_of(dst)
        found = self._place(address)
        # What is written to a mapped file is a change of a source.
        if found is None or dst.is_cpu and self._place(target) is not None:
            return False
        start, _, file, session, _ = found
        if dst.is_neg() or src.is_neg() or dst.dtype.is_complex and (dst.is_conj() or src.is_conj()):
            return False
        device = self._devices.get(dst.device)
        if device is None:
            return False
        if src.shape != dst.shape:
            src = src.expand(dst.shape)
        item, count = src.itemsize, dst.numel()
        if not count:
            return True
        if dst.is_contiguous() and src.is_contiguous():
            view = ((count,), _DENSE, _DENSE)
            span = count * item
        else:
            view = (src.shape, src.stride(), dst.stride())
            span = _span(dst)
        if len(Deferred._entered) > 1 and not self._may_write(target, target + span):
            return False
        with self._lock:
            left = self._left
            if left and (left.meets(address, address + _span(src)) or left.meets(target, target + span)):
                return False
            storage = storage_of(dst)
            # Memory that is not torch's alone: what NumPy has too, before torch or after it, is used there unseen.
            if dst.is_cpu and not storage.resizable():
                return False
            base, length = storage.data_ptr(), storage.nbytes()
            if session is not self._latest:
                # Sessions do not know of each other: what is copied later is written later only within one.
                if self._pending:
                    self.arrive()
                self._latest = session
            # Nor does one know of storages that share memory.
            if self._lengths.get(base) != length and self._memory.meets(base, base + length):
                self.arrive()
            if self._queued and self._cuda is not None:
                torch.cuda.current_stream(self._cuda).synchronize()
                self._queued = False
            if not session.copy(file, address - start, item, *view, device, base, length, target - base):
                return False
            if base not in self._lengths:
                self._lengths[base] = length
                self._memory.add(base, base + length)
                self.written.add(base)
            self._pending.add(target, target + span)
            self._held.append(storage)
            self.moved += count * item
        return True

    def _may_write(self, start: int, end: int) -> bool:
        """Waits until no other one that is entered writes to a range; False where it maps a file there."""
        for other in Deferred._entered:
            if other is not self:
                if other._place(start) is not None:
                    return False
                with other._lock:
                    if other._pending.meets(start, end):
                        other.arrive()
        return True

    def _place(self, address: int) -> tuple[int, int, int, Any, _Mapping] | None:
        """The mapped file that an address lies in."""
        number = bisect.bisect_right(self._ranges, address, key=_START) - 1
        if number < 0 or address >= self._ranges[number][1]:
            return None
        return self._ranges[number]

    def _before(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What must be done before an operation other than a view or a copy that was taken over."""
        written = _written(func)
        for place, value in (*enumerate(args), *kwargs.items()):
            for tensor in _tensors(value):
                if tensor.is_meta:
                    continue
                if tensor.layout is not torch.strided:  # its memory is that of other tensors
                    self.arrive()
                    continue
                writes = place in written
                if self._lengths and (writes and _may_free(func, place) or _reads_around(func)):
                    with self._lock:
                        if storage_of(tensor).data_ptr() in self._lengths:
                            self.arrive()
                if not tensor.numel():
                    continue
                address, span = address_of(tensor), _span(tensor)
                if writes:
                    self.written.add(storage_of(tensor).data_ptr())
                with self._lock:
                    if self._pending and self._pending.meets(address, address + span):
                        self.arrive()
                    if tensor.is_cpu:
                        self._touch(func._schema.name, address, span, tensor.numel() * tensor.itemsize, writes)

    def _touch(self, name: str, address: int, span: int, nbytes: int, writes: bool) -> None:
        """Notes a use of `nbytes` of a range of addresses, where that is a mapped file's: an operation, or another
        access."""
        if (place := self._place(address)) is None:
            return
        start, _, file, session, mapping = place
        mapping.check(file, address - start + span)
        self.read_through[name] = self.read_through.get(name, 0) + nbytes
        if self._options["verify"]:
            self._verify(session, file, address - start, span)
        if writes:
            self._left.add(address, address + span)

    def _reached(self, tensor: torch.Tensor, access: str, kept: bool) -> None:
        """Called before memory is reached past the dispatcher, in any thread: perhaps by work that is queued. Where it
        is `kept`, the whole storage may be used at any time after it."""
        try:
            storage, address = storage_of(tensor), address_of(tensor)
            start, length = storage.data_ptr(), storage.nbytes()
        except (NotImplementedError, RuntimeError):  # it has none, or none of its own
            self.arrive()
            return
        if not kept:
            start, length = address, _span(tensor)
        if not start or not length:
            return
        end = start + length
        with self._lock:
            if self._pending.meets(start, end):
                self.arrive()
            if tensor.is_cpu and not (kept and self._left.holds(start, end)):
                self._touch(access, start, length, length if kept else tensor.numel() * tensor.itemsize, kept)
            if kept:
                self._left.add(start, end)
                self._queued = True

    def _verify(self, session: Any, file: int, offset: int, span: int) -> None:
        """Reads bytes once more, by the session, which compares their checksums."""
        start, end = offset, offset + span
        while start < end:
            length = min(end, start - start % _WINDOW + _WINDOW) - start
            scratch = storage_of(torch.empty(length, dtype=torch.uint8, device="cpu"))
            self._held.append(scratch)
            session.copy(file, start, 1, [length], [1], [1], 0, scratch.data_ptr(), length, 0)
            self._wait(session)  # where this raises, bytes may still be under way
            self._held.pop()
            start += length

    # --- arrival ---

    def arrive(self) -> None:
        """Waits for all bytes that are under way."""
        with self._lock:
            for _, session in self._sources:
                self._wait(session)
            self._forget()

    def _forget(self) -> None:
        self._pending.clear()
        self._lengths.clear()
        self._memory.clear()
        self._held.clear()

    def _wait(self, session: Any) -> None:
        start = time.perf_counter()
        try:
            _session.wait(session, lambda: self._tick(self._read_bytes()))
        except BaseException:
            self._failed = True
            raise
        self.waited_s += time.perf_counter() - start

    def _read_bytes(self) -> int:
        return sum(session.read_bytes() for _, session in self._sources)

    def finish(self) -> list[LoadReport]:
        """Waits for all bytes, and gives a report for each checkpoint of which some were moved. Raises where a file
        was written to meanwhile. What lies in a mapped file from now on, as others hold it, is verified too."""
        self.arrive()
        for mapping, session in self._sources:
            for file, offset, length in mapping.held():
                with self._lock:
                    self._verify(session, file, offset, length)
            mapping.check_unwritten()
        reports = [report for _, session in self._sources for report in _session.finish(session)]
        self._release()
        return reports

    def _release(self) -> None:
        """Lets go of the sources. Their files stay mapped while somebody holds a tensor of them."""
        self._sources.clear()
        self._ranges.clear()

    def summary(self) -> str:
        """Which way the bytes went."""
        text = f"{self.moved / 1e9:.2f} GB straight into the parameters"
        if self.read_through:
            operations = ", ".join(f"{name} {count / 1e6:.1f} MB" for name, count in sorted(self.read_through.items()))
            text += f"; read through the mapped files: {operations}"
        return text

    def __enter__(self) -> Any:
        super().__enter__()
        with _entering:
            Deferred._entered = (*Deferred._entered, self)
        _accesses.watch(self._reached)
        return self

    def __exit__(self, *exc: Any) -> None:
        try:
            if exc[0] is None and not self._failed:
                self.arrive()
        finally:
            with self._lock:
                for _, session in self._sources:
                    session.close()
                self._release()
                self._forget()
            _accesses.unwatch(self._reached)
            with _entering:
                Deferred._entered = tuple(other for other in Deferred._entered if other is not self)
            super().__exit__(*exc)


def _span(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to its last one's end."""
    if tensor.is_contiguous():
        return tensor.numel() * tensor.itemsize
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return (last + 1) * tensor.itemsize if tensor.numel() else 0


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (list, tuple, dict)):
        return [leaf for leaf in _pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return []


_composites: dict[Any, bool] = {}
# Views as methods, which take their arguments faster.
_direct: dict[Any, Any] = {
    torch.ops.aten.detach.default: torch.Tensor.detach,
    torch.ops.aten.select.int: torch.Tensor.select,
    torch.ops.aten.unbind.int: torch.Tensor.unbind,
    torch.ops.aten.unsqueeze.default: torch.Tensor.unsqueeze,
    torch.ops.aten.view.default: torch.Tensor.view,
}
_writes: dict[Any, frozenset[int | str]] = {}


def _is_composite(func: Any) -> bool:
    """Whether an operation is nothing but others, some of which may be copies."""
    composite = _composites.get(func)
    if composite is None:
        key = "CompositeImplicitAutograd"
        composite = _composites[func] = bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key))
    return composite


def _is_view(func: Any) -> bool:
    """Whether an operation reads and writes no bytes: its results are views of its arguments."""
    schema = func._schema
    aliases = [a.alias_info for a in (*schema.arguments, *schema.returns) if a.alias_info is not None]
    returned = all(r.alias_info is not None for r in schema.returns)
    return bool(aliases) and returned and bool(schema.returns) and not any(a.is_write for a in aliases)


def _written(func: Any) -> frozenset[int | str]:
    """Places and names of the arguments that an operation writes."""
    places = _writes.get(func)
    if places is None:
        arguments = [(i, a) for i, a in enumerate(func._schema.arguments) if a.alias_info and a.alias_info.is_write]
        places = frozenset([i for i, _ in arguments] + [a.name for _, a in arguments])
        _writes[func] = places
    return places


def _negating(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Lets torch negate and conjugate tensors that are yet to be, which it leaves out under a mode: it has done so
    before, but for an operation that comes whole."""
    tensors = itertools.chain.from_iterable(map(_tensors, (*args, *kwargs.values())))
    if not any(tensor.is_neg() or tensor.is_conj() for tensor in tensors):
        return contextlib.nullcontext()
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    return torch._C._ForceDispatchKeyGuard(included, excluded - _LAZY)


def _reads_around(func: Any) -> bool:
    """Whether an operation may read memory of a storage beside the tensor's: the bytes between rows, or anywhere."""
    name = func._schema.name
    return name == "aten::copy" or name.startswith("aten::as_strided") or name.endswith("_scatter")


def _may_free(func: Any, place: object) -> bool:
    """Whether an operation may give an argument that it writes other memory."""
    # Those that are given by name are what results go to.
    return isinstance(place, str) or func._schema.name.startswith(("aten::resize", "aten::set_"))
