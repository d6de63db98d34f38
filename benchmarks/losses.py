"""Whether losses stay with eager PyTorch's over many steps.

    python benchmarks/losses.py --workloads mlp lstm --steps 200 --out docs/numbers

fp32: the largest relative difference from eager at any step, and for comparison that of eager from
itself where each weight is at most one unit in the last place away: what rounding alone does.
bf16: eager under autocast trains from three seeds (weights and data), and so do we. For each window
of steps the mean of our losses should lie between the least and the largest of eager's three.
With `--out` the table is also written there, beside rows of other workloads that it already has.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import tyro  # noqa: E402

from benchmarks.steps.results import difference  # noqa: E402
from benchmarks.steps.runners import make_runner  # noqa: E402
from benchmarks.steps.tables import markdown  # noqa: E402
from benchmarks.workloads import ALL, WORKLOADS, build, require_known, shake  # noqa: E402

SEEDS = (0, 1, 2)
FP32_LIMIT = 1e-4


@dataclass(frozen=True)
class Options:
    """Trains with eager PyTorch and with shoestring, and compares the losses.

    Attributes:
        workloads: which; all by default.
        precisions: bf16 without matrix units for it takes hours in eager PyTorch.
        steps: how many.
        shakes: how often eager trains with shaken weights; the largest difference counts.
        window: steps over which bf16 losses are averaged.
        out: folder for `losses.md` and its data; none are written without it.
        tiny: the test's sizes.
    """

    workloads: tuple[str, ...] = tuple(WORKLOADS)
    precisions: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    steps: int = 200
    shakes: int = 1
    window: int = 20
    out: Path | None = None
    tiny: bool = False


@dataclass(frozen=True)
class Exact:
    """fp32 of one workload.

    Attributes:
        difference: largest relative difference from eager in any step.
        half: the same in the first half of the steps.
        rounding: the largest difference from eager of eager with shaken weights.
        last: eager's last loss.
        shakes: how often weights were shaken.
    """

    difference: float
    half: float
    rounding: float
    last: float
    shakes: int = 1

    @property
    def holds(self) -> bool:
        """Within the limit, or no further than twice what rounding alone does."""
        return self.difference <= max(FP32_LIMIT, 2 * self.rounding)


@dataclass(frozen=True)
class Band:
    """bf16 of one workload.

    Attributes:
        outside: windows in which the mean of our losses left eager's band.
        windows: all windows.
        excess: how far outside of the band at most, relative.
    """

    outside: int
    windows: int
    excess: float

    @property
    def holds(self) -> bool:
        """No window is outside."""
        return self.outside == 0


@dataclass(frozen=True)
class Outcome:
    """What one workload gave; None for a precision that was not measured."""

    workload: str
    steps: int
    fp32: Exact | None = None
    bf16: Band | None = None

    @property
    def holds(self) -> bool:
        """All that was measured is within its limits."""
        return all(part is None or part.holds for part in (self.fp32, self.bf16))


def losses(
    name: str,
    contender: str,
    precision: str,
    options: Options,
    seed: int = 0,
    shaken: int | None = None,
) -> list[float]:
    """One loss a step; `shaken` is the seed with which weights are moved."""
    workload = build(name, tiny=options.tiny, seed=seed)
    if shaken is not None:
        shake(workload.model, shaken)
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
    fp32 = exact(name, options) if "fp32" in options.precisions else None
    bf16 = band(name, options) if "bf16" in options.precisions else None
    return Outcome(name, options.steps, fp32, bf16)


def exact(name: str, options: Options) -> Exact:
    """Ours beside eager's in fp32."""
    eager = losses(name, "eager", "fp32", options)
    shaken = [losses(name, "eager", "fp32", options, shaken=i) for i in range(options.shakes)]
    ours = losses(name, "shoestring", "fp32", options)
    half = options.steps // 2 or 1
    return Exact(
        difference(ours, eager),
        difference(ours[:half], eager[:half]),
        max(difference(s, eager) for s in shaken),
        eager[-1],
        options.shakes,
    )


def band(name: str, options: Options) -> Band:
    """Ours within eager's band over the seeds, in bf16."""
    curves = [
        [windows(losses(name, who, "bf16", options, seed), options.window) for seed in SEEDS]
        for who in ("shoestring", "eager")
    ]
    excess = outside(*curves)
    return Band(sum(e > 0 for e in excess), len(excess), max(excess))


HEADER = [
    "workload",
    "steps",
    "last loss",
    "fp32 differs by",
    "in the first half",
    "rounding alone",
    "bf16 windows outside",
    "by",
]


def table(outcomes: Sequence[Outcome]) -> str:
    return markdown(HEADER, [_cells(o) for o in outcomes])


def _cells(outcome: Outcome) -> list[str]:
    fp32, bf16 = outcome.fp32, outcome.bf16
    exact = ["-"] * 4
    if fp32 is not None:
        differences = (fp32.difference, fp32.half, fp32.rounding)
        exact = [f"{fp32.last:.4f}", *(f"{d:.1e}" for d in differences)]
        exact[-1] += f" of {fp32.shakes}" if fp32.shakes > 1 else ""
    band = ["-"] * 2
    if bf16 is not None:
        band = [f"{bf16.outside} of {bf16.windows}", f"{bf16.excess:.1e}"]
    return [outcome.workload, str(outcome.steps), *exact, *band]


def write(folder: Path, new: Outcome) -> None:
    """The page and its data; what was not measured now stays as it was."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "losses.json"
    known = [_from_plain(p) for p in json.loads(data.read_text())] if data.exists() else []
    old = next((o for o in known if (o.workload, o.steps) == (new.workload, new.steps)), new)
    merged = Outcome(new.workload, new.steps, new.fp32 or old.fp32, new.bf16 or old.bf16)
    every = [*(o for o in known if o.workload != new.workload), merged]
    every.sort(key=lambda o: list(ALL).index(o.workload))
    data.write_text(json.dumps([asdict(o) for o in every], indent=1) + "\n")
    (folder / "losses.md").write_text(f"{PAGE}\n{table(every)}\n")


def _from_plain(plain: dict[str, Any]) -> Outcome:
    fp32, bf16 = plain["fp32"], plain["bf16"]
    return Outcome(plain["workload"], plain["steps"], fp32 and Exact(**fp32), bf16 and Band(**bf16))


PAGE = """\
# Losses of a training run beside eager PyTorch's

`python benchmarks/losses.py --out docs/numbers`

The same weights, data and optimizer. Differences are relative, the largest of all steps; "rounding
alone" is that of eager PyTorch from itself where each weight begins at most one unit in the last
place away; with "of n" the largest of so many such runs. bf16: windows of steps in which the mean
of our losses, over three seeds, is outside of the band of eager autocast's three, and how far.
"""


def main() -> int:
    options = tyro.cli(Options, description=__doc__)
    require_known(options.workloads)
    outcomes: list[Outcome] = []
    for name in options.workloads:
        outcomes.append(measure(name, options))
        print(table(outcomes[-1:]), flush=True)
        if options.out is not None:
            write(options.out, outcomes[-1])
    print(f"\n{table(outcomes)}")
    return 0 if all(o.holds for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
