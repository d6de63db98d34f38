"""Adam with the infinity norm.

Source: Kingma and Ba, "Adam: a method for stochastic optimization", 2015, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .rule import Hyper, InitialState, Rule, State, advance, average, decay, descent, scalar


@dataclass(frozen=True)
class AdamaxRule(Rule):
    """u = max(beta2 u, |g| + eps); p -= lr / (1 - beta1^t) m / u."""

    def init(self, p: torch.Tensor, group: Mapping[str, Any]) -> InitialState:
        return {
            "step": scalar(0.0, group),
            "exp_avg": torch.zeros_like(p),
            "exp_inf": torch.zeros_like(p),
        }

    def update(self, p: torch.Tensor, grad: torch.Tensor, state: State, h: Hyper) -> None:
        step = advance(state)
        beta1, beta2 = h["betas.0"], h["betas.1"]
        grad = decay(p, descent(grad, h), h)
        m, norm = average(state["exp_avg"], grad, 1 - beta1), state["exp_inf"]
        norm.copy_(torch.maximum(norm * beta2, grad.abs() + h["eps"]))
        p.sub_(m / norm * (h["lr"] / (1 - beta1**step)))
