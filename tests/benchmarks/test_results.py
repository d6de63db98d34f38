"""What the benchmark of steps derives from its measurements, and how it shows it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.cpu_step import Entry, Options, compare_losses, row_of
from benchmarks.steps import tables
from benchmarks.steps.child import Order, first_line
from benchmarks.steps.processes import Child, compile_seconds, steps_of_turn
from benchmarks.steps.results import Result, Row, difference, geometric_mean, merge, save
from benchmarks.steps.roofline import Peaks, Work
from benchmarks.steps.runners import aggregate

from shoestring.backends.c import CBackend
from shoestring.ir import Builder, Role, parse_type
from shoestring.runtime.executor import Executor, Timing

PEAKS = Peaks(fp32=100e9, bf16=200e9, bandwidth=10e9)
ROWS = [
    Row("shoestring", "fp32", "", 0.1, 9, 300, 100, 2.0, 1.0, 1e-6, 290),
    Row("eager", "fp32", "", 0.3, 9, 500, 200, 0.0, 0.0),
    Row("compile", "fp32", "", 0.2, 9, 600, 400, 8.0, 4.0),
    Row("max-autotune", "fp32", "", 0.15, 9, 500, 200, 80.0, 4.0),
    Row("jax", "fp32", "jax is not installed"),
]
RESULT = Result("mlp", "An MLP.", 10, ROWS, PEAKS, Work(5_000_000_000, 100_000_000))


def test_geometric_mean() -> None:
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert geometric_mean([]) is None


def test_difference() -> None:
    assert difference([1.0, 2.2], [1.0, 2.0]) == pytest.approx(0.1)
    assert math.isinf(difference([math.nan], [1.0]))


def test_ratios_are_to_the_best_setting_of_the_compiler() -> None:
    best = RESULT.best_compiled("fp32")
    assert best is not None and best.contender == "max-autotune"
    assert tables.speedup("best")(RESULT, "fp32") == pytest.approx(1.5)
    assert tables.speedup("eager")(RESULT, "fp32") == pytest.approx(3.0)
    assert tables.speedup("jax")(RESULT, "fp32") is None
    assert tables.of_peer("growth")(RESULT, "fp32") == pytest.approx(0.5)
    assert tables.of_peer("cold")(RESULT, "bf16") is None


def test_roofline() -> None:
    assert RESULT.roofline_share(ROWS[0]) == pytest.approx((0.05 + 0.01) / 0.1)
    assert RESULT.work is not None and RESULT.work.floor(PEAKS, "bf16") == pytest.approx(0.035)
    assert RESULT.roofline_share(ROWS[4]) is None
    assert Peaks(1, 2, 3).best(Peaks(2, 1, 4)) == Peaks(2, 2, 4)


def test_work_counts_products_and_state() -> None:
    b = Builder("f")
    w = b.param(parse_type("f32[4,8]"), Role.PARAMETER, "w")
    frozen = b.param(parse_type("f32[8]"), Role.PARAMETER, "frozen")
    x = b.param(parse_type("f32[2,4]"), Role.BATCH, "#batch.0")
    b.output("y", b.emit("aten.add.Tensor", b.emit("aten.mm.default", x, w), frozen))
    b.replace_state(w, b.emit("aten.mul.Tensor", w, 0.5))
    assert Work.of(b.build()) == Work(2 * 2 * 4 * 8, 2 * 4 * 8 * 4 + 8 * 4)


def test_markdown() -> None:
    assert tables.markdown(["a", "bb"], [["long", "1"]]) == (
        "| a    | bb |\n| ---- | -: |\n| long |  1 |"
    )


def test_tables_show_every_row_and_why_one_is_missing() -> None:
    text = tables.workload_table(RESULT)
    assert "jax fp32: jax is not installed" in text and "2.00x" in text
    summary = tables.summary_table([RESULT, replace(RESULT, workload="gpt")], "fp32")
    assert summary.splitlines()[-1].startswith("| geometric mean |")
    assert summary.count("1.50x") == 2 * 3  # to max-autotune, which is the best setting
    page = tables.page({"processor": "any"}, [RESULT], None)
    assert "## mlp" in page and "predicted 0 MiB" in page and "## bf16" not in page


def test_results_of_other_workloads_are_kept(tmp_path: Path) -> None:
    path, machine = tmp_path / "data.json", {"processor": "any"}
    save(path, machine, [RESULT])
    other = replace(RESULT, workload="gpt")
    assert merge(path, machine, [other]) == [RESULT, other]
    assert merge(path, machine, [RESULT]) == [RESULT]
    assert merge(path, {"processor": "another"}, [other]) == [other]


def test_compile_time_is_what_two_steps_took_too_long() -> None:
    hello = {"setup": 1.0, "seconds": [5.0, 2.0, 0.5, 0.5, 0.5]}
    assert compile_seconds(hello) == pytest.approx(7.0)


def entry(contender: str, precision: str, losses: list[float], drops: bool = False) -> Entry:
    order = Order("mlp", contender, precision, True, 3)
    child = Child(order, {}, Path("log"), 1.0, {"losses": losses, "baseline": 100, "drops": drops})
    child.hello["seconds"] = [1.0, 1.0, 0.5, 0.5]
    child.close = lambda: None  # type: ignore[method-assign]
    return Entry(order, child, {"first_losses": losses})


def test_contenders_with_other_losses_are_dropped() -> None:
    eager = entry("eager", "fp32", [2.0, 1.0])
    wrong = entry("compile", "fp32", [2.0, 1.01])
    close = entry("compile", "bf16", [2.0, 1.01])
    compare_losses([wrong, eager, close])
    assert wrong.child is None and "losses differ by 1.0e-02" in wrong.problem
    assert row_of(wrong, []).problem == wrong.problem
    assert eager.child is not None and close.child is not None


def test_losses_may_differ_as_far_as_rounding_carries_eager() -> None:
    eager, near = entry("eager", "fp32", [2.0, 1.0]), entry("compile", "fp32", [2.0, 1.004])
    eager.started["first_losses"] = [2.0, 1.003]
    far = entry("shoestring", "fp32", [2.0, 1.007])
    assert compare_losses([near, eager, far])["fp32"] == pytest.approx(0.006)
    assert near.child is not None and far.child is None


def test_losses_with_dropout_are_compared_roughly() -> None:
    eager, near = (
        entry("eager", "fp32", [2.0, 1.0], True),
        entry("compile", "fp32", [2.0, 1.1], True),
    )
    far = entry("shoestring", "fp32", [2.0, 1.3], True)
    assert compare_losses([near, eager, far])["fp32"] == pytest.approx(0.2)
    assert near.child is not None and far.child is None


def test_rows_leave_the_first_step_of_a_turn_out() -> None:
    ours = entry("shoestring", "fp32", [1.0])
    ours.started = {"cold": 1.0, "warm": 0.5, "loss_difference": 0.0}
    first = {"seconds": [9.0, 1.0, 2.0], "peak": 150, "travel": 2e-7}
    row = row_of(ours, [first, {"seconds": [9, 3], "peak": 1, "travel": 4e-8}])
    assert (row.step, row.steps, row.peak, row.growth) == (2.0, 3, 150, 50)
    assert row.travel == pytest.approx(1.2e-7)
    assert ours.child is not None and steps_of_turn(ours.child, 10.0) == 20


def test_profiles_are_summed_by_what_instructions_do() -> None:
    b = Builder("f")
    w = b.param(parse_type("f32[4,4]"), Role.PARAMETER, "w")
    b.output("y", b.emit("aten.mm.default", b.emit("aten.mm.default", w, w), w))
    compiled, seen = CBackend().compile(b.build()), list[Timing]()
    for _ in range(2):
        Executor(compiled, seen.append).run([torch.ones(4, 4)])
    rows = aggregate(compiled.instructions, seen, 2)
    assert sum(r["calls"] for r in rows) == len(compiled.instructions)
    assert all("mm [" in r["name"] and "[4,4]" in r["name"] for r in rows)
    assert rows[0]["name"] in tables.profile_table(rows)


def test_first_line_of_an_error() -> None:
    assert first_line(ValueError("\n a \nb")) == "ValueError: a"
    assert first_line(ValueError()) == "ValueError: "


def test_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="of the extra `bench`")
    tables.write_plot(tmp_path / "plot.svg", [RESULT])
    assert "<svg" in (tmp_path / "plot.svg").read_text()


def test_defaults_leave_the_slow_contender_out() -> None:
    assert "max-autotune" not in Options().contenders
