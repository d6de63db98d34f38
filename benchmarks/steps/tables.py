"""Results as Markdown, for a terminal and for a page, and as a plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .results import LIMIT_BF16, LIMIT_DROPS, LIMIT_FP32, Result, Row, geometric_mean, limit

PRECISIONS = ("fp32", "bf16")
Number = float | None


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table: the first column to the left, all others to the right."""
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        rest = [c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True)]
        return f"| {' | '.join([first, *rest])} |"

    rules = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join([line(header), f"| {' | '.join(rules)} |", *map(line, rows)])


def ratio(value: Number) -> str:
    return "-" if value is None else f"{value:.2f}x"


def percent(value: Number) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}" if seconds < 1 else f"{1e3 * seconds:.0f}"


def mib(count: Number) -> str:
    return "-" if count is None else f"{count / 2**20:,.0f}"


# --- one workload -----------------------------------------------------------------------------

HEADER = (
    "contender", "step, ms", "shoestring is", "of roofline", "peak, MiB", "w/o libraries",
    "our share", "compile cold, s", "warm, s", "loss differs by", "core to core, ns",
)  # fmt: skip


def workload_table(result: Result) -> str:
    """One row a contender; shoestring's ratios are to the row of equal precision."""
    return markdown(HEADER, [_cells(result, row) for row in result.rows])


def _cells(result: Result, row: Row) -> list[str]:
    name = f"{row.contender} {row.precision}"
    if not row.ok:
        return [f"{name}: {row.problem}".replace("|", "/"), *["-"] * (len(HEADER) - 1)]
    ours = result.row("shoestring", row.precision)
    peer = None if ours is row else ours
    return [
        name,
        milliseconds(row.step),
        "-" if peer is None else f"{row.step / peer.step:.2f}x",
        percent(result.roofline_share(row)),
        mib(row.peak),
        mib(row.growth),
        "-" if peer is None else f"{peer.growth / max(row.growth, 1):.2f}x",
        "-" if row.contender == "eager" else f"{row.cold:.1f}",
        "-" if row.contender == "eager" else f"{row.warm:.1f}",
        f"{row.loss_difference:.0e}",
        f"{1e9 * row.travel:.0f}" if row.travel else "-",
    ]


def _why(allowed: float) -> str:
    if allowed == LIMIT_DROPS:
        return "as each contender drops what its own random numbers say"
    return "twice as far as rounding carries eager"


def facts(result: Result) -> str:
    """The roofline of a workload and the memory predicted, as text."""
    peaks = result.peaks
    lines = [
        f"peaks: fp32 {peaks.fp32 / 1e9:.0f} GFLOP/s (torch.mm {peaks.mm_fp32 / 1e9:.0f}),"
        f" bf16 {peaks.bf16 / 1e9:.0f} GFLOP/s (torch.mm {peaks.mm_bf16 / 1e9:.0f}),"
        f" memory {peaks.bandwidth / 1e9:.1f} GB/s;"
        f" waiting contenders used {percent(result.idle)} of a core"
    ]
    lines += [
        f"losses {precision}: may differ by {allowed:.0e}, {_why(allowed)}"
        for precision, allowed in result.allowed.items()
        if allowed > limit(precision)
    ]
    for precision in PRECISIONS:
        if result.work is not None and peaks.fp32 and peaks.bandwidth:
            products, state = result.work.seconds(peaks, precision)
            lines.append(
                f"roofline {precision}: {result.work.product_flops / 1e9:.1f} GFLOP of products in"
                f" {milliseconds(products)} ms + {result.work.state_bytes / 1e6:.0f} MB of state in"
                f" {milliseconds(state)} ms"
            )
        row = result.row("shoestring", precision)
        if row is not None and row.predicted is not None:
            lines.append(
                f"memory {precision}: predicted {mib(row.predicted)} MiB, real {mib(row.peak)} MiB"
                f" ({row.predicted / row.peak:.2f} of it)"
            )
    return "\n".join(f"- {line}" for line in lines)


def profile_table(rows: list[dict[str, Any]], count: int = 25) -> str:
    """The slowest instructions of a step."""
    total = sum(r["ms"] for r in rows) or 1.0
    shown = [
        [r["name"], f"{r['calls']:.0f}", f"{r['ms']:.2f}", percent(r["ms"] / total)]
        for r in rows[:count]
    ]
    left = sum(r["ms"] for r in rows[count:])
    if left:
        shown.append([f"{len(rows) - count} others", "", f"{left:.2f}", percent(left / total)])
    shown.append(["all", "", f"{total:.2f}", ""])
    return markdown(("instruction", "calls", "ms a step", "share"), shown)


# --- all workloads ----------------------------------------------------------------------------

Pick = Callable[[Result, str], Number]


def speedup(peer: str) -> Pick:
    """How many times as fast shoestring is; `best` stands for the best torch.compile."""

    def pick(result: Result, precision: str) -> Number:
        ours, theirs = result.row("shoestring", precision), _peer(result, peer, precision)
        return theirs.step / ours.step if ours is not None and theirs is not None else None

    return pick


def _peer(result: Result, peer: str, precision: str) -> Row | None:
    return result.best_compiled(precision) if peer == "best" else result.row(peer, precision)


