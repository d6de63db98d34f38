"""Stochastic gradient descent, with momentum, dampening and Nesterov's form.

Source: Sutskever, Martens, Dahl and Hinton, "On the importance of initialization and momentum in
deep learning", 2013, in the variant that PyTorch documents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .rule import Hyper, InitialState, Rule, State, decay, descent


@dataclass(frozen=True)
class SGDRule(Rule):
    """b = momentum b + (1 - dampening) g; p -= lr b."""

    def init(self, p: torch.Tensor, group: Mapping[str, Any]) -> InitialState:
        return {"momentum_buffer": torch.zeros_like(p)} if group["momentum"] != 0 else {}

    def refuses_sparse(self, group: Mapping[str, Any]) -> str:
        if group["momentum"] != 0:
            return "with momentum it would keep sparse state"
        return "weight_decay needs dense gradients" if group["weight_decay"] != 0 else ""

    def update(self, p: torch.Tensor, grad: torch.Tensor, state: State, h: Hyper) -> None:
        grad = decay(p, descent(grad, h), h)
        if h.nonzero("momentum"):
            momentum, buffer = h["momentum"], state["momentum_buffer"]
            buffer.mul_(momentum).add_(self._share(grad, h))
            grad = grad + buffer * momentum if h.flag("nesterov") else buffer
        p.sub_(grad * h["lr"])

    def _share(self, grad: torch.Tensor, h: Hyper) -> torch.Tensor:
        """What of the gradient enters the buffer: the first one is not dampened."""
        if not h.nonzero("dampening"):
            return grad
        return grad * (1 - h["dampening"] * (1 - h.first("momentum_buffer")))
