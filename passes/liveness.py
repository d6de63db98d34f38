"""How much memory an order of ops needs: the model that scheduling passes minimize.

* Parameters live outside the step and cost the same in any order: they count nothing.
* A view shares the storage of its operand and keeps it alive. So does a half that is widened: each
  reader widens what it loads.
* A next value takes its parameter's storage where the old value is not read afterwards; else it
  needs storage of its own up to the end.
* Any other value is alive from the op that makes it to the last op that reads it, both included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shoestring.ir import Function, Kind, Op, TensorType, Value

HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Liveness:
    """Bytes alive at each op.

    Attributes:
        profile: bytes alive while each op runs.
        peak: the most of them.
        at: the index of the op at which the peak is first reached.
    """

    profile: tuple[int, ...]
    peak: int
    at: int


def size_of(type_: TensorType) -> int:
    """Bytes of a value; a symbolic dimension counts as one."""
    size = type_.dtype.itemsize
    for d in type_.shape:
        if isinstance(d, int):
            size *= d
    return size


def is_view(op: Op) -> bool:
    """Whether the result is made of its operand's own bytes when it is read."""
    if op.name == "aten._to_copy.default":
        return op.result.type.dtype is torch.float32 and op.inputs[0].type.dtype in HALVES
    return op.opdef.kind is Kind.VIEW and len(op.inputs) == 1 and len(op.results) == 1


def storage_roots(function: Function) -> dict[Value, Value]:
    """Each value -> the value whose storage it shares (itself for most)."""
    roots = {p.value: p.value for p in function.params}
    for op in function.ops:
        for r in op.results:
            roots[r] = roots[op.inputs[0]] if is_view(op) else r
    return roots


def measure(
    function: Function, ops: Sequence[Op] | None = None, roots: dict[Value, Value] | None = None
) -> Liveness:
    """Bytes alive at each op of the function, in another order of its ops where one is given."""
    ops = function.ops if ops is None else ops
    if not ops:
        return Liveness((), 0, 0)
    roots = storage_roots(function) if roots is None else roots
    spans = _spans(function, ops, roots)
    change = [0] * (len(ops) + 1)
    for value, (first, last) in spans.items():
        size = size_of(value.type)
        change[first] += size
        change[last + 1] -= size
    profile: list[int] = []
    alive = 0
    for delta in change[:-1]:
        alive += delta
        profile.append(alive)
    peak = max(profile)
    return Liveness(tuple(profile), peak, profile.index(peak))


def _spans(
    function: Function, ops: Sequence[Op], roots: dict[Value, Value]
) -> dict[Value, tuple[int, int]]:
    """Storage -> the first and last op at which it is alive; only what counts."""
    made: dict[Value, int] = {}
    last: dict[Value, int] = {}
    for index, op in enumerate(ops):
        for v in op.inputs:
            last[roots[v]] = index
        for r in op.results:
            if roots[r] is r:
                made[r] = last[r] = index
    last.update((roots[v], len(ops) - 1) for v in function.results)
    in_place = _in_place(function, roots, made, last)
    return {v: (i, last[v]) for v, i in made.items() if v not in in_place}


def _in_place(
    function: Function, roots: dict[Value, Value], made: dict[Value, int], last: dict[Value, int]
) -> set[Value]:
    """Next values that are written over the parameter that they replace."""
    outputs = {roots[o.value] for o in function.outputs}
    return {
        p.next
        for p in function.params
        if p.next is not None
        and p.next in made
        and p.value not in outputs
        and made[p.next] >= last.get(p.value, -1)
    }
