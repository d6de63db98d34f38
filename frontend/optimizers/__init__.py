"""Update rules, one for each class of `torch.optim` that is a pure update."""

from __future__ import annotations

from functools import cache
from types import CodeType
from typing import Any

import torch
from torch.optim.optimizer import Optimizer

from shoestring.ir.errors import CaptureError

from .adadelta import AdadeltaRule
from .adafactor import AdafactorRule
from .adagrad import AdagradRule
from .adam import AdamRule
from .adamax import AdamaxRule
from .asgd import ASGDRule
from .muon import MuonRule
from .nadam import NAdamRule
from .radam import RAdamRule
from .rmsprop import RMSpropRule
from .rprop import RpropRule
from .rule import Hyper, InitialState, Rule, State, lookup, static_value
from .sgd import SGDRule
from .sparse_adam import SparseAdamRule

RULES: dict[type[Optimizer], Rule] = {
    torch.optim.ASGD: ASGDRule(),
    torch.optim.Adadelta: AdadeltaRule(),
    torch.optim.Adafactor: AdafactorRule(),
    torch.optim.Adagrad: AdagradRule(),
    torch.optim.Adam: AdamRule(),
    torch.optim.AdamW: AdamRule(decoupled=True),
    torch.optim.Adamax: AdamaxRule(),
    torch.optim.Muon: MuonRule(),
    torch.optim.NAdam: NAdamRule(),
    torch.optim.RAdam: RAdamRule(),
    torch.optim.RMSprop: RMSpropRule(),
    torch.optim.Rprop: RpropRule(),
    torch.optim.SGD: SGDRule(),
    torch.optim.SparseAdam: SparseAdamRule(),
}


def rule_of(optimizer: Optimizer) -> Rule:
    """The update rule of an optimizer; a subclass that does not change the update has its base's.

    Raises:
        CaptureError: SS1201 where its class has none, SS1202 for LBFGS.
    """
    if isinstance(optimizer, torch.optim.LBFGS):
        raise CaptureError(
            "SS1202",
            "LBFGS evaluates the loss several times in a step, so its step is not one program",
            hint="use another optimizer, or compile the forward pass alone",
        )
    cls = type(optimizer)
    base = next((c for c in cls.__mro__ if c in RULES), None)
    if base is None or _updates(cls) != _updates(base):
        raise _unknown(cls, base)
    return RULES[base]


def _updates(cls: type[Any]) -> tuple[Any, Any]:
    """What decides how a class of `torch.optim` updates: two functions that it may override."""
    step = cls.step
    # PyTorch wraps `step` in each class whose first instance is made; looks through that only.
    while getattr(step, "__code__", None) is _wrapper():
        step = step.__wrapped__
    return step, getattr(cls, "_init_group", None)


@cache
def _wrapper() -> CodeType:
    """The code of PyTorch's profiling wrapper around `step`."""
    wrap: Any = Optimizer.profile_hook_step
    code: CodeType = wrap(rule_of).__code__
    return code


def _unknown(cls: type[Any], base: type[Any] | None) -> CaptureError:
    known = ", ".join(sorted(c.__name__ for c in RULES))
    changed = f": it changes the update of {base.__name__}" if base else ""
    return CaptureError(
        "SS1201",
        f"the optimizer {cls.__module__}.{cls.__qualname__} has no update rule{changed}",
        hint=f"use one of {known}, or add a rule to RULES of shoestring.frontend.optimizers",
    )


__all__ = [
    "RULES",
    "Hyper",
    "InitialState",
    "Rule",
    "State",
    "lookup",
    "rule_of",
    "static_value",
]
