"""Which nodes share a kernel.

A kernel has one domain of loops; every node in it lives on one of the levels of `levels.py`. A
reduction takes `full` to `outer` or `columns`, or to `none` where there is neither. Greedy, in
program order: a node joins the kernels of its operands where levels agree and no path leaves the
kernel and comes back. A sum over rows also joins another reader of what it sums up, and what is
computed again joins the epilogue that reads the same.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from shoestring.ir import Phase

from .atoms import Atoms, Run, strides_of
from .layout import row_major
from .levels import is_columns, join
from .nodes import Base, Node, Ref, Work, WorkList
from .placement import Placement
from .products import Axes, axes_of, split_dims, walks
from .reductions import keeps_dims, reduced_dims

KEYED = frozenset({"rng.uniform.default", "rng.bits.default"})  # random numbers of a key
MAX_NODES = 96
MAX_SEARCH = 256
HELD = 1 << 20  # bytes that may be kept alive longer for the sake of one kernel
MAX_READERS = 4
_NOTHING: set[int] = set()  # of all units that became part of another


@dataclass(eq=False, slots=True)
class Placed:
    """A node within a kernel: the loops of its domain, and of its result.

    Attributes:
        domain: per dimension of what it iterates over (a reduction: its operand).
        result: per dimension of its result.
        loops: of all dimensions of the domain, as they were when it was placed.
        result_loops: the same of the result.
    """

    node: Node
    domain: list[Run]
    result: list[Run]
    loops: Run = field(init=False)
    result_loops: Run = field(init=False)

    def __post_init__(self) -> None:
        self.loops = tuple(a for run in self.domain for a in run)
        self.result_loops = tuple(a for run in self.result for a in run)


@dataclass(eq=False, slots=True)
class Unit:
    """What runs as one: a kernel, or a call of a PyTorch kernel.

    Attributes:
        full: loops of the whole domain; meaningless for a library call.
        outer: loops of the outer level; None where no node is on it.
        columns: loops of the level of sums over rows, likewise.
        reduces_all: whether a reduction goes from `full` to `none`.
        product: the matrix product whose epilogue the other nodes are.
        axes: its loops, as they were when all of them were checked.
        places: where it must run (`Placement.of`); nodes of several places share no kernel.
        last: its last node, in program order.
        latest: the last node of all that it depends on, itself included.
    """

    index: int
    nodes: list[Placed]
    library: bool = False
    full: Run = ()
    outer: Run | None = None
    columns: Run | None = None
    reduces_all: bool = False
    inputs: set[int] = field(default_factory=set[int])
    users: set[int] = field(default_factory=set[int])
    places: set[int] = field(default_factory=set[int])
    last: int = 0
    latest: int = 0
    product: Placed | None = None
    axes: Axes | None = None

    @property
    def reduces(self) -> bool:
        """Whether a node is a reduction."""
        return self.reduces_all or self.outer is not None or self.columns is not None

    @property
    def makes(self) -> list[Base]:
        """The results of its nodes."""
        return [o for p in self.nodes for o in p.node.outs]

    @property
    def reads(self) -> list[Ref]:
        """What its nodes read of what others make."""
        own = set(self.makes)
        return [r for p in self.nodes for r in p.node.refs if r.base not in own]


class Grouping:
    """The units of a function, under construction."""

    def __init__(self, work: WorkList, fuse: bool = True) -> None:
        self.atoms = Atoms()
        self.units: dict[int, Unit] = {}
        self.unit_of: dict[Node, int] = {}
        self.placed: dict[Node, Placed] = {}
        summed = (n.refs[0].base for n in work.nodes if n.work is Work.REDUCTION)
        again = (r.base for n in work.nodes if is_recomputed(n) for r in n.refs)
        self.readers: dict[Base, list[tuple[Ref, Placed]]] = {b: [] for b in (*summed, *again)}
        self.fuse = fuse
        self.wide_readers = _wide_readers(work)
        self.heavy = [n.index for n in work.nodes if n.work in (Work.PRODUCT, Work.LIBRARY)]
        self.placement = Placement.find(work)
        for node in work.nodes:
            self._add(node)

    # -- adding a node -------------------------------------------------------------------------

    def _add(self, node: Node) -> None:
        if node.work is Work.LIBRARY:
            self._new_unit(Placed(node, [], []), library=True)
            return
        placed = self._place(node)
        unit = self._new_unit(placed)
        unit.full = placed.loops
        if node.work is Work.REDUCTION:
            kept = placed.result_loops
            unit.outer, unit.reduces_all = (kept, False) if kept else (None, True)
        if self.fuse:
            for ref in self._mergeable(node):
                self._try_merge(ref, placed)
            if node.work is Work.REDUCTION:
                self._join_readers(node.refs[0], placed)
            for ref in node.refs if node.work is Work.POINTWISE else ():
                self._join_readers(ref, placed)
        for ref in node.refs:
            if ref.base in self.readers:
                self.readers[ref.base].append((ref, placed))

    def _mergeable(self, node: Node) -> list[Ref]:
        """What a node reads element by element: first what products make, the last of them first.

        A kernel has one product. So each of many is added to their sum at once, and none waits for
        the others.
        """
        refs = [] if reads_whole(node) else node.refs
        return sorted(refs, key=self._product_of, reverse=True)

    def _product_of(self, ref: Ref) -> int:
        """The product in whose kernel an operand is made, or -1."""
        maker = ref.base.node
        product = self.units[self.unit_of[maker]].product if maker in self.unit_of else None
        return product.node.index if product else -1

    def _new_unit(self, placed: Placed, library: bool = False) -> Unit:
        node = placed.node
        unit = Unit(node.index, [placed], library, last=node.index, latest=node.index)
        unit.product = placed if node.work is Work.PRODUCT else None
        unit.places = self.placement.of(node)
        producers = (r.base.node for r in node.refs)
        unit.inputs = {self.unit_of[n] for n in producers if n is not None}
        for i in unit.inputs:
            self.units[i].users.add(unit.index)
        self.units[unit.index] = unit
        self.unit_of[node] = unit.index
        self.placed[node] = placed
        return unit

    def _place(self, node: Node) -> Placed:
        """Fresh loops, one a dimension."""
        if node.work in (Work.POINTWISE, Work.PRODUCT):
            dims = [self.atoms.fresh(n) for n in node.outs[0].shape]
            if node.work is Work.PRODUCT:
                split_dims(self.atoms, node, dims)
            return Placed(node, dims, dims)
        source = node.refs[0]
        dims = [self.atoms.fresh(n) for n in source.shape]
        gone, keep = set(reduced_dims_of(node)), keeps_dims_of(node)
        result = [() if i in gone else run for i, run in enumerate(dims) if keep or i not in gone]
        return Placed(node, dims, result)

    # -- merging -------------------------------------------------------------------------------

    def _try_merge(self, ref: Ref, placed: Placed) -> None:
        """Merges the unit that makes what a node reads with the node's."""
        producer = ref.base.node
        if producer is None or producer not in self.placed:
            return
        a, b = self.units[self.unit_of[producer]], self.units[self.unit_of[placed.node]]
        if a is b or ref.layout.numel == 1 and not self._may_share_number(a, b):
            return
        product = a.product
        if product and not self.placement.follows(producer, product.node, placed.node):
            return
        self._merge(a, b)

    def _merge(self, a: Unit, b: Unit, tie: Sequence[tuple[Run, Run]] = ()) -> None:
        """Makes two units one, where that can be; `tie` are loops that must be the same."""
        if a.library or b.library or len(a.nodes) + len(b.nodes) > MAX_NODES:
            return
        if (a.product and b.product) or ((a.product or b.product) and (a.reduces or b.reduces)):
            return
        if len(a.places | b.places) > 1 or self._comes_back(a, b) or self._waits(a, b):
            return
        mark = self.atoms.mark()
        tied = all(self.atoms.tie(*pair) for pair in tie)
        tied = tied and self._tie_all(a, b) and self._tie_rest(a, b)
        merged = join(self.atoms, a, b) if tied and self._is_epilogue(a, b) else None
        if merged is None or self._reaches(a, b) or self._reaches(b, a):
            self.atoms.undo(mark)
            return
        a.full, a.outer, a.columns = merged.full, merged.outer, merged.columns
        a.reduces_all = merged.reduces_all
        self._absorb(a, b)

    def _join_readers(self, ref: Ref, placed: Placed) -> None:
        """Merges kernels that read the same elements in the same order.

        A sum over rows joins any, and an epilogue what is computed again.
        """
        for other, reader in self.readers.get(ref.base, ())[-MAX_READERS:]:
            a, b = self.units[self.unit_of[reader.node]], self.units[self.unit_of[placed.node]]
            if a is b or other.layout != ref.layout or reads_whole(reader.node) or a.product:
                continue
            if len(reader.domain) != len(placed.domain):
                continue
            if (
                self._sums_columns(b)
                if placed.node.work is Work.REDUCTION
                else (b.product and is_recomputed(reader.node))
            ):
                self._merge(a, b, list(zip(reader.domain, placed.domain, strict=True)))

    def _sums_columns(self, unit: Unit) -> bool:
        if unit.outer is None or unit.columns is not None:
            return False
        full, outer = self.atoms.resolve(unit.full), self.atoms.resolve(unit.outer)
        return set(outer) < set(full) and is_columns(self.atoms, unit.nodes, outer, full)

    def _may_share_number(self, a: Unit, b: Unit) -> bool:
        """Whether two units may meet over one number that `b` reads from `a`.

        Numbers that many kernels read (a learning rate) get a kernel of their own: else they would
        pull together kernels that have nothing else in common.
        """
        if not self.atoms.resolve(b.full):
            return True
        if self.atoms.resolve(a.full):
            return False
        return all(self.wide_readers.get(o, 0) <= 1 for o in a.makes)

    def _comes_back(self, a: Unit, b: Unit) -> bool:
        """Whether `b` belongs to the backward pass and would be computed, and kept, before it.

        A value that is computed again to save memory comes so from what its original came from.
        """
        if any(p.node.loc.phase is Phase.FORWARD for p in b.nodes):
            return False
        if all(p.node.loc.phase is not Phase.FORWARD for p in a.nodes):
            return False
        start, end = (bisect(self.heavy, i) for i in (a.last, b.nodes[0].node.index))
        return start < end

    def _waits(self, a: Unit, b: Unit) -> bool:
        """Whether `a` in one kernel with `b` waits for others, and holds large operands meanwhile.

        So each of many products is added up at once: in one kernel with its update, a sum of sums
        would keep the operands of all of them.
        """
        if not self._is_late(a, b):
            return False
        theirs = {r.base for p in b.nodes for r in p.node.refs}
        reads = {r.base for r in a.reads} - theirs
        held = sum(base.nbytes for base in reads if base.node is not None)
        return held > HELD + 2 * sum(base.nbytes for base in theirs.intersection(a.makes))

    def _is_late(self, a: Unit, b: Unit) -> bool:
        """Whether `b` needs a product or a call that comes after `a`; True in doubt.

        Where pointwise work stands says nothing: what decays a parameter stands behind the last
        reader of the parameter, and could be computed at any time.
        """
        stack, seen = [b], {a.index, b.index}
        while stack:
            for i in {self._current(i) for i in stack.pop().inputs} - seen:
                unit = self.units[i]
                if unit.latest <= a.last or not (unit.library or self.atoms.resolve(unit.full)):
                    continue
                if unit.library or unit.product or len(seen) > MAX_SEARCH:
                    return True
                seen.add(i)
                stack.append(unit)
        return False

    def _tie_all(self, a: Unit, b: Unit) -> bool:
        """Ties every operand that one unit reads from the other; in a kernel none is in memory."""
        return all(
            not reads_whole(reader.node) and self._tie(ref, self.placed[ref.base.node], reader)
            for unit, other in ((a, b), (b, a))
            if other.index in map(self._current, unit.inputs)
            for reader in unit.nodes
            for ref in reader.node.refs
            if ref.base.node is not None and self.unit_of[ref.base.node] == other.index
        )

    def _tie_rest(self, a: Unit, b: Unit) -> bool:
        """Ties loops that only one of the two has, where they are as many: any order will do.

        So a mean over rows and the difference from it share their inner loop.
        """
        left, right = self.atoms.resolve(a.full), self.atoms.resolve(b.full)
        only_left = tuple(x for x in left if x not in set(right))
        only_right = tuple(x for x in right if x not in set(left))
        if not only_left or not only_right:
            return True
        if self.atoms.size(only_left) != self.atoms.size(only_right):
            return False
        return self.atoms.tie(only_left, only_right)

    def _tie(self, ref: Ref, producer: Placed, reader: Placed) -> bool:
        dims = self.atoms.through(producer.result_loops, ref.layout)
        if dims is None:
            return False
        extra = len(reader.domain) - len(dims)
        for run, mine in zip(dims, reader.domain[extra:], strict=True):
            if run and not self.atoms.tie(run, mine):
                return False
        return True

    def _is_epilogue(self, a: Unit, b: Unit) -> bool:
        """Whether what is not the product itself is done to each element of it, row by row."""
        product, other = (a, b) if a.product else (b, a)
        if product.product is None:
            return True
        axes = axes_of(self.atoms, product.product.node, product.product.domain)
        same = axes == product.axes
        if not all(self._walks(axes, p) for p in (other.nodes if same else a.nodes + b.nodes)):
            return False
        product.axes = other.axes = axes
        return True

    def _walks(self, axes: Axes, placed: Placed) -> bool:
        """Whether a node of an epilogue goes through its memory row by row, as the product does."""
        node = placed.node
        if not _covers(self.atoms, axes, placed):
            return False
        views = [(placed.result, node.outs[0].shape, row_major(node.outs[0].shape).strides)]
        if not reads_whole(node):
            views += [(_dims_of(placed, r), r.shape, r.layout.strides) for r in node.refs]
        return all(walks(self.atoms, axes, strides_of(self.atoms, *v)) for v in views)

    def _absorb(self, a: Unit, b: Unit) -> None:
        for placed in b.nodes:
            self.unit_of[placed.node] = a.index
        a.nodes = sorted((*a.nodes, *b.nodes), key=lambda p: p.node.index)
        a.inputs = {self._current(i) for i in a.inputs | b.inputs} - {a.index, b.index}
        a.users = {self._current(i) for i in a.users | b.users} - {a.index, b.index}
        a.places |= b.places
        a.last = max(a.last, b.last)
        self._delay(a, b.latest)
        a.product = a.product or b.product
        b.nodes = []
        b.full = (a.index,)  # where it went
        b.inputs = b.users = b.places = _NOTHING

    def _delay(self, unit: Unit, latest: int) -> None:
        """Notes that a unit, and so all that depend on it, come after a node."""
        stack = [unit]
        while stack:
            late = stack.pop()
            if late.latest < latest:
                late.latest = latest
                stack += [self.units[self._current(i)] for i in late.users]

    def _current(self, index: int) -> int:
        """The unit that a unit has become part of."""
        while not self.units[index].nodes:
            index = self.units[index].full[0]
        return index

    def _reaches(self, source: Unit, target: Unit) -> bool:
        """Whether `target` depends on `source` through a third unit; True in doubt.

        Searched from both ends: in a long program at least one of them is mostly near its edge.
        """
        found = self._path(target, source, "inputs", source.nodes[0].node.index)
        if found is None:
            found = self._path(source, target, "users", 0)
        return found is not False

    def _path(
        self, start: Unit, goal: Unit, step: Literal["inputs", "users"], begin: int
    ) -> bool | None:
        """Whether a path of two or more steps leads to `goal`; None after too many units.

        What depends on no node from `begin` on is not followed.
        """
        near: set[int] = getattr(start, step)
        stack = [i for i in map(self._current, near) if i not in (start.index, goal.index)]
        seen = set(stack)
        while stack:
            if len(seen) > MAX_SEARCH:
                return None
            unit = self.units[stack.pop()]
            if unit.latest < begin:
                continue
            further: set[int] = getattr(unit, step)
            for i in {self._current(i) for i in further} - seen:
                if i == goal.index:
                    return True
                seen.add(i)
                stack.append(i)
        return False

    def finished(self) -> list[Unit]:
        """The units, each with the units that it reads from. No node can be added after that."""
        units = [u for u in self.units.values() if u.nodes]
        for u in units:
            u.inputs = {self._current(i) for i in u.inputs} - {u.index}
            if self._sums_columns(u):
                u.outer, u.columns = None, u.outer
        self.units = {u.index: u for u in units}
        # Of a long program these are as large as what is written from it.
        self.readers.clear()
        self.placed.clear()
        del self.placement
        return units


