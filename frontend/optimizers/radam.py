"""Rectified Adam.

Source: Liu et al., "On the variance of the adaptive learning rate and beyond", 2020, algorithm 2.
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

# Below this length of the moving average the variance is unknown; 4 in the paper, 5 in PyTorch.
TRACTABLE = 5.0


@dataclass(frozen=True)
class RAdamRule(Rule):
    """Adam, its step scaled by how well v is known; plain momentum while it is not."""

    def init(self, p: torch.Tensor, group: Mapping[str, Any]) -> InitialState:
        return {
            "step": scalar(0.0, group),
            "exp_avg": torch.zeros_like(p),
            "exp_avg_sq": torch.zeros_like(p),
        }

    def update(self, p: torch.Tensor, grad: torch.Tensor, state: State, h: Hyper) -> None:
        step = advance(state)
        beta1, beta2 = h["betas.0"], h["betas.1"]
        grad = decay_as(p, descent(grad, h), h, decoupled=bool(h.flag("decoupled_weight_decay")))
        m = average(state["exp_avg"], grad, 1 - beta1)
        v = average_square(state["exp_avg_sq"], grad, beta2)
        known, rectified = self._rectify(step, beta2)
        scale = h["lr"] / (1 - beta1**step) * rectified
        p.sub_(m * scale / torch.where(known, v.sqrt() + h["eps"], 1.0))

    def _rectify(
        self, step: torch.Tensor, beta2: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether the variance is tractable, and by what the step is multiplied."""
        correction = 1 - beta2**step
        longest = 2 / (1 - beta2) - 1
        rho = longest - 2 * step * beta2**step / correction
        known = rho > TRACTABLE
        # The root of a negative number is discarded by `where`, but need not be computed.
        safe = torch.where(known, rho, longest)
        ratio = (safe - 4) * (safe - 2) * longest / ((longest - 4) * (longest - 2) * safe)
        return known, torch.where(known, (ratio * correction).sqrt(), 1.0)
