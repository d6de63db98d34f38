"""Computes of a value only the slice that is read, and of a gradient only what is not zero."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from shoestring.ir import Function, Kind, Loc, Op, TensorType, Value, make_op

from .base import Numerics, Pass, PassReport
from .editing import Names, append, reading, resized

SLICE, SELECT = "aten.slice.Tensor", "aten.select.int"
SLICE_BACKWARD, SELECT_BACKWARD = "aten.slice_backward.default", "aten.select_backward.default"
VIEW = "aten.view.default"
RESHAPES = frozenset(
    {VIEW, "aten._unsafe_view.default", "aten.unsqueeze.default", "aten.squeeze.default",
     "aten.squeeze.dim", "aten.squeeze.dims"}
)  # fmt: skip

SUMS = frozenset({"aten.add.Tensor", "aten.sub.Tensor"})
"""Zero where all tensor operands are."""
PRODUCTS = frozenset({"aten.mul.Tensor", "aten.mm.default", "aten.bmm.default"})
"""Zero where one operand is."""
FIRST = frozenset(
    {"aten.neg.default", "aten.mul.Scalar", "aten.div.Scalar", "aten.div.Tensor",
     "aten.sum.dim_IntList", "aten._to_copy.default", "aten.clone.default"}
)  # fmt: skip
"""Zero where the first operand is."""
GRADIENTS = ("grad_output", "grad_out", "grad")
"""Names of the first operand of backward ops, which are linear in it, row by row."""


@dataclass(frozen=True)
class Slice:
    """Elements of a tensor, by their row-major position p: `start <= p // stride % size < stop`.

    So it survives reshapes: of [32, 128, 384] the rows [:, 0] are every 128th row of [4096, 384].
    """

    stride: int
    size: int
    start: int
    stop: int

    def locate(self, shape: Sequence[int]) -> tuple[int, int, int] | None:
        """(dimension, outer, inner): it slices the middle one of `[outer, size, inner]`.

        None where that is no single dimension.
        """
        after = 1
        for dim in reversed(range(len(shape))):
            total = after * shape[dim]
            if total and self.stride % after == 0 and total % (self.stride * self.size) == 0:
                return dim, total // (self.stride * self.size), self.stride // after
            after = total
        return None

    def narrow(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of what it keeps of a tensor of `shape`."""
        dim, outer, inner = self._place(shape)
        kept = outer * (self.stop - self.start) * inner
        return (*shape[:dim], kept, *shape[dim + 1 :])

    def unfold(self, shape: Sequence[int], size: int) -> tuple[int, tuple[int, ...]]:
        """The dimension it slices, and the shape, once that has a dimension of `size` to itself."""
        dim, outer, inner = self._place(shape)
        if outer == inner == 1:
            return dim, (*shape[:dim], size, *shape[dim + 1 :])
        return dim + 1, (*shape[:dim], outer, size, inner, *shape[dim + 1 :])

    def _place(self, shape: Sequence[int]) -> tuple[int, int, int]:
        place = self.locate(shape)
        assert place is not None, "a slice is followed only to where it has a dimension"
        return place


@dataclass(frozen=True)
class Path:
    """What a slice of one operand or result of an op means for all of them; None: all of it."""

    operands: tuple[Slice | None, ...]
    results: tuple[Slice | None, ...]
    sums: bool = False
    """Whether results without the slice are sums over it."""


