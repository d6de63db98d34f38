"""A training step on this CPU: shoestring beside PyTorch eager, torch.compile and JAX, in turns.

    python benchmarks/cpu_step.py --workloads gpt mlp --rounds 5 --out docs/numbers

Prints a table a workload and the geometric means; with `--out` writes `cpu_step.md`, `cpu_step.svg`
and `cpu_step.json` there. Results in that folder of other workloads stay, if they are of the same
machine and versions. `--profile` shows where shoestring's time goes.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import torch  # noqa: E402
import tyro  # noqa: E402

from benchmarks.steps import tables  # noqa: E402
from benchmarks.steps.child import Order  # noqa: E402
from benchmarks.steps.processes import (  # noqa: E402
    Child,
    Failed,
    Starter,
    child_environment,
    find_malloc,
    take_turns,
)
from benchmarks.steps.results import Result, Row, difference, limit, merge, save  # noqa: E402
from benchmarks.steps.roofline import Work, measure  # noqa: E402
from benchmarks.workloads import ALL, WORKLOADS, require_known  # noqa: E402
from shoestring.cli.compare import machine as processor  # noqa: E402

Contender = Literal["shoestring", "eager", "compile", "max-autotune", "jax"]
Precision = Literal["fp32", "bf16"]
FIRST_STEPS = 5
ISA = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "bf16")


@dataclass(frozen=True)
class Options:
    """Times training steps of shoestring and its peers in turns.

    Attributes:
        workloads: which; by default the eight whose mean is asked for.
        precisions: fp32 is the reference of all losses and always needed for the check.
        contenders: who takes part; max-autotune takes minutes to compile.
        rounds: turns of each contender.
        turn_seconds: length of a turn; at least 3 steps are taken.
        out: folder for table, plot and data; none are written without it.
        profile: also print the time of each of shoestring's instructions.
        threads: of each contender; 0 for PyTorch's default, one a core.
        malloc: a library to preload for the peers; `auto` takes tcmalloc or jemalloc if installed,
            `system` none.
        timeout: seconds that a contender may take for compiling.
        lock: a file to hold locked while steps and peaks are timed, on a machine that others share.
        tiny: the test's sizes: a check of the script, not a measurement.
    """

    workloads: tuple[str, ...] = tuple(WORKLOADS)
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    contenders: tuple[Contender, ...] = ("shoestring", "eager", "compile", "jax")
    rounds: int = 5
    turn_seconds: float = 1.0
    out: Path | None = None
    profile: bool = False
    threads: int = 0
    malloc: str = "auto"
    timeout: float = 900.0
    lock: Path | None = None
    tiny: bool = False


@contextmanager
def alone(lock: Path | None) -> Iterator[None]:
    """Holds the lock, if there is one, against all others that take it."""
    if lock is None:
        yield
        return
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@dataclass
class Entry:
    """A contender on its way through a run: its child while it lives, and its row."""

    order: Order
    child: Child | None = None
    started: dict[str, Any] = field(default_factory=dict[str, Any])
    problem: str = ""

    @property
    def losses(self) -> list[float]:
        """Of the first steps."""
        assert self.child is not None, "it runs"
        found: list[float] = self.child.hello["losses"]
        return found

    def fail(self, problem: str) -> None:
        self.problem = problem
        self.close()

    def close(self) -> None:
        if self.child is not None:
            self.child.close()
        self.child = None


def main() -> None:
    run(tyro.cli(Options, description=__doc__))


def run(options: Options) -> list[Result]:
    """Measures, prints, writes; the new results."""
    require_known(options.workloads)
    malloc = find_malloc() if options.malloc == "auto" else options.malloc
    malloc = None if malloc == "system" else malloc
    threads = options.threads or torch.get_num_threads()
    about = machine(threads, malloc)
    print(tables.machine_text(about), flush=True)
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        starter = Starter(Path(folder), threads, malloc, options.timeout)
        for name in options.workloads:
            results.append(measure_workload(name, options, starter))
            show(results[-1])
    for precision in options.precisions:
        print(f"\n{precision}\n\n{tables.summary_table(results, precision)}", flush=True)
    if options.out is not None:
        write(options.out, about, results)
    return results


def machine(threads: int, malloc: str | None) -> dict[str, Any]:
    """What the numbers were measured on."""
    facts = processor()
    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set[str]()
    compiler = "" if shutil.which("g++") else "; torch.compile needs g++, which is not installed"
    versions = f"Python {facts['python']}, torch {facts['torch']}"
    if importlib.util.find_spec("jax") is not None:
        versions += f", jax {version('jax')}"
    return {
        "processor": f"{facts['processor']}, {facts['cores']} cores, {threads} threads used",
        "instruction sets": ", ".join(n for n in ISA if n in words) or "unknown",
        "versions": f"{versions}, {facts['system']}{compiler}",
        "malloc of the peers": malloc or "the system's (neither tcmalloc nor jemalloc found)",
    }


def measure_workload(name: str, options: Options, starter: Starter) -> Result:
    """Starts every contender, compares losses, lets them take turns, and ends them."""
    environment = child_environment(starter.threads, starter.folder, None)
    entries = [
        Entry(Order(name, contender, precision, options.tiny, FIRST_STEPS))
        for precision in options.precisions
        for contender in options.contenders
    ]
    try:
        for entry in entries:
            start(entry, starter)
        allowed = compare_losses(entries)
        with alone(options.lock):
            peaks = measure(environment)
            rows, idle = time_steps(entries, options)
            profile = dict(profiles(entries)) if options.profile else {}
            peaks = peaks.best(measure(environment))
        work = next(works(entries), None)
        parameters = max((e.child.hello["parameters"] for e in entries if e.child), default=0)
    finally:
        for entry in entries:
            entry.close()
    about = ALL[name].__doc__ or ""
    return Result(name, about, parameters, rows, peaks, work, idle, allowed, profile)


def start(entry: Entry, starter: Starter) -> None:
    """Brings a contender to its first turn, or notes why it cannot."""
    order = entry.order
    print(f"{order.workload}: starting {order.contender} {order.precision}", end="", flush=True)
    try:
        entry.child, entry.started = starter.start(order)
        print(f", compiled in {entry.started['cold']:.1f} s, again {entry.started['warm']:.1f} s")
    except Failed as error:
        entry.fail(str(error))
        print(f": {error}")


def compare_losses(entries: list[Entry]) -> dict[str, float]:
    """Drops contenders whose losses are not those of the reference: eager fp32, or the first.

    Returns:
        Precision -> how far they may be: a limit, or twice as far as rounding carries eager itself.
    """
    alive = [e for e in entries if e.child is not None]
    eager = [e for e in alive if e.order.contender == "eager"]
    if not alive:
        return {}
    reference = [*(e for e in eager if e.order.precision == "fp32"), *alive][0].losses
    drops = any(e.child is not None and e.child.hello["drops"] for e in alive)
    allowed = {e.order.precision: limit(e.order.precision, drops) for e in alive}
    for entry in eager:
        shaken = difference(entry.started["first_losses"], entry.losses)
        own = max(shaken, difference(entry.losses, reference))
        allowed[entry.order.precision] = max(allowed[entry.order.precision], 2 * own)
    for entry in alive:
        off = difference(entry.losses, reference)
        entry.started["loss_difference"] = off
        if not off <= allowed[entry.order.precision]:
            entry.fail(f"its losses differ by {off:.1e}")
    return allowed


def time_steps(entries: list[Entry], options: Options) -> tuple[list[Row], float]:
    """A row of each contender, and what waiting ones used of a core."""
    children = [e.child for e in entries if e.child is not None]
    answers, idle = take_turns(children, options.rounds, options.turn_seconds)
    return [row_of(e, answers[e.child] if e.child else []) for e in entries], idle


def row_of(entry: Entry, turns: list[dict[str, Any]]) -> Row:
    """What a contender's turns say. The first step of a turn finds cold caches: it is left out."""
    name = (entry.order.contender, entry.order.precision)
    if entry.child is None:
        return Row(*name, problem=entry.problem)
    seconds = [s for turn in turns for s in turn["seconds"][1:]]
    hello, started = entry.child.hello, entry.started
    peak = max(turn["peak"] for turn in turns)
    growth = peak - hello["baseline"]
    if name[0] != "shoestring":
        peak, growth = min(peak, started["plain_peak"]), min(growth, started["plain_growth"])
    return Row(
        *name,
        step=statistics.median(seconds),
        steps=len(seconds),
        peak=peak,
        growth=growth,
        cold=started["cold"],
        warm=started["warm"],
        loss_difference=started["loss_difference"],
        predicted=hello.get("predicted"),
        travel=statistics.median(turn["travel"] for turn in turns),
    )