def _wide_readers(work: WorkList) -> dict[Base, int]:
    """Base -> how many nodes with more than one element read it."""
    counts: dict[Base, int] = {}
    for node in work.nodes:
        if node.outs[0].nbytes == node.outs[0].dtype.itemsize and node.work is Work.POINTWISE:
            continue
        for ref in node.refs:
            counts[ref.base] = counts.get(ref.base, 0) + 1
    return counts


def reads_whole(node: Node) -> bool:
    """Whether the node reads its operands as a whole: a random key, the sides of a product."""
    return node.name in KEYED or node.work is Work.PRODUCT


def is_recomputed(node: Node) -> bool:
    """Whether a pointwise node computes again what the forward pass has."""
    return node.work is Work.POINTWISE and node.loc.phase is Phase.RECOMPUTE


def _covers(atoms: Atoms, axes: Axes, placed: Placed) -> bool:
    """Whether a node has one element for each of the product's."""
    mine = atoms.resolve(placed.result_loops)
    return set(mine) == {a for axis in axes.values() for a in axis}


def _dims_of(placed: Placed, ref: Ref) -> list[Run]:
    """The runs of a view that a node reads; missing outer dimensions broadcast."""
    return placed.domain[len(placed.domain) - len(ref.shape) :]


def reduced_dims_of(node: Node) -> tuple[int, ...]:
    return tuple(node.attrs["dims"]) if "dims" in node.attrs else reduced_dims(node.op)


def keeps_dims_of(node: Node) -> bool:
    return bool(node.attrs["keepdim"]) if "dims" in node.attrs else keeps_dims(node.op)