@dataclass(frozen=True)
class PropagateSlices(Pass):
    """Moves slices towards what they are made of, and the zeros of their gradients the other way.

    A classifier that reads one token needs of the last layer only that token's row, forward and
    backward; the gradient of a slice is zero elsewhere, so that products and sums with it run over
    that row alone. Rows follow from the sharding rules of the ops. Where all of a value is needed,
    or two different slices of it, it is computed whole. Infinite or NaN elements that no slice
    reads do not reach gradients, as they do by a product with zero.

    Attributes:
        most: the largest share of a dimension that a slice may keep; others are left alone.

    Before:

        func @f {
          parameter %w: f32[8,6] "w"
          batch %x: f32[4,10,8] "x"
          %rows: f32[40,8] = aten.view.default(%x) {size=[40, 8]}
          %y: f32[40,6] = aten.mm.default(%rows, %w)
          %h: f32[4,10,6] = aten.view.default(%y) {size=[4, 10, 6]}
          %first: f32[4,6] = aten.select.int(%h) {dim=1, index=0}
          return first=%first
        }

    After:

        func @f {
          parameter %w: f32[8,6] "w"
          batch %x: f32[4,10,8] "x"
          %x.1: f32[4,1,8] = aten.slice.Tensor(%x) {dim=1, start=0, end=1}
          %rows.1: f32[4,8] = aten.view.default(%x.1) {size=[4, 8]}
          %y.1: f32[4,6] = aten.mm.default(%rows.1, %w)
          %h.1: f32[4,1,6] = aten.view.default(%y.1) {size=[4, 1, 6]}
          %first: f32[4,6] = aten.view.default(%h.1) {size=[4, 6]}
          return first=%first
        }
    """

    most: float = 0.25

    numerics: ClassVar[Numerics] = Numerics.REASSOCIATING

    def run(self, function: Function) -> tuple[Function, PassReport]:
        report = PassReport()
        report.matched = sum(
            bool(_slice_of(op, self.most) or _pad_of(op, self.most)) for op in function.ops
        )
        if not report.matched:
            return function, report
        zeros = _Zeros(function, self.most)
        needs = _Needs(zeros.run(), self.most)
        report.changed = zeros.narrowed + len(needs.paths)
        if not report.changed:
            return function, report
        report.note(
            f"{zeros.narrowed} ops of gradients and {len(needs.paths)} others run on slices"
        )
        return needs.run(), report


# -- following a slice through an op ---------------------------------------------------------------


def _slice_of(op: Op, most: float) -> Slice | None:
    """The part of its operand that a slice or select reads, if that is little."""
    if op.name not in (SLICE, SELECT) or not op.inputs[0].type.is_static:
        return None
    return _slice_at(op, op.inputs[0].type.static_shape, most)


def _pad_of(op: Op, most: float) -> Slice | None:
    """The part of its result that the gradient of a slice or select fills, if that is little."""
    if op.name not in (SLICE_BACKWARD, SELECT_BACKWARD) or not op.result.type.is_static:
        return None
    return _slice_at(op, op.result.type.static_shape, most)


def _slice_at(op: Op, shape: Sequence[int], most: float) -> Slice | None:
    if op.name in (SELECT, SELECT_BACKWARD):
        dim = op.attr("dim") % len(shape)
        start = op.attr("index") % shape[dim] if shape[dim] else 0
        stop = start + 1
    else:
        dim = (op.attr("dim") or 0) % len(shape)
        start, stop, step = slice(op.attr("start"), op.attr("end")).indices(shape[dim])
        if op.attr("step") != step:
            return None
    if not 0 < stop - start <= most * shape[dim] or 0 in shape:
        return None
    return Slice(math.prod(shape[dim + 1 :]), shape[dim], start, stop)


def _path(op: Op, index: int, s: Slice) -> Path | None:
    """Where a slice of one value of the op is in all others; operands count first, then results."""
    values = (*op.inputs, *op.results)
    if not op.opdef.pure or not all(v.type.is_static for v in values):
        return None
    if op.name in RESHAPES:
        fits = all(s.locate(v.type.static_shape) for v in values)
        return Path((s,), (s,)) if fits else None
    factors = op.opdef.factors(op)
    place = s.locate(values[index].type.static_shape)
    if factors is None or place is None:
        return None
    names = (*factors.operands, *factors.results)
    dim, outer, inner = place
    factor = names[index][dim]
    if factor is None:
        return None

    slices: list[Slice | None] = []
    for v, dims in zip(values, names, strict=True):
        shape, found = v.type.static_shape, [d for d, name in enumerate(dims) if name == factor]
        if len(found) > 1 or any(shape[d] != outer * s.size * inner for d in found):
            return None
        strides = [inner * math.prod(shape[d + 1 :]) for d in found]
        slices.append(replace(s, stride=strides[0]) if strides else None)
    count = len(op.inputs)
    sums = factors.reduce.get(factor) == "sum"
    return Path(tuple(slices[:count]), tuple(slices[count:]), sums)


