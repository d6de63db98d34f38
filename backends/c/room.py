"""The scratch that gemm.c needs for a product, known before anything is compiled.

What `shape_of` and `ss_gemm_scratch` of gemm.c compute, in Python: a test compares both on every
instruction set. `Machine` is what the constants there depend on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache

import torch

from ..memory import aligned
from .build import cached_text, defined_names, find_compiler, flags
from .sides import Sides, count_of, stride_of

BLOCK, MOST_ROWS = 384, 264  # KC and MC of gemm.c; what follows has the names that it has there
GROUP, TILES, REUSED, FEW = 4, 512 << 10, 128, 48
AMX_TILE, AMX_UNITS = 32, 16
FAR = 64 << 10
WIDE = ("__AVX512F__", "__AVX512BW__", "__AVX512BF16__", "__AVX512VNNI__")  # what wide.h defines
FLOAT = 4


@dataclass(frozen=True)
class Machine:
    """What compiled code multiplies with.

    Attributes:
        lanes: f32 in a vector.
        pairs: whether pairs of bf16 are multiplied at once.
        bytes: i8 that are.
        amx: whether there may be tile registers.
    """

    lanes: int
    pairs: bool
    bytes: int
    amx: bool

    @classmethod
    def of(cls, names: Mapping[str, str]) -> Machine:
        """The machine for which a compiler defines these names."""
        narrow = int(names.get("SS_NARROW", 16))
        lanes = 4
        if names.keys() >= {"__AVX2__", "__FMA__"} and narrow >= 8:
            lanes = 8
        if "SS_EMULATE_AVX512" in names:
            names = {**names, **dict.fromkeys(WIDE, "1")}
        if names.keys() >= {"__AVX512F__", "__AVX512BW__"} and narrow == 16:
            lanes = 16
        four = "__AVX512VNNI__" if lanes == 16 else "__AVXVNNI__"
        tiles = "SS_EMULATE_AMX" in names or names.keys() >= {"__AMX_BF16__", "__linux__"}
        pairs = lanes == 16 and "__AVX512BF16__" in names
        return cls(lanes, pairs, 4 if lanes > 4 and four in names else 2, pairs and tiles)


def this_machine() -> Machine:
    """What the compiler, the processor and `$SHOESTRING_ISA` make it.

    Raises:
        BackendError: SS4201 without a compiler, SS4203 where the cache cannot be written, SS4204
            where `$SHOESTRING_ISA` names no instruction set.
    """
    return _machine_of(find_compiler(), flags())


@cache
def _machine_of(*_: object) -> Machine:
    """Of the compiler and the flags in use, which are the key of this cache."""
    text = cached_text("machine.json", lambda: json.dumps(asdict(Machine.of(defined_names()))))
    return Machine(**json.loads(text))


@dataclass(frozen=True)
class Extent:
    """A product as gemm.c is told of it.

    Attributes:
        matrices: of the batch.
        rows, cols: of each.
        grouping: a name of `ss_grouping`.
        packed: whether the right side is packed before.
    """

    matrices: int
    rows: int
    cols: int
    grouping: str = "SS_UNGROUPED"
    packed: bool = False


def thread_bytes(machine: Machine, sides: Sides, extent: Extent) -> int:
    """Bytes that each thread needs; where tile registers may be refused, enough without them."""
    tried = {False, machine.amx and sides.a.ref.dtype is torch.bfloat16}
    return max(_Shape(machine, sides, extent, amx).nbytes for amx in tried)


class _Shape:
    """`shape_of` of gemm.c.

    Attributes:
        rows, cols: of a tile.
        width: units of the sum, padded.
        direct: whether the left side is read where it is.
        some: rows that share a panel.
        panels: of which the tiles wait together for the next block of the sum.
    """

    def __init__(self, machine: Machine, sides: Sides, extent: Extent, amx: bool) -> None:
        self.packed = extent.packed
        self.machine, self.sides, self.amx = machine, sides, amx
        self.rows, vectors = {16: (8, 3), 8: (6, 2), 4: (4, 3)}[machine.lanes]
        self.cols = vectors * machine.lanes
        if amx:
            self.rows = self.cols = AMX_TILE
        elif vectors == 3 and _blocks(extent.cols, machine.lanes) == 4:
            self.cols = 2 * machine.lanes
        each, windows = _elements(machine, sides.a.ref.dtype, amx), sides.windows
        units = _blocks(sides.summed, each)
        if windows is not None:
            units = _blocks(windows.channels, each) * len(windows.a_taps)
        self.width = _blocks(units, AMX_UNITS) * AMX_UNITS if amx else units
        shared = sides.a.batch == 0 and extent.grouping == "SS_UNGROUPED"
        matrices = extent.matrices if shared else 1
        if windows is not None or "a_sum" in sides.lists():
            self.direct = _is_listed_in_place(machine, sides, amx, each)
        else:
            few = extent.rows <= FEW or matrices * extent.cols < REUSED or machine.lanes != 8
            self.direct = _is_in_words(sides, extent, each)
            self.direct = self.direct and (self.width == units if amx else few)
        one = _blocks(extent.cols, self.cols)
        self.some = min(MOST_ROWS // self.rows, _blocks(extent.rows, self.rows)) * self.rows
        if sides.order is not None:
            most = TILES // (FLOAT * one * self.cols)
            self.some = max(1, min(self.some, most) // self.rows) * self.rows
        self.panels = self._panels(one, one * matrices)

    def _panels(self, one: int, every: int) -> int:
        """How many wait; of columns in another order, all `one` of a matrix at least."""
        fit = TILES // (FLOAT * self.some * self.cols)
        if self.sides.order is not None:
            return min(every, max(1, 1 if self.direct else fit // one) * one)
        return max(1, min(min(fit, GROUP) if self.width <= BLOCK else fit, every))

    @property
    def nbytes(self) -> int:
        """`ss_gemm_scratch`: panels, rows that are packed, tiles, and these as handed over."""
        packed = (self.rows if self.amx else 0) if self.direct else self.some
        tiles, handed, lanes = self.panels * self.some * self.cols, 0, self.machine.lanes
        if self.sides.windows is not None:
            handed = self.panels * self.cols * _blocks(self.some, lanes) * lanes
        elif self.sides.order is not None:
            handed = self.some * count_of(self.sides.order.at)
        panels = 0 if self.packed else GROUP * self.cols
        floats = (panels + packed) * min(self.width, BLOCK) + tiles + handed
        return aligned(FLOAT * floats) + FAR


def units_of(machine: Machine, dtype: torch.dtype, summed: int) -> int:
    """The most units that a sum of `summed` products has; bf16 may have to do without tiles."""
    return _blocks(summed, _elements(machine, dtype, amx=False))


def _elements(machine: Machine, dtype: torch.dtype, amx: bool) -> int:
    """What a lane of one multiply-add takes of the sum."""
    if dtype is torch.int8:
        return machine.bytes
    return 2 if amx or (machine.pairs and dtype is torch.bfloat16) else 1


def _is_in_words(sides: Sides, extent: Extent, each: int) -> bool:
    """Whether rows of the left side are units as they lie in memory."""
    dtype = sides.a.ref.dtype
    whole = sides.summed % each == 0 and extent.grouping != "SS_GROUPS_OF_SUM"
    words = dtype is torch.float32 or (whole and each * dtype.itemsize == FLOAT)
    return stride_of(sides.a.cols) == 1 and words


def _is_listed_in_place(machine: Machine, sides: Sides, amx: bool, each: int) -> bool:
    """The same of rows that begin where a list says."""
    if amx or (sides.windows is None and machine.lanes == 8):
        return False
    if sides.a.ref.dtype is torch.float32 or each == 1:
        return sides.a.ref.dtype is torch.float32
    size, stride = sides.a.cols[-1] if sides.windows is None else (each, 1)
    return stride == 1 and size % each == 0


def _blocks(size: int, block: int) -> int:
    return -(-size // block)
