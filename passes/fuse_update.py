"""Fuses the update into its gradient: a parameter is updated as soon as its gradient exists."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from shoestring.ir import Function, Op, Phase, Value

from .base import Numerics, Pass, PassReport
from .liveness import measure, size_of
from .scheduling import hoist, is_update


@dataclass(frozen=True)
class FuseUpdate(Pass):
    """Moves each optimizer update directly after the op that makes its gradient.

    A gradient then lives for one update, not up to the end of the backward pass. Where updates need
    all gradients at once (clipping by the global norm), they cannot move, and the report says so.

    Before:

        func @f {
          parameter %a: f32[4] "a" -> %a.new
          parameter %b: f32[4] "b" -> %b.new
          batch %x: f32[4] "x"
          %ga: f32[4] = aten.mul.Tensor(%x, %b) loc("m.py":1 "" backward)
          %gb: f32[4] = aten.mul.Tensor(%x, %a) loc("m.py":2 "" backward)
          %da: f32[4] = aten.mul.Tensor(%ga, 0.1) loc("m.py":3 "" update)
          %a.new: f32[4] = aten.sub.Tensor(%a, %da) loc("m.py":3 "" update)
          %db: f32[4] = aten.mul.Tensor(%gb, 0.1) loc("m.py":3 "" update)
          %b.new: f32[4] = aten.sub.Tensor(%b, %db) loc("m.py":3 "" update)
          return
        }

    After (`%a` is replaced once its last reader, `%gb`, has run):

        func @f {
          parameter %a: f32[4] "a" -> %a.new
          parameter %b: f32[4] "b" -> %b.new
          batch %x: f32[4] "x"
          %ga: f32[4] = aten.mul.Tensor(%x, %b) loc("m.py":1 "" backward)
          %da: f32[4] = aten.mul.Tensor(%ga, 0.1) loc("m.py":3 "" update)
          %gb: f32[4] = aten.mul.Tensor(%x, %a) loc("m.py":2 "" backward)
          %a.new: f32[4] = aten.sub.Tensor(%a, %da) loc("m.py":3 "" update)
          %db: f32[4] = aten.mul.Tensor(%gb, 0.1) loc("m.py":3 "" update)
          %b.new: f32[4] = aten.sub.Tensor(%b, %db) loc("m.py":3 "" update)
          return
        }
    """

    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, function: Function) -> tuple[Function, PassReport]:
        report = PassReport()
        gradients = find_gradients(function)
        report.matched = len(gradients)
        if not gradients:
            return function, report
        ops = hoist(function, is_update)
        kept = _explain(function, ops, gradients, report)
        immediate = sum(size_of(g.type) for g in gradients if g not in kept)
        total = sum(size_of(g.type) for g in gradients)
        done = len(gradients) - len(kept)
        report.note(
            f"{done} of {len(gradients)} gradients are consumed at once ({immediate} of {total} B)"
        )
        if not done:
            return function, report
        if all(new is old for new, old in zip(ops, function.ops, strict=True)):
            report.note("the order was so already")
            return function, report
        report.changed = done
        before, after = measure(function).peak, measure(function, ops).peak
        report.note(f"peak of live values {before} B -> {after} B")
        return function.with_ops(ops), report


def find_gradients(function: Function) -> dict[Value, Op]:
    """What the backward pass makes and updates read -> the op that makes it."""
    made = {r: op for op in function.ops if op.loc.phase is Phase.BACKWARD for r in op.results}
    read = (v for op in function.ops if is_update(op) for v in op.inputs)
    return {v: made[v] for v in dict.fromkeys(read) if v in made}


OUTSIDE = "an op of the backward pass still reads it later"


def _explain(
    function: Function, ops: list[Op], gradients: dict[Value, Op], report: PassReport
) -> set[Value]:
    """Gradients that are still read after some other op of the step; why goes into the report."""
    last = {v: i for i, op in enumerate(ops) for v in op.inputs}
    steps = [0]
    for op in ops:
        steps.append(steps[-1] + (not is_update(op)))
    place = {op: i for i, op in enumerate(ops)}
    needs = _gradients_needed(function, gradients)
    late: set[Value] = set()
    for gradient, maker in gradients.items():
        if steps[last[gradient] + 1] != steps[place[maker] + 1]:
            late.add(gradient)
            reason = _reason(needs[gradient]) if is_update(ops[last[gradient]]) else OUTSIDE
            report.skip(reason, maker.loc)
    return late


MANY = 2  # one gradient may wait for another of the same op; more is a reduction over gradients


def _gradients_needed(function: Function, gradients: dict[Value, Op]) -> dict[Value, int]:
    """Gradient -> how many gradients its last reader waits for (counted up to `MANY`)."""
    behind: dict[Value, frozenset[Value]] = {g: frozenset({g}) for g in gradients}
    needed: dict[Value, int] = {}
    for op in function.ops:
        if not is_update(op):
            continue
        merged: set[Value] = set()
        for v in op.inputs:
            merged.update(behind.get(v, ()))
        few = frozenset(sorted(merged, key=lambda g: g.name)[: MANY + 1])
        behind.update(dict.fromkeys(op.results, few))
        for v in op.inputs:
            if v in gradients:
                needed[v] = max(needed.get(v, 0), len(few))
    return needed


def _reason(count: int) -> str:
    if count > 1:
        return "its update needs other gradients too, as clipping by the global norm does"
    return "its update waits for a later op, such as the last reader of the old parameter"
