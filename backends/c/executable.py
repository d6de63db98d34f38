"""Running a program: memory, bound calls, and a short loop."""

from __future__ import annotations

import ctypes
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from shoestring.ir import DTYPE_NAMES, Function
from shoestring.ir.errors import RuntimeFault

from ..instructions import (
    Buffer,
    CallKernel,
    CallTorch,
    Copy,
    Instruction,
    Program,
    Region,
    Space,
    Way,
)
from .calls import KernelCalls, Pool
from .library import bind_call
from .lower import KernelInfo
from .openmp import considerate, is_small, let_go
from .pages import fresh_pages

Call = Callable[[], object]


@dataclass(frozen=True)
class Fallback:
    """An op whose results pass through memory of PyTorch's own."""

    op: str
    count: int
    why: str


@dataclass(frozen=True)
class CompileInfo:
    """How an executable came to be.

    Attributes:
        seconds: of the C compiler and of loading.
        cache_hit: whether the C compiler was not needed.
        source_folder: the emitted C; None where there is none.
    """

    seconds: float
    cache_hit: bool
    source_folder: Path | None


class CExecutable:
    """A compiled function for the host CPU.

    Attributes:
        program: the instructions; `str(program)` shows them.
        kernels: every C function, with the ops that it covers.
        info: compile time and cache.
    """

    def __init__(
        self,
        program: Program,
        kernels: list[KernelInfo],
        library: ctypes.CDLL | None,
        sources: Sequence[str],
        info: CompileInfo,
    ) -> None:
        self.program = program
        self.kernels = tuple(kernels)
        self.sources = tuple(sources)
        self.info = info
        self._arena = fresh_pages(program.plan.arena_bytes)
        self._arena_start = self._arena.data_ptr()
        self._constants = [t.contiguous() for t in program.constants]
        self._held: list[torch.Tensor | None] = [None] * len(program.function.params)
        self._keys: list[tuple[int, tuple[int, ...]] | None] = [None] * len(self._held)
        self._staged: dict[int, torch.Tensor] = {}
        self._all = [*program.instructions, *program.copies]
        self._kernels = KernelCalls(library, self._all, self._do_otherwise)
        self._calls: list[Call] = [
            self._kernels.stretch(i, 1) if isinstance(k, CallKernel) else _unbound
            for i, k in enumerate(self._all)
        ]
        self._stretches = list(self._whole_stretches(len(program.instructions)))
        self._outputs: list[torch.Tensor | None] = [None] * len(program.outputs)
        self._users = _users(self._all, program.outputs)
        self._written = {i for i, p in enumerate(program.function.params) if p.next is not None}
        self._types = [
            (p.value.type.dtype, p.value.type.static_shape) for p in program.function.params
        ]
        self._bind(range(len(self._all)), range(len(program.outputs)), skip_arguments=True)

    # -- facts ---------------------------------------------------------------------------------

    @property
    def function(self) -> Function:
        """What was compiled."""
        return self.program.function

    @property
    def source(self) -> str:
        """The emitted C."""
        return "\n".join(self.sources)

    @property
    def instructions(self) -> tuple[Instruction, ...]:
        """Everything that runs, copies at the end included."""
        return tuple(self._all)

    @property
    def arena_bytes(self) -> int:
        return self.program.plan.arena_bytes

    @property
    def transient_bytes(self) -> int:
        """The most that a library op without an out variant takes outside of the arena."""
        copied = [i for i in self._all if isinstance(i, CallTorch) and i.way is Way.COPIED]
        return max((sum(r.type.nbytes for r in i.op.results) for i in copied), default=0)

    @property
    def unbound_bytes(self) -> int:
        """What a step needs beside its arguments: the arena and what libraries take beside it."""
        return self.arena_bytes + self.transient_bytes

    @property
    def total_bytes(self) -> int:
        """Parameters, state, constants, arena and transients: what a step needs."""
        params = sum(p.value.type.nbytes for p in self.function.params)
        return params + sum(t.nbytes for t in self._constants) + self.unbound_bytes

    @property
    def fallbacks(self) -> tuple[Fallback, ...]:
        """Library ops without an out variant, by name."""
        calls = [i for i in self._all if isinstance(i, CallTorch) and i.way is Way.COPIED]
        counts = Counter((i.op.name, i.why) for i in calls)
        copied = "no out variant: computed in PyTorch's memory, then copied"
        return tuple(
            Fallback(name, n, f"{why}; {copied}" if why else copied)
            for (name, why), n in sorted(counts.items())
        )

    def describe(self) -> dict[str, object]:
        """Instructions, kernels, memory and fallbacks, for a report."""
        kinds = Counter(type(i).__name__ for i in self._all)
        calls = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
        seconds = f"built in {self.info.seconds:.1f} s"
        built = "taken from the cache" if self.info.cache_hit else seconds
        arena, total = self.arena_bytes / 1e6, self.total_bytes / 1e6
        return {
            "instructions": calls,
            "kernels": f"{len(self.kernels)}, {built}",
            "generated C": self.info.source_folder or "none",
            "memory": f"{total:.1f} MB for a step, of which {arena:.1f} MB arena",
            "fallbacks": [f"{f.op} ({f.count} times: {f.why})" for f in self.fallbacks],
        }

    # -- running -------------------------------------------------------------------------------

    def run(self, arguments: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The outputs; parameters with a next value are overwritten in place.

        Raises:
            RuntimeFault: SS5001 for a wrong number of arguments, SS5002 for a wrong type.
        """
        self.prepare(arguments)
        with torch.no_grad():
            for index, stretch in self._stretches:
                (stretch or self._calls[index])()
            outputs = self.collect()
            for call in self._calls[len(self.program.instructions) :]:
                call()
        self.finish(arguments)
        return outputs

    def prepare(self, arguments: Sequence[torch.Tensor]) -> None:
        """Binds the arguments; does nothing for those that are where they were."""
        Pool.resize(torch.get_num_threads())
        let_go()
        if len(arguments) != len(self._keys):
            what = f"@{self.function.name} takes {len(self._keys)} tensors, found {len(arguments)}"
            raise RuntimeFault("SS5001", what)
        changed: list[int] = []
        for i, t in enumerate(arguments):
            key = (t.data_ptr(), t.stride())
            if key != self._keys[i] or i in self._staged or t.shape != self._types[i][1]:
                changed.append(i)
        if changed:
            self._rebind(arguments, changed)
        for i, staged in self._staged.items():
            staged.copy_(arguments[i].detach())

    def collect(self) -> list[torch.Tensor]:
        """Copies of the outputs."""
        return [t.clone() for t in self._outputs if t is not None]

    def call(self, index: int) -> None:
        """Runs one instruction; for executors that look in between."""
        self._calls[index]()

    def finish(self, arguments: Sequence[torch.Tensor]) -> None:
        """Copies state back to arguments whose layout the code cannot write."""
        for i, staged in self._staged.items():
            if i in self._written:
                with torch.no_grad():
                    arguments[i].copy_(staged)

    def tensor(self, region: Region) -> torch.Tensor:
        """A region as a tensor over the executable's memory or its bound arguments."""
        space, index = region.buffer.space, region.buffer.index
        if space is Space.ARENA:
            start = self.program.plan.offsets[index]
            size = region.buffer.nbytes
            flat = self._arena[start : start + size].view(region.dtype)
        elif space is Space.CONSTANT:
            flat = self._constants[index].reshape(-1)
        else:
            held = self._held[index]
            assert held is not None, "an argument is bound before it is used"
            flat = held.reshape(-1)
        return torch.as_strided(
            flat, region.shape, region.strides, flat.storage_offset() + region.offset
        )

    def _do_otherwise(self, index: int) -> None:
        """Runs what stands in for a kernel that declined: it succeeds or raises PyTorch's error."""
        instruction = self._all[index]
        assert isinstance(instruction, CallKernel) and instruction.otherwise is not None
        self._bound(instruction.otherwise)()

    # -- binding -------------------------------------------------------------------------------

    def _rebind(self, arguments: Sequence[torch.Tensor], changed: list[int]) -> None:
        for i in changed:
            self._check(i, arguments[i])
        self._staged = {
            i: self._staged.get(i, torch.empty(0))
            for i in sorted(_must_stage(arguments, self._written))
        }
        dirty = set(changed) | self._staged.keys()
        for i in sorted(dirty):
            t = arguments[i]
            if i in self._staged:
                if self._staged[i].shape != t.shape or self._staged[i].dtype != t.dtype:
                    self._staged[i] = torch.empty(t.shape, dtype=t.dtype)
                self._held[i] = self._staged[i]
            else:
                self._held[i] = t.detach()
            self._keys[i] = (t.data_ptr(), t.stride())
        calls = sorted({c for i in dirty for c in self._users[0].get(i, ())})
        outs = sorted({o for i in dirty for o in self._users[1].get(i, ())})
        self._bind(calls, outs)

    def _check(self, i: int, t: torch.Tensor) -> None:
        dtype, shape = self._types[i]
        if t.dtype is dtype and tuple(t.shape) == shape and t.device.type == "cpu":
            return
        p = self.function.params[i]
        found = f"{DTYPE_NAMES.get(t.dtype, t.dtype)}{list(t.shape)} on {t.device}"
        what = f"{p.role.value} {p.path!r} was compiled as {p.value.type} on cpu, found {found}"
        raise RuntimeFault("SS5002", what, "", "compile again for this argument")

    def _whole_stretches(self, end: int) -> Iterator[tuple[int, Call | None]]:
        """Instruction and, where it begins a stretch of kernels, the call of all of them."""
        for is_kernel, group in itertools.groupby(
            range(end), lambda i: isinstance(self._all[i], CallKernel)
        ):
            indices = list(group)
            if is_kernel:
                yield indices[0], self._kernels.stretch(indices[0], len(indices))
            else:
                yield from ((i, None) for i in indices)

    def _bind(
        self, calls: Iterable[int], outputs: Iterable[int], skip_arguments: bool = False
    ) -> None:
        def waits(regions: Iterable[Region]) -> bool:
            return skip_arguments and any(r.buffer.space is Space.ARGUMENT for r in regions)

        for c in calls:
            instruction = self._all[c]
            if isinstance(instruction, CallKernel):
                self._kernels.bind(c, self._addresses(instruction, skip_arguments))
            elif not waits(instruction.regions):
                self._calls[c] = self._bound(instruction)
        for o in outputs:
            region = self.program.outputs[o]
            if not waits([region]):
                self._outputs[o] = self.tensor(region)

    def _addresses(self, call: CallKernel, first: bool) -> dict[int, int]:
        """Position -> address of a kernel's pointers: the fixed ones at first, then arguments."""
        return {
            position: self._start(region.buffer) + region.byte_offset
            for position, region in enumerate(call.pointers)
            if first != (region.buffer.space is Space.ARGUMENT)
        }

    def _start(self, buffer: Buffer) -> int:
        if buffer.space is Space.ARENA:
            return self._arena_start + self.program.plan.offsets[buffer.index]
        if buffer.space is Space.CONSTANT:
            return self._constants[buffer.index].data_ptr()
        held = self._held[buffer.index]
        assert held is not None, "an argument is bound before it is used"
        return held.data_ptr()

    def _bound(self, instruction: Instruction) -> Call:
        if isinstance(instruction, CallTorch):
            operands = [self._operand(o) for o in instruction.operands]
            outs = [self.tensor(r) for r in instruction.outs]
            call = bind_call(instruction.op, instruction.way, operands, outs)
            return considerate(call, is_small(instruction))
        assert isinstance(instruction, Copy)
        source, target = self.tensor(instruction.source), self.tensor(instruction.target)
        return lambda: target.copy_(source)

    def _operand(self, operand: object) -> object:
        if isinstance(operand, Region):
            return self.tensor(operand)
        if isinstance(operand, tuple):
            return [None if r is None else self.tensor(r) for r in operand]
        return operand


def _unbound() -> None:
    raise AssertionError("an instruction ran before its arguments were bound")


def _users(
    instructions: Sequence[Instruction], outputs: Sequence[Region]
) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """Argument -> the instructions, and the outputs, that touch it."""
    calls: dict[int, list[int]] = {}
    outs: dict[int, list[int]] = {}
    for i, instruction in enumerate(instructions):
        for index in {
            r.buffer.index for r in instruction.regions if r.buffer.space is Space.ARGUMENT
        }:
            calls.setdefault(index, []).append(i)
    for o, region in enumerate(outputs):
        if region.buffer.space is Space.ARGUMENT:
            outs.setdefault(region.buffer.index, []).append(o)
    return calls, outs


def _must_stage(arguments: Sequence[torch.Tensor], written: set[int]) -> set[int]:
    """Arguments that work on a private copy: of odd layout, or sharing memory that is written."""
    staged = {
        i for i, t in enumerate(arguments) if not t.is_contiguous() or t.is_neg() or t.is_conj()
    }
    spans = sorted(
        (t.data_ptr(), t.data_ptr() + _extent(t), i) for i, t in enumerate(arguments) if t.numel()
    )
    cluster: list[int] = []
    end = 0
    for start, stop, i in [*spans, (1 << 63, 1 << 63, -1)]:
        if start >= end:
            if len(cluster) > 1 and written & set(cluster):
                staged.update(cluster)
            cluster = []
        cluster.append(i)
        end = max(end, stop)
    return staged


def _extent(t: torch.Tensor) -> int:
    """Bytes from the first to behind the last element."""
    reach = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return (reach + 1) * t.element_size()
