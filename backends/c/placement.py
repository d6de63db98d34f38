"""Where pointwise work belongs, before kernels are formed: early or late, with a product or not.

A node that reads what an early kernel makes need not run there: the gradient of a norm reads values
of the forward pass, but nobody reads it before the backward pass. So each node has a depth, the
number of library calls and products on the longest path to it, and a place: the depth at which it
is needed first. Kernels hold nodes of one place.

A product's epilogue is all that follows of one place and is pointwise, or nothing: what it passes
on to memory must not be more than the product's result.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from .nodes import Base, Node, Work, WorkList

SMALL = 1 << 12  # elements of a value that may be computed anywhere
MOST_STEPS = 16  # nodes that wait together, as far as one looks back
HELD = 1.5  # a late node keeps its operands: at most so many times the bytes of its result


@dataclass(frozen=True)
class Placement:
    """Places of nodes, and the epilogues of products."""

    place: dict[Node, int]
    epilogue: dict[Node, set[Node]]

    @classmethod
    def find(cls, work: WorkList) -> Placement:
        found = _Search(work)
        products = (n for n in work.nodes if n.work is Work.PRODUCT)
        return cls(found.place, {n: found.epilogue(n) for n in products})

    def follows(self, maker: Node, product: Node, reader: Node) -> bool:
        """Whether a node may join a product's kernel, by what it reads of it."""
        epilogue = self.epilogue[product]
        return reader in epilogue or not (maker is product or maker in epilogue)

    def of(self, node: Node) -> set[int]:
        """The place that a node of a kernel is bound to; a small one goes anywhere."""
        return {self.place[node]} if _numel(node) > SMALL else set()


