"""What the comparison of losses over many steps says of its curves."""

from __future__ import annotations

import pytest
from benchmarks.losses import Options, Outcome, measure, outside, table, windows


def test_windows_are_means() -> None:
    assert windows([1, 3, 5, 7, 9], 2) == [2, 6, 9]


def test_outside_of_a_band() -> None:
    eager = [[2.0, 2.0, 4.0], [4.0, 3.0, 2.0], [3.0, 2.5, 3.0]]
    assert outside([[3.0, 2.0, 5.0], [3.0, 2.0, 5.0]], eager) == [0.0, 0.0, 0.25]
    assert outside([[1.0, 2.0, 3.0]], eager) == [0.5, 0.0, 0.0]


def test_limits() -> None:
    fine = Outcome("mlp", 1e-5, 1e-6, 0, 10, 0.0, 1.0)
    assert fine.holds
    assert Outcome("mlp", 3e-3, 2e-3, 0, 10, 0.0, 1.0).holds
    assert not Outcome("mlp", 5e-3, 2e-3, 0, 10, 0.0, 1.0).holds
    assert not Outcome("mlp", 1e-5, 1e-6, 1, 10, 0.1, 1.0).holds
    assert "| mlp" in table([fine]) and "0 of 10" in table([fine])


def test_a_short_run() -> None:
    outcome = measure("mlp", Options(steps=6, window=3, tiny=True))
    assert outcome.holds and outcome.windows == 2
    assert outcome.last == pytest.approx(2.4, abs=0.3)
