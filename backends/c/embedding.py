"""The gradient of an embedding table: rows of a gradient added up by their index, in C."""

from __future__ import annotations

import torch

from .claims import Claim, comment_of
from .expressions import REGISTER
from .layout import row_major
from .nodes import Node, Ref

NAME = "aten.embedding_dense_backward.default"
PARTS = 16  # of the table's rows, dealt out in turns: frequent rows are often neighbours
PARALLEL = 1 << 16  # elements below which one thread is faster


def claim(node: Node) -> Claim | str | None:
    """The kernel for the gradient of an embedding."""
    if node.op.name != NAME:
        return None
    grad, indices = node.refs
    if node.op.attr("scale_grad_by_freq"):
        return "scaled by frequency: PyTorch counts the indices"
    if grad.dtype not in (torch.float32, torch.float64) or grad.layout.numel == 0:
        return "sums of rows in 16 bits are rounded as PyTorch rounds them"
    if indices.dtype not in (torch.int64, torch.int32):
        return "indices of another type"
    if any(r.layout.strides != row_major(r.shape).strides for r in (grad, indices)):
        return "operands in another order"
    table = Ref(node.outs[0], row_major(node.outs[0].shape))
    comment = comment_of("rows added up by their index", node)
    body = _body(grad, indices, table, node.op.attr("padding_idx"))
    return Claim("embedding_backward", comment, body, (grad, indices, table), (2,))


def _body(grad: Ref, indices: Ref, table: Ref, padding: int) -> str:
    """Each part adds up rows of its own, in order: equal for every number of threads."""
    rows, width = table.shape
    kind, index, tokens = REGISTER[table.dtype], REGISTER[indices.dtype], indices.layout.numel
    fork = "#pragma omp parallel for schedule(static)\n" if rows * width > PARALLEL else ""
    return f"""\
    const {kind} *restrict grad = b[0];
    const {index} *restrict rows = b[1];
    {kind} *restrict table = b[2];
{fork}    for (int64_t r = 0; r < {rows}; r++)
        for (int64_t j = 0; j < {width}; j++) table[r * {width} + j] = 0;
{fork}    for (int64_t part = 0; part < {PARTS}; part++) {{
        for (int64_t t = 0; t < {tokens}; t++) {{
            const int64_t r = rows[t];
            if (r % {PARTS} != part || r < 0 || r >= {rows} || r == {padding}) continue;
            for (int64_t j = 0; j < {width}; j++) table[r * {width} + j] += grad[t * {width} + j];
        }}
    }}"""
