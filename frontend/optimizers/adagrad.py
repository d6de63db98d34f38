"""Adagrad.

Source: Duchi, Hazan and Singer, "Adaptive subgradient methods for online learning and stochastic
optimization", 2011, section 1.1 (the diagonal form).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .rule import Hyper, InitialState, Rule, State, advance, decay, descent, scalar
from .sparse_adam import rows_of


@dataclass(frozen=True)
class AdagradRule(Rule):
    """s += g^2; p -= lr / (1 + (t - 1) lr_decay) g / (sqrt(s) + eps)."""

    def init(self, p: torch.Tensor, group: Mapping[str, Any]) -> InitialState:
        start = float(group["initial_accumulator_value"])
        return {"step": scalar(0.0, group), "sum": torch.full_like(p, start)}

    def refuses_sparse(self, group: Mapping[str, Any]) -> str:
        return "weight_decay needs dense gradients" if group["weight_decay"] != 0 else ""

    def update(self, p: torch.Tensor, grad: torch.Tensor, state: State, h: Hyper) -> None:
        step = advance(state)
        grad = decay(p, descent(grad, h), h)
        total = state["sum"].add_(grad * grad)
        lr = h["lr"] / (1 + (step - 1) * h["lr_decay"])
        change = grad / (total.sqrt() + h["eps"]) * lr
        # An untouched row has no gradient; without eps and history its quotient would be 0 / 0.
        p.sub_(change if h.touched is None else torch.where(rows_of(h.touched, p), change, 0.0))
