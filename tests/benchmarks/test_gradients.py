"""What the comparison of gradients with fp64 finds."""

from __future__ import annotations

import pytest
import torch
from benchmarks.gradients import Errors, Options, Outcome, errors, measure, table
from benchmarks.workloads import WORKLOADS


def test_errors_are_relative_and_leave_out_zero() -> None:
    exact = {"a": torch.tensor([3.0, 4.0]).double(), "zero": torch.tensor([1e-12]).double()}
    found = {"a": torch.tensor([3.0, 4.5]), "zero": torch.tensor([1e-9])}
    both = errors((1.01, found), (1.0, exact))
    assert both.loss == pytest.approx(0.01) and both.gradients == pytest.approx([0.1])


def test_limits() -> None:
    fine = Outcome("mlp", "fp32", Errors(0.0, [1e-7, 2e-7, 9e-7]), Errors(0.0, [3e-7, 3e-7, 1e-6]))
    assert fine.ratio == pytest.approx(1.5) and fine.holds
    assert not Outcome("mlp", "fp32", fine.eager, Errors(0.0, [5e-7])).holds
    assert "| mlp" in table([fine]) and "1.50x" in table([fine])


@pytest.mark.parametrize("name", WORKLOADS)
def test_gradients_are_as_exact_as_eager_ones(name: str) -> None:
    for outcome in measure(name, Options(tiny=True)):
        assert outcome.holds, outcome.precision
