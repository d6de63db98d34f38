"""Which results are written where they are joined.

A stack of the results of many kernels, such as those of all steps of a recurrence, takes their
memory a second time, and a copy. Where each of them is one stretch of the stack, it is written
there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..memory import ALIGNMENT
from .layout import row_major
from .nodes import Base, Node, WorkList

JOINS = frozenset({"aten.stack.default", "aten.cat.default"})


@dataclass
class Joins:
    """The joins that need no code.

    Attributes:
        nodes: those that join.
        places: part -> the whole that it is in, and at which byte.
    """

    nodes: set[Node] = field(default_factory=set[Node])
    places: dict[Base, tuple[Base, int]] = field(default_factory=dict[Base, tuple[Base, int]])

    @property
    def bases(self) -> set[Base]:
        """Parts and wholes: nothing else may take their places."""
        return {*self.places, *(whole for whole, _ in self.places.values())}


def joins(work: WorkList, kept: set[Base]) -> Joins:
    """The stacks and concatenations whose parts are written in place.

    Args:
        work: the nodes.
        kept: bases whose place is decided otherwise.
    """
    found = Joins()
    taken: set[Base] = set()
    for node in work.nodes:
        if node.name not in JOINS or not _is_in_order(node):
            continue
        (whole,) = node.outs
        parts = list(_parts(node))
        bases = {base for base, _ in parts}
        if len(bases) < len(node.refs) or not taken.isdisjoint({whole, *bases}):
            continue
        if whole in kept or not kept.isdisjoint(bases):
            continue
        taken |= {whole, *bases}
        found.nodes.add(node)
        found.places.update((base, (whole, at)) for base, at in parts)
    return found


def _is_in_order(node: Node) -> bool:
    """Whether the parts follow each other in memory."""
    (out,) = node.outs
    return bool(out.nbytes) and math.prod(out.shape[: node.op.attr("dim") % len(out.shape)]) == 1


def _parts(node: Node) -> Iterator[tuple[Base, int]]:
    """Bases that can be anywhere, and at which byte each belongs; ends at the first that cannot."""
    at = 0
    for ref in node.refs:
        base = ref.base
        movable = base.node is not None and base.dtype is node.outs[0].dtype and ref.wide is None
        whole = ref.layout.numel * base.dtype.itemsize == base.nbytes
        if not movable or not whole or ref.layout != row_major(ref.shape) or at % ALIGNMENT:
            return
        yield base, at
        at += base.nbytes
