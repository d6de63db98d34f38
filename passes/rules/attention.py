"""Attention as matrix products and a softmax; gradients from the saved log-sum-exp.

B: batch, H: heads, T: queries, S: keys, D: size of a head.
Source: Dao, "FlashAttention-2", algorithms 1 and 2, without the tiling.
"""

# mypy: disable-error-code="no-any-return"
# torch.ops is untyped: every call through it gives Any.

from __future__ import annotations

import math

import torch
from torch import Tensor

aten = torch.ops.aten
NO_SCORE = -math.inf


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float32) if x.dtype in (torch.bfloat16, torch.float16) else x


def _product(x: Tensor, y: Tensor) -> Tensor:
    """x [B,H,M,K] by y [B,H,K,N]."""
    b, h, m, k = x.shape
    n = y.shape[-1]
    flat = aten.bmm(x.reshape(b * h, m, k), y.reshape(b * h, k, n))
    return flat.reshape(b, h, m, n)


def _scores(q: Tensor, k: Tensor, causal: bool, mask: Tensor | None, scale: float | None) -> Tensor:
    """[B,H,T,S]; what a query may not see is -inf."""
    factor = scale if scale is not None else 1.0 / math.sqrt(q.shape[-1])
    scores = _product(q * factor, k.transpose(-1, -2))
    if mask is not None:
        scores = scores + mask
    if causal:
        t, s = scores.shape[-2:]
        seen = torch.arange(t).unsqueeze(-1) >= torch.arange(s)
        scores = torch.where(seen, scores, torch.full((), NO_SCORE, dtype=scores.dtype))
    return scores


def _finite(x: Tensor) -> Tensor:
    """0 in the place of -inf: a query that sees nothing has no largest score."""
    return torch.where(x == NO_SCORE, torch.zeros((), dtype=x.dtype), x)


def _refuse_dropout(dropout: float) -> None:
    if dropout:
        raise NotImplementedError("attention with dropout inside the op")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """([B,H,T,D], log-sum-exp [B,H,T])."""
    _refuse_dropout(dropout)
    scores = _scores(_wide(q), _wide(k), causal, attn_mask, scale)
    largest = aten.amax(scores, [-1], True)
    weights = torch.exp(scores - _finite(largest))
    total = aten.sum(weights, [-1], True)
    safe = torch.where(total == 0, torch.ones((), dtype=total.dtype), total)
    out = _product(weights / safe, _wide(v)).to(q.dtype)
    return out, (largest + torch.log(total)).squeeze(-1)


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout: float,
    causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    _refuse_dropout(dropout)
    wide_q, wide_k, wide_grad = _wide(q), _wide(k), _wide(grad)
    factor = scale if scale is not None else 1.0 / math.sqrt(q.shape[-1])
    scores = _scores(wide_q, wide_k, causal, attn_mask, scale)
    weights = torch.exp(scores - _finite(logsumexp).unsqueeze(-1))
    grad_v = _product(weights.transpose(-1, -2), wide_grad)
    grad_weights = _product(wide_grad, _wide(v).transpose(-1, -2))
    row = aten.sum(wide_grad * _wide(out), [-1], True)
    grad_scores = weights * (grad_weights - row) * factor
    grad_q = _product(grad_scores, wide_k)
    grad_k = _product(grad_scores.transpose(-1, -2), wide_q)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)
