"""`shoestring explain`: what was captured, what each pass did and why not, memory and cost."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tyro.conf import OmitArgPrefixes

from shoestring.backends.c import CExecutable
from shoestring.ir import Cost, Function, Op, Role, Value
from shoestring.ir.errors import UsageError
from shoestring.runtime.roofline import Measured, Peaks, measure_kernels, measure_peaks
from shoestring.runtime.step import batch_tensors

from .program import Source
from .workload import DataOptions, ModelOptions, OptimizerOptions, positive


@dataclass(frozen=True)
class ExplainOptions:
    """What to explain.

    Attributes:
        model: `module:factory`; factory() gives (model, loss_fn, optimizer, example_batch). By
            default the model of `shoestring train`.
        backend: what compiles the step.
        top: rows of each table.
        timed: steps over which kernels are timed; 0 times none.
    """

    model: str | None = None
    backend: str = "c"
    top: int = 15
    timed: int = 3

    def __post_init__(self) -> None:
        positive("top", self.top)
        if self.timed < 0:
            raise UsageError("SS7005", f"--timed must be 0 or more, found {self.timed}")


@dataclass(frozen=True)
class Explain:
    """Compiles a step and tells what each pass did, what holds memory and what costs time."""

    what: OmitArgPrefixes[ExplainOptions] = field(default_factory=ExplainOptions)
    shape: OmitArgPrefixes[ModelOptions] = field(default_factory=ModelOptions)
    data: OmitArgPrefixes[DataOptions] = field(default_factory=DataOptions)
    optimizer: OmitArgPrefixes[OptimizerOptions] = field(default_factory=OptimizerOptions)

    def run(self) -> int:
        """Explains; the exit code."""
        import shoestring

        source = Source(self.what.model, self.shape, self.data, self.optimizer)
        (model, loss_fn, optimizer, batch), _ = source.make()
        step = shoestring.compile(
            model,
            loss_fn,
            optimizer,
            batch,
            backend=self.what.backend,
            precision=self.shape.precision,
            seed=self.data.seed,
        )
        report = step.report()
        console = Console(highlight=False, soft_wrap=True)
        console.print(str(report), markup=False)
        executable = step.program(batch).executable
        if isinstance(executable, CExecutable):
            console.print(plan_table(executable, self.what.top))
        else:
            console.print(memory_table(report.function, self.what.top))
        console.print(cost_table(report.function, self.what.top))
        if isinstance(executable, CExecutable) and self.what.timed:
            arguments = step.bind(step.program(batch).captured, batch_tensors(batch))
            peaks = measure_peaks()
            rows = measure_kernels(executable, arguments, peaks, self.what.timed)
            console.print(time_table(rows, peaks, self.what.top))
        return 0


def plan_table(executable: CExecutable, top: int) -> Table:
    """What a step needs: state by the user's names, and what lives in the arena at its peak."""
    plan, function = executable.program.plan, executable.function
    where = executable.instructions[plan.peak_at] if executable.instructions else None
    place = f" at {where.name} ({where.loc})" if where is not None else ""
    held = [Held(h.label, "value", "", h.nbytes) for h in plan.holders] + _state(function)
    total = executable.total_bytes
    title = (
        f"memory: {total / 1e6:.1f} MB for a step, of which {plan.arena_bytes / 1e6:.1f} MB arena;"
        f" its peak of {plan.peak_bytes / 1e6:.1f} MB is{place}"
    )
    return _held_table(title, sorted(held, key=lambda h: -h.nbytes), top)


# --- time ---------------------------------------------------------------------------------------


