"""Adam and AdamW.

Source: Kingma and Ba, "Adam: a method for stochastic optimization", 2015, algorithm 1; Loshchilov
and Hutter, "Decoupled weight decay regularization", 2019; Reddi, Kale and Kumar, "On the
convergence of Adam and beyond", 2018 (amsgrad).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .rule import (
    Hyper,
    InitialState,
    Rule,
    State,
    advance,
    average,
    average_square,
    decay_as,
    descent,
    scalar,
)


@dataclass(frozen=True)
class AdamRule(Rule):
    """m, v: running means of the gradient and of its square; p -= lr m^ / (sqrt(v^) + eps)."""

    decoupled: bool = False

    def init(self, p: torch.Tensor, group: Mapping[str, Any]) -> InitialState:
        state: InitialState = {
            "step": scalar(0.0, group),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }
        if group["amsgrad"]:
            state["max_exp_avg_sq"] = torch.zeros_like(p)
        return state

    def update(self, p: torch.Tensor, grad: torch.Tensor, state: State, h: Hyper) -> None:
        step = advance(state)
        lr, beta1, beta2 = h["lr"], h["betas.0"], h["betas.1"]
        decoupled = self.decoupled or bool(h.flag("decoupled_weight_decay"))
        grad = decay_as(p, descent(grad, h), h, decoupled=decoupled)
        m = average(state["exp_avg"], grad, 1 - beta1)
        v = average_square(state["exp_avg_sq"], grad, beta2)
        if h.flag("amsgrad"):
            v = state["max_exp_avg_sq"].copy_(torch.maximum(state["max_exp_avg_sq"], v))
        denominator = v.sqrt() / (1 - beta2**step).sqrt() + h["eps"]
        p.sub_(m / denominator * (lr / (1 - beta1**step)))
