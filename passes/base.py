"""What a pass is, and what it reports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from shoestring.ir import Function, Loc


class Numerics(Enum):
    """What a pass may do to the numbers."""

    EXACT = "exact"
    """Every output and state is equal bit for bit; any NaN equals any NaN."""
    REASSOCIATING = "reassociating"
    """Equal up to the order of floating-point operations."""
    LOSSY = "lossy"
    """Changes the computation: precision, sparsity. Never on by default."""


@dataclass
class Skipped:
    """How often a pass left something alone for one reason, and where first."""

    count: int
    example: Loc


@dataclass
class PassReport:
    """What one run of a pass did and refused.

    Attributes:
        matched: places that the pass looks for.
        changed: places that it changed.
        skipped: reason -> how often, with the location of the first.
        notes: measurements, such as peak bytes before and after.
    """

    matched: int = 0
    changed: int = 0
    skipped: dict[str, Skipped] = field(default_factory=dict[str, Skipped])
    notes: list[str] = field(default_factory=list[str])

    def skip(self, reason: str, loc: Loc, count: int = 1) -> None:
        """Counts places that were left alone."""
        entry = self.skipped.setdefault(reason, Skipped(0, loc))
        entry.count += count

    def note(self, text: str) -> None:
        self.notes.append(text)

    def lines(self) -> list[str]:
        """The report as text; a pass that matched nothing says so."""
        head = (
            f"matched {self.matched}, changed {self.changed}" if self.matched else "matched nothing"
        )
        skips = [f"skipped {s.count}: {r} (first at {s.example})" for r, s in self.skipped.items()]
        return [head, *skips, *self.notes]

    def __str__(self) -> str:
        return "\n".join(self.lines())


@dataclass(frozen=True)
class Pass(ABC):
    """One rewrite of a whole function. Subclasses are frozen dataclasses; fields are options.

    The module is named after the pass: class `DeadCode` of module `dead_code` is pass `dead_code`.
    A pass never edits a function, runs in linear time, and keeps parameters and outputs.
    """

    numerics: ClassVar[Numerics]

    @property
    def name(self) -> str:
        return name_of(type(self))

    @property
    def doc(self) -> str:
        """The first sentence of the docstring."""
        return (type(self).__doc__ or "").strip().split("\n")[0]

    @abstractmethod
    def run(self, function: Function) -> tuple[Function, PassReport]:
        """The rewritten function, and what was done."""


def name_of(cls: type[Pass]) -> str:
    """The name of a pass: the last part of its module's name."""
    return cls.__module__.rpartition(".")[2]
