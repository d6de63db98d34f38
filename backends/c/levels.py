"""The levels of a kernel: which loops its values live on.

    full      one value an iteration of all loops
    outer     one a row
    columns   one a column: sums over the rows, and what becomes of them when all rows are done
    none      one number

A sum over rows shares the pass over memory with work within rows: each block of rows adds into sums
of its own, and the blocks are combined in order. So nothing but the column itself may read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .atoms import Atoms, Run
from .expressions import FLOATS
from .layout import row_major
from .nodes import Work
from .reductions import REDUCTIONS

if TYPE_CHECKING:
    from .groups import Placed, Unit

FEWEST_COLUMNS, MOST_COLUMNS = 16, 1 << 16
ROWS_OF_BLOCK = (16, 256)  # fewest and most rows that are summed up in f32
BLOCKS = 64  # more than these only where a block would be too long


@dataclass(frozen=True)
class Levels:
    """The loops of each level; None where no node is on it."""

    full: Run
    outer: Run | None
    columns: Run | None
    reduces_all: bool


def block_rows(rows: int) -> int:
    """Rows of one block: a function of their number alone, so that threads change no sum."""
    fewest, most = ROWS_OF_BLOCK
    return min(max(-(-rows // BLOCKS), fewest), most)


def join(atoms: Atoms, a: Unit, b: Unit) -> Levels | None:
    """The levels of both together, or None where their nodes do not fit them."""
    full = max((atoms.resolve(u.full) for u in (a, b)), key=len)
    if len(set(full)) != len(full):
        return None
    partial = _partial_levels(atoms, (a, b), set(full))
    if partial is None or len(partial) > 2:
        return None
    reduces_all = a.reduces_all or b.reduces_all
    if reduces_all and (partial or not _reduce_whole(atoms, (a, b), set(full))):
        return None
    if len(partial) < 2:
        return Levels(full, partial[0] if partial else None, None, reduces_all)
    if len(partial[0]) + len(partial[1]) != len(full) or set(partial[0]) & set(partial[1]):
        return None
    orders = (partial, partial[::-1])
    nodes = [*a.nodes, *b.nodes]
    for columns, rows in orders:
        if _follows_columns(atoms, a, b, columns):
            return Levels(full, rows, columns, False)
    for columns, rows in orders:
        if is_columns(atoms, nodes, columns, full):
            return Levels(full, rows, columns, False)
    return None


def _follows_columns(atoms: Atoms, a: Unit, b: Unit, level: Run) -> bool:
    """Whether the level is that of the sums of `a`, and all that `b` does is to go on with them.

    Then `is_columns` holds as it did for `a` alone, and need not look at every node again.
    """
    loops = set(level)
    if a.columns is None or set(atoms.resolve(a.columns)) != loops:
        return False
    if any(p.node.work is not Work.POINTWISE for p in b.nodes):
        return False
    made = {out for p in b.nodes for out in p.node.outs}
    return all(set(atoms.resolve(p.loops)) == loops for p in b.nodes) and not any(
        ref.base in made for p in a.nodes for ref in p.node.refs
    )


def _partial_levels(atoms: Atoms, units: Sequence[Unit], whole: set[int]) -> list[Run] | None:
    """Levels of some of the loops, each once; None where a level has loops of its own."""
    found: list[Run] = []
    for level in (level for u in units for level in (u.full, u.outer, u.columns)):
        loops = atoms.resolve(level) if level is not None else ()
        if len(set(loops)) != len(loops) or not set(loops) <= whole:
            return None
        if loops and set(loops) != whole and all(set(loops) != set(f) for f in found):
            found.append(loops)
    return found


def _reduce_whole(atoms: Atoms, units: Sequence[Unit], whole: set[int]) -> bool:
    return all(set(atoms.resolve(u.full)) == whole for u in units if u.reduces_all)


def is_columns(atoms: Atoms, nodes: Sequence[Placed], level: Run, full: Run) -> bool:
    """Whether a level can be summed up beside the rows: only sums, read by no one else, wide."""
    size, rows = atoms.size(level), atoms.size(full) // atoms.size(level)
    if not FEWEST_COLUMNS <= size <= MOST_COLUMNS or rows < 2 * ROWS_OF_BLOCK[0]:
        return False
    loops, whole = set(level), set(full)
    made = [p for p in nodes if set(atoms.resolve(p.result_loops)) == loops]
    if not all(_fits(atoms, p, loops, whole) for p in made):
        return False
    bases = {b for p in made for b in p.node.outs}
    readers = [p for p in nodes if any(r.base in bases for r in p.node.refs)]
    inside = all(
        p.node.work is Work.POINTWISE and set(atoms.resolve(p.loops)) == loops for p in readers
    )
    return inside and any(p.node.work is Work.REDUCTION for p in made) and _is_wide(
        atoms, nodes, loops, whole
    )  # fmt: skip


def _fits(atoms: Atoms, p: Placed, loops: set[int], whole: set[int]) -> bool:
    if p.node.work is Work.POINTWISE:
        return True
    kind = REDUCTIONS.get(p.node.name)
    sums = kind is not None and kind.how == "sum" and p.node.outs[0].dtype in FLOATS
    return sums and set(atoms.resolve(p.loops)) == whole


def _is_wide(atoms: Atoms, nodes: Sequence[Placed], loops: set[int], whole: set[int]) -> bool:
    """Whether most memory that all loops walk is contiguous along the columns."""
    votes = 0
    for p in nodes:
        if set(atoms.resolve(p.loops)) != whole:
            continue
        views = [(r.shape, r.layout.strides, r.layout.numel) for r in p.node.refs]
        if p.node.work is Work.POINTWISE:
            out = row_major(p.node.outs[0].shape)
            views.append((out.shape, out.strides, out.numel))
        for shape, strides, weight in views:
            if len(shape) > len(p.domain):
                continue  # read as a whole
            runs = p.domain[len(p.domain) - len(shape) :]
            for run, size, stride in zip(runs, shape, strides, strict=True):
                if stride == 1 and size > 1:
                    votes += weight if atoms.resolve(run)[-1] in loops else -weight
    return votes > 0
