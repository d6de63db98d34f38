"""Memory planning: lifetimes in, offsets in one arena out; and a checker that trusts nothing."""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from shoestring.ir.errors import BackendError

ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Lifetime:
    """When a buffer holds something.

    Attributes:
        index: the buffer's number.
        nbytes: its size.
        first: the instruction that writes it first.
        last: the last instruction that touches it.
        label: the user's name of what it holds.
        whole: the buffer that it is a part of; its own life ends before that of the whole begins,
            or begins when that of the whole has ended.
        at: bytes from the start of the whole.
    """

    index: int
    nbytes: int
    first: int
    last: int
    label: str = ""
    whole: int | None = None
    at: int = 0


@dataclass(frozen=True)
class Holder:
    """A buffer that is alive at the peak."""

    label: str
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """Where each buffer is.

    Attributes:
        offsets: buffer's number -> bytes from the start of the arena.
        arena_bytes: size of the arena.
        peak_bytes: most bytes alive at one time; a lower bound of the arena.
        peak_at: the instruction at which that is.
        holders: what is alive then, largest first.
    """

    offsets: Mapping[int, int]
    arena_bytes: int
    peak_bytes: int
    peak_at: int
    holders: tuple[Holder, ...]


def aligned(nbytes: int) -> int:
    """`nbytes` rounded up to whole cache lines."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class _FreeList:
    """Free stretches of the arena, by offset and by size."""

    def __init__(self) -> None:
        self.starts: list[int] = []  # sorted
        self.sizes: dict[int, int] = {}
        self.by_size: list[tuple[int, int]] = []  # sorted (size, start)
        self.end = 0

    def take(self, size: int) -> int:
        """The start of the smallest stretch that fits; the arena grows where none does."""
        at = bisect.bisect_left(self.by_size, (size, -1))
        if at < len(self.by_size):
            found, start = self.by_size[at]
            self._remove(start, found)
            if found > size:
                self._insert(start + size, found - size)
            return start
        start = self._tail()
        self.end = start + size
        return start

    def _tail(self) -> int:
        """Where new memory begins: at the last stretch if that one is free, else at the end."""
        if self.starts:
            last = self.starts[-1]
            if last + self.sizes[last] == self.end:
                self._remove(last, self.sizes[last])
                return last
        return self.end

    def give(self, start: int, size: int) -> None:
        """Makes a stretch free again, joined with its free neighbours."""
        at = bisect.bisect_left(self.starts, start)
        if at < len(self.starts) and self.starts[at] == start + size:
            after = self.starts[at]
            extra = self.sizes[after]
            self._remove(after, extra)
            size += extra
        if at > 0:
            before = self.starts[at - 1]
            if before + self.sizes[before] == start:
                extra = self.sizes[before]
                self._remove(before, extra)
                start, size = before, size + extra
        self._insert(start, size)

    def _insert(self, start: int, size: int) -> None:
        bisect.insort(self.starts, start)
        self.sizes[start] = size
        bisect.insort(self.by_size, (size, start))

    def _remove(self, start: int, size: int) -> None:
        del self.starts[bisect.bisect_left(self.starts, start)]
        del self.sizes[start]
        del self.by_size[bisect.bisect_left(self.by_size, (size, start))]


def plan_memory(lifetimes: Sequence[Lifetime]) -> Plan:
    """Offsets by greedy best fit; checked before they are returned.

    Several orders are tried, as instructions come and most first of each of `MOST`, of many buffers
    not all of these; the smallest arena wins.

    Raises:
        BackendError: SS4301, a bug of the planner that the checker found.
    """
    parts = _parts(lifetimes)
    best, size = _place_in_order(lifetimes, parts)
    peak, at = _peak(lifetimes)
    for most in MOST[: MOST_FIRST_LIMIT // max(1, len(lifetimes))]:
        if size > peak:
            offsets, other = _place_most_first(lifetimes, parts, most)
            best, size = (offsets, other) if other < size else (best, size)
    for whole, own in parts.items():
        best.update((p.index, best[whole] + p.at) for p in own)
    alive = [t for t in lifetimes if t.first <= at <= t.last and t.nbytes]
    alive.sort(key=lambda t: (-t.nbytes, t.index))
    holders = tuple(Holder(t.label, t.nbytes) for t in alive)
    plan = Plan(best, size, peak, at, holders)
    check_plan(lifetimes, plan)
    return plan


# Placement out of order looks at every placed neighbour; of more buffers it costs too much.
MOST_FIRST_LIMIT = 4000
MOST: tuple[Callable[[Lifetime], int], ...] = (
    lambda t: t.last - t.first,
    lambda t: t.nbytes * (t.last - t.first + 1),
    lambda t: t.nbytes,
)


Parts = Mapping[int, Sequence[Lifetime]]


def _parts(lifetimes: Sequence[Lifetime]) -> Parts:
    """Whole -> the buffers that are parts of it."""
    found: dict[int, list[Lifetime]] = {}
    for t in lifetimes:
        if t.whole is not None:
            found.setdefault(t.whole, []).append(t)
    return found


def _with_parts(lifetimes: Sequence[Lifetime], parts: Parts) -> Iterator[Lifetime]:
    """What has a place of its own; a whole is alive from its first part to its last."""
    for t in lifetimes:
        own = parts.get(t.index)
        if t.whole is None and own:
            first, last = min(p.first for p in own), max(p.last for p in own)
            yield replace(t, first=min(first, t.first), last=max(last, t.last))
        elif t.whole is None:
            yield t


def _place_in_order(lifetimes: Sequence[Lifetime], parts: Parts) -> tuple[dict[int, int], int]:
    free, offsets = _FreeList(), dict[int, int]()
    dying: list[tuple[int, int, int]] = []
    for t in sorted(_with_parts(lifetimes, parts), key=lambda t: (t.first, -t.nbytes, t.index)):
        while dying and dying[0][0] < t.first:
            _, start, size = heapq.heappop(dying)
            free.give(start, size)
        size = aligned(t.nbytes)
        if size == 0:
            offsets[t.index] = 0
            continue
        offsets[t.index] = free.take(size)
        heapq.heappush(dying, (t.last, offsets[t.index], size))
    return offsets, free.end


def _place_most_first(
    lifetimes: Sequence[Lifetime], parts: Parts, most: Callable[[Lifetime], int]
) -> tuple[dict[int, int], int]:
    """A place in a whole is free while neither it nor the part that belongs there is alive."""
    placed: list[tuple[int, int, int, int]] = []  # offset, end, first, last; sorted
    offsets, end = dict[int, int](), 0
    own = {t.index: t for t in lifetimes}
    wholes = _with_parts(lifetimes, parts)
    for t in sorted(wholes, key=lambda t: (-most(t), -t.nbytes, t.first, t.index)):
        size = aligned(t.nbytes)
        if size == 0:
            offsets[t.index] = 0
            continue
        start = _first_gap(placed, t, size)
        offsets[t.index] = start
        end = max(end, start + size)
        alone = own[t.index]
        bisect.insort(placed, (start, start + size, alone.first, alone.last))
        for p in parts.get(t.index, ()):
            place = start + p.at
            bisect.insort(placed, (place, place + aligned(p.nbytes), p.first, p.last))
    return offsets, end


def _first_gap(placed: list[tuple[int, int, int, int]], t: Lifetime, size: int) -> int:
    start = 0
    for offset, end, first, last in placed:
        if end <= start or last < t.first or first > t.last:
            continue
        if offset - start >= size:
            break
        start = end
    return start


def _peak(lifetimes: Sequence[Lifetime]) -> tuple[int, int]:
    """Most bytes alive at one instruction, and the first such instruction."""
    change: dict[int, int] = {}
    for t in lifetimes:
        size = aligned(t.nbytes)
        change[t.first] = change.get(t.first, 0) + size
        change[t.last + 1] = change.get(t.last + 1, 0) - size
    now = peak = at = 0
    for moment in sorted(change):
        now += change[moment]
        if now > peak:
            peak, at = now, moment
    return peak, at


def check_plan(lifetimes: Sequence[Lifetime], plan: Plan) -> None:
    """Proves that no two buffers alive at one time share a byte.

    Shares no code with the planner: it sweeps over the instructions and keeps the intervals that
    are alive sorted; neighbours must not touch.

    Raises:
        BackendError: SS4301 with the two buffers, the bound or the alignment that is wrong.
    """
    events: list[tuple[int, int, int, int, str]] = []
    for t in lifetimes:
        if t.index not in plan.offsets:
            raise _wrong(f"buffer {t.index} ({t.label}) has no offset")
        start = plan.offsets[t.index]
        if t.nbytes == 0:
            continue
        if t.whole is not None and start != plan.offsets.get(t.whole, -1) + t.at:
            raise _wrong(f"buffer {t.index} ({t.label}) is not where its whole {t.whole} has it")
        if start % 64 != 0:
            raise _wrong(f"buffer {t.index} ({t.label}) starts at {start}, which is not aligned")
        if start < 0 or start + t.nbytes > plan.arena_bytes:
            what = f"[{start}, {start + t.nbytes}) of an arena of {plan.arena_bytes} bytes"
            raise _wrong(f"buffer {t.index} ({t.label}) is out of bounds: {what}")
        events.append((t.first, 1, start, start + t.nbytes, t.label))
        events.append((t.last + 1, 0, start, start + t.nbytes, t.label))
    alive: list[tuple[int, int, str]] = []
    for moment, begins, start, end, label in sorted(events):
        entry = (start, end, label)
        at = bisect.bisect_left(alive, entry)
        if not begins:
            del alive[at]
            continue
        for other in alive[max(0, at - 1) : at + 1]:
            if other[0] < end and start < other[1]:
                what = f"{label} [{start}, {end}) and {other[2]} [{other[0]}, {other[1]})"
                raise _wrong(f"{what} are both alive at instruction {moment}")
        alive.insert(at, entry)


def _wrong(what: str) -> BackendError:
    return BackendError("SS4301", f"the memory plan is wrong: {what}", "", "report this as a bug")
