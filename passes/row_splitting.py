"""Running a part of a program in chunks of rows: what splits, where it enters and leaves.

Which dimension of a value counts rows follows from the sharding rules of the ops. Reshapes may
regroup rows: the *units* that chunks are made of are the greatest common divisor of all sizes met.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from shoestring.ir import Function, Kind, Loc, Op, TensorType, Value, make_op

from .editing import Names, resized

CHEAP = frozenset({Kind.POINTWISE, Kind.VIEW})
HALVES = (torch.bfloat16, torch.float16)


class NotSplittableError(Exception):
    """Why a region does not split by rows; becomes the reason in a report."""


@dataclass(frozen=True)
class Split:
    """How one op splits: the rows' dimension in each operand and result; None where there is none.

    A result without rows is a sum over rows: each chunk gives a part of it.
    """

    operands: tuple[int | None, ...]
    results: tuple[int | None, ...]


@dataclass
class Region:
    """Ops that run in chunks.

    Attributes:
        ops: in program order.
        rows: value -> the dimension that counts rows; None for a sum over rows.
        wanted: value -> the dimensions that those who read it take for rows.
        splits: of each op.
        units: into how many parts rows can be cut.
    """

    function: Function
    ops: list[Op]
    rows: dict[Value, int | None] = field(default_factory=dict[Value, "int | None"])
    wanted: dict[Value, set[int | None]] = field(default_factory=dict[Value, "set[int | None]"])
    splits: dict[Op, Split] = field(default_factory=dict[Op, Split])
    units: int = 0
    made: set[Value] = field(init=False)

    def __post_init__(self) -> None:
        self.made = {r for op in self.ops for r in op.results}


# -- which ops ------------------------------------------------------------------------------------


def enclose(function: Function, inside: Collection[Op]) -> list[Op]:
    """The ops and everything on paths from one of them to another, in program order."""
    core = set(inside)
    after: set[Value] = set()
    reached: set[Op] = set()
    for op in function.ops:
        if op in core or not after.isdisjoint(op.inputs):
            after.update(op.results)
            reached.add(op)
    before: set[Value] = set()
    chosen: list[Op] = []
    for op in reversed(function.ops):
        if op in core or (op in reached and not before.isdisjoint(op.results)):
            before.update(op.inputs)
            chosen.append(op)
    return chosen[::-1]


# -- where rows are -------------------------------------------------------------------------------


def follow_rows(
    function: Function, ops: Sequence[Op], seeds: Mapping[Op, int], large: int
) -> Region:
    """The region with the rows of every value.

    It takes in cheap makers of operands of more than `large` elements that nobody else reads,
    such as masks.

    Args:
        seeds: op -> the dimension of its result in which rows begin.

    Raises:
        NotSplittableError: where an op needs all rows at once.
    """
    region = Region(function, list(ops))
    for op in ops:
        _place(region, op, _factor_of(region, op, seeds))
    _absorb(region, large)
    region.units = _count_units(region)
    return region


def _absorb(region: Region, large: int) -> None:
    inside = set(region.ops)
    users = region.function.users()
    ends = set(region.function.results)
    for op in reversed(region.function.ops):
        if op in inside or op.opdef.kind not in CHEAP or len(op.results) != 1:
            continue
        r = op.result
        if not r.type.is_static or r.type.numel <= large or r in ends:
            continue
        dims = region.wanted.get(r, set())
        dim = next(iter(dims), None)
        if len(dims) == 1 and dim is not None and inside.issuperset(users[r]):
            inside.add(op)
            region.made.add(r)
            region.rows[r] = dim
            _place(region, op, _factors(op)[1][0][dim])
    region.ops = [op for op in region.function.ops if op in inside]


def _factors(op: Op) -> tuple[Sequence[Sequence[str | None]], Sequence[Sequence[str | None]]]:
    static = all(v.type.is_static for v in (*op.inputs, *op.results))
    found = op.opdef.factors(op) if static else None
    if found is None:
        raise NotSplittableError(f"{op.name} needs all rows at once")
    return found.operands, found.results


def _factor_of(region: Region, op: Op, seeds: Mapping[Op, int]) -> str | None:
    """The factor of an op that counts rows, as its operands say."""
    operands, results = _factors(op)
    if op in seeds:
        return results[0][seeds[op]]
    found: set[str | None] = set()
    for v, names in zip(op.inputs, operands, strict=True):
        if v in region.rows:
            dim = region.rows[v]
            if dim is None:
                raise NotSplittableError(f"{op.name} waits for a value of all rows")
            found.add(names[dim])
    return found.pop() if len(found) == 1 else None


def _place(region: Region, op: Op, factor: str | None) -> None:
    """Records where an op's operands and results have their rows."""
    if factor is None:
        raise NotSplittableError(f"{op.name} needs all rows at once")
    operands, results = _factors(op)
    reads = tuple(_index(names, factor) for names in operands)
    makes = tuple(_index(names, factor) for names in results)
    if None in makes:
        found = op.opdef.factors(op)
        if found is None or found.reduce.get(factor) != "sum":
            raise NotSplittableError(f"{op.name} needs all rows at once")
    region.splits[op] = Split(reads, makes)
    for v, dim in zip(op.results, makes, strict=True):
        region.rows[v] = dim
    for v, dim in zip(op.inputs, reads, strict=True):
        region.wanted.setdefault(v, set()).add(dim)
        if v in region.made and region.rows[v] != dim:
            raise NotSplittableError(f"{op.name} reads its rows in another order")


