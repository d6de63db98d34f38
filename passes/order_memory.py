"""Orders ops for the least peak of live values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from shoestring.ir import Function, Kind, Op, Value

from .base import Numerics, Pass, PassReport
from .liveness import is_view, measure, size_of, storage_roots
from .scheduling import hoist, is_update, sink


@dataclass(frozen=True)
class OrderMemory(Pass):
    """Tries a few orders and keeps the one with the least peak; the captured order is one of them.

    Updates move up to their gradients, ops that free more than they take move up to their operands,
    and ops that take more than they free move down to their first reader.

    Before:

        func @f {
          batch %x: f32[4] "x"
          %big: f32[64] = aten.full.default() {size=[64], fill_value=1.0}
          %wide: f32[64,4] = aten.expand.default(%x) {size=[64, 4]}
          %copy: f32[64,4] = aten.exp.default(%wide)
          %sum: f32[4] = aten.sum.dim_IntList(%copy) {dim=[0]}
          %y: f32[64] = aten.mul.Tensor(%big, 2.0)
          return s=%sum, y=%y
        }

    After:

        func @f {
          batch %x: f32[4] "x"
          %wide: f32[64,4] = aten.expand.default(%x) {size=[64, 4]}
          %copy: f32[64,4] = aten.exp.default(%wide)
          %sum: f32[4] = aten.sum.dim_IntList(%copy) {dim=[0]}
          %big: f32[64] = aten.full.default() {size=[64], fill_value=1.0}
          %y: f32[64] = aten.mul.Tensor(%big, 2.0)
          return s=%sum, y=%y
        }
    """

    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, function: Function) -> tuple[Function, PassReport]:
        report = PassReport(matched=len(function.ops))
        roots = storage_roots(function)
        before = measure(function, None, roots).peak
        best, peak, how = function.ops, before, "the captured order"
        for name, ops in _orders(function):
            found = measure(function, ops, roots).peak
            if found < peak:
                best, peak, how = ops, found, name
        report.note(f"peak of live values {before} B -> {peak} B by {how}")
        if peak == before:
            return function, report
        report.changed = sum(a is not b for a, b in zip(best, function.ops, strict=True))
        return function.with_ops(best), report


def _orders(function: Function) -> Iterator[tuple[str, tuple[Op, ...]]]:
    """The orders that are tried; some begin where another one ends."""
    early = function.with_ops(hoist(function, is_update))
    yield "early updates", early.ops
    yield "late producers", tuple(sink(function, function.ops, _is_lazy(function)))
    late = early.with_ops(sink(early, early.ops, _is_lazy(early)))
    yield "early updates and late producers", late.ops
    shrinks = _is_shrinking(late)
    reduced = hoist(late, lambda op: is_update(op) or shrinks(op))
    yield "early updates, late producers and early reductions", tuple(reduced)


def _is_lazy(function: Function) -> Callable[[Op], bool]:
    """Ops that cost memory the earlier they run: delaying them lengthens no operand's life."""
    first, last = _reads(function)
    made = {r for op in function.ops for r in op.results}
    results = set(function.results)
    lazy: set[Op] = set()
    delayed: set[Value] = set()
    for op in function.ops:
        if is_update(op) or op.opdef.kind is Kind.RANDOM or results.intersection(op.results):
            continue
        start = min((first[r] for r in op.results if r in first), default=-1)
        if all(v not in made or v in delayed or last[v] >= start for v in op.inputs):
            lazy.add(op)
            delayed.update(op.results)
    return lazy.__contains__


def _is_shrinking(function: Function) -> Callable[[Op], bool]:
    """Ops that free more than they take."""
    _, last = _reads(function)
    roots = storage_roots(function)
    made = {r for op in function.ops for r in op.results}
    shrinking: set[Op] = set()
    for index, op in enumerate(function.ops):
        dying = {roots[v] for v in op.inputs if v in made and last[v] == index}
        freed = sum(size_of(v.type) for v in dying)
        taken = sum(size_of(r.type) for r in op.results)
        if not is_view(op) and op.opdef.kind is not Kind.RANDOM and 0 < taken < freed:
            shrinking.add(op)
    return shrinking.__contains__


def _reads(function: Function) -> tuple[dict[Value, int], dict[Value, int]]:
    """The first and the last op that reads each value; results of the function are read last."""
    first: dict[Value, int] = {}
    last: dict[Value, int] = {}
    for index, op in enumerate(function.ops):
        for v in op.inputs:
            first.setdefault(v, index)
            last[v] = index
    last.update(dict.fromkeys(function.results, len(function.ops)))
    return first, last
