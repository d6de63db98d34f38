"""Computes cheap forward values again in the backward pass rather than keep them alive."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from shoestring.ir import Function, Kind, Loc, Op, Phase, Role, Value

from .base import Numerics, Pass, PassReport
from .editing import Names
from .liveness import Liveness, measure, size_of, storage_roots

CHEAP = frozenset({Kind.POINTWISE, Kind.VIEW, Kind.CREATION})
# Also cheap, though not elementwise: each is one pass over memory. A draw is what its key gives.
ONE_PASS = frozenset(
    f"aten.{name}"
    for name in """native_layer_norm.default native_group_norm.default index.Tensor
    embedding.default""".split()
) | {"rng.uniform.default"}
CAST = "aten._to_copy.default"
KEPT_INSTEAD = 4  # members of a group that may be kept instead of what all depend on
SOON = 16  # ops between two reads of a weight that is rounded once for both
LATER = frozenset({Phase.BACKWARD, Phase.RECOMPUTE, Phase.UPDATE})


@dataclass(frozen=True)
class Rematerialize(Pass):
    """Duplicates cheap forward chains next to their backward readers, from values kept anyway.

    Of an activation function written in eight pointwise ops only the input stays alive between
    forward and backward. The duplicates are of phase `recompute`: they do not merge with their
    originals again. Reductions are never duplicated; a layer norm, a gather and a random draw,
    which its key gives again, are: each is one pass over memory. Keeping an input that nobody else
    keeps is worth it where it is smaller than what it replaces.

    So are a few products of the forward pass, those that free the most memory for their work: up to
    `products` of all the work of the step, where the step needs `worth` times as large a part less
    memory for it, state included.

    Attributes:
        max_chain: the most ops that are duplicated for one value, beside products.
        window: a duplicate serves readers up to so many ops further on, that of a weight in a lower
            precision so many after its last reader; later ones get their own.
        products: how much of the FLOPs of all products may be done again; 0 for none.
        worth: the least that the part of memory saved is to the part of work added.

    Before:

        func @f {
          parameter %w: f32[8] "w"
          batch %x: f32[8,8] "x"
          %h: f32[8,8] = aten.mm.default(%x, %x)
          %e: f32[8,8] = aten.exp.default(%h)
          %t: f32[8,8] = aten.tanh.default(%h)
          %l: f32[8,8] = aten.mul.Tensor(%e, %t)
          %m: f32[8,8] = aten.mm.default(%l, %x)
          %g: f32[8,8] = aten.mm.default(%m, %x) loc("m.py":1 "" backward)
          %ge: f32[8,8] = aten.mul.Tensor(%g, %e) loc("m.py":1 "" backward)
          %gt: f32[8,8] = aten.mul.Tensor(%ge, %t) loc("m.py":1 "" backward)
          %gh: f32[8,8] = aten.mul.Tensor(%gt, %h) loc("m.py":1 "" backward)
          return g=%gh
        }

    After:

        func @f {
          parameter %w: f32[8] "w"
          batch %x: f32[8,8] "x"
          %h: f32[8,8] = aten.mm.default(%x, %x)
          %e: f32[8,8] = aten.exp.default(%h)
          %t: f32[8,8] = aten.tanh.default(%h)
          %l: f32[8,8] = aten.mul.Tensor(%e, %t)
          %m: f32[8,8] = aten.mm.default(%l, %x)
          %g: f32[8,8] = aten.mm.default(%m, %x) loc("m.py":1 "" backward)
          %e.1: f32[8,8] = aten.exp.default(%h) loc("":0 "" recompute)
          %ge: f32[8,8] = aten.mul.Tensor(%g, %e.1) loc("m.py":1 "" backward)
          %t.1: f32[8,8] = aten.tanh.default(%h) loc("":0 "" recompute)
          %gt: f32[8,8] = aten.mul.Tensor(%ge, %t.1) loc("m.py":1 "" backward)
          %gh: f32[8,8] = aten.mul.Tensor(%gt, %h) loc("m.py":1 "" backward)
          return g=%gh
        }
    """

    max_chain: int = 16
    window: int = 64
    products: float = 0.05
    worth: float = 1.5

    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, function: Function) -> tuple[Function, PassReport]:
        plan = _Plan(function, self.max_chain)
        chosen = plan.choose()
        report = plan.report
        plain = _duplicate(function, plan, chosen, self.window) if chosen else function
        again, result, after = self.with_products(plan, plain, measure(plain))
        before = measure(function).peak
        if after >= before:
            if chosen:
                report.skip("the peak of live values would not fall", Loc(), len(chosen))
            return function, report
        report.changed = len(chosen) + len(again)
        report.note(f"{len(result.ops) - len(function.ops)} ops are computed again")
        for op in again:
            report.note(f"also {op.name} of {op.loc.module or op.result.name}")
        report.note(f"peak of live values {before} B -> {after} B")
        return result, report

    def with_products(
        self, plan: _Plan, plain: Function, alive: Liveness
    ) -> tuple[list[Op], Function, int]:
        """Products that are worth computing again, the function that does, and its peak.

        Args:
            plan: that without products, decided.
            plain: what it gives.
            alive: the bytes alive in that.
        """
        function = plan.function
        total = sum(map(_flops, function.ops))
        again: list[Op] = []
        left = self.products * total
        for op in _products_at(alive.at, plain):
            kept = plan.needs(op.result)
            if kept is None or plan.bytes_of(kept) >= size_of(op.result.type):
                continue
            if _flops(op) <= left:
                again.append(op)
                left -= _flops(op)
        if not again:
            return [], plain, alive.peak
        other = _Plan(function, self.max_chain, again)
        result = _duplicate(function, other, other.choose(), self.window)
        work = sum(map(_flops, result.ops)) - total
        state = sum(size_of(p.value.type) for p in function.params)
        peak = measure(result).peak
        saved = (alive.peak - peak) / (state + alive.peak)
        if work > self.products * total or saved < self.worth * work / total:
            return [], plain, alive.peak
        return again, result, peak


class _Plan:
    """Decides which saved values are computed again, and from what.

    Products of `again` are taken for as cheap as pointwise ops.
    """

    def __init__(self, function: Function, max_chain: int, again: Collection[Op] = ()) -> None:
        self.function = function
        self.max_chain = max_chain
        self.again = again
        self.roots = storage_roots(function)
        self.report = PassReport()
        self.saved = self.find_saved()
        self.report.matched = len(self.saved)
        self.available = {p.value for p in function.params}
        self.available |= _held_meanwhile(function)
        self.available.update(self.roots[v] for v in _kept_anyway(function, self.saved))

    def choose(self) -> set[Value]:
        """Values to compute again."""
        chosen: set[Value] = set()
        groups, far = self.grouped(self.saved)
        for members in groups.values():
            chosen.update(self.decide(members))
        for v in far:  # some are nearer now, to what is kept meanwhile
            if self.roots[v] in self.available:
                continue
            if self.needs(v) is None:
                self.keep([v], f"more than {self.max_chain} ops away from values kept anyway")
            else:
                chosen.update(self.decide([v]))
        return chosen

    def grouped(
        self, values: Iterable[Value]
    ) -> tuple[dict[frozenset[Value], list[Value]], list[Value]]:
        """Values by what must be kept in order to compute them again; and those too far from it."""
        groups: dict[frozenset[Value], list[Value]] = {}
        far: list[Value] = []
        for v in values:
            if self.roots[v] in self.available:
                continue
            needs = self.needs(v)
            if needs is None:
                far.append(v)
            else:
                groups.setdefault(needs, []).append(v)
        return groups, far

    def decide(self, members: list[Value]) -> list[Value]:
        """All members of a group that depends on the same inputs, or none, or all but one.

        The one is kept instead of the inputs where that takes no more memory: a sum, of which a
        norm is computed again, instead of its summands.
        """
        open_ = [v for v in members if self.roots[v] not in self.available]
        needed = self.needed_by(open_)
        for v in open_[:KEPT_INSTEAD] if needed else ():
            root = self.roots[v]
            rest = [o for o in open_ if self.roots[o] is not root]
            self.available.add(root)
            with_it = self.needed_by(rest) | {root}
            self.available.remove(root)
            if rest and self.bytes_of(with_it) <= self.bytes_of(needed):
                self.keep([v], "others are computed again from it")
                return self.decide(rest)
        if self.bytes_of(needed) < self.bytes_of({self.roots[v] for v in open_} - needed):
            self.available |= needed
            return open_
        self.keep(open_, "its inputs take as much memory and nobody else keeps them")
        return []

    def keep(self, values: Iterable[Value], reason: str) -> None:
        for v in values:
            self.available.add(self.roots[v])
            op = self.function.producer(v)
            self.report.skip(reason, op.loc if op is not None else Loc())

    def needed_by(self, values: Iterable[Value]) -> set[Value]:
        """What must be kept in order to compute all of them again."""
        return {n for v in values for n in self.needs(v) or ()}

    def bytes_of(self, values: Iterable[Value]) -> int:
        return sum(size_of(v.type) for v in values)

    def needs(self, v: Value) -> frozenset[Value] | None:
        """Storage that must be kept in order to compute a value again; None where it is too far."""
        chain = self.chain(v)
        if chain is None:
            return None
        made = {r for op in chain for r in op.results}
        read = {self.roots[i] for op in chain for i in op.inputs if i not in made}
        return frozenset(read - self.available)

    def chain(self, v: Value) -> list[Op] | None:
        """The ops to duplicate, last first, for a value; None where there are too many."""
        found: dict[Op, None] = {}
        stack = [v]
        while stack:
            op = self.function.producer(stack.pop())
            assert op is not None, "parameters are available"
            if op in found:
                continue
            if len(found) == self.max_chain + len(self.again):
                return None
            found[op] = None
            stack += [i for i in op.inputs if self.is_open(i)]
        return list(found)

    def is_open(self, v: Value) -> bool:
        """Whether a value is not alive in the backward pass, but may be computed there."""
        op = self.function.producer(v)
        return op is not None and v in self.cheap(op) and self.roots[v] not in self.available

    def cheap(self, op: Op) -> tuple[Value, ...]:
        return op.results if op in self.again else cheap_results(op)

    def find_saved(self) -> list[Value]:
        """Values of the forward pass that the backward pass reads and may compute, in order.

        A view of what is not cheap is none of them: its storage is kept whatever is decided.
        """
        ops = self.function.ops
        read = {v for op in ops if op.loc.phase is Phase.BACKWARD for v in op.inputs}
        made = [r for op in ops for r in self.cheap(op)]
        cheap = set(made)
        return [r for r in made if r in read and self.roots[r] in cheap]


def cheap_results(op: Op) -> tuple[Value, ...]:
    """What may be computed twice of an op of the forward pass.

    The statistics of a normalization are kept: they are small.
    """
    if op.loc.phase is not Phase.FORWARD or not op.opdef.pure:
        return ()
    if op.name in ONE_PASS:
        return op.results[:1]
    return op.results if op.opdef.kind in CHEAP else ()


def _held_meanwhile(function: Function) -> set[Value]:
    """Weights in a lower precision that are not worth rounding again.

    The backward pass reads them soon after the forward pass, or between two reads of that, as those
    of a loss in chunks: rounding them for each chunk would cost more time, and memory for a second
    copy.
    """
    own = {p.value for p in function.params if p.role is Role.PARAMETER}
    casts = {o.result for o in function.ops if o.name == CAST and o.inputs[0] in own}
    last: dict[Value, int] = {}
    far: set[Value] = set()
    begun: set[Value] = set()
    between: set[Value] = set()
    for i, op in enumerate(function.ops):
        forward = op.loc.phase is Phase.FORWARD
        for v in casts.intersection(op.inputs):
            if forward and v in begun:
                between.add(v)
            if not forward:
                begun.add(v)
                if i - last.get(v, i) > SOON:
                    far.add(v)
            last[v] = i
    return casts - far | between


def _flops(product: Op) -> int:
    """Floating-point operations of a product; 0 for another op, and where sizes are not known."""
    if product.opdef.kind is not Kind.CONTRACTION:
        return 0
    known = all(v.type.is_static for v in (*product.inputs, *product.results))
    return product.opdef.cost(product).flops if known else 0


def _products_at(at: int, function: Function) -> list[Op]:
    """Forward products whose only result is alive at an op; the least work for a byte first.

    Among equals the first, which the backward pass reads last.
    """
    roots = storage_roots(function)
    read = {roots[v] for op in function.ops[at + 1 :] for v in op.inputs}
    found = [
        op
        for op in function.ops[:at]
        if _flops(op)
        and op.loc.phase is Phase.FORWARD
        and op.opdef.pure
        and len(op.results) == 1
        and op.result in read
    ]
    return sorted(found, key=lambda op: _flops(op) / size_of(op.result.type))


def _kept_anyway(function: Function, saved: Iterable[Value]) -> set[Value]:
    """Values that stay alive into the backward pass whatever is decided here."""
    cheap = set(saved)
    read = {
        v
        for op in function.ops
        if op.loc.phase in LATER
        for v in op.inputs
        if v not in cheap or op.loc.phase is not Phase.BACKWARD
    }
    forward = {r for op in function.ops if op.loc.phase is Phase.FORWARD for r in op.results}
    return (read | set(function.results)) & forward


def _duplicate(function: Function, plan: _Plan, chosen: set[Value], window: int) -> Function:
    """The function in which backward readers of the chosen values read duplicates."""
    names = Names(function)
    fresh: dict[Value, tuple[int, Value]] = {}
    order = {op: i for i, op in enumerate(function.ops)}
    ops: list[Op] = []

    def duplicate(v: Value) -> None:
        chain, now = plan.chain(v) or [], len(ops)
        for op in sorted(chain, key=order.__getitem__):
            near = [r for r in op.results if _is_near(fresh, r, now, window)]
            if op.name == CAST:  # each step of a recurrence reads its weights
                fresh.update((r, (now, fresh[r][1])) for r in near)
            if not near:
                copies = tuple(names.fresh(r.type, r.name) for r in op.results)
                own = op.map_operands(
                    lambda i: fresh[i][1] if _is_near(fresh, i, now, window) else i
                )
                loc = replace(op.loc, phase=Phase.RECOMPUTE)
                ops.append(Op(op.opdef, own.operands, op.attrs, copies, loc))
                fresh.update((r, (len(ops), c)) for r, c in zip(op.results, copies, strict=True))

    for op in function.ops:
        if op.loc.phase is Phase.BACKWARD and not chosen.isdisjoint(op.inputs):
            for v in dict.fromkeys(op.inputs):
                if v in chosen:
                    duplicate(v)
            op = op.map_operands(lambda i: fresh[i][1] if i in chosen else i)
        ops.append(op)
    return function.with_ops(ops)


def _is_near(fresh: dict[Value, tuple[int, Value]], v: Value, now: int, window: int) -> bool:
    """Whether a duplicate was made or read recently enough to be read again."""
    return v in fresh and now - fresh[v][0] <= window
