"""Which values are released stretch by stretch.

The inputs of all steps of a recurrence are one product. Each step reads a slice of it, and is the
last that does; so what is made later can be where the slice was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..memory import ALIGNMENT, aligned
from .groups import Unit
from .nodes import Base, Ref, Work


@dataclass(frozen=True)
class Stretch:
    """Bytes of a value that nobody reads after `last`."""

    at: int
    nbytes: int
    last: Unit


def releases(order: Sequence[Unit], kept: set[Base]) -> dict[Base, list[Stretch]]:
    """The values that are only read in stretches apart from each other, and these.

    Args:
        order: the units as they run.
        kept: bases whose memory is not theirs alone, or must survive to the end.
    """
    found: dict[Base, dict[tuple[int, int], Unit]] = {}
    whole = set(kept)
    for unit in order:
        for ref in unit.reads:
            base = ref.base
            if base.node is None or base in whole:
                continue
            start, end = _reach(ref)
            # C for one op may have an order of its own for what it makes, such as a packed matrix.
            own_order = unit.library or base.node.work is Work.LIBRARY
            if own_order or end - start == base.nbytes:
                whole.add(base)
            elif start < end:
                found.setdefault(base, {})[start, end] = unit
    return {
        base: [Stretch(start, end - start, last) for (start, end), last in sorted(spans.items())]
        for base, spans in found.items()
        if base not in whole and _are_apart(sorted(spans))
    }


def _reach(ref: Ref) -> tuple[int, int]:
    """The bytes of its base from the first to behind the last that a view shows."""
    layout, size = ref.layout, ref.base.dtype.itemsize
    if layout.numel == 0:
        return 0, 0
    steps = [(n - 1) * s for n, s in zip(layout.shape, layout.strides, strict=True)]
    first = layout.offset + sum(min(0, s) for s in steps)
    last = layout.offset + sum(max(0, s) for s in steps)
    return first * size, (last + 1) * size


def _are_apart(spans: list[tuple[int, int]]) -> bool:
    """Whether sorted stretches have no cache line in common."""
    ends = [aligned(end) for _, end in spans]
    starts = [start for start, _ in spans]
    at_lines = all(start % ALIGNMENT == 0 for start in starts)
    return at_lines and all(e <= s for e, s in zip(ends, starts[1:], strict=False))
