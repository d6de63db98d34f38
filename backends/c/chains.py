"""Long chains of arithmetic, cut into loops of their own.

A core works on as many elements at once as its queues have room for: of a loop whose arithmetic is
a chain of fifty operations, each of which waits for the one before, on two or three. Cut into loops
of twenty it works on many. What crosses from one to the next waits in a short array, in the first
cache.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from .expressions import EXPENSIVE, HALVES
from .nodes import Node

LONGEST = 22  # operations one after the other that a loop may have
STRIP = 512  # elements that go through all loops together
CHEAP = 2  # operations from memory on; so few are done again where they are needed

ROUNDING = 5  # operations that a rounding to a half takes
LENGTHS = {
    "aten.exp.default": 15, "aten.log.default": 16, "aten.erf.default": 30,
    "aten.tanh.default": 18, "aten.sigmoid.default": 20, "aten.gelu.default": 26,
    "aten.gelu_backward.default": 30, "aten.silu.default": 21, "aten.silu_backward.default": 26,
    "aten.sin.default": 30, "aten.cos.default": 30, "aten.pow.Tensor_Tensor": 40,
    "rng.uniform.default": 30, "aten.pow.Tensor_Scalar": 2, "aten.sqrt.default": 5,
    "aten.rsqrt.default": 8, "aten.div.Tensor": 3, "aten.reciprocal.default": 3,
}  # fmt: skip
"""Operations one after the other, where they are not one."""
LATE = frozenset({"aten.gelu_backward.default", "aten.silu_backward.default"})
"""Ops whose first operand is only multiplied by what they make of the second."""


@dataclass(frozen=True)
class Piece:
    """One loop.

    Attributes:
        takes: what loops before it have left in arrays.
        computes: its own nodes, and cheap ones of others that it needs, in order.
        leaves: what later loops take.
    """

    takes: tuple[Node, ...]
    computes: tuple[Node, ...]
    leaves: tuple[Node, ...] = ()


def cut(nodes: Sequence[Node], ends: Collection[Node], given: Collection[Node]) -> list[Piece]:
    """The loops in which to compute the nodes; one where no chain is long.

    Args:
        nodes: pointwise nodes in order.
        ends: those among them that are stored or summed up, which the last loop does.
        given: those that are read, not computed.
    """
    inputs = _inputs(nodes, given)
    lengths = {n: 0 if n in given else length(n) for n in nodes}
    depth = _depths(nodes, inputs, lengths)
    costly = {n for n in nodes if n.name in EXPENSIVE and n not in given}
    if max(depth.values(), default=0) <= LONGEST or not costly:
        return [Piece((), tuple(nodes))]
    cheap = {n for n in nodes if depth[n] <= CHEAP and n not in costly}
    parts = _joined(_turns(nodes, inputs, costly), inputs, lengths)
    return _pieces(nodes, parts, inputs, cheap, ends)


def length(node: Node) -> int:
    """Operations one after the other."""
    return LENGTHS.get(node.name, 1) + ROUNDING * (node.outs[0].dtype in HALVES)


def _inputs(nodes: Sequence[Node], given: Collection[Node]) -> dict[Node, list[Node]]:
    here = set(nodes)
    found: dict[Node, list[Node]] = {}
    for n in nodes:
        makers = (r.base.node for r in n.refs if n not in given)
        found[n] = list(dict.fromkeys(m for m in makers if m is not None and m in here))
    return found


def _depths(
    nodes: Sequence[Node], inputs: Mapping[Node, list[Node]], lengths: Mapping[Node, int]
) -> dict[Node, int]:
    depth: dict[Node, int] = {}
    for n in nodes:
        late = n.refs[0].base.node if n.name in LATE else None
        depth[n] = lengths[n]
        for m in inputs[n]:
            depth[n] = max(depth[n], depth.get(m, 0) + (1 if m is late else lengths[n]))
    return depth


def _turns(
    nodes: Sequence[Node], inputs: Mapping[Node, list[Node]], costly: Collection[Node]
) -> list[list[Node]]:
    """Costly nodes in turns 1, 3, ..., each after those that it depends on; others between them,
    as late as their readers allow."""
    turn: dict[Node, int] = {}
    for n in nodes:
        after = max((turn[m] for m in inputs[n]), default=0)
        turn[n] = after + after % 2 + (n in costly)
    last = max(turn.values())
    last += last % 2
    wanted: dict[Node, int] = {}
    for n in reversed(nodes):
        if n not in costly:
            turn[n] = wanted.get(n, last)
        for m in inputs[n]:
            wanted[m] = min(wanted.get(m, last), turn[n] - turn[n] % 2)
    return [[n for n in nodes if turn[n] == t] for t in range(last + 1)]


def _joined(
    turns: Sequence[list[Node]], inputs: Mapping[Node, list[Node]], lengths: Mapping[Node, int]
) -> list[list[Node]]:
    """Turns that are short enough together, or no longer than one of them, as one."""

    def depth(part: list[Node]) -> int:
        here = {n: [m for m in inputs[n] if m in part] for n in part}
        return max(_depths(part, here, lengths).values(), default=0)

    joined: list[list[Node]] = []
    for own in turns:
        both = [*joined[-1], *own] if joined else own
        if joined and depth(both) <= max(LONGEST, depth(joined[-1]), depth(own)):
            joined[-1] = both
        elif own:
            joined.append(own)
    return joined


def _pieces(
    nodes: Sequence[Node],
    parts: Sequence[Sequence[Node]],
    inputs: Mapping[Node, list[Node]],
    cheap: Collection[Node],
    ends: Collection[Node],
) -> list[Piece]:
    """The loops of parts: what each takes from those before, and cheap nodes that it does again."""
    part = {n: i for i, own in enumerate(parts) for n in own}
    taken = [set[Node]() for _ in parts]
    computed = [set(own) for own in parts]
    for i, own in enumerate(parts):
        stack = [m for n in own for m in inputs[n]] + (list(ends) if own is parts[-1] else [])
        while stack:
            n = stack.pop()
            if n in computed[i]:
                continue
            if n in cheap:
                computed[i].add(n)
                stack += inputs[n]
            else:
                taken[i].add(n)
    left = set[Node]().union(*taken)
    return [
        Piece(
            tuple(n for n in nodes if n in taken[i]),
            tuple(n for n in nodes if n in computed[i]),
            tuple(n for n in nodes if n in left and part[n] == i),
        )
        for i in range(len(parts))
    ]
