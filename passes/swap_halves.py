"""Reads the halves of a value in reverse order where they were cut out and joined again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from shoestring.ir import Function, Op, Operand, Value, make_op

from .base import Numerics, Pass, PassReport
from .constants import CONSTANT
from .editing import Names, append

ADD, CAT, FLIP, MUL = "aten.add.Tensor", "aten.cat.default", "aten.flip.default", "aten.mul.Tensor"
NEG, VIEW = "aten.neg.default", "aten.view.default"
SLICE, SLICE_BACKWARD = "aten.slice.Tensor", "aten.slice_backward.default"


@dataclass(frozen=True)
class SwapHalves(Pass):
    """Halves that are swapped and get a sign become a product of the reversed halves and the signs.

    So rotary positions rotate: `cat(-x[half:], x[:half])`, and in the backward pass a sum of two
    halves within zeros. Joining takes memory and passes over it; reversed halves are a view for
    backends that know strides, so that one kernel reads both and adds them up. A product that is
    only rotated is made of reversed factors, to be in that kernel too.

    Before:

        func @f {
          batch %x: f32[3,4] "x"
          %low: f32[3,2] = aten.slice.Tensor(%x) {dim=1, start=0, end=2}
          %high: f32[3,2] = aten.slice.Tensor(%x) {dim=1, start=2, end=4}
          %n: f32[3,2] = aten.neg.default(%high)
          %y: f32[3,4] = aten.cat.default([%n, %low]) {dim=1}
          return y=%y
        }

    After:

        func @f {
          batch %x: f32[3,4] "x"
          %low: f32[3,2] = aten.slice.Tensor(%x) {dim=1, start=0, end=2}
          %high: f32[3,2] = aten.slice.Tensor(%x) {dim=1, start=2, end=4}
          %n: f32[3,2] = aten.neg.default(%high)
          %x.1: f32[3,2,2] = aten.view.default(%x) {size=[3, 2, 2]}
          %x.2: f32[3,2,2] = aten.flip.default(%x.1) {dims=[1]}
          %y.1: f32[2,1] = ir.constant.default() {data=[-1.0, 1.0], shape=[2, 1], dtype=f32}
          %y.2: f32[3,2,2] = aten.mul.Tensor(%x.2, %y.1)
          %y: f32[3,4] = aten.view.default(%y.2) {size=[3, 4]}
          return y=%y
        }
    """

    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, function: Function) -> tuple[Function, PassReport]:
        report = PassReport()
        rewriter = _Rewriter(function)
        for op in function.ops:
            swap = rewriter.swap_of(op)
            if swap is None:
                rewriter.ops.append(op)
                continue
            report.matched += 1
            report.changed += 1
            rewriter.replace(op, swap)
        if not report.changed:
            return function, report
        return function.with_ops(rewriter.ops), report


@dataclass(frozen=True)
class _Joined:
    """What becomes the first and the second half of a dimension, and what that is added to."""

    dim: int
    first: Value
    second: Value
    rest: Value | None = None


@dataclass(frozen=True)
class _Placed:
    """What is the first or the second half along a dimension; the other one is zero."""

    dim: int
    second: bool
    half: Value


@dataclass(frozen=True)
class _Half:
    """One half of a value, and whether its sign is changed."""

    source: Value
    second: bool
    negated: bool
    cut: Op


@dataclass(frozen=True)
class _Swap:
    """The second half of a value before the first one.

    Attributes:
        source: the value.
        dim: the dimension that is halved.
        negated: whether each half of the result has its sign changed.
        cuts: the slices that took the halves.
        added: whether zeros were added, which makes 0.0 of -0.0.
        rest: what else is added, if anything is.
    """

    source: Value
    dim: int
    negated: tuple[bool, bool]
    cuts: tuple[Op, Op]
    added: bool
    rest: Value | None

    @property
    def half(self) -> int:
        return self.source.type.static_shape[self.dim] // 2


@dataclass
class _Rewriter:
    function: Function
    ops: list[Op] = field(default_factory=list[Op])

    def __post_init__(self) -> None:
        self.names = Names(self.function)
        self.users = self.function.users()
        self.results = set(self.function.results)
        self.replaced: set[Op] = set()

    # -- finding -------------------------------------------------------------------------------

    def swap_of(self, op: Op) -> _Swap | None:
        """What an op joins, if it is the two halves of one value, swapped, and a sign changes."""
        joined = self._concatenated(op) if op.name == CAT else self._added(op)
        if joined is None:
            return None
        dim = joined.dim
        first, second = self._half(joined.first, dim), self._half(joined.second, dim)
        if first is None or second is None or first.source is not second.source:
            return None
        if not first.second or second.second or not (first.negated or second.negated):
            return None
        type_ = first.source.type
        same = type_ == op.result.type and type_.numel and type_.dtype.is_floating_point
        cuts, signs = (first.cut, second.cut), (first.negated, second.negated)
        if not same:
            return None
        return _Swap(first.source, dim, signs, cuts, op.name == ADD, joined.rest)

    def _concatenated(self, op: Op) -> _Joined | None:
        if len(op.inputs) != 2 or not all(v.type.is_static for v in (*op.inputs, op.result)):
            return None
        first, second = op.inputs
        return _Joined(op.attr("dim") % op.result.type.rank, first, second)

    def _added(self, op: Op) -> _Joined | None:
        """Two halves, each within zeros, as gradients of slices are, and what they are added to."""
        placed: dict[bool, Value] = {}
        dims: set[int] = set()
        rest: list[Value] = []
        for v in self._terms(op):
            found = self._within_zeros(v)
            if found is None or found.second in placed:
                rest.append(v)
                continue
            dims.add(found.dim)
            placed[found.second] = found.half
        if len(dims) != 1 or len(placed) != 2 or len(rest) > 1:
            return None
        return _Joined(dims.pop(), placed[False], placed[True], *rest)

    def _terms(self, op: Op) -> list[Value]:
        """What two tensors are, or three, of which two are added first and only for this sum.

        Halves within zeros can be added in any order: one term of two is always a zero.
        """
        if not _is_sum(op):
            return []
        terms: list[Value] = []
        for v in op.inputs:
            maker = self.function.producer(v)
            if maker is None or not _is_sum(maker) or maker in self.replaced:
                terms.append(v)
            else:
                terms += maker.inputs if self._is_read_once(v) else [v]
        return terms if len(terms) <= 3 else list(op.inputs)

    def _within_zeros(self, v: Value) -> _Placed | None:
        """What a gradient of a slice puts into one half, where nobody else reads it."""
        op = self.function.producer(v)
        if op is None or op.name != SLICE_BACKWARD or not self._is_read_once(v):
            return None
        if not v.type.is_static:
            return None
        dim = op.attr("dim") % v.type.rank
        second = _which_half(op, v.type.static_shape[dim])
        return None if second is None else _Placed(dim, second, op.inputs[0])

    def _is_read_once(self, v: Value) -> bool:
        return len(self.users[v]) == 1 and v not in self.results

    def _half(self, v: Value, dim: int) -> _Half | None:
        op = self.function.producer(v)
        negated = op is not None and op.name == NEG
        if op is not None and negated:
            op = self.function.producer(op.inputs[0])
        if op is None or op.name != SLICE or not op.inputs[0].type.is_static:
            return None
        (source,) = op.inputs
        if op.attr("dim") % source.type.rank != dim:
            return None
        second = _which_half(op, source.type.static_shape[dim])
        return None if second is None else _Half(source, second, negated, op)

    # -- replacing -----------------------------------------------------------------------------

    def replace(self, op: Op, swap: _Swap) -> None:
        """Appends what computes the same from the reversed halves."""
        name, loc, type_ = op.result.name, op.loc, swap.source.type

        def emit(
            kind: str, operands: tuple[Operand, ...], result: Value | None = None, **attrs: object
        ) -> Value:
            return append(self.ops, self.names, make_op(kind, operands, attrs, loc), name, result)

        x = self._reversed(swap.source, swap, op)
        if swap.negated == (True, True):
            x = emit(NEG, (x,))
        else:
            signs = tuple(-1.0 if n else 1.0 for n in swap.negated)
            shape = (2, *(1 for _ in type_.static_shape[swap.dim :]))
            x = emit(MUL, (x, emit(CONSTANT, (), data=signs, shape=shape, dtype=type_.dtype)))
        if swap.added:
            x = emit(ADD, (x, 0.0))
        if swap.rest is None:
            emit(VIEW, (x,), op.result, size=type_.static_shape)
        else:
            x = emit(VIEW, (x,), size=type_.static_shape)
            emit(ADD, (swap.rest, x), op.result)
        self.replaced.add(op)

    def _reversed(self, v: Value, swap: _Swap, op: Op) -> Value:
        """A value with its halves along the dimension in reverse order: [..., 2, half, ...]."""
        behind = swap.source.type.rank - swap.dim  # dimensions from there on
        if v.type.rank < behind:
            return v
        at, shape = v.type.rank - behind, v.type.static_shape
        folded = (*shape[:at], *((1, 1) if shape[at] == 1 else (2, swap.half)), *shape[at + 1 :])
        maker = self.function.producer(v)
        if shape[at] != 1 and maker is not None and maker.name == MUL and self._is_cut(v, swap):
            factors = tuple(
                self._reversed(o, swap, op) if isinstance(o, Value) else o for o in maker.operands
            )
            new = make_op(MUL, factors, maker.attrs, maker.loc)
            return append(self.ops, self.names, new, v.name)
        view = make_op(VIEW, (v,), {"size": folded}, op.loc)
        x = append(self.ops, self.names, view, v.name)
        if shape[at] == 1:
            return x
        return append(self.ops, self.names, make_op(FLIP, (x,), {"dims": (at,)}, op.loc), v.name)

    def _is_cut(self, v: Value, swap: _Swap) -> bool:
        """Whether nobody needs a value but the two halves."""
        users = self.users[v]
        return v not in self.results and all(u in swap.cuts for u in users)


def _is_sum(op: Op) -> bool:
    return op.name == ADD and len(op.inputs) == 2 and op.attr("alpha") == 1


def _which_half(op: Op, size: int) -> bool | None:
    """Whether a slice, or its gradient, has the second half of a dimension; None: neither half."""
    if op.attr("step") != 1 or size % 2:
        return None
    start, stop, _ = slice(op.attr("start"), op.attr("end")).indices(size)
    return {(0, size // 2): False, (size // 2, size): True}.get((start, stop))