def of_peer(field: str, peer: str = "best") -> Pick:
    """Shoestring's figure divided by the peer's."""

    def pick(result: Result, precision: str) -> Number:
        ours, theirs = result.row("shoestring", precision), _peer(result, peer, precision)
        if ours is None or theirs is None or not getattr(theirs, field):
            return None
        share: float = getattr(ours, field) / getattr(theirs, field)
        return share

    return pick


def _own(result: Result, precision: str) -> Number:
    row = result.row("shoestring", precision)
    return None if row is None else row.step


def _share(result: Result, precision: str) -> Number:
    row = result.row("shoestring", precision)
    return None if row is None else result.roofline_share(row)


def _predicted(result: Result, precision: str) -> Number:
    row = result.row("shoestring", precision)
    return None if row is None or row.predicted is None else row.predicted / row.peak


COLUMNS: tuple[tuple[str, Pick, Callable[[Number], str]], ...] = (
    ("step, ms", _own, lambda v: "-" if v is None else milliseconds(v)),
    ("to eager", speedup("eager"), ratio),
    ("to torch.compile", speedup("compile"), ratio),
    ("to max-autotune", speedup("max-autotune"), ratio),
    ("to best torch.compile", speedup("best"), ratio),
    ("to JAX", speedup("jax"), ratio),
    ("of roofline", _share, percent),
    ("memory", of_peer("growth"), ratio),
    ("with libraries", of_peer("peak"), ratio),
    ("cold compile", of_peer("cold"), ratio),
    ("warm compile", of_peer("warm"), ratio),
    ("predicted memory", _predicted, ratio),
)


def summary_table(results: Sequence[Result], precision: str) -> str:
    """One row a workload, and the geometric means of the ratios."""
    header = ["workload", *(name for name, _, _ in COLUMNS)]
    rows = [[r.workload, *(show(pick(r, precision)) for _, pick, show in COLUMNS)] for r in results]
    means = [
        "" if pick is _own else show(_mean(pick, results, precision)) for _, pick, show in COLUMNS
    ]
    return markdown(header, [*rows, ["geometric mean", *means]])


def _mean(pick: Pick, results: Sequence[Result], precision: str) -> Number:
    return geometric_mean(v for r in results if (v := pick(r, precision)))


EXPLANATION = f"""\
Steps are timed in turns in one run, each contender in a process of its own, after their losses were
compared with eager fp32's (limits: fp32 {LIMIT_FP32:g}, bf16 {LIMIT_BF16:g}, relative; where
rounding carries eager itself further, twice as far as that: weights one unit in the last place
away, or autocast). Medians.
"to X" says how many times as fast as X shoestring is at equal precision: more than 1 is faster.
Memory and compile times are shoestring's divided by those of the best torch.compile: less than 1
is better.
"memory" is the peak of the process while it steps, without what it held before the model was built;
of a peer the less of two runs, with the system's malloc and with the one it is timed with.
Compile time is setup and two steps, less two ordinary steps; imports do not count. Peers have
fused AdamW, one thread a core, the malloc named below, and autocast for bf16.
The roofline of a step: FLOPs of products / peak + bytes of state (parameters and moments, read and
written once) / bandwidth, the peaks being measured before and after in the same run. It is that of
the model as written: a pass that leaves out products nobody reads raises the share.
"core to core" is how long a cache line takes from one core to another, measured after each turn,
in the median one: a host may move a virtual machine's cores to where they share no cache, which
costs every contender time."""


def machine_text(machine: dict[str, Any]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in machine.items())


def page(machine: dict[str, Any], results: Sequence[Result], plot: str | None) -> str:
    """The page of the docs."""
    parts = ["# A training step on the CPU", "`python benchmarks/cpu_step.py`", EXPLANATION]
    parts.append(machine_text(machine))
    if plot is not None:
        parts.append(f"![shoestring's speed relative to its peers]({plot})")
    for precision in PRECISIONS:
        if any(r.row("shoestring", precision) for r in results):
            parts += [f"## {precision}", summary_table(results, precision)]
    for result in results:
        parts += [f"## {result.workload}", result.about, workload_table(result), facts(result)]
    return "\n\n".join(parts) + "\n"


PEER_BARS = (
    ("eager", "PyTorch eager"),
    ("compile", "torch.compile"),
    ("max-autotune", "max-autotune"),
    ("jax", "JAX jit"),
)


def write_plot(path: Path, results: Sequence[Result]) -> None:
    """Bars of how many times as fast as each peer shoestring is.

    Raises:
        ImportError: where matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "shoestring"
    from matplotlib import pyplot

    groups = [(r, p) for p in PRECISIONS for r in results if r.row("shoestring", p) is not None]
    figure, axes = pyplot.subplots(figsize=(max(6.0, 1.1 * len(groups)), 4.0))
    width = 0.8 / len(PEER_BARS)
    for i, (peer, label) in enumerate(PEER_BARS):
        values = [(g, v) for g, (r, p) in enumerate(groups) if (v := speedup(peer)(r, p))]
        axes.bar(
            [g + (i - 1.5) * width for g, _ in values], [v for _, v in values], width, label=label
        )
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks(range(len(groups)), [f"{r.workload}\n{p}" for r, p in groups])
    axes.set_ylabel("times as fast as the peer")
    axes.set_title("shoestring's training step; above the line it is faster")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
