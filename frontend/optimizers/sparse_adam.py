"""Adam that updates only the rows that a sparse gradient has.

Source: Kingma and Ba, "Adam: a method for stochastic optimization", 2015, algorithm 1, applied
lazily: the moments of a row that is not in the batch stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from .rule import Hyper, InitialState, Rule, State, average, average_square, descent


def rows_of(touched: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """A mask of rows, bool[rows], in a shape that broadcasts over the parameter."""
    return touched.reshape(-1, *(1 for _ in p.shape[1:]))


@dataclass(frozen=True)
class SparseAdamRule(Rule):
    """p -= lr sqrt(1 - beta2^t) / (1 - beta1^t) m / (sqrt(v) + eps) in the touched rows."""

    needs_sparse: ClassVar[bool] = True

    def init(self, p: torch.Tensor, group: Mapping[str, Any]) -> InitialState:
        # PyTorch counts in a Python int here, unlike in all other optimizers.
        return {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    def refuses_sparse(self, group: Mapping[str, Any]) -> str:
        return ""

    def update(self, p: torch.Tensor, grad: torch.Tensor, state: State, h: Hyper) -> None:
        assert h.touched is not None
        step = state["step"] + 1
        beta1, beta2 = h["betas.0"], h["betas.1"]
        grad, rows = descent(grad, h), rows_of(h.touched, p)
        old_m, old_v = state["exp_avg"].clone(), state["exp_avg_sq"].clone()
        m = average(state["exp_avg"], grad, 1 - beta1)
        v = average_square(state["exp_avg_sq"], grad, beta2)
        scale = h["lr"] * (1 - beta2**step).sqrt() / (1 - beta1**step)
        p.copy_(torch.where(rows, p - m / (v.sqrt() + h["eps"]) * scale, p))
        m.copy_(torch.where(rows, m, old_m))
        v.copy_(torch.where(rows, v, old_v))
