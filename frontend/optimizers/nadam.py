"""Adam with Nesterov's momentum.

Source: Dozat, "Incorporating Nesterov momentum into Adam", 2016, algorithm 2.
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

# The base of the momentum's warm-up, fixed in section 3.2 of the paper.
WARM_UP = 0.96


@dataclass(frozen=True)
class NAdamRule(Rule):
    """p -= lr ((1 - mu) g / (1 - prod mu) + mu' m / (1 - prod mu mu')) / (sqrt(v^) + eps)."""

    def init(self, p: torch.Tensor, group: Mapping[str, Any]) -> InitialState:
        return {
            "step": scalar(0.0, group),
            "mu_product": scalar(1.0, group),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }

    def update(self, p: torch.Tensor, grad: torch.Tensor, state: State, h: Hyper) -> None:
        step = advance(state)
        lr, beta1, beta2 = h["lr"], h["betas.0"], h["betas.1"]
        grad = decay_as(p, descent(grad, h), h, decoupled=bool(h.flag("decoupled_weight_decay")))
        mu, mu_next = self._momentum(step, h), self._momentum(step + 1, h)
        product = state["mu_product"]
        # Rounded to the state's type before the product, as eager does with a Python float.
        product.mul_(mu.to(product.dtype))
        m = average(state["exp_avg"], grad, 1 - beta1)
        v = average_square(state["exp_avg_sq"], grad, beta2)
        denominator = (v / (1 - beta2**step)).sqrt() + h["eps"]
        of_grad = lr * (1 - mu) / (1 - product.double())
        of_mean = lr * mu_next / (1 - product.double() * mu_next)
        p.sub_((grad * of_grad + m * of_mean) / denominator)

    def _momentum(self, step: torch.Tensor, h: Hyper) -> torch.Tensor:
        return h["betas.0"] * (1 - 0.5 * WARM_UP ** (step * h["momentum_decay"]))