def _index(names: Sequence[str | None], factor: str) -> int | None:
    return list(names).index(factor) if factor in names else None


def _count_units(region: Region) -> int:
    sizes = [v.type.static_shape[d] for v, d in _with_rows(region) if d is not None]
    return math.gcd(*sizes)


def _with_rows(region: Region) -> Iterator[tuple[Value, int | None]]:
    for op, split in region.splits.items():
        yield from zip(op.inputs, split.operands, strict=True)
        yield from zip(op.results, split.results, strict=True)


# -- chunks ---------------------------------------------------------------------------------------


def run_in_chunks(region: Region, units: int) -> Function:
    """The function with the region in chunks of so many units of rows, one after the other.

    Each chunk runs through all ops before the next begins. What the region reads is made before it.
    """
    writer = _ChunkWriter(region)
    for start in range(0, region.units, units):
        writer.chunk(start, min(start + units, region.units))
    writer.join()
    return region.function.with_ops(_around(region, writer.ops))


def _around(region: Region, chunks: list[Op]) -> list[Op]:
    """The function's other ops, with the chunks before the first that could need them."""
    inside = set(region.ops)
    needed = {v for op in region.ops for v in op.inputs} - region.made
    early: set[Op] = set()
    for op in reversed(region.function.ops):
        if op not in inside and not needed.isdisjoint(op.results):
            early.add(op)
            needed.update(op.inputs)
    first = region.function.ops.index(region.ops[0])
    before = [
        op for i, op in enumerate(region.function.ops)
        if op not in inside and (i < first or op in early)
    ]  # fmt: skip
    placed = set(before) | inside
    return [*before, *chunks, *(op for op in region.function.ops if op not in placed)]