def _type(v: Value, s: Slice | None) -> TensorType:
    return v.type if s is None else v.type.with_shape(s.narrow(v.type.static_shape))


def _fits(op: Op, path: Path) -> bool:
    """Whether the op on slices has slices for results: no size hides in an attribute."""
    parts = iter(
        [Value(_type(v, s), v.name) for v, s in zip(op.inputs, path.operands, strict=True)]
    )
    types = tuple(map(_type, op.results, path.results))
    new = resized(op.map_operands(lambda _: next(parts)), types[0])
    try:
        return op.opdef.infer(new) == types
    except Exception:  # the reference refuses the smaller operands in its own words
        return False


class _Editor:
    """A function in the making, with slices of its values."""

    def __init__(self, function: Function) -> None:
        self.function = function
        self.names = Names(function)
        self.ops: list[Op] = []
        self.parts: dict[tuple[Value, Slice], Value] = {}

    def emit(
        self, name: str, v: Value, base: str, loc: Loc, result: Value | None = None, **attrs: object
    ) -> Value:
        return append(self.ops, self.names, make_op(name, (v,), attrs, loc), base, result)

    def reshape(
        self, v: Value, shape: Sequence[int], loc: Loc, result: Value | None = None
    ) -> Value:
        if result is None and v.type.shape == tuple(shape):
            return v
        return self.emit(VIEW, v, v.name, loc, result, size=tuple(shape))

    def part(self, v: Value, s: Slice | None, loc: Loc) -> Value:
        """The slice of a value."""
        if s is None:
            return v
        if (v, s) not in self.parts:
            shape = v.type.static_shape
            dim, unfolded = s.unfold(shape, s.size)
            whole = self.reshape(v, unfolded, loc)
            sliced = self.emit(SLICE, whole, v.name, loc, dim=dim, start=s.start, end=s.stop)
            self.parts[v, s] = self.reshape(sliced, s.narrow(shape), loc)
        return self.parts[v, s]

    def pad(self, part: Value, s: Slice, whole: Value, loc: Loc) -> None:
        """The value that is zero but for its slice."""
        shape = whole.type.static_shape
        dim, unfolded = s.unfold(shape, s.size)
        part = self.reshape(part, s.unfold(shape, s.stop - s.start)[1], loc)
        result = whole if unfolded == shape else None
        bounds = {"dim": dim, "start": s.start, "end": s.stop, "step": 1}
        attrs = {"input_sizes": unfolded, **bounds}
        padded = self.emit(SLICE_BACKWARD, part, whole.name, loc, result, **attrs)
        if result is None:
            self.reshape(padded, shape, loc, whole)

    def run_on(self, op: Op, path: Path) -> None:
        """The op on slices; results without one are its own."""
        slices = iter(path.operands)
        types = tuple(map(_type, op.results, path.results))
        new = resized(op.map_operands(lambda v: self.part(v, next(slices), op.loc)), types[0])
        results = tuple(
            r if s is None else self.names.fresh(t, r.name)
            for r, s, t in zip(op.results, path.results, types, strict=True)
        )
        self.ops.append(replace(new, results=results))
        for r, s, part in zip(op.results, path.results, results, strict=True):
            if s is not None:
                self.parts[r, s] = part


# -- zeros of gradients, forwards ------------------------------------------------------------------


