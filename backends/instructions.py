"""A compiled function: a flat list of typed instructions over planned buffers.

    Program     = function, buffers, instructions, outputs, plan
    Instruction = CallKernel | CallTorch | Copy
    Region      = buffer, dtype, offset, shape, strides (all in elements of dtype)

Nothing is decided when the list runs. Printing it shows everything that a step does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any

import torch

from shoestring.ir import DTYPE_NAMES, Function, Loc, Number, Op, Value

from .memory import Plan


class Space(Enum):
    """Where a buffer lives."""

    ARENA = "arena"
    ARGUMENT = "argument"
    CONSTANT = "constant"


@dataclass(frozen=True, eq=False, slots=True)
class Buffer:
    """A stretch of memory.

    Attributes:
        space: who owns it.
        index: number within its space; for an argument, the parameter's position.
        nbytes: its size.
        label: the user's name of what it holds.
    """

    space: Space
    index: int
    nbytes: int
    label: str

    def __str__(self) -> str:
        return f"{self.space.value}{self.index}"


@dataclass(frozen=True, slots=True)
class Region:
    """A strided part of a buffer, as a tensor."""

    buffer: Buffer
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def byte_offset(self) -> int:
        return self.offset * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Of its elements, each once."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def is_contiguous(self) -> bool:
        return self.strides == contiguous_strides(self.shape)

    def __str__(self) -> str:
        text = f"{self.buffer}:{DTYPE_NAMES[self.dtype]}[{','.join(map(str, self.shape))}]"
        text += f"+{self.offset}" if self.offset else ""
        return text if self.is_contiguous else f"{text}@{','.join(map(str, self.strides))}"


@cache
def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides, in elements."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


RegionOperand = Region | Number | None | tuple[Region | None, ...]


@dataclass(frozen=True, slots=True)
class Work:
    """What an instruction has to do at least.

    Attributes:
        flops: floating-point operations of its products; of all its ops where it has none.
        bytes: read and written, each element once.
        dtype: of the factors of its products.
    """

    flops: int = 0
    bytes: int = 0
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, eq=False, slots=True)
class CallKernel:
    """Calls generated code with pointers to regions.

    Attributes:
        kernel: name of the C function.
        pointers: what the kernel reads and writes, in its own order.
        writes: those of `pointers` that it writes.
        results: the values that are in memory after it, and where.
        ops: names of the IR ops that it carries out.
        work: what they have to do at least.
        why: what kind of kernel it is.
        otherwise: what is done instead where the kernel declines; None where it never does.
    """

    kernel: str
    pointers: tuple[Region, ...]
    writes: tuple[Region, ...]
    results: Mapping[Value, Region]
    ops: tuple[str, ...]
    loc: Loc = Loc()
    work: Work = Work()
    why: str = ""
    otherwise: CallTorch | None = None

    @property
    def name(self) -> str:
        return self.kernel

    @property
    def regions(self) -> tuple[Region, ...]:
        return self.pointers

    def __str__(self) -> str:
        written = ", ".join(str(r) for r in self.writes)
        read = ", ".join(str(r) for r in self.pointers if r not in self.writes)
        return f"{written} = kernel {self.kernel}({read})"


class Way(Enum):
    """How a PyTorch kernel's results reach their buffers."""

    OUT = "out"
    DIRECT = "direct"
    COPIED = "copied"


@dataclass(frozen=True, eq=False, slots=True)
class CallTorch:
    """Calls a PyTorch kernel.

    Attributes:
        op: the IR op.
        operands: the op's operands with each value's region in its place.
        outs: where the results go.
        way: through the op's out variant; through code of ours that writes in place; or computed
            in memory of PyTorch's own and copied.
        why: why generated code does not do it, where that is known.
    """

    op: Op
    operands: tuple[RegionOperand, ...]
    outs: tuple[Region, ...]
    way: Way
    why: str = ""

    @property
    def name(self) -> str:
        return self.op.name

    @property
    def loc(self) -> Loc:
        return self.op.loc

    @property
    def results(self) -> Mapping[Value, Region]:
        return dict(zip(self.op.results, self.outs, strict=False))

    @property
    def writes(self) -> tuple[Region, ...]:
        return self.outs

    @property
    def regions(self) -> tuple[Region, ...]:
        return (*operand_regions(self.operands), *self.outs)

    def __str__(self) -> str:
        outs = ", ".join(str(r) for r in self.outs)
        return f"{outs} = {self.op.name}({', '.join(map(_show, self.operands))}) [{self.way.value}]"


@dataclass(frozen=True, eq=False, slots=True)
class Copy:
    """Copies a region: a next value that could not be computed in its parameter's storage."""

    source: Region
    target: Region
    why: str = ""
    loc: Loc = Loc()

    @property
    def name(self) -> str:
        return "copy"

    @property
    def results(self) -> Mapping[Value, Region]:
        return {}

    @property
    def writes(self) -> tuple[Region, ...]:
        return (self.target,)

    @property
    def regions(self) -> tuple[Region, ...]:
        return (self.source, self.target)

    def __str__(self) -> str:
        return f"{self.target} = copy({self.source})" + (f"  // {self.why}" if self.why else "")


Instruction = CallKernel | CallTorch | Copy


@dataclass(frozen=True, eq=False)
class Program:
    """Everything that running a function takes, except memory and code.

    Attributes:
        function: what was compiled.
        instructions: in order of execution; outputs are read after the last that is not a
            `Copy`, then the copies run.
        outputs: where each output is.
        constants: contents of the buffers in space `constant`.
        plan: where each arena buffer is.
    """

    function: Function
    buffers: tuple[Buffer, ...]
    instructions: tuple[Instruction, ...]
    copies: tuple[Copy, ...]
    outputs: tuple[Region, ...]
    constants: tuple[torch.Tensor, ...]
    plan: Plan

    def __str__(self) -> str:
        lines = [f"program @{self.function.name} {{"]
        lines += [f"  arena {self.plan.arena_bytes} bytes"]
        for b in self.buffers:
            where = f" at {self.plan.offsets[b.index]}" if b.space is Space.ARENA else ""
            lines.append(f"  {b}: {b.nbytes} bytes{where}  // {b.label}")
        lines += [f"  {i}" for i in self.instructions]
        names = (o.name for o in self.function.outputs)
        lines += [f"  output {n} = {r}" for n, r in zip(names, self.outputs, strict=True)]
        lines += [f"  {c}" for c in self.copies]
        return "\n".join([*lines, "}"]) + "\n"


def operand_regions(operands: tuple[RegionOperand, ...]) -> list[Region]:
    """The regions among operands, lists included."""
    found: list[Region] = []
    for o in operands:
        if isinstance(o, Region):
            found.append(o)
        elif isinstance(o, tuple):
            found.extend(r for r in o if r is not None)
    return found


def _show(operand: Any) -> str:
    if isinstance(operand, tuple):
        return "[" + ", ".join(map(_show, operand)) + "]"  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    return "_" if operand is None else str(operand)