class _Search:
    """What is known of nodes while their places are found."""

    def __init__(self, work: WorkList) -> None:
        self.nodes = {n.index: n for n in work.nodes}
        self.readers: dict[Base, list[Node]] = {}
        for node in work.nodes:
            for ref in node.refs:
                self.readers.setdefault(ref.base, []).append(node)
        self.only: dict[Base, Node] = {}  # which one node alone reads
        for base, readers in self.readers.items():
            if all(r is readers[0] for r in readers):
                self.only[base] = readers[0]
        ends = (*(work.refs[o.value] for o in work.function.outputs), *work.nexts.values())
        self.ends = {r.base for r in ends}
        self.depth: dict[Node, int] = {}
        for node in work.nodes:
            self.depth[node] = self._depth(node)
        # Where a reader is: its depth, until its place is found.
        self.needed = dict(self.depth)
        self.leads_on: dict[Node, bool] = {}
        self.place: dict[Node, int] = {}
        for node in reversed(work.nodes):
            self.leads_on[node] = self._leads_on(node)
        self.beside: set[Node] = set()
        self._find_places(work)
        # Once more with what a first round has found.
        self.beside = {n for n in work.nodes if self._has_neighbours(n)}
        self._find_places(work)

    def _find_places(self, work: WorkList) -> None:
        self.place = {}
        self.needed.update(self.depth)
        for node in reversed(work.nodes):
            self.place[node] = self._place(node)
            if not _is_barrier(node):
                self.needed[node] = self.place[node]

    # -- early or late -------------------------------------------------------------------------

    def _depth(self, node: Node) -> int:
        makers = (r.base.node for r in node.refs)
        inputs = (self.depth[m] + _is_barrier(m) for m in makers if m is not None)
        return max(inputs, default=0)

    def _place(self, node: Node) -> int:
        """Reductions make little of much: they run as soon as they can."""
        if node.work is not Work.POINTWISE:
            return self.depth[node] + _is_barrier(node)
        depth = self.depth[node]
        if self._ends_product(node):
            return depth
        late = max(depth, self._first_need(node))
        held = self._held(node, late)
        return depth if _bytes(held) > HELD * node.outs[0].nbytes else late

    def _ends_product(self, node: Node) -> bool:
        """Whether it converts a product that nobody else reads."""
        if node.name != "aten._to_copy.default":
            return False
        (ref,) = node.refs
        maker = ref.base.node
        return maker is not None and maker.work is Work.PRODUCT and self.only.get(ref.base) is node

    def _held(self, node: Node, late: int, steps: int = MOST_STEPS) -> set[Base]:
        """What is kept for a node that waits; what only it reads is made when it is."""
        held: set[Base] = set()
        for base in {r.base for r in node.refs}:
            maker, alone = base.node, self.only.get(base) is node
            if maker is not None and maker.work is Work.POINTWISE and alone and steps:
                held |= self._held(maker, late, steps - 1)
            elif self._dies(base, late):
                held.add(base)
        return held

    def _first_need(self, node: Node) -> int:
        """The place of the first reader.

        A product that only leads to new state may wait by one, where that brings nodes together.
        """
        readers = self._readers_of(node)
        last = [self.depth[r] for r in readers if _is_barrier(r) and not self.leads_on[r]]
        others = [self.needed[r] for r in readers if not _is_barrier(r) or self.leads_on[r]]
        waits = bool(others) or node in self.beside
        return min([*others, *(d + waits for d in last)], default=0)

    def _has_neighbours(self, node: Node) -> bool:
        """Whether what it reads is also read by nodes of the place where it would wait."""
        if node.work is not Work.POINTWISE or not self._readers_of(node):
            return False
        makers = {r.base.node for r in node.refs}
        if node.name == "aten._to_copy.default" and len(makers) == 1:
            (maker,) = makers
            if maker is not None and self._readers_of(maker) == [node]:
                return self._has_neighbours(maker)
        readers = {r for m in makers if m is not None for r in self._readers_of(m)} - {node}
        return any(self.place[r] == self.place[node] + 1 for r in readers)

    def _leads_on(self, node: Node) -> bool:
        """Whether a call or a product depends on it."""
        return any(_is_barrier(r) or self.leads_on[r] for r in self._readers_of(node))

    def _dies(self, base: Base, place: int) -> bool:
        """Whether nobody else keeps a value until then."""
        kept = base.param is not None or base.constant is not None or base in self.ends
        readers = self.readers.get(base, ())
        return not kept and all([self.needed[r] < place for r in readers])

    # -- epilogues -----------------------------------------------------------------------------

    def epilogue(self, product: Node) -> set[Node]:
        """The nodes that may follow a product in its kernel; all those that can, or none."""
        found = {product}
        self._follow(product, found)
        if len(found) == 1:
            return set()
        before = _bytes([product.outs[0]])
        passed = [n.outs[0] for n in found if self._is_read_outside(n, found)]
        ends = [b for b in passed if self._is_end(b)]
        behind = [b for b in passed if self._is_read_behind(b, found)]
        alone = 2 * before + _bytes(b for b in ends if b is not product.outs[0])
        if _bytes(passed) + _bytes(behind) <= alone:
            return found - {product}
        # The bias in any case: without it the product would be stored before it is rounded.
        return {n for n in found if n.op is product.op} - {product}

    def _follow(self, product: Node, found: set[Node]) -> None:
        """Adds the pointwise nodes of the product's place that need nothing that comes after it."""
        place = self.place[product]
        behind: set[Node] = set()  # depends on the product and cannot share its kernel
        ready = [r.index for r in self._readers_of(product)]
        heapq.heapify(ready)
        while ready:
            node = self.nodes[heapq.heappop(ready)]
            if node in found or node in behind or self.place[node] != place or _is_barrier(node):
                continue
            makers = {r.base.node for r in node.refs}
            waits = node.work is not Work.POINTWISE or not behind.isdisjoint(makers)
            (behind if waits else found).add(node)
            for reader in self._readers_of(node):
                heapq.heappush(ready, reader.index)

    def _readers_of(self, node: Node) -> list[Node]:
        return [reader for out in node.outs for reader in self.readers.get(out, ())]

    def _is_read_outside(self, node: Node, found: set[Node]) -> bool:
        out = node.outs[0]
        return out in self.ends or any(r not in found for r in self.readers.get(out, ()))

    def _is_end(self, base: Base) -> bool:
        """Whether it must be in memory whatever shares kernels: read late, by a call, or kept."""
        place = self.place[base.node] if base.node is not None else 0
        readers = self.readers.get(base, ())
        return base in self.ends or any(_is_barrier(r) or self.place[r] != place for r in readers)

    def _is_read_behind(self, base: Base, found: set[Node]) -> bool:
        """Whether a kernel behind reads it again."""
        place = self.place[base.node] if base.node is not None else 0
        readers = (r for r in self.readers.get(base, ()) if r not in found)
        return any(not _is_barrier(r) and self.place[r] == place for r in readers)


def _is_barrier(node: Node) -> bool:
    """Whether no kernel reaches across the node."""
    return node.work is Work.LIBRARY or node.work is Work.PRODUCT


def _numel(node: Node) -> int:
    return node.outs[0].nbytes // node.outs[0].dtype.itemsize


def _bytes(bases: Iterable[Base]) -> int:
    return sum(b.nbytes for b in bases)
