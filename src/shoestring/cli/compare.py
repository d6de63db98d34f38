"""Two runs side by side: curves, times, memory, on the terminal and as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from shoestring.ir.errors import UsageError

from .chart import curve
from .peer import PeerResult
from .workload import WorkloadOptions

WARMUP = 5


@dataclass
class Side:
    """What one side of a comparison measured; bytes and seconds.

    Attributes:
        name: printed.
        losses: one a step.
        seconds: one a step.
        baseline: resident before the model was built: interpreter and libraries.
        peak: most resident while stepping.
        predicted_peak: what `peak` was said to become, after compiling and before the first step.
        compile_seconds: capture, passes and code generation.
        compile_warm_seconds: the same with a filled cache.
        compile_peak: most resident until the first step.
        validation: loss on held-out text at the end.
    """

    name: str
    losses: list[float] = field(default_factory=list[float])
    seconds: list[float] = field(default_factory=list[float])
    baseline: int = 0
    peak: int = 0
    predicted_peak: int | None = None
    compile_seconds: float | None = None
    compile_warm_seconds: float | None = None
    compile_peak: int | None = None
    validation: float | None = None

    @staticmethod
    def of_peer(result: PeerResult, precision: str = "fp32") -> Side:
        return Side(
            "PyTorch eager" if precision == "fp32" else f"PyTorch eager, {precision} autocast",
            result.losses,
            result.seconds,
            result.baseline,
            result.peak,
            validation=result.validation,
        )

    @property
    def median_seconds(self) -> float:
        """Of the steps after warm-up; of all where there are few."""
        return statistics.median(self.seconds[WARMUP:] or self.seconds or [0.0])

    @property
    def growth(self) -> int:
        """Peak memory without interpreter and libraries."""
        return max(0, self.peak - self.baseline)

    def summary(self) -> dict[str, Any]:
        return {**asdict(self), "median_seconds": self.median_seconds, "growth": self.growth}


def relative_difference(a: float, b: float) -> float:
    """|a - b| / max(|a|, |b|); 0 for two zeros."""
    return abs(a - b) / (max(abs(a), abs(b)) or 1.0)


def _ratio(ours: float, theirs: float) -> str:
    return f"{ours / theirs:.2f}x" if theirs else "-"


def _mib(count: float | None) -> str:
    return "-" if count is None else f"{count / 2**20:,.1f} MiB"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


def ratios(ours: Side, theirs: Side) -> dict[str, float | None]:
    """The headline numbers: ours divided by theirs, and how far the losses are apart."""
    largest = max(map(relative_difference, ours.losses, theirs.losses), default=0.0)
    both = ours.losses and theirs.losses
    return {
        "step_time": ours.median_seconds / (theirs.median_seconds or 1.0),
        "peak_memory": ours.peak / (theirs.peak or 1),
        "peak_memory_without_libraries": ours.growth / (theirs.growth or 1),
        "final_loss_relative_difference": (
            relative_difference(ours.losses[-1], theirs.losses[-1]) if both else None
        ),
        "largest_loss_relative_difference": largest,
    }


def print_comparison(ours: Side, theirs: Side) -> None:
    """Both loss curves and a table of what was measured."""
    console = Console(highlight=False)
    _print_curves(console, [ours, theirs])
    table = Table(title="measured side by side, steps taken in turns", title_justify="left")
    for name in ("", ours.name, theirs.name, "ratio or difference"):
        table.add_column(name, justify="left" if not name else "right")
    for row in _rows(ours, theirs):
        table.add_row(*row)
    console.print(table)


def _print_curves(console: Console, sides: list[Side]) -> None:
    every = [loss for side in sides for loss in side.losses]
    if not every:
        return
    plain = "utf" not in (sys.stdout.encoding or "").lower()
    for side in sides:
        console.print(f"loss, {side.name}, step 1 to {len(side.losses)}")
        for line in curve(side.losses, ascii_only=plain, bounds=(min(every), max(every))):
            console.print(line, markup=False)


def _rows(ours: Side, theirs: Side) -> list[tuple[str, str, str, str]]:
    rows: list[tuple[str, str, str, str]] = []
    for name, a, b in _losses(ours, theirs):
        rows.append((name, f"{a:.6f}", f"{b:.6f}", f"{relative_difference(a, b):.1e}"))
    a, b = ours.median_seconds, theirs.median_seconds
    rows.append(("median step", f"{a * 1e3:.1f} ms", f"{b * 1e3:.1f} ms", _ratio(a, b)))
    rows.append(
        ("peak memory of steps", _mib(ours.peak), _mib(theirs.peak), _ratio(ours.peak, theirs.peak))
    )
    if ours.predicted_peak is not None:
        predicted, real = ours.predicted_peak, ours.peak
        rows.append(("  predicted / real", _mib(predicted), "-", _ratio(predicted, real)))
    rows.append(
        (
            "  without libraries",
            _mib(ours.growth),
            _mib(theirs.growth),
            _ratio(ours.growth, theirs.growth),
        )
    )
    rows.append(("peak until first step", _mib(ours.compile_peak), "-", "-"))
    rows.append(("compile, cold", _seconds(ours.compile_seconds), "-", "-"))
    rows.append(("compile, warm", _seconds(ours.compile_warm_seconds), "-", "-"))
    return rows


def _losses(ours: Side, theirs: Side) -> list[tuple[str, float, float]]:
    count = min(len(ours.losses), len(theirs.losses))
    marks = sorted({1, count // 4, count // 2, 3 * count // 4, count} - {0})
    rows = [
        (f"loss, step {m}", ours.losses[m - 1], theirs.losses[m - 1]) for m in marks if m <= count
    ]
    if ours.validation is not None and theirs.validation is not None:
        rows.append(("loss, held-out text", ours.validation, theirs.validation))
    return rows


def write_json(path: Path, options: WorkloadOptions, ours: Side, theirs: Side | None) -> None:
    """Everything that was measured, as JSON.

    Raises:
        UsageError: SS7002 where the file cannot be written.
    """
    content: dict[str, Any] = {
        "machine": machine(),
        "options": asdict(options),
        "shoestring": ours.summary(),
    }
    if theirs is not None:
        content |= {"eager": theirs.summary(), "ratios": ratios(ours, theirs)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1, default=str) + "\n")
    except OSError as error:
        raise UsageError(
            "SS7002", f"writing JSON: a writable file is required: {error.strerror}", str(path)
        ) from None


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (ln for ln in cpuinfo.read_text().splitlines() if ln.startswith("model name"))
        model = next(lines, "").partition(":")[2].strip()
    return {
        "processor": model or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