class _Zeros(_Editor):
    """Runs what is made of the gradient of a slice on that slice, as far as all else is zero."""

    def __init__(self, function: Function, most: float) -> None:
        super().__init__(function)
        self.most = most
        self.zero: dict[Value, Slice] = {}
        self.pads: dict[Value, Op] = {}
        self.whole: set[Value] = set()
        self.narrowed = 0

    def run(self) -> Function:
        for op in self.function.ops:
            pad = _pad_of(op, self.most)
            if pad is not None and op.inputs[0] not in self.zero:
                self.zero[op.result] = pad
                self.pads[op.result] = op
                continue
            path = self._path(op)
            if path is None:
                self._make_whole(op.inputs)
                self.ops.append(op)
                continue
            for v in op.inputs:
                self._start(v)
            self.run_on(op, path)
            self.narrowed += 1
            for r, s in zip(op.results, path.results, strict=True):
                if s is not None:
                    self.zero[r] = s
        self._make_whole(self.function.results)
        return self.function.with_ops(self.ops)

    def _path(self, op: Op) -> Path | None:
        """How to run the op on slices; None where its results are not zero elsewhere."""
        padded = [i for i, v in enumerate(op.inputs) if v in self.zero]
        if not padded or not _keeps_zeros(op, padded):
            return None
        path = _path(op, padded[0], self.zero[op.inputs[padded[0]]])
        if path is None or any(path.operands[i] != self.zero[op.inputs[i]] for i in padded):
            return None
        if not path.sums and None in path.results:
            return None
        return path if _fits(op, path) else None

    def _start(self, v: Value) -> None:
        """Makes the slice of a value from the gradient that fills it."""
        if v not in self.pads or (v, self.zero[v]) in self.parts:
            return
        (gradient,), s = self.pads[v].inputs, self.zero[v]
        shape = s.narrow(v.type.static_shape)
        self.parts[v, s] = self.reshape(gradient, shape, self.pads[v].loc)

    def _make_whole(self, values: Iterable[Value]) -> None:
        for v in values:
            if v not in self.zero or v in self.whole:
                continue
            self.whole.add(v)
            if v in self.pads:
                self.ops.append(self.pads[v])
                self._start(v)
            else:
                maker = self.function.producer(v)
                assert maker is not None, "a parameter is not known to be zero"
                self.pad(self.parts[v, self.zero[v]], self.zero[v], v, maker.loc)


def _keeps_zeros(op: Op, padded: list[int]) -> bool:
    """Whether results are zero, or sums without a term, where these operands are zero."""
    if op.opdef.kind is Kind.VIEW or op.name in PRODUCTS:
        return True
    if op.name in SUMS:
        return len(op.inputs) == len(padded) and all(isinstance(o, Value) for o in op.operands[:2])
    if op.name in FIRST:
        return padded == [0]
    return padded[0] == 0 and op.opdef.operand_names[0] in GRADIENTS


# -- slices that are read, backwards ---------------------------------------------------------------

WHOLE = Slice(1, 1, 0, 1)


class _Needs(_Editor):
    """Runs ops on the slice of their results that is read."""

    def __init__(self, function: Function, most: float) -> None:
        super().__init__(function)
        self.most = most
        self.need: dict[Value, Slice] = dict.fromkeys(function.results, WHOLE)
        self.paths: dict[Op, Path] = {}
        for op in reversed(function.ops):
            self._visit(op)

    def _visit(self, op: Op) -> None:
        needs = [self.need.get(r) for r in op.results]
        if op.opdef.pure and not any(needs):
            return
        s = _slice_of(op, self.most)
        if s is not None:
            self._read(op.inputs[0], s)
            return
        path = self._path(op, needs)
        if path is not None:
            self.paths[op] = path
        slices = (None,) * len(op.inputs) if path is None else path.operands
        for v, part in zip(op.inputs, slices, strict=True):
            self._read(v, part or WHOLE)

    def _read(self, v: Value, s: Slice) -> None:
        self.need[v] = s if self.need.get(v, s) == s else WHOLE

    def _path(self, op: Op, needs: list[Slice | None]) -> Path | None:
        index, s = next(((i, s) for i, s in enumerate(needs) if s is not None), (0, WHOLE))
        if s is WHOLE:
            return None
        path = _path(op, len(op.inputs) + index, s)
        if path is None or any(
            n not in (None, p) for n, p in zip(needs, path.results, strict=True)
        ):
            return None
        return path if _fits(op, path) else None

    def run(self) -> Function:
        """The function with those ops on slices."""
        same: dict[Value, Value] = {}
        for op in self.function.ops:
            new, s = reading(op, same), _slice_of(op, self.most)
            if op in self.paths:
                self.run_on(new, self.paths[op])
            elif s is not None and (new.inputs[0], s) in self.parts:
                part = self.parts[new.inputs[0], s]
                if part.type == op.result.type:
                    same[op.result] = part
                else:
                    self.reshape(part, op.result.type.static_shape, op.loc, op.result)
            elif not op.opdef.pure or any(r in self.need for r in op.results):
                self.ops.append(new)
        return self.function.with_ops(self.ops, same)
