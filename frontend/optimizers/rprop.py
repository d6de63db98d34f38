"""Resilient backpropagation.

Source: Riedmiller and Braun, "A direct adaptive method for faster backpropagation learning: the
RPROP algorithm", 1993; the variant without backtracking (Igel and Husken, 2003, iRprop-).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .rule import Hyper, InitialState, Rule, State, advance, descent, initial_lr, scalar


@dataclass(frozen=True)
class RpropRule(Rule):
    """A step size an element: grows while the sign of its gradient stays, shrinks when it flips."""

    def init(self, p: torch.Tensor, group: Mapping[str, Any]) -> InitialState:
        return {
            "step": scalar(0.0, group),
            "prev": torch.zeros_like(p),
            "step_size": torch.full_like(p, initial_lr(group)),
        }

    def update(self, p: torch.Tensor, grad: torch.Tensor, state: State, h: Hyper) -> None:
        advance(state)
        shrink, grow = h["etas.0"].to(p.dtype), h["etas.1"].to(p.dtype)
        least, most = h["step_sizes.0"].to(p.dtype), h["step_sizes.1"].to(p.dtype)
        grad = descent(grad, h)
        agreement, size = grad * state["prev"], state["step_size"]
        factor = torch.where(agreement > 0, grow, torch.where(agreement < 0, shrink, 1.0))
        size.copy_(torch.minimum(torch.maximum(size * factor, least), most))
        kept = torch.where(agreement < 0, 0.0, grad)
        p.sub_(kept.sign() * size)
        state["prev"].copy_(kept)
