"""Random programs of operations of torch. The same seed and tensors of the same forms give the same program, whatever
memory the tensors lie in.

A program takes views of tensors of a checkpoint, copies them into parameters, and reads and changes both, by the
dispatcher and past it. What an operation raises is one of its results.
"""

from __future__ import annotations

import copy
import ctypes
import io
import pickle
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

DTYPES = [
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.float8_e4m3fn),
    *(torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool),
]
# Rows above and below the 64 bytes that are worth a copy of their own.
SHAPES = [(12, 96), (3, 8, 64), (300,), (), (0, 9), (1, 1), (2, 3, 4, 5), (70, 3), (1, 40)]
LENGTH = 3000  # elements of a parameter


class Plain(torch.Tensor):
    """A subclass whose operations are torch's."""


class Pair(torch.Tensor):
    """A subclass whose operations are those of two tensors."""

    @staticmethod
    def __new__(cls, a: Any, b: Any) -> Any:
        return torch.Tensor._make_wrapper_subclass(
            cls, a.shape, a.stride(), a.storage_offset(), dtype=a.dtype, device=a.device
        )

    def __init__(self, a: Any, b: Any) -> None:
        self.a, self.b = a, b

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def half(value: Any, name: str) -> Any:
            return getattr(value, name) if isinstance(value, Pair) else value

        halves = [
            func(*(half(arg, name) for arg in args), **{k: half(v, name) for k, v in (kwargs or {}).items()})
            for name in "ab"
        ]
        return args[0] if func._schema.name.endswith("_") else Pair(*halves)


class Program:
    """`steps` operations. Then `results` has all that was written to, and all that was found."""

    def __init__(self, seed: int, tensors: Iterable[tuple[str, Any]], steps: int) -> None:
        self.random = random.Random(seed)
        self.sources = [tensor for _, tensor in sorted(tensors, key=lambda pair: pair[0])]
        self.parameters = [torch.zeros(LENGTH, dtype=dtype) for dtype in DTYPES]
        self.made: list[Any] = []  # by operations
        self.results: list[Any] = [*self.parameters, *self.sources]
        self.log: list[str] = []
        for _ in range(steps):
            name, step = self.one_of(self.one_of([COPIES, COPIES, WRITES, READS]))
            self.log.append(name)
            result = self.attempt(step, self)
            if isinstance(result, torch.Tensor):
                self.made = [*self.made, result][-9:]
            self.results.append(result)

    def one_of(self, choices: Any) -> Any:
        return choices[self.random.randrange(len(choices))]

    def chance(self, of: float) -> bool:
        return self.random.random() < of

    def attempt(self, function: Callable[..., Any], *args: Any) -> Any:
        try:
            return function(*args)
        except Exception as e:  # the other way must raise it too
            return type(e).__name__

    def view(self, tensor: Any) -> Any:
        for _ in range(self.random.randrange(4)):
            name, view = self.one_of(VIEWS)
            other = self.attempt(view, self, tensor)
            if isinstance(other, torch.Tensor):
                tensor = other
            self.log.append(f"  {name} {tuple(tensor.shape)} {tensor.dtype}")
        return tensor

    def source(self) -> Any:
        return self.view(self.one_of(self.sources))

    def target(self) -> Any:
        """Something to write to; now and then it is a source."""
        few = self.sources if self.chance(0.3) else self.made or self.parameters
        return self.view(self.one_of(self.parameters if self.chance(0.6) else few))

    def any(self) -> Any:
        return self.source() if self.chance(0.5) else self.target()

    def place(self, source: Any, same: bool = True) -> Any:
        """A place in a parameter for a tensor: its dimensions in any order, with gaps between rows. If not the `same`,
        it may be of another dtype, or of another dimension."""
        shape = list(source.shape)
        if not same and len(shape) < 3 and self.chance(0.15):
            shape.insert(0, 2)
        dtype = source.dtype if same or self.chance(0.85) else self.one_of(DTYPES)
        parameter = next(parameter for parameter in self.parameters if parameter.dtype is dtype)
        order = list(range(len(shape)))
        if self.chance(0.3):
            self.random.shuffle(order)
        for gap in (self.one_of([0, 0, 0, 1, 17]), 0):
            strides, step = [0] * len(shape), 1
            for number, dim in enumerate(reversed(order)):
                strides[dim] = step
                step = step * max(shape[dim], 1) + (gap if number == 0 else 0)
            if step <= LENGTH:
                break
        if step > LENGTH:
            return torch.zeros(shape, dtype=dtype)
        return parameter.as_strided(shape, strides, self.one_of([0, self.random.randrange(LENGTH - step + 1)]))

    def dim(self, tensor: Any) -> int:
        return self.random.randrange(-tensor.dim(), tensor.dim())

    def length(self, tensor: Any, dim: int) -> int:
        return self.random.randrange(tensor.shape[dim])

    def index(self) -> Any:
        some = [slice(None), slice(1, None), slice(None, None, 2), slice(-3, None), slice(2, -1, 3), 0, -1, None, ...]
        return self.one_of(some), self.one_of(some[:-1])


