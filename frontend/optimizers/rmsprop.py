"""RMSprop, plain or centered, with momentum.

Source: Hinton, "Neural networks for machine learning", lecture 6e, 2012; Graves, "Generating
sequences with recurrent neural networks", 2013, equations 38 to 41 (centered).
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
    decay,
    descent,
    scalar,
)


@dataclass(frozen=True)
class RMSpropRule(Rule):
    """p -= lr g / (sqrt(E[g^2]) + eps); centered: of the variance instead of the mean square."""

    def init(self, p: torch.Tensor, group: Mapping[str, Any]) -> InitialState:
        state: InitialState = {"step": scalar(0.0, group), "square_avg": torch.zeros_like(p)}
        if group["momentum"] > 0:
            state["momentum_buffer"] = torch.zeros_like(p)
        if group["centered"]:
            state["grad_avg"] = torch.zeros_like(p)
        return state

    def update(self, p: torch.Tensor, grad: torch.Tensor, state: State, h: Hyper) -> None:
        advance(state)
        grad = decay(p, descent(grad, h), h)
        scale = average_square(state["square_avg"], grad, h["alpha"])
        if h.flag("centered"):
            mean = average(state["grad_avg"], grad, 1 - h["alpha"])
            scale = scale - mean * mean
        change = grad / (scale.sqrt() + h["eps"])
        if h.positive("momentum"):
            change = state["momentum_buffer"].mul_(h["momentum"]).add_(change)
        p.sub_(change * h["lr"])
