"""Computes a sum of matrix products as one product, where their rows lie together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from shoestring.ir import Function, Op, Value, make_op

from .base import Numerics, Pass, PassReport
from .dead_code import DeadCode
from .editing import Names, append

ADD, MM, SUM = "aten.add.Tensor", "aten.mm.default", "aten.sum.dim_IntList"
PERMUTE, VIEW = "aten.permute.default", "aten.view.default"
SLICE, SELECT, STACK = "aten.slice.Tensor", "aten.select.int", "aten.stack.default"

Place = tuple[Value, int]
"""Row `i` of a value [steps, rows, size]."""


@dataclass(frozen=True)
class Term:
    """One summand: x^T y for x [rows, m] and y [rows, n], or the sum of the rows of x."""

    leaf: Value
    rows: tuple[Value, ...]


@dataclass(frozen=True)
class Run:
    """Summands whose rows follow each other: steps `start` to `stop` of the first base."""

    bases: tuple[Value, ...]
    shifts: tuple[int, ...]
    start: int
    stop: int
    leaves: tuple[Value, ...]


@dataclass(frozen=True)
class MergeProducts(Pass):
    """Multiplies all steps of a recurrence at once for the gradient of their common weight.

    The gradient of a weight that is used at each step is a sum of small products. Where what they
    multiply is stacked for another reader anyway, one product of the stacks gives the sum; so does
    one sum for a bias. Products of other sums stay: to stack their operands would take memory.

    Attributes:
        least: the fewest products or sums that are merged.

    Before:

        func @f {
          batch %x: f32[2,8,5] "x"
          batch %y: f32[2,8,3] "y"
          %x0: f32[8,5] = aten.select.int(%x) {dim=0, index=0}
          %x1: f32[8,5] = aten.select.int(%x) {dim=0, index=1}
          %y0: f32[8,3] = aten.select.int(%y) {dim=0, index=0}
          %y1: f32[8,3] = aten.select.int(%y) {dim=0, index=1}
          %t0: f32[5,8] = aten.permute.default(%x0) {dims=[1, 0]}
          %t1: f32[5,8] = aten.permute.default(%x1) {dims=[1, 0]}
          %p0: f32[5,3] = aten.mm.default(%t0, %y0)
          %p1: f32[5,3] = aten.mm.default(%t1, %y1)
          %dw: f32[5,3] = aten.add.Tensor(%p0, %p1)
          return dw=%dw
        }

    After, with what is dead:

        func @f {
          batch %x: f32[2,8,5] "x"
          batch %y: f32[2,8,3] "y"
          %x0: f32[8,5] = aten.select.int(%x) {dim=0, index=0}
          %x1: f32[8,5] = aten.select.int(%x) {dim=0, index=1}
          %y0: f32[8,3] = aten.select.int(%y) {dim=0, index=0}
          %y1: f32[8,3] = aten.select.int(%y) {dim=0, index=1}
          %t0: f32[5,8] = aten.permute.default(%x0) {dims=[1, 0]}
          %t1: f32[5,8] = aten.permute.default(%x1) {dims=[1, 0]}
          %p0: f32[5,3] = aten.mm.default(%t0, %y0)
          %p1: f32[5,3] = aten.mm.default(%t1, %y1)
          %x.1: f32[16,5] = aten.view.default(%x) {size=[16, 5]}
          %y.1: f32[16,3] = aten.view.default(%y) {size=[16, 3]}
          %x.2: f32[5,16] = aten.permute.default(%x.1) {dims=[1, 0]}
          %dw: f32[5,3] = aten.mm.default(%x.2, %y.1)
          return dw=%dw
        }
    """

    least: int = 2

    numerics: ClassVar[Numerics] = Numerics.REASSOCIATING

    def run(self, function: Function) -> tuple[Function, PassReport]:
        report = PassReport()
        if not any(op.name in (STACK, SELECT) for op in function.ops):
            return function, report
        alive, _ = DeadCode().run(function)  # what nobody needs reads sums, too
        merger = _Merger(alive, self.least)
        for op in reversed(alive.ops):
            leaves = merger.leaves(op)
            if len(leaves) >= self.least:
                report.matched += 1
                report.changed += merger.merge(op, leaves)
        if not report.changed:
            return function, report
        report.note(f"{merger.merged} products and sums in {merger.runs}")
        return alive.with_ops(merger.ops()), report


class _Merger:
    """Finds sums and writes them anew."""

    def __init__(self, function: Function, least: int) -> None:
        self.function, self.least = function, least
        self.names, self.users = Names(function), function.users()
        self.at = {op: i for i, op in enumerate(function.ops)}
        self.kept = set(function.results)
        self.inner: set[Op] = set()
        self.gone: set[Op] = set()  # last additions of sums; the others are dead
        self.new: dict[int, list[Op]] = {}
        self.merged = self.runs = 0
        self.stacked: dict[Value, list[Place]] = {}
        for op in function.ops:
            self._note_places(op)

    def _note_places(self, op: Op) -> None:
        if op.name not in (STACK, SELECT):
            return
        whole = op.result if op.name == STACK else op.inputs[0]
        if not (whole.type.rank == 3 and whole.type.is_static and op.attr("dim") % 3 == 0):
            return
        if op.name == STACK:
            for i, v in enumerate(op.inputs):
                self.stacked.setdefault(v, []).append((whole, i))
        else:
            index = op.attr("index") % whole.type.static_shape[0]
            self.stacked.setdefault(op.result, []).append((whole, index))

    # -- what is added up ------------------------------------------------------------------------

    def leaves(self, root: Op) -> list[Value]:
        """What an addition adds up, if it is the last of its sum."""
        if root in self.inner or not _adds(root):
            return []
        found: list[Value] = []
        stack = [root]
        while stack:
            op = stack.pop()
            for v in op.inputs:
                maker = self.function.producer(v)
                if maker is not None and _adds(maker) and self._only(v):
                    self.inner.add(maker)
                    stack.append(maker)
                else:
                    found.append(v)
        return found

    def _only(self, v: Value) -> bool:
        """Whether a value is read once."""
        return v not in self.kept and len(self.users[v]) == 1

    def _terms(self, leaves: Sequence[Value]) -> Iterator[Term]:
        times = Counter(leaves)
        for leaf in leaves:
            op = self.function.producer(leaf)
            if op is None or not self._only(leaf) or times[leaf] > 1:
                continue
            if op.name == MM:
                turned = self.function.producer(op.inputs[0])
                if turned is not None and turned.name == PERMUTE:
                    yield Term(leaf, (turned.inputs[0], op.inputs[1]))
                continue
            if op.name == VIEW:
                op = self.function.producer(op.inputs[0])
            if op is not None and op.name == SUM and op.inputs[0].type.rank == 2:
                if op.attr("dim") == (0,) and op.attr("dtype") is None:
                    yield Term(leaf, (op.inputs[0],))

    def _runs(self, leaves: Sequence[Value]) -> list[Run]:
        """Summands that can be merged; each is in one run."""
        groups: dict[tuple[object, ...], dict[int, Value]] = {}
        for term in self._terms(leaves):
            first, *others = (self.stacked.get(v, []) for v in term.rows)
            for base, i in first:
                for other, j in others[0] if others else [(base, i)]:
                    key: tuple[object, ...] = (base, other, j - i) if others else (base,)
                    groups.setdefault(key, {}).setdefault(i, term.leaf)
        found: list[Run] = []
        taken: set[Value] = set()
        for key, steps in sorted(groups.items(), key=lambda g: -len(g[1])):
            steps = {i: v for i, v in steps.items() if v not in taken}
            for start, stop in _stretches(sorted(steps)):
                if stop - start < self.least:
                    continue
                own = tuple(steps[i] for i in range(start, stop))
                taken.update(own)
                bases = tuple(v for v in key if isinstance(v, Value))
                shifts = (0, *(n for n in key if isinstance(n, int)))
                found.append(Run(bases, shifts, start, stop, own))
        return found

    # -- writing ---------------------------------------------------------------------------------

    def merge(self, root: Op, leaves: Sequence[Value]) -> int:
        """Writes a sum anew where it was, or as soon as its stacks are there.

        The sooner, the sooner the stacks go. How many products and sums are merged.
        """
        end = min((self.at[u] for u in self.users[root.result]), default=len(self.function.ops))
        runs = [r for r in self._runs(leaves) if self._made(r) < end]
        if not runs:
            return 0
        where = max(self.at[root], *map(self._made, runs)) + 1
        taken = {v for run in runs for v in run.leaves}
        parts = [v for v in leaves if v not in taken]
        ops: list[Op] = []
        for run in runs:
            parts.append(self._product(run, root, ops))
        total = parts[0]
        for part in parts[1:]:
            total = self._emit(ops, root, ADD, total, part)
        ops[-1] = replace(ops[-1], results=(root.result,))
        self.new.setdefault(where, []).extend(ops)
        self.gone.add(root)
        self.merged += len(taken)
        self.runs += len(runs)
        return len(taken)

    def _made(self, run: Run) -> int:
        """The op that makes the last of the stacks; -1 where they are parameters."""
        makers = (self.function.producer(base) for base in run.bases)
        return max((self.at[maker] for maker in makers if maker is not None), default=-1)

    def _product(self, run: Run, root: Op, ops: list[Op]) -> Value:
        sides = [
            self._rows(base, run.start + shift, run.stop + shift, root, ops)
            for base, shift in zip(run.bases, run.shifts, strict=True)
        ]
        if len(sides) == 2:
            turned = self._emit(ops, root, PERMUTE, sides[0], base=run.bases[0], dims=(1, 0))
            return self._emit(ops, root, MM, turned, sides[1])
        total = self._emit(ops, root, SUM, sides[0], dim=(0,), keepdim=False)
        shape = root.result.type.shape
        return (
            total if total.type.shape == shape else self._emit(ops, root, VIEW, total, size=shape)
        )

    def _rows(self, base: Value, start: int, stop: int, root: Op, ops: list[Op]) -> Value:
        """Some steps of a value, one below the other."""
        steps, rows, size = base.type.static_shape
        v = base
        if (start, stop) != (0, steps):
            v = self._emit(ops, root, SLICE, v, base=base, dim=0, start=start, end=stop)
        return self._emit(ops, root, VIEW, v, base=base, size=((stop - start) * rows, size))

    def _emit(
        self, ops: list[Op], root: Op, name: str, *operands: Value,
        base: Value | None = None, **attrs: object,
    ) -> Value:  # fmt: skip
        op = make_op(name, operands, attrs, root.loc)
        return append(ops, self.names, op, (base or root.result).name)

    def ops(self) -> Iterator[Op]:
        """The function's ops with the new ones among them."""
        for i, op in enumerate(self.function.ops):
            yield from self.new.get(i, ())
            if op not in self.gone:
                yield op
        yield from self.new.get(len(self.function.ops), ())


def _adds(op: Op) -> bool:
    """Whether an op adds two tensors of one shape and type, element by element."""
    if (
        op.name != ADD
        or op.attr("alpha") != 1
        or not all(isinstance(o, Value) for o in op.operands)
    ):
        return False
    return all(v.type == op.result.type and v.type.is_static for v in op.inputs)


def _stretches(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, one past the last) of numbers that follow each other."""
    start = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield numbers[start], numbers[i - 1] + 1
            start = i
