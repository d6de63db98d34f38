"""Averaged stochastic gradient descent.

Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992; the
schedules of eta and mu are Bottou's, "Stochastic gradient descent tricks", 2012, section 5.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .rule import Hyper, InitialState, Rule, State, advance, decay, descent, initial_lr, scalar


@dataclass(frozen=True)
class ASGDRule(Rule):
    """p = (1 - lambd eta) p - eta g; ax += mu (p - ax); then eta and mu for the next step."""

    def init(self, p: torch.Tensor, group: Mapping[str, Any]) -> InitialState:
        return {
            "step": scalar(0.0, group),
            "eta": scalar(initial_lr(group), group),
            "mu": scalar(1.0, group),
            "ax": torch.zeros_like(p),
        }

    def update(self, p: torch.Tensor, grad: torch.Tensor, state: State, h: Hyper) -> None:
        step = advance(state)
        lr, lambd = h["lr"], h["lambd"]
        eta, mu, ax = state["eta"], state["mu"], state["ax"]
        grad = decay(p, descent(grad, h), h)
        p.mul_(1 - lambd * eta.double()).sub_(grad * eta.double())
        # A weight of one replaces the average, whatever it was, infinities included.
        ax.copy_(torch.where(mu == 1, p, ax + (p - ax) * mu))
        # PyTorch passes both through a tensor of the default type, whatever that of the state.
        through = torch.get_default_dtype()
        eta.copy_((lr / (1 + lambd * lr * step) ** h["alpha"]).to(through))
        mu.copy_((1 / torch.clamp(step - h["t0"], min=1.0)).to(through))
