"""Which results take the place of what they are made from.

A kernel that reads an element only where it writes one may write over it: in the last of its
passes, when everything that it computes from the old element is there.
"""

from __future__ import annotations

from collections.abc import Sequence

from .atoms import Atoms
from .claims import may_overwrite
from .groups import Unit, reads_whole
from .layout import row_major
from .nodes import Base


def overwritten(
    order: Sequence[Unit], stored: set[Base], kept: set[Base], atoms: Atoms
) -> dict[Base, Base]:
    """New result -> the intermediate value whose last reader makes it, and whose place it takes.

    Args:
        order: the units as they run.
        stored: the bases that are in memory.
        kept: bases whose place is decided otherwise: state, and what must survive to the end.
        atoms: the loops.
    """
    last = {ref.base: unit for unit in order for ref in unit.reads}
    found: dict[Base, Base] = {}
    for unit in order:
        reads = dict.fromkeys(ref.base for ref in unit.reads)
        free = [b for b in reads if last[b] is unit and b.node is not None and b not in kept]
        for new in (o for o in unit.makes if o in stored and o not in kept):
            old = next((b for b in free if _fits(unit, b, new, atoms)), None)
            if old is not None:
                found[new] = old
                free.remove(old)
    return found


def _fits(unit: Unit, old: Base, new: Base, atoms: Atoms) -> bool:
    if old.dtype is not new.dtype or old.nbytes != new.nbytes:
        return False
    if unit.library:
        return may_overwrite(unit.nodes[0].node, old, new)
    return same_position(unit, old, new, atoms)


def same_position(unit: Unit, old: Base, new: Base, atoms: Atoms) -> bool:
    """Whether a kernel reads `old` only at the element that it writes."""
    if unit.library:
        return False
    (writer,) = [p for p in unit.nodes if new in p.node.outs]
    target = atoms.resolve(writer.result_loops)
    columns = set(atoms.resolve(unit.columns)) if unit.columns is not None else None
    for placed in unit.nodes:
        if set(target) == columns != set(atoms.resolve(placed.loops)):
            continue  # columns are written when everything else is done
        for ref in placed.node.refs:
            if ref.base is not old:
                continue
            if reads_whole(placed.node):
                return False
            whole = (
                row_major(ref.shape) == ref.layout
                and ref.layout.numel == row_major(old.shape).numel
            )
            mine = atoms.resolve(placed.loops)
            if not whole or mine != target:
                return False
    return True
