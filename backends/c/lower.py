"""The pipeline of the backend: nodes, units, order, buffers, memory plan, kernels, instructions."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from shoestring.ir import Function, Loc, Op
from shoestring.ir.errors import BackendError

from ..instructions import (
    Buffer,
    CallKernel,
    CallTorch,
    Copy,
    Instruction,
    Program,
    Region,
    RegionOperand,
    Space,
    contiguous_strides,
)
from ..memory import Lifetime, plan_memory
from .accounting import work_of_op, work_of_unit
from .claims import Claim, claim
from .column_sums import ColumnSumWriter
from .decompositions import decompose
from .distance import read_far_away
from .groups import Grouping, Unit
from .kernels import Kernel, KernelWriter
from .library import way_of
from .nodes import Base, Node, NodeOperand, Ref, WorkList, normalize
from .product_kernels import ProductWriter
from .schedule import Order, schedule
from .tuning import slower_products

SOURCE_FILES = 4
HEADER_OF = {
    "gemm.h": r"\bss_gemm", "attention.h": r"\bss_attention_\w+ward\(",
    "attention_f64.h": r"\bss_attention_\w+_f64\(", "run.h": r"\bss_declined",
    "far.h": r"\bss_store_far\b", "draws.h": r"\bss_uniform\b",
}  # fmt: skip


@dataclass(frozen=True)
class KernelInfo:
    """A C function and what it is for."""

    name: str
    ops: tuple[str, ...]
    calls: int


@dataclass
class Lowered:
    """A program and the C that it calls."""

    program: Program
    sources: list[str]
    kernels: list[KernelInfo]


def lower(function: Function, *, fuse: bool = True, measure: bool = False) -> Lowered:
    """The function as instructions over planned memory, and the C source of its kernels.

    Args:
        function: with static shapes.
        fuse: whether nodes share kernels.
        measure: whether products that this machine's library may make faster are tried both ways.

    Raises:
        BackendError: SS4101 where a shape is symbolic, SS4102 where an encoding is not dense.
    """
    _check(function)
    decomposed = decompose(function)
    work = normalize(decomposed, slower_products(decomposed) if measure else None)
    grouping = Grouping(work, fuse)
    units = grouping.finished()
    stored = _stored(work, grouping)
    order = schedule(work, units, grouping.atoms, stored)
    lowered = _Emitter(function, work, grouping, order, stored).emit()
    work.forget()
    return lowered


def _check(function: Function) -> None:
    for value in function.values:
        if not value.type.is_static:
            what = f"static shapes are required, found {value!r}"
            raise BackendError("SS4101", what, "", "compile for one size of the batch")
        if value.type.encoding.kind != "dense":
            raise BackendError("SS4102", f"dense storage is required, found {value!r}")


def _stored(work: WorkList, grouping: Grouping) -> set[Base]:
    """Results of nodes that must be in memory: read by another unit, or at the end."""
    ends = (*(work.refs[o.value] for o in work.function.outputs), *work.nexts.values())
    stored = {r.base for r in ends if r.base.node is not None}
    for node in work.nodes:
        home = grouping.unit_of[node]
        if grouping.units[home].library:
            stored.update(node.outs)
        for ref in node.refs:
            producer = ref.base.node
            if producer is not None and grouping.unit_of[producer] != home:
                stored.add(ref.base)
    return stored


@dataclass
class _CFunction:
    """Kernels of equal text: their name, the first of them, and how many they are."""

    name: str
    first: Kernel
    calls: int = 0

    def written(self, text: str) -> str:
        """The text that they have, under their name."""
        many = f"// called {self.calls} times; named here as in the first call\n"
        return f"{many * (self.calls > 1)}{self.first.comment}\n{text.replace('@', self.name)}"


@dataclass
class _Emitter:
    function: Function
    work: WorkList
    grouping: Grouping
    order: Order
    stored: set[Base]
    buffers: dict[Base, Buffer] = field(default_factory=dict[Base, Buffer])
    arena: list[Buffer] = field(default_factory=list[Buffer])
    extra: list[Buffer] = field(default_factory=list[Buffer])
    constants: list[torch.Tensor] = field(default_factory=list[torch.Tensor])
    functions: dict[str, _CFunction] = field(default_factory=dict[str, _CFunction])

    def __post_init__(self) -> None:
        self.known = set(self.function.values)
        self.far = read_far_away(self.order.units, self.order.in_place)

    # -- buffers -------------------------------------------------------------------------------

    def buffer_of(self, base: Base) -> Buffer:
        """Where a base is; for a next value written in place, its parameter's storage."""
        found = self.buffers.get(base)
        if found is not None:
            return found
        if base in self.order.in_place:
            buffer = self.buffer_of(self.order.in_place[base])
        elif base.param is not None:
            buffer = Buffer(Space.ARGUMENT, base.param, base.nbytes, base.label)
        elif base.constant is not None:
            buffer = Buffer(Space.CONSTANT, len(self.constants), base.nbytes, base.label)
            self.constants.append(base.constant)
        else:
            buffer = Buffer(Space.ARENA, len(self.arena), base.nbytes, base.label)
            self.arena.append(buffer)
        self.buffers[base] = buffer
        return buffer

    def region(self, ref: Ref) -> Region:
        layout = ref.layout
        return Region(
            self.buffer_of(ref.base), ref.dtype, layout.offset, layout.shape, layout.strides
        )

    def whole(self, base: Base) -> Region:
        return Region(
            self.buffer_of(base), base.dtype, 0, base.shape, contiguous_strides(base.shape)
        )

    # -- instructions --------------------------------------------------------------------------

    def emit(self) -> Lowered:
        units = [u for u in self.order.units if u.nodes[0].node not in self.order.joins.nodes]
        instructions = list(map(self.instruction, units))
        copies = tuple(
            Copy(self.region(ref), self.whole(old), f"new {old.label}")
            for ref, old in self.order.late
        )
        outputs = tuple(self.region(self.work.refs[o.value]) for o in self.work.function.outputs)
        plan = plan_memory(self.lifetimes(units, instructions, copies, outputs))
        program = Program(
            self.function, (*dict.fromkeys(self.buffers.values()), *self.extra),
            tuple(instructions),
            copies, outputs, tuple(self.constants), plan,
        )  # fmt: skip
        infos = [KernelInfo(f.name, f.first.ops, f.calls) for f in self.functions.values()]
        return Lowered(program, self.sources(), infos)

    def instruction(self, unit: Unit) -> Instruction:
        """What a unit becomes; nothing is left of its nodes, whose number may be large."""
        made = self.library_instruction(unit) if unit.library else self.kernel_call(unit)
        unit.nodes.clear()
        self.grouping.atoms.forget()
        return made

    def library_instruction(self, unit: Unit) -> Instruction:
        node = unit.nodes[0].node
        found = claim(node)
        if isinstance(found, Claim):
            return self.claimed_call(node, found)
        return self.library_call(node, found or self.work.refused.get(node.op, ""))

    def library_call(self, node: Node, why: str) -> CallTorch:
        operands = tuple(self.operand(o) for o in node.operands)
        return CallTorch(
            node.op, operands, tuple(self.whole(b) for b in node.outs), way_of(node.op), why
        )

    def claimed_call(self, node: Node, found: Claim) -> CallKernel:
        """A call of C that a claimer wrote for one node."""
        ops = (node.op.name,)
        kernel = Kernel(
            found.body, found.comment, (), found.written, ops, found.stem, found.helper,
            found.scratch,
        )  # fmt: skip
        name = self.name_of(kernel)
        pointers = tuple(self.region(r) for r in found.pointers)
        written = tuple(pointers[i] for i in found.written)
        if found.scratch:
            pointers += (self.scratch(kernel),)
        places = {b.value: self.whole(b) for b in node.outs}
        places |= {v: self.region(r) for v, r in zip(node.op.results, node.results, strict=False)}
        results = {v: r for v, r in places.items() if v in self.known}
        work = work_of_op(node.op, map(self.region, found.pointers))
        why = "written for this op"
        otherwise = self.library_call(node, "its kernel declined") if found.declines else None
        return CallKernel(name, pointers, written, results, ops, node.loc, work, why, otherwise)

    def name_of(self, kernel: Kernel) -> str:
        """The C function's name; kernels of equal text share one."""
        found = self.functions.get(kernel.text)
        if found is None:
            found = _CFunction(f"k{len(self.functions)}_{kernel.stem}", kernel)
            self.functions[kernel.text] = found
        found.calls += 1
        return found.name

    def operand(self, operand: NodeOperand) -> RegionOperand:
        if isinstance(operand, Ref):
            return self.region(operand)
        if isinstance(operand, tuple):
            return tuple(None if r is None else self.region(r) for r in operand)
        return operand

    def kernel_call(self, unit: Unit) -> CallKernel:
        writer = _writer_of(unit)
        kernel = writer(
            unit, self.grouping.atoms, self.buffer_of, self.stored, self.order.in_place, self.far
        ).write()
        name = self.name_of(kernel)
        pointers = tuple(
            Region(b, dtype, offset, *_flat(b.nbytes // dtype.itemsize - offset))
            for b, offset, dtype in kernel.buffers
        )
        if kernel.scratch:
            pointers += (self.scratch(kernel),)
        made = [b for b in unit.makes if b in self.stored]
        # Values within a decomposition are not the function's: nothing to compare them with.
        results = {b.value: self.whole(b) for b in made if b.value in self.known}
        written = tuple(pointers[i] for i in kernel.written)
        loc = _loc_of([p.node.op for p in unit.nodes])
        work = work_of_unit(unit, self.stored)
        return CallKernel(name, pointers, written, results, kernel.ops, loc, work, _kind(unit))

    def scratch(self, kernel: Kernel) -> Region:
        """Memory that one call of a kernel needs beside what it reads and writes."""
        name = self.functions[kernel.text].name
        buffer = Buffer(Space.ARENA, len(self.arena), kernel.scratch, f"scratch of {name}")
        self.arena.append(buffer)
        self.extra.append(buffer)
        return Region(buffer, torch.uint8, 0, *_flat(kernel.scratch))

    # -- memory --------------------------------------------------------------------------------

    def lifetimes(
        self,
        units: Sequence[Unit],
        instructions: Sequence[Instruction],
        copies: Sequence[Copy],
        outputs: Sequence[Region],
    ) -> list[Lifetime]:
        first: dict[Buffer, int] = {}
        last: dict[Buffer, int] = {}
        for i, instruction in enumerate(instructions):
            for r in instruction.regions:
                first.setdefault(r.buffer, i)
                last[r.buffer] = i
        end = len(instructions)
        for r in (*outputs, *(c.source for c in copies)):
            first.setdefault(r.buffer, end)
            last[r.buffer] = end
        parts: dict[Buffer, tuple[int, int]] = {}
        for base, (whole, at) in self.order.joins.places.items():
            own, home = self.buffer_of(base), self.buffer_of(whole)
            parts[own] = home.index, at
            begin = first.setdefault(home, end)  # nobody may read it
            last[home] = max(last.get(home, end), last[own])
            last[own] = begin - 1
        stretches = list(self.stretches(units, first))
        last.update((home, first[home]) for home in map(self.buffer_of, self.order.releases))
        buffers = [
            Lifetime(b.index, b.nbytes, first[b], last[b], b.label, *parts.get(b, (None, 0)))
            for b in self.arena
        ]
        return buffers + stretches

    def stretches(self, units: Sequence[Unit], written: Mapping[Buffer, int]) -> Iterator[Lifetime]:
        """What is left of buffers that are released stretch by stretch, once they are written."""
        position = {unit.index: i for i, unit in enumerate(units)}
        number = itertools.count(len(self.arena))
        for base, released in self.order.releases.items():
            home = self.buffer_of(base)
            since = written[home] + 1
            for s in released:
                read = position[s.last.index]
                yield Lifetime(next(number), s.nbytes, since, read, home.label, home.index, s.at)

    # -- source --------------------------------------------------------------------------------

    def sources(self) -> list[str]:
        """The kernels as C files of about equal length, comments not counted: those change with
        every line that the user adds."""
        parts: list[list[str]] = [[] for _ in range(min(SOURCE_FILES, len(self.functions)))]
        lengths = [0] * len(parts)
        for body, function in self.functions.items():
            shortest = lengths.index(min(lengths))
            parts[shortest].append(function.written(body))
            lengths[shortest] += len(body)
        return [_file("\n".join(part)) for part in parts]


def _kind(unit: Unit) -> str:
    """What a generated kernel is, for a reader of its times."""
    count = len(unit.nodes)
    if unit.product is not None:
        return "product" if count == 1 else f"product, {count - 1} ops on each block of it"
    return f"{count} ops in one pass" if count > 1 else "one op"


def _writer_of(unit: Unit) -> type[KernelWriter]:
    if unit.product is not None:
        return ProductWriter
    return KernelWriter if unit.columns is None else ColumnSumWriter


def _file(text: str) -> str:
    """A C file: what it includes, and kernels."""
    headers = [name for name, use in HEADER_OF.items() if re.search(use, text)]
    return "".join(f'#include "{name}"\n' for name in (*headers, "prelude.h")) + f"\n{text}"


def _flat(count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (count,), (1,)


def _loc_of(ops: Sequence[Op]) -> Loc:
    """The last op's place that is known."""
    known = [op.loc for op in ops if op.loc != Loc()]
    return known[-1] if known else Loc()
