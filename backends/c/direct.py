"""Library ops written straight into memory of ours, where PyTorch's out variant would not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from shoestring.ir import Op

Direct = Callable[[Op, list[Any], list[torch.Tensor]], None]


def _embedding(op: Op, operands: list[Any], outs: list[torch.Tensor]) -> None:
    table, indices = operands
    rows = indices.reshape(-1)
    torch.index_select(table, 0, rows, out=outs[0].view(rows.numel(), table.shape[1]))


def _embedding_backward(op: Op, operands: list[Any], outs: list[torch.Tensor]) -> None:
    """Adds rows into zeros. PyTorch's own makes a whole new table each time."""
    grad, indices = operands
    rows = indices.reshape(-1)
    grad = grad.reshape(rows.numel(), grad.shape[-1])
    padding = op.attr("padding_idx")
    if padding >= 0:
        grad = grad * (rows != padding).unsqueeze(1).to(grad.dtype)
    if op.attr("scale_grad_by_freq"):
        counts = torch.bincount(rows, minlength=op.attr("num_weights"))
        grad = grad / counts[rows].unsqueeze(1).to(grad.dtype)
    outs[0].zero_()
    outs[0].index_add_(0, rows, grad)


def _slice_scatter(op: Op, operands: list[Any], outs: list[torch.Tensor]) -> None:
    base, source = operands
    dim, step = op.attr("dim"), op.attr("step")
    outs[0].copy_(base)
    torch.ops.aten.slice.Tensor(outs[0], dim, op.attr("start"), op.attr("end"), step).copy_(source)


def _select_scatter(op: Op, operands: list[Any], outs: list[torch.Tensor]) -> None:
    outs[0].copy_(operands[0])
    outs[0].select(op.attr("dim"), op.attr("index")).copy_(operands[1])


def _as_strided_scatter(op: Op, operands: list[Any], outs: list[torch.Tensor]) -> None:
    """Counts in the row-major order of the result; PyTorch's own counts in that of the operand."""
    outs[0].copy_(operands[0])
    offset = outs[0].storage_offset() + (op.attr("storage_offset") or 0)
    torch.as_strided(outs[0], op.attr("size"), op.attr("stride"), offset).copy_(operands[1])


def _index_put(op: Op, operands: list[Any], outs: list[torch.Tensor]) -> None:
    """Sums of whole rows by one list of positions are an `index_add`, many times as fast."""
    base, indices, values = operands
    outs[0].copy_(base)
    accumulate = op.attr("accumulate")
    if accumulate and _adds_rows(outs[0], indices, values):
        try:
            outs[0].index_add_(0, indices[0], values)
            return
        except RuntimeError:  # a position from the end, which is none for `index_add`, or outside
            outs[0].copy_(base)
    torch.ops.aten.index_put_.default(outs[0], indices, values, accumulate)


def _adds_rows(out: torch.Tensor, indices: list[torch.Tensor | None], values: torch.Tensor) -> bool:
    rows = indices[0]
    if len(indices) != 1 or rows is None or rows.dim() != 1 or rows.dtype is torch.bool:
        return False
    exact = out.dtype in (torch.float32, torch.float64)  # halves are rounded after each addition
    return exact and out.dim() > 1 and values.shape == (rows.numel(), *out.shape[1:])


def _contiguous_copy(op: Op, operands: list[Any], outs: list[torch.Tensor]) -> None:
    outs[0].copy_(operands[0])


DIRECT: dict[str, Direct] = {
    "aten.embedding.default": _embedding,
    "aten.embedding_dense_backward.default": _embedding_backward,
    "aten.slice_scatter.default": _slice_scatter,
    "aten.select_scatter.default": _select_scatter,
    "aten.as_strided_scatter.default": _as_strided_scatter,
    "aten.index_put.default": _index_put,
    "aten.clone.default": _contiguous_copy,
    "aten._to_copy.default": _contiguous_copy,
}
