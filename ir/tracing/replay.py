"""What a piece of code did to some tensors, to be done again to others of the same layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..function import Op, Value
from .aliasing import Record
from .results import facts


@dataclass(frozen=True)
class Recording:
    """The ops of a piece of code, and what the tensors that it was given held.

    Attributes:
        ops: in order.
        before: a value for each tensor.
        after: the same when it was done.
    """

    ops: tuple[Op, ...]
    before: tuple[Value, ...]
    after: tuple[Value, ...]

    def repeats(self, records: Sequence[Record]) -> bool:
        """Whether other tensors would lead to the same ops: draws of random numbers differ, and a
        write to a part of a storage is made of ops on all of it."""
        written = [a is not b for a, b in zip(self.before, self.after, strict=True)]
        parts = any(r.chain for r, w in zip(records, written, strict=True) if w)
        return not parts and not any(op.name.startswith("rng.") for op in self.ops)


def layouts(tensors: Sequence[torch.Tensor], records: Sequence[Record]) -> object | None:
    """What the ops of a piece of code depend on, where it knows nothing else of the tensors.

    None where two share their storage: then a write to one changes the other.
    """
    if len({id(r.storage) for r in records}) < len(records):
        return None
    values = [r.storage.base for r in records]
    whole = tuple([not r.chain for r in records])
    return facts(tuple(tensors)), tuple([values.index(v) for v in values]), whole