def works(entries: list[Entry]) -> Iterator[Work]:
    """The work of a step, as each contender that knows it says."""
    for entry in entries:
        if entry.child is not None and "work" in entry.child.hello:
            yield Work(**entry.child.hello["work"])


def profiles(entries: list[Entry]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Precision -> times of instructions."""
    for entry in entries:
        if entry.child is not None and entry.order.contender == "shoestring":
            yield entry.order.precision, entry.child.ask(profile=FIRST_STEPS)["profile"]


def show(result: Result) -> None:
    """Prints one workload."""
    print(f"\n{result.workload}: {result.about} {result.parameters / 1e6:.2f} M parameters\n")
    print(f"{tables.workload_table(result)}\n\n{tables.facts(result)}\n", flush=True)
    for precision, rows in result.profile.items():
        print(f"shoestring {precision}, by instruction\n\n{tables.profile_table(rows)}\n")


def write(folder: Path, about: dict[str, Any], results: list[Result]) -> None:
    """The page, the plot and the data."""
    folder.mkdir(parents=True, exist_ok=True)
    data, plot = folder / "cpu_step.json", folder / "cpu_step.svg"
    every = merge(data, about, [replace(r, profile={}) for r in results])
    every.sort(key=lambda r: list(ALL).index(r.workload))
    save(data, about, every)
    try:
        tables.write_plot(plot, every)
    except ImportError as error:
        print(f"no plot: {error}; pip install 'shoestring[bench]'")
    (folder / "cpu_step.md").write_text(
        tables.page(about, every, plot.name if plot.exists() else None)
    )
    print(f"written: {os.path.relpath(folder)}/cpu_step.md")


if __name__ == "__main__":
    main()
