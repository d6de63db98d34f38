"""Whether losses stay with eager PyTorch's over many steps.

    python benchmarks/losses.py --workloads mlp lstm --steps 200

fp32: the largest relative difference from eager at any step, and for comparison that of eager from
itself where each weight is at most one unit in the last place away: what rounding alone does.
bf16: eager under autocast trains from three seeds (weights and data), and so do we. For each window
of steps the mean of our losses should lie between the least and the largest of eager's three.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import tyro  # noqa: E402

from benchmarks.steps.results import difference  # noqa: E402
from benchmarks.steps.runners import make_runner  # noqa: E402
from benchmarks.steps.tables import markdown  # noqa: E402
from benchmarks.workloads import WORKLOADS, build, shake  # noqa: E402

SEEDS = (0, 1, 2)
FP32_LIMIT = 1e-4


@dataclass(frozen=True)
class Options:
    """Trains with eager PyTorch and with shoestring, and compares the losses.

    Attributes:
        workloads: which; all by default.
        steps: how many.
        window: steps over which bf16 losses are averaged.
        tiny: the test's sizes.
    """

    workloads: tuple[str, ...] = tuple(WORKLOADS)
    steps: int = 200
    window: int = 20
    tiny: bool = False


@dataclass(frozen=True)
class Outcome:
    """What one workload gave.

    Attributes:
        fp32: largest relative difference from eager.
        rounding: the same of eager with shaken weights.
        outside: windows in which the mean of bf16 losses left eager's band.
        windows: all windows.
        excess: how far outside of the band at most, relative.
        last: eager's last loss in fp32.
    """

    workload: str
    fp32: float
    rounding: float
    outside: int
    windows: int
    excess: float
    last: float

    @property
    def holds(self) -> bool:
        """Within the limits, or no further than twice what rounding alone does."""
        return self.fp32 <= max(FP32_LIMIT, 2 * self.rounding) and self.outside == 0


def losses(
    name: str, contender: str, precision: str, options: Options, seed: int = 0, shaken: bool = False
) -> list[float]:
    """One loss a step."""
    workload = build(name, tiny=options.tiny, seed=seed)
    if shaken:
        shake(workload.model)
    runner = make_runner(contender, precision)
    runner.imports()
    runner.setup(workload)
    return [runner.step() for _ in range(options.steps)]


def windows(curve: Sequence[float], size: int) -> list[float]:
    """Means of stretches of a curve."""
    return [statistics.fmean(curve[i : i + size]) for i in range(0, len(curve), size)]


def outside(ours: Sequence[Sequence[float]], eager: Sequence[Sequence[float]]) -> list[float]:
    """For each window how far the mean of ours is outside of eager's band, relative to its edge."""
    found: list[float] = []
    for mine, theirs in zip(zip(*ours, strict=True), zip(*eager, strict=True), strict=True):
        mean, low, high = statistics.fmean(mine), min(theirs), max(theirs)
        found.append(max(0.0, (low - mean) / abs(low), (mean - high) / abs(high)))
    return found


def measure(name: str, options: Options) -> Outcome:
    """Trains one workload with both."""
    eager = losses(name, "eager", "fp32", options)
    shaken = losses(name, "eager", "fp32", options, shaken=True)
    ours = losses(name, "shoestring", "fp32", options)
    bands = [
        [windows(losses(name, who, "bf16", options, seed), options.window) for seed in SEEDS]
        for who in ("shoestring", "eager")
    ]
    excess = outside(*bands)
    return Outcome(
        name,
        difference(ours, eager),
        difference(shaken, eager),
        sum(e > 0 for e in excess),
        len(excess),
        max(excess),
        eager[-1],
    )


HEADER = [
    "workload",
    "last loss",
    "fp32 differs by",
    "rounding alone",
    "bf16 windows outside",
    "by",
]


def table(outcomes: Sequence[Outcome]) -> str:
    rows = [
        [
            o.workload,
            f"{o.last:.4f}",
            f"{o.fp32:.1e}",
            f"{o.rounding:.1e}",
            f"{o.outside} of {o.windows}",
            f"{o.excess:.1e}",
        ]
        for o in outcomes
    ]
    return markdown(HEADER, rows)


def main() -> int:
    options = tyro.cli(Options, description=__doc__)
    unknown = set(options.workloads) - set(WORKLOADS)
    if unknown:
        sys.exit(f"unknown workloads {sorted(unknown)}; there are {', '.join(WORKLOADS)}")
    outcomes: list[Outcome] = []
    for name in options.workloads:
        outcomes.append(measure(name, options))
        print(table(outcomes[-1:]), flush=True)
    print(f"\n{options.steps} steps\n\n{table(outcomes)}")
    return 0 if all(o.holds for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
