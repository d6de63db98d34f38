"""Adadelta.

Source: Zeiler, "ADADELTA: an adaptive learning rate method", 2012, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .rule import Hyper, InitialState, Rule, State, advance, average_square, decay, descent, scalar


@dataclass(frozen=True)
class AdadeltaRule(Rule):
    """d = sqrt(E[d^2] + eps) / sqrt(E[g^2] + eps) g; p -= lr d."""

    def init(self, p: torch.Tensor, group: Mapping[str, Any]) -> InitialState:
        return {
            "step": scalar(0.0, group),
            "square_avg": torch.zeros_like(p),
            "acc_delta": torch.zeros_like(p),
        }

    def update(self, p: torch.Tensor, grad: torch.Tensor, state: State, h: Hyper) -> None:
        advance(state)
        rho, eps = h["rho"], h["eps"]
        grad = decay(p, descent(grad, h), h)
        squares = average_square(state["square_avg"], grad, rho)
        delta = (state["acc_delta"] + eps).sqrt() / (squares + eps).sqrt() * grad
        average_square(state["acc_delta"], delta, rho)
        p.sub_(delta * h["lr"])
