"""The order of units: operands first, then old state before new, then whatever frees memory."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from .atoms import Atoms
from .groups import Unit
from .joining import Joins, joins
from .nodes import Base, Ref, WorkList
from .overwriting import overwritten, same_position
from .releasing import Stretch, releases


@dataclass
class Order:
    """The result of scheduling.

    Attributes:
        units: in order of execution.
        in_place: base -> the one whose storage it is written into: a parameter, or what is last
            read by the kernel that makes it.
        late: the other next values; copied when everything else is done.
        joins: what is written as a part of something larger.
        releases: what is read, and no more needed, stretch by stretch.
    """

    units: list[Unit]
    in_place: dict[Base, Base]
    late: list[tuple[Ref, Base]]
    joins: Joins
    releases: dict[Base, list[Stretch]]


@dataclass
class _Task:
    unit: Unit
    reads: set[Base]
    writes: list[Base]
    waits: int = 0
    # Who waits for this task: a unit, and for old state the next value that would replace it.
    after: list[tuple[int, Base | None]] = field(default_factory=list[tuple[int, Base | None]])
    old_readers: dict[Base, int] = field(default_factory=dict[Base, int])


def schedule(work: WorkList, units: list[Unit], atoms: Atoms, stored: set[Base]) -> Order:
    """Orders units so that as much state as possible is overwritten where it is."""
    tasks = {u.index: _task(u, stored) for u in units}
    candidates = _candidates(work, tasks, atoms)
    _add_edges(tasks, candidates)
    scheduler = _ListScheduler(tasks, candidates, _last_readers(tasks), _kept(work))
    order = scheduler.run()
    in_place = {n: old for n, (old, _) in candidates.items() if n not in scheduler.dropped}
    kept = _kept(work) | set(in_place)
    joined = joins(work, kept)
    in_place |= overwritten(order, stored, kept | joined.bases, atoms)
    late = [
        (ref, work.refs[value].base)
        for value, ref in work.nexts.items()
        if ref.base not in in_place
    ]
    shared = kept | joined.bases | set(in_place) | set(in_place.values())
    return Order(order, in_place, late, joined, releases(order, shared))


def _task(unit: Unit, stored: set[Base]) -> _Task:
    reads = {ref.base for ref in unit.reads}
    return _Task(unit, reads, [b for b in unit.makes if b in stored])


def _kept(work: WorkList) -> set[Base]:
    """Bases that must survive to the end."""
    refs = (*(work.refs[o.value] for o in work.function.outputs), *work.nexts.values())
    return {r.base for r in refs}


def _candidates(
    work: WorkList, tasks: dict[int, _Task], atoms: Atoms
) -> dict[Base, tuple[Base, int]]:
    """Next value -> (parameter, the unit that makes it), where nothing forbids writing in place."""
    maker = {b: i for i, t in tasks.items() for b in t.writes}
    shown = {work.refs[o.value].base for o in work.function.outputs}
    found: dict[Base, tuple[Base, int]] = {}
    for value, ref in work.nexts.items():
        old = work.refs[value].base
        if old in shown or ref.base not in maker:
            continue
        task = tasks[maker[ref.base]]
        if old not in task.reads or same_position(task.unit, old, ref.base, atoms):
            found[ref.base] = (old, maker[ref.base])
    return found


def _add_edges(tasks: dict[int, _Task], candidates: dict[Base, tuple[Base, int]]) -> None:
    for index, task in tasks.items():
        for producer in task.unit.inputs:
            tasks[producer].after.append((index, None))
        task.waits = len(task.unit.inputs)
    readers: dict[Base, list[int]] = {}
    for index, task in tasks.items():
        for base in task.reads:
            readers.setdefault(base, []).append(index)
    for new, (old, index) in candidates.items():
        for reader in readers.get(old, ()):
            if reader != index:
                tasks[reader].after.append((index, new))
                tasks[index].waits += 1
                waiting = tasks[index].old_readers
                waiting[new] = waiting.get(new, 0) + 1


def _last_readers(tasks: dict[int, _Task]) -> dict[Base, set[int]]:
    readers: dict[Base, set[int]] = {}
    for index, task in tasks.items():
        for base in task.reads:
            if base.param is None and base.constant is None:
                readers.setdefault(base, set()).add(index)
    return readers


class _ListScheduler:
    """Runs whatever is ready, what frees memory first, else in program order.

    Where only readers of old state stand in the way of everything, a next value gives up its place:
    it is computed elsewhere and copied at the end.
    """

    def __init__(
        self,
        tasks: dict[int, _Task],
        candidates: dict[Base, tuple[Base, int]],
        readers: dict[Base, set[int]],
        kept: set[Base],
    ) -> None:
        self.tasks, self.candidates, self.readers, self.kept = tasks, candidates, readers, kept
        self.ready: list[tuple[int, int, int]] = []
        self.done: set[int] = set()
        self.dropped: set[Base] = set()

    def run(self) -> list[Unit]:
        order: list[Unit] = []
        for index, task in self.tasks.items():
            if task.waits == 0:
                self._push(index)
        while len(order) < len(self.tasks):
            if not self.ready:
                self._drop_one()
                continue
            _, _, index = heapq.heappop(self.ready)
            if index not in self.done:
                self.done.add(index)
                order.append(self.tasks[index].unit)
                self._finish(index)
        return order

    def _push(self, index: int) -> None:
        task = self.tasks[index]
        alone = (b for b in task.reads if self.readers.get(b) == {index} and b not in self.kept)
        freed = sum(b.nbytes for b in alone)
        taken = sum(b.nbytes for b in task.writes if b not in self.candidates or b in self.dropped)
        heapq.heappush(self.ready, (0 if freed > taken else 1, task.unit.last, index))

    def _finish(self, index: int) -> None:
        for base in self.tasks[index].reads:
            left = self.readers.get(base)
            if left is not None:
                left.discard(index)
                self._reconsider(left)
        for waiter, new in self.tasks[index].after:
            if new in self.dropped:
                continue
            if new is not None:
                self.tasks[waiter].old_readers[new] -= 1
            self.tasks[waiter].waits -= 1
            if self.tasks[waiter].waits == 0:
                self._push(waiter)

    def _reconsider(self, left: set[int]) -> None:
        """A value's only remaining reader now frees it."""
        if len(left) == 1:
            (last,) = left
            if self.tasks[last].waits == 0 and last not in self.done:
                self._push(last)

    def _drop_one(self) -> None:
        stuck = [
            (new.nbytes, new.index, new, index)
            for index, task in self.tasks.items()
            if index not in self.done and task.waits == sum(task.old_readers.values())
            for new, count in task.old_readers.items()
            if count
        ]
        assert stuck, "units that only wait for old state, where nothing else is ready"
        _, _, new, index = min(stuck, key=lambda s: s[:2])
        task = self.tasks[index]
        self.dropped.add(new)
        task.waits -= task.old_readers.pop(new)
        if task.waits == 0:
            self._push(index)
