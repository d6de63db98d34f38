"""Index spaces that can be split and tied together, with undo.

An atom is a loop: a size and an identity. A dimension of a value inside a kernel is a run of atoms,
outermost first. Reading a value elementwise ties its atoms to the reader's; a reshape splits them.
So one mechanism carries permutations, reshapes and broadcasts through a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from .layout import Layout

Run = tuple[int, ...]


class Atoms:
    """A union-find of loops in which a loop can also be split in two."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._link: dict[int, Run] = {}
        self._trail: list[int] = []
        self._resolved: dict[Run, Run] = {}  # until the next tie, split, undo or `forget`

    def fresh(self, size: int) -> Run:
        """A new dimension; none at all for size one."""
        if size == 1:
            return ()
        self.sizes.append(size)
        return (len(self.sizes) - 1,)

    def mark(self) -> int:
        """A point to which `undo` returns."""
        return len(self._trail)

    def undo(self, mark: int) -> None:
        """Forgets every tie and split since `mark`."""
        self._resolved.clear()
        while len(self._trail) > mark:
            del self._link[self._trail.pop()]

    def forget(self) -> None:
        """Drops what was found out of runs; another question finds it again."""
        self._resolved.clear()

    def resolve(self, run: Iterable[int]) -> Run:
        """The run in terms of loops that are neither tied away nor split."""
        run = tuple(run)
        known = self._resolved.get(run)
        if known is None:
            known = self._resolved[run] = tuple(self._loops(run))
        return known

    def _loops(self, run: Run) -> Iterator[int]:
        for atom in run:
            link = self._link.get(atom)
            if link is None:
                yield atom
            else:
                yield from self.resolve(link)

    def size(self, run: Iterable[int]) -> int:
        return math.prod(self.sizes[a] for a in run)

    def _set(self, atom: int, run: Run) -> None:
        self._resolved.clear()
        self._link[atom] = run
        self._trail.append(atom)

    def split(self, atom: int, inner: int) -> None:
        """Makes a loop two nested ones, the inner of size `inner`."""
        self._set(atom, (*self.fresh(self.sizes[atom] // inner), *self.fresh(inner)))

    def tie(self, a: Run, b: Run) -> bool:
        """Makes two runs of equal size one; False where their sizes do not divide each other."""
        left, right = list(self.resolve(a)), list(self.resolve(b))
        while left and right:
            x, y = left.pop(), right.pop()
            if x == y:
                continue
            m, n = self.sizes[x], self.sizes[y]
            if m == n:  # the older loop stays: what was found out about it holds on
                self._set(max(x, y), (min(x, y),))
            elif m > n and m % n == 0:
                self.split(x, n)
                left.extend(self.resolve((x,)))
                right.append(y)
            elif n > m and n % m == 0:
                self.split(y, m)
                right.extend(self.resolve((y,)))
                left.append(x)
            else:
                return False
            left, right = list(self.resolve(left)), list(self.resolve(right))
        return not left and not right

    def through(self, base: Run, view: Layout) -> list[Run | None] | None:
        """The runs of each dimension of a view of a value with the runs `base`.

        A dimension along which the view repeats is None: it may be any loop.
        Nothing where the view leaves out or reorders within what the atoms can express.
        """
        if view.offset:
            return None
        dims: list[Run | None] = []
        covered = 0
        for size, stride in zip(view.shape, view.strides, strict=True):
            if size == 1:
                dims.append(())
                continue
            if stride == 0:
                dims.append(None)
                continue
            run = self._locate(base, size, stride)
            if run is None:
                return None
            covered += len(self.resolve(run))
            dims.append(run)
        flat = [a for d in dims if d is not None for a in self.resolve(d)]
        whole = self.resolve(base)
        return dims if covered == len(whole) and set(flat) == set(whole) else None

    def _locate(self, base: Run, size: int, stride: int) -> Run | None:
        """The atoms of a row-major `base` that count `size` steps of `stride`; splits them."""
        if not self._cut(base, stride) or not self._cut(base, stride * size):
            return None
        found: list[int] = []
        step = 1
        for atom in reversed(self.resolve(base)):
            if stride <= step < stride * size:
                found.append(atom)
            step *= self.sizes[atom]
        run = tuple(reversed(found))
        return run if self.size(run) == size else None

    def _cut(self, base: Run, at: int) -> bool:
        """Makes a boundary between atoms at element distance `at`."""
        step = 1
        for atom in reversed(self.resolve(base)):
            if step == at:
                return True
            after = step * self.sizes[atom]
            if step < at < after:
                if at % step or after % at:
                    return False
                self.split(atom, at // step)
                return True
            step = after
        return step == at


def strides_of(
    atoms: Atoms, dims: Sequence[Run], shape: Sequence[int], strides: Sequence[int]
) -> dict[int, int]:
    """Loop -> elements to move at each step, for a view whose dimensions are these runs."""
    table: dict[int, int] = {}
    for run, size, stride in zip(dims, shape, strides, strict=True):
        if size == 1 or stride == 0:
            continue
        step = stride
        for atom in reversed(atoms.resolve(run)):
            table[atom] = table.get(atom, 0) + step
            step *= atoms.sizes[atom]
    return {a: s for a, s in table.items() if s}
