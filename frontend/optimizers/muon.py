"""Muon: momentum, orthogonalized.

Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024; Liu et al.,
"Muon is scalable for LLM training", 2025, section 2.2 (`match_rms_adamw`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .rule import Hyper, InitialState, Rule, State


@dataclass(frozen=True)
class MuonRule(Rule):
    """p = (1 - lr weight_decay) p - lr' orthogonal(g), g with Nesterov's momentum."""

    def init(self, p: torch.Tensor, group: Mapping[str, Any]) -> InitialState:
        return {"momentum_buffer": torch.zeros_like(p)}

    def update(self, p: torch.Tensor, grad: torch.Tensor, state: State, h: Hyper) -> None:
        buffer, lr = state["momentum_buffer"], h["lr"]
        # `lerp` and not sums: what follows is in bf16 and magnifies a difference of one rounding.
        buffer.lerp_(grad, (1 - h["momentum"]).to(p.dtype))
        update = buffer
        if h.flag("nesterov"):
            update = grad.lerp(buffer, h["momentum"].to(p.dtype))
        update = orthogonal(update, h.flag("ns_coefficients"), h.flag("ns_steps"), h.flag("eps"))
        p.mul_(1 - lr * h["weight_decay"])
        p.sub_(update.to(p.dtype) * (lr * shape_factor(h.flag("adjust_lr_fn"), p)))


def orthogonal(
    matrix: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """Roughly U V^T of the singular value decomposition, in bf16, by Newton-Schulz iteration.

    Each round is X <- a X + (b G + c G G) X with G = X X^T; the coefficients are fixed in the
    program, since bf16 leaves no room for rounding them otherwise than PyTorch does.
    """
    a, b, c = coefficients
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.bfloat16().T if tall else matrix.bfloat16()
    norm: torch.Tensor = torch.ops.aten.linalg_vector_norm(x)
    x = x / norm.clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def shape_factor(method: str | None, p: torch.Tensor) -> float:
    """By what the learning rate is multiplied for a matrix of this shape."""
    rows, columns = p.shape
    if method == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))
