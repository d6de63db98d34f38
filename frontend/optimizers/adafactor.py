"""Adafactor.

Source: Shazeer and Stern, "Adafactor: adaptive learning rates with sublinear memory cost", 2018,
algorithms 4 and 5, with the learning rate as PyTorch takes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .rule import Hyper, InitialState, Rule, State, advance, average, descent, scalar


@dataclass(frozen=True)
class AdafactorRule(Rule):
    """Of a matrix, the second moment is kept as its row and column means: v ~ r c / mean(r)."""

    def init(self, p: torch.Tensor, group: Mapping[str, Any]) -> InitialState:
        if p.dim() < 2:
            return {"step": scalar(0.0, group), "variance": torch.zeros_like(p)}
        *batch, rows, columns = p.shape
        return {
            "step": scalar(0.0, group),
            "row_var": p.new_zeros([*batch, rows, 1]),
            "col_var": p.new_zeros([*batch, 1, columns]),
        }

    def update(self, p: torch.Tensor, grad: torch.Tensor, state: State, h: Hyper) -> None:
        step = advance(state)
        grad = descent(grad, h)
        lr, weight = h["lr"], step ** h["beta2_decay"]
        rate = torch.minimum(lr, 1 / step.sqrt()) * torch.maximum(h["eps.1"], rms(p))
        if h.nonzero("weight_decay"):
            p.mul_(1 - lr * h["weight_decay"])
        eps = self._smallest(p, h)
        v = self._second_moment(grad, state, weight, eps)
        change = grad * torch.maximum(v, eps * eps).rsqrt()
        p.sub_(change * (rate / torch.clamp(rms(change) / h["d"], min=1.0)))

    def _smallest(self, p: torch.Tensor, h: Hyper) -> torch.Tensor:
        """The first epsilon, in the parameter's type; by default what that type resolves."""
        if h.absent("eps.0"):
            return torch.full((), torch.finfo(p.dtype).eps, dtype=p.dtype)
        return h["eps.0"].to(p.dtype)

    def _second_moment(
        self, grad: torch.Tensor, state: State, weight: torch.Tensor, eps: torch.Tensor
    ) -> torch.Tensor:
        squares = grad * grad
        if grad.dim() < 2:
            return average(state["variance"], squares, weight)
        rows = average(state["row_var"], squares.mean(-1, keepdim=True), weight)
        columns = average(state["col_var"], squares.mean(-2, keepdim=True), weight)
        return rows * columns / torch.maximum(rows.mean(-2, keepdim=True), eps)


def rms(x: torch.Tensor) -> torch.Tensor:
    """The root mean square as f64[]."""
    count = torch.full((), float(x.numel()), dtype=torch.float64)
    norm: torch.Tensor = torch.linalg.vector_norm(x)
    return norm.double() / count.sqrt()
