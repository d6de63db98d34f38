"""Attention beyond PyTorch's kernel: weights are dropped, values have another size than keys, masks
choose scores or hide all of a query's.

B: batch, H: heads of queries, T: queries, S: keys, D: size of a head; heads of keys and values
divide H. A mask of floats is added to scores; one of bools leaves those where it is true and
replaces others by `fill`, which have no gradient then. A query all of whose scores are -inf gets 0
where it is `safe`, else NaN (a causal kernel leaves later keys out of that). With a key of random
numbers, weight i, of [B,H,T,S] in row-major order, is kept where element i of `rng.uniform`, of
that key and site, is less than `keep`, and divided by `keep`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..function import Op
from ..opdef import Kind, OpDef
from ..types import TensorType
from .aten import replicate
from .contractions import attention_cost
from .random import uniform

FORWARD_OPERANDS = ("query", "key", "value", "attn_mask", "rng")
BACKWARD_OPERANDS = (
    "grad_out", "query", "key", "value", "out", "statistics", "attn_mask", "rng",
)  # fmt: skip
DEFAULTS = {
    "keep": 1.0, "site": 0, "is_causal": False, "scale": None, "fill": -math.inf, "safe": True,
}  # fmt: skip


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """f32 for 16 bits, which are computed in it."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def wide(x: Tensor) -> Tensor:
    """A tensor in the type in which it is computed."""
    return x.to(wide_type(x.dtype))


def _shared(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values, each head as often as heads of queries share it."""
    return wide(x).repeat_interleave(q.shape[1] // x.shape[1], 1)


def _added(gradient: Tensor, x: Tensor) -> Tensor:
    """Gradients of heads that were shared, added up."""
    batch, heads, length, size = x.shape
    return gradient.reshape(batch, heads, -1, length, size).sum(2).to(x.dtype)


def _scores(
    q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float, fill: float
) -> Tensor:
    scores = wide(q) @ _shared(k, q).transpose(-1, -2) * scale
    if mask is not None and mask.dtype is torch.bool:
        scores = scores.masked_fill(~mask, fill)
    elif mask is not None:
        scores = scores + mask
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    return scores


def _statistics(scores: Tensor, safe: bool) -> Tensor:
    """[B,H,T,2]: the largest score, and the logarithm of the sum of exp(score - largest)."""
    lowest = scores.new_full((*scores.shape[:-1], 1), -math.inf)  # there may be no keys
    largest = torch.cat([scores, lowest], -1).amax(-1, keepdim=True)
    blind = largest == -math.inf
    largest = largest.masked_fill(blind, 0)
    rest = (scores - largest).exp().sum(-1, keepdim=True).log()
    return torch.cat([largest, rest.masked_fill(blind, 0 if safe else math.nan)], -1)


def _weights(scores: Tensor, statistics: Tensor) -> Tensor:
    largest, rest = statistics.split(1, -1)
    weights: Tensor = (scores - largest - rest).exp()
    return weights


def _factors(scores: Tensor, rng: Tensor | None, keep: float, site: int) -> Tensor:
    """What weights are multiplied by: 0, or 1 / keep; 1 where none is dropped."""
    if rng is None:
        return torch.ones((), dtype=scores.dtype)
    shape = tuple(scores.shape)
    drawn = uniform(rng, site=site, shape=shape, dtype=torch.float32)
    return (drawn < keep).to(scores.dtype) / keep


def _forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rng: Tensor | None, *,
    keep: float = 1.0, site: int = 0, is_causal: bool = False, scale: float | None = None,
    fill: float = -math.inf, safe: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    scores = _scores(q, k, mask, is_causal, _scale(q, scale), fill)
    statistics = _statistics(scores, safe)
    weights = _weights(scores, statistics) * _factors(scores, rng, keep, site)
    return (weights @ _shared(v, q)).to(q.dtype), statistics


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor,
    mask: Tensor | None, rng: Tensor | None, *,
    keep: float = 1.0, site: int = 0, is_causal: bool = False, scale: float | None = None,
    fill: float = -math.inf, safe: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    factor, full = _scale(q, scale), wide(grad)
    scores = _scores(q, k, mask, is_causal, factor, fill)
    weights = _weights(scores, statistics)
    kept = _factors(scores, rng, keep, site)
    row = (full * wide(out)).sum(-1, keepdim=True)
    of_weights = full @ _shared(v, q).transpose(-1, -2) * kept
    inner = weights * (of_weights - row) * factor
    if mask is not None and mask.dtype is torch.bool:
        inner = inner.masked_fill(~mask, 0)
    grad_q = inner @ _shared(k, q)
    grad_k = inner.transpose(-1, -2) @ wide(q)
    grad_v = (weights * kept).transpose(-1, -2) @ full
    return grad_q.to(q.dtype), _added(grad_k, k), _added(grad_v, v)


def _scale(q: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(max(q.shape[-1], 1)) if scale is None else scale


def _infer_forward(op: Op) -> tuple[TensorType, ...]:
    q, v = op.inputs[0].type, op.inputs[2].type
    sums = TensorType(wide_type(q.dtype), (*q.shape[:-1], 2))
    return TensorType(q.dtype, (*q.shape[:-1], v.shape[-1])), sums


def _infer_backward(op: Op) -> tuple[TensorType, ...]:
    return tuple(v.type for v in op.inputs[1:4])


FORWARD = OpDef(
    "attention.softmax.default", Kind.CONTRACTION, _forward, FORWARD_OPERANDS, DEFAULTS,
    _infer_forward, attention_cost(1, 1), replicate,
    doc="dropout(softmax(scale q k^T + mask)) v; of each row the largest score and the log-sum-exp "
    "less that.",
)  # fmt: skip
BACKWARD = OpDef(
    "attention.softmax_backward.default", Kind.CONTRACTION, _backward, BACKWARD_OPERANDS, DEFAULTS,
    _infer_backward, attention_cost(3, 2), replicate,
    doc="Gradients of it for queries, keys and values.",
)  # fmt: skip

OPS = (FORWARD, BACKWARD)
