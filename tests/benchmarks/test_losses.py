"""What the comparison of losses over many steps says of its curves."""

from __future__ import annotations

from pathlib import Path

import pytest
from benchmarks.losses import (
    Band,
    Exact,
    Options,
    Outcome,
    measure,
    outside,
    table,
    windows,
    write,
)


def test_windows_are_means() -> None:
    assert windows([1, 3, 5, 7, 9], 2) == [2, 6, 9]


def test_outside_of_a_band() -> None:
    eager = [[2.0, 2.0, 4.0], [4.0, 3.0, 2.0], [3.0, 2.5, 3.0]]
    assert outside([[3.0, 2.0, 5.0], [3.0, 2.0, 5.0]], eager) == [0.0, 0.0, 0.25]
    assert outside([[1.0, 2.0, 3.0]], eager) == [0.5, 0.0, 0.0]


def test_limits() -> None:
    inside = Band(0, 10, 0.0)
    fine = Outcome("mlp", 200, Exact(1e-5, 1e-7, 1e-6, 1.0), inside)
    assert fine.holds and Outcome("mlp", 200, None, inside).holds
    assert Outcome("mlp", 200, Exact(3e-3, 1e-7, 2e-3, 1.0), inside).holds
    assert not Outcome("mlp", 200, Exact(5e-3, 1e-7, 2e-3, 1.0), inside).holds
    assert not Outcome("mlp", 200, fine.fp32, Band(1, 10, 0.1)).holds
    assert "| mlp" in table([fine]) and "0 of 10" in table([fine])
    assert "1.0e-06 of 3" in table([Outcome("mlp", 200, Exact(1e-5, 1e-7, 1e-6, 1.0, shakes=3))])


def test_a_page_keeps_what_was_not_measured_again(tmp_path: Path) -> None:
    write(tmp_path, Outcome("lstm", 200, Exact(1e-5, 1e-7, 1e-6, 2.5)))
    write(tmp_path, Outcome("mlp", 200, Exact(1e-5, 1e-7, 1e-6, 1.5)))
    write(tmp_path, Outcome("mlp", 200, None, Band(1, 10, 0.125)))
    lines = (tmp_path / "losses.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith(("| mlp", "| lstm"))]
    assert len(rows) == 2 and "1.5000" in rows[0] and "1 of 10 | 1.2e-01" in rows[0]
    write(tmp_path, Outcome("mlp", 100, None, Band(0, 5, 0.0)))
    assert "1.5000" not in (tmp_path / "losses.md").read_text()


def test_a_short_run() -> None:
    outcome = measure("mlp", Options(steps=6, window=3, tiny=True))
    assert outcome.holds and outcome.bf16 is not None and outcome.bf16.windows == 2
    assert outcome.fp32 is not None and outcome.fp32.last == pytest.approx(2.4, abs=0.3)
    assert measure("mlp", Options(precisions=("fp32",), steps=2, shakes=2, tiny=True)).bf16 is None
