"""What is in no cache any more when it is first read, and is stored past the caches.

A store to a line that is in no cache fetches the line, only to overwrite it. What a forward pass
keeps for the backward one is not read before much else was.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from .groups import Unit
from .nodes import Base

FAR = 32 << 20  # bytes read or written meanwhile: about a cache of the third level
LEAST = 1 << 20  # bytes of what is worth it


def read_far_away(order: Sequence[Unit], elsewhere: Collection[Base]) -> set[Base]:
    """Results that are first read after more than `FAR` bytes of others.

    Args:
        order: the units as they run.
        elsewhere: results that overwrite something, whose lines are in a cache.
    """
    made: dict[Base, int] = {}
    far: set[Base] = set()
    passed = 0
    for unit in order:
        touched = {*(ref.base for ref in unit.reads), *unit.makes}
        for base in touched & made.keys():
            if passed - made.pop(base) > FAR:
                far.add(base)
        passed += sum(base.nbytes for base in touched)
        large = (b for b in unit.makes if b.nbytes >= LEAST and b not in elsewhere)
        made.update((base, passed) for base in large)
    return far