def time_table(rows: list[Measured], peaks: Peaks, top: int) -> Table:
    """Which kernel ran for which ops and why, its time, and how far it is from the roofline."""
    whole, least = sum(r.seconds for r in rows), sum(r.least for r in rows)
    fp32, bf16 = (peaks.flops[t] / 1e9 for t in (torch.float32, torch.bfloat16))
    title = (
        f"time of a step: {whole * 1e3:.2f} ms; at the roofline {least * 1e3:.2f} ms."
        f" Peaks measured here: products {fp32:.0f} GFLOP/s in f32 and {bf16:.0f} in bf16,"
        f" memory {peaks.bandwidth / 1e9:.0f} GB/s"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("kernel")
    for column in ("times", "ms", "share", "of peak"):
        table.add_column(column, justify="right")
    for column in ("bound by", "why this kernel", "ops"):
        table.add_column(column)
    for r in rows[:top]:
        table.add_row(
            escape(r.name), str(r.calls), f"{r.seconds * 1e3:.3f}", f"{r.seconds / whole:.1%}",
            f"{r.share_of_peak:.0%}", r.bound, escape(r.why), escape(_ops_text(r.ops)),
        )  # fmt: skip
    if len(rows) > top:
        rest = sum(r.seconds for r in rows[top:])
        times = sum(r.calls for r in rows[top:])
        more = f"{len(rows) - top} more"
        table.add_row(more, str(times), f"{rest * 1e3:.3f}", f"{rest / whole:.1%}")
    return table


def _ops_text(ops: tuple[str, ...]) -> str:
    """The first ops by short name, and how many more there are."""
    names = [name.removeprefix("aten.").partition(".")[0] for name in ops]
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


# --- memory -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """A value that is alive at the peak, under the user's name."""

    name: str
    role: str
    type: str
    nbytes: int


def at_peak(function: Function) -> tuple[int, Op | None, list[Held]]:
    """Bytes of intermediate values at the op where they are most, that op, and all that lives then.

    A value lives from its op to its last reader. Views count as copies, and state is listed in
    full: this is the program's own need, a backend may do better and says so itself.
    """
    last = _last_readers(function)
    best, where, now = 0, None, 0
    alive: dict[Value, None] = {}
    snapshot: list[Value] = []
    for index, op in enumerate(function.ops):
        alive.update(dict.fromkeys(op.results))
        now += sum(r.type.nbytes for r in op.results)
        if now > best:
            best, where, snapshot = now, op, list(alive)
        for v in dict.fromkeys((*op.inputs, *op.results)):
            if v in alive and last[v] == index:
                del alive[v]
                now -= v.type.nbytes
    held = [Held(_name(function, v), "value", str(v.type), v.type.nbytes) for v in snapshot]
    return best, where, sorted([*held, *_state(function)], key=lambda h: -h.nbytes)


def _state(function: Function) -> list[Held]:
    """All that the caller holds: parameters, moments, the batch."""
    return [
        Held(p.path, p.role.value, str(p.value.type), p.value.type.nbytes)
        for p in function.params
        if p.role is not Role.HYPER
    ]


def _last_readers(function: Function) -> dict[Value, int]:
    last = {v: i for i, op in enumerate(function.ops) for v in (*op.inputs, *op.results)}
    return last | dict.fromkeys(function.results, len(function.ops))


def _name(function: Function, value: Value) -> str:
    """Where a value comes from: module path, op and source line."""
    op = function.producer(value)
    if op is None:
        return value.name
    place = f"{op.loc.file.rpartition('/')[2]}:{op.loc.line}" if op.loc.file else ""
    parts = [op.loc.module, op.name.removeprefix("aten."), op.loc.phase.value, place]
    return " ".join(p for p in parts if p)


def memory_table(function: Function, top: int) -> Table:
    """What is alive at the peak, largest first."""
    peak, where, held = at_peak(function)
    place = f" at {where.name} ({where.loc})" if where is not None else ""
    title = f"memory: {peak / 1e6:.1f} MB of values at their peak{place}; all that lives then"
    return _held_table(title, held, top)


def _held_table(title: str, held: list[Held], top: int) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("what", "role", "type"):
        table.add_column(column)
    table.add_column("MB", justify="right")
    for h in held[:top]:
        table.add_row(escape(h.name), h.role, escape(h.type), f"{h.nbytes / 1e6:.2f}")
    if len(held) > top:
        rest = sum(h.nbytes for h in held[top:])
        table.add_row(f"{len(held) - top} more", "", "", f"{rest / 1e6:.2f}")
    return table


# --- cost ---------------------------------------------------------------------------------------


def cost_by(ops: Iterable[Op]) -> list[tuple[str, int, Cost]]:
    """(op, how often, cost), the most operations first, then the most bytes."""
    total: dict[str, Cost] = defaultdict(lambda: Cost(0, 0))
    count: Counter[str] = Counter()
    for op in ops:
        total[op.name] += op.opdef.cost(op)
        count[op.name] += 1
    rows = [(name, count[name], cost) for name, cost in total.items()]
    return sorted(rows, key=lambda r: (-r[2].flops, -r[2].bytes, r[0]))


def cost_table(function: Function, top: int) -> Table:
    """Floating-point operations and bytes of one step, by op."""
    rows = cost_by(function.ops)
    whole = sum((c for _, _, c in rows), Cost(0, 0))
    table = Table(
        title=f"cost of a step: {whole.flops / 1e9:.2f} GFLOP, {whole.bytes / 1e6:,.0f} MB moved"
        f" by {len(function.ops)} ops",
        title_justify="left",
    )
    table.add_column("op")
    for column in ("times", "GFLOP", "share", "MB", "share"):
        table.add_column(column, justify="right")
    for name, count, cost in rows[:top]:
        table.add_row(name, str(count), *_shares(cost, whole))
    if len(rows) > top:
        rest = sum((c for _, _, c in rows[top:]), Cost(0, 0))
        times = sum(n for _, n, _ in rows[top:])
        table.add_row(f"{len(rows) - top} more", str(times), *_shares(rest, whole))
    return table


def _shares(cost: Cost, whole: Cost) -> list[Any]:
    flops, moved = cost.flops / (whole.flops or 1), cost.bytes / (whole.bytes or 1)
    return [f"{cost.flops / 1e9:.3f}", f"{flops:.1%}", f"{cost.bytes / 1e6:,.1f}", f"{moved:.1%}"]