class _ChunkWriter:
    """Writes the ops of each chunk, and joins what leaves the region."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self.names = Names(region.function)
        self.ops: list[Op] = []
        self.leaving = leaving(region)
        self.parts: dict[tuple[Value, int], list[Value]] = {}
        self.sums: dict[Value, Value] = {}
        self.checked: set[tuple[Op, int]] = set()
        # Gradients of a chunk follow its forward pass: nothing is kept or recomputed for them.
        self.phase = region.ops[0].loc.phase

    def chunk(self, start: int, stop: int) -> None:
        """One chunk: units `start` to `stop`."""
        self.start, self.stop = start, stop
        self.whole = stop - start == self.region.units
        self.last = stop == self.region.units
        self.table: dict[tuple[Value, int | None], Value] = {}
        for op in self.region.ops:
            self.op(op)

    def op(self, op: Op) -> None:
        split = self.region.splits[op]
        dims = iter(split.operands)
        operands = op.map_operands(lambda v: self.part(v, next(dims), op.loc)).operands
        pairs = list(zip(op.results, split.results, strict=True))
        types = tuple(self.type_of(r, dim) for r, dim in pairs)
        here = replace(op.loc, phase=self.phase)
        new = resized(replace(op, operands=operands, results=(), loc=here), types[0])
        if (op, self.stop - self.start) not in self.checked:
            self.checked.add((op, self.stop - self.start))
            if op.opdef.infer(new) != types:
                raise NotSplittableError(f"{op.name} has its size in an attribute")
        new = replace(new, results=tuple(map(self.fresh, op.results, types)))
        self.ops.append(new)
        for (old, dim), value in zip(pairs, new.results, strict=True):
            self.table[old, dim] = value
            if old in self.leaving and not self.whole:
                self.leave(new, old, value, dim)

    def type_of(self, v: Value, dim: int | None) -> TensorType:
        """The type of this chunk's part of a value."""
        if dim is None:
            return v.type
        shape = list(v.type.static_shape)
        shape[dim] = shape[dim] // self.region.units * (self.stop - self.start)
        return replace(v.type, shape=tuple(shape))

    def fresh(self, old: Value, type_: TensorType) -> Value:
        return old if self.whole else self.names.fresh(type_, old.name)

    def part(self, v: Value, dim: int | None, loc: Loc) -> Value:
        """This chunk's rows of a value; all of it where it has none."""
        if (v, dim) in self.table:
            return self.table[v, dim]
        if dim is None or self.whole:
            return v
        step = v.type.static_shape[dim] // self.region.units
        bounds = {"start": self.start * step, "end": self.stop * step}
        here = replace(loc, phase=self.phase)
        slice_ = make_op("aten.slice.Tensor", (v,), {"dim": dim, **bounds}, here)
        self.table[v, dim] = self.append(slice_, self.names.fresh(self.type_of(v, dim), v.name))
        return self.table[v, dim]

    def append(self, op: Op, result: Value) -> Value:
        self.ops.append(replace(op, results=(result,)))
        return result

    # -- what leaves -----------------------------------------------------------------------------

    def leave(self, op: Op, old: Value, value: Value, dim: int | None) -> None:
        if dim is not None:
            self.parts.setdefault((old, dim), []).append(value)
        elif old.type.dtype in HALVES:
            wide = replace(old.type, dtype=torch.float32)
            cast = make_op("aten._to_copy.default", (value,), {"dtype": torch.float32}, op.loc)
            self.add(op, old, self.append(cast, self.names.fresh(wide, old.name)))
        else:
            self.add(op, old, value)

    def add(self, op: Op, old: Value, value: Value) -> None:
        """Adds a chunk's part of a sum to those before it; halves are added in f32."""
        narrow = value.type.dtype is not old.type.dtype
        if old not in self.sums:
            self.sums[old] = value
            return
        total = old if self.last and not narrow else self.names.fresh(value.type, old.name)
        if op.name == "aten.mm.default" and not narrow:
            del self.ops[-1]
            new = make_op("aten.addmm.default", (self.sums[old], *op.operands), {}, op.loc)
        else:
            new = make_op("aten.add.Tensor", (self.sums[old], value), {}, op.loc)
        self.sums[old] = self.append(new, total)
        if self.last and narrow:
            dtype = {"dtype": old.type.dtype}
            self.append(make_op("aten._to_copy.default", (total,), dtype, op.loc), old)

    def join(self) -> None:
        """Puts the rows of all chunks together."""
        for (old, dim), parts in self.parts.items():
            maker = self.region.function.producer(old)
            assert maker is not None, "a region makes what leaves it"
            self.append(make_op("aten.cat.default", (tuple(parts),), {"dim": dim}, maker.loc), old)


def leaving(region: Region) -> dict[Value, str]:
    """Values of the region that others read -> who does."""
    inside, made = set(region.ops), region.made
    found: dict[Value, str] = {}
    for op in region.function.ops:
        if op not in inside:
            found.update((v, op.name) for v in op.inputs if v in made)
    found.update((o.value, f"output {o.name}") for o in region.function.outputs if o.value in made)
    nexts = ((p.next, p.path) for p in region.function.params)
    found.update((v, f"state {path}") for v, path in nexts if v is not None and v in made)
    return found
