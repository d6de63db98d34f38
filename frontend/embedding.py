"""`nn.Embedding(sparse=True, padding_idx=...)` under the tracer.

PyTorch drops the padding's positions from the gradient with a boolean index, whose size depends on
data. Here they stay, with a gradient of zero, and are left out of the mask of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from shoestring.ir import Tracer
from shoestring.ir.tracing.sparse import row_gradient


class PaddedEmbeddings(TorchFunctionMode):
    """Replaces sparse embeddings that have a padding index while a model is traced."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.embedding:
            given = dict(zip(_NAMES, args, strict=False)) | kwargs
            padding, weight = given.get("padding_idx"), given["weight"]
            if given.get("sparse") and padding is not None and given.get("max_norm") is None:
                row = int(padding) % int(weight.shape[0])
                embed: Any = _PaddedEmbedding
                return embed.apply(weight, given["input"], row, self.tracer)
        return func(*args, **kwargs)


_NAMES = (
    "input",
    "weight",
    "padding_idx",
    "max_norm",
    "norm_type",
    "scale_grad_by_freq",
    "sparse",
)


def has_padded_embeddings(model: torch.nn.Module) -> bool:
    """Whether a module of the model needs `PaddedEmbeddings`."""
    return any(
        isinstance(m, torch.nn.Embedding) and m.sparse and m.padding_idx is not None
        for m in model.modules()
    )


class _PaddedEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Any, indices: Any, padding: int, tracer: Tracer) -> Any:
        ctx.save_for_backward(indices)
        ctx.size, ctx.padding, ctx.tracer = tuple(weight.shape), padding, tracer
        return torch.embedding(weight, indices)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (indices,) = ctx.saved_tensors
        rows = indices.reshape(-1)
        values = grads[0].reshape(rows.shape[0], *ctx.size[1:])
        return row_gradient(ctx.tracer, ctx.size, rows, values, rows != ctx.padding), *_NO_GRADS


_NO_GRADS = (None, None, None)
