"""Moves ops within a function without changing what they compute."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shoestring.ir import Function, Op, Phase, Value


def is_update(op: Op) -> bool:
    return op.loc.phase is Phase.UPDATE


def hoist(function: Function, movable: Callable[[Op], bool]) -> list[Op]:
    """The ops with each movable one directly after the last op that it must wait for.

    An op waits for its operands, and the op that makes a parameter's next value waits for the last
    fixed reader of the old one, so that the value can be replaced in place. Movable ops that
    depend on no fixed op go as late as their readers allow: earlier they would only take memory.
    """
    fixed = [op for op in function.ops if not movable(op)]
    anchors = _anchors(function, fixed, movable)
    free = _sunk(function, anchors)
    buckets: dict[int, list[Op]] = {}
    for op in function.ops:
        if op in anchors:
            buckets.setdefault(free.get(op, anchors[op]), []).append(op)
    ordered = list(buckets.get(-1, []))
    for index, op in enumerate(fixed):
        ordered.append(op)
        ordered += buckets.get(index, [])
    return ordered


def _anchors(
    function: Function, fixed: Sequence[Op], movable: Callable[[Op], bool]
) -> dict[Op, int]:
    """Movable op -> index of the fixed op that it must follow; -1 where there is none."""
    ready = {r: i for i, op in enumerate(fixed) for r in op.results}
    last_read = {v: i for i, op in enumerate(fixed) for v in op.inputs}
    replaced = {p.next: p.value for p in function.params if p.next is not None}
    anchors: dict[Op, int] = {}
    for op in function.ops:
        if not movable(op):
            continue
        waits = [ready.get(v, -1) for v in op.inputs]
        waits += [last_read.get(replaced[r], -1) for r in op.results if r in replaced]
        anchors[op] = max(waits, default=-1)
        ready.update(dict.fromkeys(op.results, anchors[op]))
    # A fixed op may read what a movable one makes: then the movable one stays before it.
    return _before_readers(function, fixed, anchors)


def _before_readers(
    function: Function, fixed: Sequence[Op], anchors: dict[Op, int]
) -> dict[Op, int]:
    """Anchors lowered so that each op comes before the fixed ops that read it, as captured."""
    first_read: dict[Value, int] = {}
    for index in range(len(fixed) - 1, -1, -1):
        first_read.update(dict.fromkeys(fixed[index].inputs, index))
    for op in reversed(function.ops):
        if op not in anchors:
            continue
        limit = min((first_read[r] for r in op.results if r in first_read), default=len(fixed))
        anchors[op] = min(anchors[op], limit - 1)
        for v in op.inputs:
            first_read[v] = min(first_read.get(v, len(fixed)), anchors[op] + 1)
    return anchors


def _sunk(function: Function, anchors: dict[Op, int]) -> dict[Op, int]:
    """Ops that wait for nothing -> the place of their first reader."""
    places: dict[Op, int] = {}
    wanted: dict[Value, int] = {}
    for op in reversed(function.ops):
        if op not in anchors:
            wanted.update(dict.fromkeys(op.inputs, -1))
            continue
        readers = [wanted[r] for r in op.results if r in wanted]
        if anchors[op] == -1 and readers:
            places[op] = max(min(readers), -1)
        place = places.get(op, anchors[op])
        for v in op.inputs:
            wanted[v] = min(wanted.get(v, place), place)
    return places


def sink(function: Function, ops: Sequence[Op], lazy: Callable[[Op], bool]) -> list[Op]:
    """The ops with each lazy one directly before its first reader; lazy ops keep their order."""
    waiting: dict[Value, Op] = {}
    ordered: list[Op] = []

    def force(values: Sequence[Value]) -> None:
        stack = [waiting[v] for v in values if v in waiting]
        while stack:
            top = stack[-1]
            missing = [waiting[v] for v in top.inputs if v in waiting]
            if missing:
                stack.extend(missing)
                continue
            stack.pop()
            if any(r in waiting for r in top.results):
                ordered.append(top)
                for r in top.results:
                    waiting.pop(r, None)

    for op in ops:
        if lazy(op) and op.results:
            waiting.update(dict.fromkeys(op.results, op))
            continue
        force(op.inputs)
        ordered.append(op)
    force(tuple(waiting))
    return ordered