def order(p: Program, t: Any) -> list[int]:
    return p.random.sample(range(t.dim()), t.dim())


def narrowed(p: Program, t: Any) -> Any:
    dim = p.dim(t)
    start = p.length(t, dim)
    return t.narrow(dim, start, p.random.randrange(t.shape[dim] - start + 1))


def selected(p: Program, t: Any) -> Any:
    dim = p.dim(t)
    return t.select(dim, p.length(t, dim))


def in_place(p: Program, t: Any) -> Any:
    return p.one_of([torch.Tensor.t_, torch.Tensor.squeeze_, lambda t: t.unsqueeze_(0)])(t.detach())


def past(use: Callable[[Program, Any], Any]) -> Callable[[Program, Any], Any]:
    """An access past the dispatcher, where a tensor has memory of its own."""
    return lambda p, t: use(p, t) if t.numel() and not isinstance(t, Pair) else None


def of_storage(p: Program, t: Any) -> Any:
    other = torch.empty(0, dtype=t.dtype)
    return other.set_(t.untyped_storage(), t.storage_offset(), t.shape, t.stride())


Named = list[tuple[str, Callable[..., Any]]]

VIEWS: Named = [
    *3 * [("narrow", narrowed)],
    *2 * [("select", selected)],
    *2 * [("index", lambda p, t: t[p.index()])],
    *2 * [("view", lambda p, t: t.view(-1))],
    *2 * [("transpose", lambda p, t: t.transpose(p.dim(t), p.dim(t)))],
    *2 * [("expand", lambda p, t: t.unsqueeze(0).expand(p.random.randrange(1, 4), *t.shape))],
    *2 * [("view of a dtype", lambda p, t: t.view(p.one_of(DTYPES[:-1])))],  # a bool has two values
    ("chunk", lambda p, t: p.one_of(t.chunk(p.random.randrange(1, 4), p.dim(t)))),
    ("split", lambda p, t: p.one_of(t.split(p.random.randrange(1, 9), p.dim(t)))),
    ("tensor_split", lambda p, t: p.one_of(t.tensor_split(3, p.dim(t)))),
    ("unbind", lambda p, t: p.one_of(t.unbind(p.dim(t)))),
    ("squeeze", lambda p, t: t.squeeze()),
    ("unsqueeze", lambda p, t: t.unsqueeze(p.random.randrange(-1, t.dim() + 1))),
    ("reshape", lambda p, t: t.reshape(-1, p.one_of([2, 3, 32, 96]))),
    ("flatten", lambda p, t: t.flatten()),
    ("unflatten", lambda p, t: t.unflatten(p.dim(t), (p.one_of([2, 3, 4]), -1))),
    ("permute", lambda p, t: t.permute(order(p, t))),
    ("movedim", lambda p, t: t.movedim(p.dim(t), 0)),
    ("t", lambda p, t: t.t()),
    ("mT", lambda p, t: t.mT),
    ("broadcast_to", lambda p, t: t.broadcast_to(2, *t.shape)),
    ("as_strided", lambda p, t: t.as_strided((2, t.numel() // 4), (p.one_of([0, 1, t.numel() // 3]), 1))),
    ("diagonal", lambda p, t: t.diagonal(p.random.randrange(-1, 2), 0, -1)),
    ("unfold", lambda p, t: t.unfold(p.dim(t), 3, p.one_of([1, 2]))),
    ("detach", lambda p, t: t.detach()),
    ("data", lambda p, t: t.data),
    ("contiguous", lambda p, t: t.contiguous()),
    ("real", lambda p, t: t.real),
    ("imag", lambda p, t: t.imag),
    ("conj", lambda p, t: t.conj()),
    ("neg", lambda p, t: torch._neg_view(t) if t.dtype is torch.float32 else t),
    ("in place", in_place),
    ("a storage's", past(of_storage)),
    ("Plain", lambda p, t: t.as_subclass(Plain)),
    ("Parameter", lambda p, t: torch.nn.Parameter(t, requires_grad=False)),
]


def copied(p: Program) -> Any:
    source = p.source()
    place = p.place(source, same=False)
    place.copy_(source, non_blocking=p.chance(0.5))
    return place[(-1,) * place.dim()].clone() if p.chance(0.2) else None


def within_a_source(p: Program) -> None:
    source = p.source()
    half = source.shape[0] // 2
    source[:half].copy_(source[source.shape[0] - half :])


def copied_twice(p: Program) -> None:
    source = p.source()
    place = p.place(source)
    place.copy_(source)
    half = place.shape[0] // 2
    place[:half].copy_(source[place.shape[0] - half :])


def shards(p: Program) -> None:
    source = p.source()
    for shard in source.chunk(p.random.randrange(1, 4), p.dim(source)):
        p.place(shard).copy_(shard)


def between_fills(p: Program) -> None:
    source = p.source()
    place = p.place(source)
    place.fill_(1)
    place.copy_(source)
    place[..., :1].fill_(0)


def in_a_pair(p: Program) -> None:
    source = p.source()
    other = Pair(source, source.clone()) if p.chance(0.5) else source
    Pair(p.place(source), p.place(source)).copy_(other)


def into_new(p: Program) -> Any:
    """Into a parameter of its own, whose memory may be replaced while bytes are under way to it."""
    source = p.source()
    parameter = torch.nn.Parameter(torch.zeros_like(source), requires_grad=False)
    if p.chance(0.2):
        parameter.data = source
    else:
        parameter.data.copy_(source)
    if p.chance(0.2):
        parameter.data = torch.ones(3, dtype=source.dtype)
    return parameter


def into_resized(p: Program) -> Any:
    source = p.source()
    memory = torch.zeros(source.numel() + 8, dtype=source.dtype)
    memory[8:].copy_(source.reshape(-1))
    memory[:8].detach().resize_(LENGTH + source.numel())
    return memory.clone()


def part_of_storage(p: Program, t: Any) -> Any:
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()[1:99], 0, (90,))


def loaded(p: Program) -> Any:
    source = p.source()
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.zeros_like(source), requires_grad=False)
    module.load_state_dict({"weight": source}, assign=p.chance(0.5))
    return module.weight


def to(p: Program, use: Callable[..., Any], source: Any = None) -> Any:
    source = p.source() if source is None else source
    return use(p.place(source), source)


COPIES: Named = [
    *12 * [("copy", copied)],
    *3 * [("twice", copied_twice), ("shards", shards), ("between fills", between_fills)],
    *2 * [("into new", into_new), ("in a pair", in_a_pair)],
    ("into resized", into_resized),
    ("within a source", within_a_source),
    ("a module's", loaded),
    ("of anything", lambda p: to(p, lambda d, s: d.copy_(s), p.any())),
    ("setitem", lambda p: to(p, lambda d, s: d.__setitem__(slice(2), s[:2]))),
    ("foreach", lambda p: to(p, lambda d, s: torch._foreach_copy_([d], [s])[0])),
    ("functional", lambda p: to(p, torch.ops.aten.copy)),
    ("vmap", lambda p: to(p, torch.vmap(lambda d, s: d.copy_(s)))),
    ("functionalized", lambda p: to(p, torch.func.functionalize(lambda d, s: d.copy_(s) + 0))),
    ("out", lambda p: to(p, lambda d, s: torch.cat([s[:1], s[1:]], out=d))),
    ("to a subclass", lambda p: to(p, lambda d, s: d.as_subclass(Plain).copy_(s))),
    ("to a conjugate", lambda p: to(p, lambda d, s: d.conj().copy_(s))),
    ("with gradient", lambda p: to(p, lambda d, s: (torch.zeros(s.shape, requires_grad=True) * 1).copy_(s).detach())),
    ("to itself", lambda p: (lambda t: t.copy_(t.flip(0)))(p.target())),
]
WRITES: Named = [
    (name, lambda p, write=write: write(p, p.target()))
    for name, write in [
        ("zero", lambda p, t: t.zero_()),
        ("add", lambda p, t: t.add_(1)),
        ("add a source", lambda p, t: t.add_(p.source().flatten()[:1])),
        ("clamp", lambda p, t: t.clamp_(0, 3)),
        ("masked_fill", lambda p, t: t.masked_fill_(t == 1, 3)),
        ("setitem", lambda p, t: t.__setitem__((..., slice(0, 1)), 1)),
        ("swap rows", lambda p, t: t.__setitem__([0, 1], t[[1, 0]])),
        ("index_copy", lambda p, t: t.index_copy_(0, torch.tensor([0, 1]), t[1:3].clone())),
        ("foreach", lambda p, t: torch._foreach_add_([t], 1)[0]),
        ("vmap", lambda p, t: torch.vmap(lambda t: t.add_(1))(t)),
        ("out", lambda p, t: torch.add(t, 1, out=t)),
        ("set", lambda p, t: t.detach().set_(torch.ones(5, dtype=t.dtype))),
        ("pair's add", lambda p, t: Pair(t, t.clone()).add_(1)),
        ("numpy", past(lambda p, t: t.detach().numpy().fill(1))),
        ("of numpy", past(lambda p, t: torch.from_numpy(t.detach().numpy()).fill_(1))),
        ("dlpack", past(lambda p, t: torch.from_dlpack(t.detach()).fill_(1))),
        ("storage", past(lambda p, t: t.untyped_storage().fill_(1) and None)),
        ("data_ptr", past(lambda p, t: ctypes.memset(t.data_ptr(), 1, t.itemsize) and None)),
        ("apply", past(lambda p, t: t.detach().apply_(lambda x: 1))),
        ("map", past(lambda p, t: t.detach().map_(p.place(t), lambda x, y: y))),
        ("map2", past(lambda p, t: t.detach().map2_(p.place(t), p.place(t), lambda x, y, z: z))),
        # From now on two storages share memory.
        ("keep numpy's", past(lambda p, t: torch.from_numpy(t.detach().numpy()))),
        ("keep dlpack's", past(lambda p, t: torch.from_dlpack(t.detach()))),
        ("keep a part", past(part_of_storage)),
    ]
]


def saved(p: Program, t: Any) -> Any:
    file = io.BytesIO()
    torch.save(t.detach().as_subclass(torch.Tensor), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def gradient(p: Program, t: Any) -> Any:
    leaf = t.detach().float().requires_grad_(True)
    (leaf * leaf).sum().backward()
    return leaf.grad.reshape(-1)


READS: Named = [
    (name, lambda p, read=read: read(p, p.any()))
    for name, read in [
        ("clone", lambda p, t: t.clone()),
        ("to", lambda p, t: t.to(p.one_of(DTYPES))),
        ("to copy", lambda p, t: t.to("cpu", copy=True)),
        ("cat", lambda p, t: torch.cat([t.flatten()[:50], p.any().flatten()[:20].to(t.dtype)])),
        ("stack", lambda p, t: torch.stack([t, torch.ones_like(t)])),
        ("sum", lambda p, t: t.sum()),
        ("equal", lambda p, t: torch.equal(t, p.place(t))),
        ("gather", lambda p, t: t[[0, -1]]),
        ("masked", lambda p, t: t[t == 1]),
        ("item", lambda p, t: repr(t.flatten()[-1].item())),
        ("numbers", past(lambda p, t: torch.tensor([t.flatten()[0], t.flatten()[-1]]))),
        ("tolist", past(lambda p, t: repr(t.tolist()))),
        ("repr", past(lambda p, t: repr(t.detach()[(-1,) * t.dim()]))),
        ("numpy", past(lambda p, t: t.detach().numpy().tobytes())),
        ("asarray", past(lambda p, t: np.asarray(t.detach()).tobytes())),
        ("data_ptr", past(lambda p, t: ctypes.string_at(t.data_ptr(), t.itemsize))),
        ("storage", past(lambda p, t: t.untyped_storage()[t.storage_offset() * t.itemsize])),
        ("deepcopy", past(lambda p, t: copy.deepcopy(t.detach().as_subclass(torch.Tensor)))),
        ("pickle", past(lambda p, t: pickle.loads(pickle.dumps(t.detach().as_subclass(torch.Tensor))))),
        ("save", past(saved)),
        ("vmap", lambda p, t: torch.vmap(lambda t: torch.zeros_like(t).copy_(t))(t)),
        ("gradient", gradient),
        ("sparse", lambda p, t: t.as_subclass(torch.Tensor).to_sparse().to_dense()),
        ("pair", lambda p, t: Pair(t, t)),
    ]
]
