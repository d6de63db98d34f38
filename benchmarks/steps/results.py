"""What was measured, and what follows from it; as data that goes to JSON and back."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from .roofline import Peaks, Work

COMPILED = ("compile", "max-autotune")
LIMIT_FP32 = 1e-4
LIMIT_BF16 = 2e-2
LIMIT_DROPS = 0.2  # where each contender drops what its own random numbers say


@dataclass(frozen=True)
class Row:
    """One contender on one workload. Seconds and bytes.

    Attributes:
        contender: its name.
        precision: fp32 or bf16.
        problem: why it was not measured; empty where it was.
        step: median of a step.
        steps: how many were timed.
        peak: most resident bytes of the process while stepping.
        growth: `peak` without interpreter, libraries and what they hold before the model is built.
        cold: compile time with empty caches.
        warm: compile time with caches that a first start filled.
        loss_difference: largest relative difference from the fp32 reference in the first steps.
        predicted: what `peak` was said to become.
        travel: seconds of a cache line from core to core, in the median turn; 0 where unknown.
    """

    contender: str
    precision: str
    problem: str = ""
    step: float = 0.0
    steps: int = 0
    peak: int = 0
    growth: int = 0
    cold: float = 0.0
    warm: float = 0.0
    loss_difference: float = 0.0
    predicted: int | None = None
    travel: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.problem


@dataclass(frozen=True)
class Result:
    """All contenders on one workload, measured in one run.

    Attributes:
        workload: its name.
        about: what it is.
        parameters: elements of its weights.
        rows: of the contenders.
        peaks: of the machine, measured before and after.
        work: of a step; None where shoestring did not run.
        allowed: precision -> how far losses might be from the reference's.
        idle: cores that waiting contenders used while another was timed.
        profile: precision -> time of shoestring's instructions.
    """

    workload: str
    about: str
    parameters: int
    rows: list[Row]
    peaks: Peaks
    work: Work | None = None
    idle: float = 0.0
    allowed: dict[str, float] = field(default_factory=dict[str, float])
    profile: dict[str, list[dict[str, Any]]] = field(
        default_factory=dict[str, list[dict[str, Any]]]
    )

    def row(self, contender: str, precision: str) -> Row | None:
        """A contender that was measured; None where it was not."""
        found = (r for r in self.rows if (r.contender, r.precision) == (contender, precision))
        return next((r for r in found if r.ok), None)

    def best_compiled(self, precision: str) -> Row | None:
        """The fastest setting of torch.compile."""
        found = [r for name in COMPILED if (r := self.row(name, precision)) is not None]
        return min(found, key=lambda r: r.step, default=None)

    def roofline_share(self, row: Row) -> float | None:
        """The shortest time that the machine allows for the step, over the time it took."""
        if self.work is None or not row.ok:
            return None
        return self.work.floor(self.peaks, row.precision) / row.step

    @staticmethod
    def from_plain(plain: dict[str, Any]) -> Result:
        """The inverse of `dataclasses.asdict`; fields of other versions are left out."""
        known = {f.name for f in fields(Result)}
        kept = {k: v for k, v in plain.items() if k in known}
        kept["rows"] = [Row(**r) for r in plain["rows"]]
        kept["peaks"] = Peaks(**plain["peaks"])
        kept["work"] = Work(**plain["work"]) if plain["work"] else None
        return Result(**kept)


def geometric_mean(values: Iterable[float]) -> float | None:
    """The n-th root of the product of n positive numbers; None of none."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def difference(losses: list[float], wanted: list[float]) -> float:
    """The largest relative difference, step by step; infinite where one is not a number."""
    pairs = zip(losses, wanted, strict=True)
    found = [abs(a - b) / max(abs(b), 1e-12) for a, b in pairs]
    return math.inf if any(math.isnan(d) for d in found) else max(found)


def limit(precision: str, drops: bool = False) -> float:
    """How far losses may be from the reference's; where there is dropout, only roughly equal."""
    if drops:
        return LIMIT_DROPS
    return LIMIT_BF16 if precision == "bf16" else LIMIT_FP32


def save(path: Path, machine: dict[str, Any], results: list[Result]) -> None:
    """Writes everything as JSON."""
    content = {"machine": machine, "results": [asdict(r) for r in results]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def merge(path: Path, machine: dict[str, Any], new: list[Result]) -> list[Result]:
    """The new results, and those in the file of other workloads on the same machine."""
    replaced = {r.workload for r in new}
    kept: list[Result] = []
    if path.exists():
        content = json.loads(path.read_text())
        if content["machine"] == machine:
            every = map(Result.from_plain, content["results"])
            kept = [r for r in every if r.workload not in replaced]
    return [*kept, *new]
