"""Optimizers that have no rule are refused by name, with what to do instead."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import shoestring
from shoestring.frontend.optimizers import RULES, rule_of
from shoestring.ir.errors import CaptureError, RuntimeFault

from .eager import Pair, regression_batch, regression_loss, small_model


class Renamed(torch.optim.AdamW):
    """Has other defaults and the same update."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.05, betas=(0.8, 0.9))


class Louder(torch.optim.Adam):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Decorated(torch.optim.Adam):
    """Its `step` looks like Adam's, down to `__wrapped__`."""

    def step(self, closure: Any = None) -> Any:
        return None

    functools.update_wrapper(step, torch.optim.Adam.step)


class Gathers(torch.optim.Adam):
    def _init_group(self, *args: Any, **kwargs: Any) -> Any:
        return None


class Own(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> Any:
        return None


def _parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(2, 2))]


@pytest.mark.parametrize("cls", [Own, Louder, Decorated, Gathers])
def test_user_defined_updates_are_refused_by_name(cls: type[Any]) -> None:
    optimizer = cls(_parameters())
    with pytest.raises(CaptureError) as caught:
        rule_of(optimizer)
    assert caught.value.code == "SS1201"
    assert f"test_refusals.{cls.__name__} has no update rule" in str(caught.value)
    if cls is not Own:
        assert "it changes the update of Adam" in str(caught.value)
    assert "AdamW" in caught.value.hint


@pytest.mark.parametrize("cls", RULES, ids=lambda c: c.__name__)
def test_subclasses_with_the_same_update_have_the_rule_of_their_base(
    cls: type[Any],
) -> None:
    derived: Any = type("Derived", (cls,), {})
    for _ in range(2):  # PyTorch wraps `step` of a class when its first instance is made
        assert rule_of(derived(_parameters())) is RULES[cls]


def test_a_subclass_trains() -> None:
    pair = Pair(
        small_model(), regression_loss, lambda m: Renamed(m.parameters()), regression_batch(0)
    )
    for i in range(3):
        pair.both(*regression_batch(i))


def test_lbfgs_is_refused() -> None:
    with pytest.raises(CaptureError) as caught:
        rule_of(torch.optim.LBFGS(_parameters()))
    assert caught.value.code == "SS1202"
    assert "LBFGS evaluates the loss several times" in str(caught.value)
    assert "compile the forward pass alone" in caught.value.hint


def test_complex_parameters_are_refused() -> None:
    model = torch.nn.ParameterDict({"z": torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(CaptureError) as caught:
        shoestring.compile(
            model,
            lambda m, x: (m["z"].real * x).sum() + m["z"].imag.square().sum(),
            optimizer,
            (torch.ones(2),),
            backend="reference",
        )
    assert caught.value.code == "SS1203"
    assert "SGD updates real parameters only, found 'z'" in str(caught.value)


def test_incomplete_state_is_refused() -> None:
    pair = Pair(
        small_model(),
        regression_loss,
        lambda m: torch.optim.Adam(m.parameters()),
        regression_batch(0),
    )
    pair.both(*regression_batch(0))
    first = pair.optimizer.param_groups[0]["params"][0]
    del pair.optimizer.state[first]["exp_avg_sq"]
    with pytest.raises(RuntimeFault, match="SS5012.*has step, exp_avg but not exp_avg_sq"):
        pair.step(*regression_batch(1))
