"""The loss of rows of log-probabilities by their classes, and its gradient, in C.

A class that there is not is an error of PyTorch's, which C cannot raise: the kernel declines there.
"""

from __future__ import annotations

import torch

from .claims import Claim, comment_of, fork
from .expressions import MEMORY
from .layout import row_major
from .nodes import Node, Ref

FORWARD = "aten.nll_loss_forward.default"
BACKWARD = "aten.nll_loss_backward.default"
TYPES = (torch.float32, torch.float64)
MOST_ROWS = 1 << 16  # that one thread adds up
PARALLEL = 1 << 16  # elements of a gradient below which one thread is faster
NONE, MEAN = 0, 1  # of `reduction`


def claim(node: Node) -> Claim | str | None:
    """The kernel for `nll_loss` or its gradient."""
    if node.op.name not in (FORWARD, BACKWARD):
        return None
    x, target, weight = node.operands[-3:] if node.op.name == FORWARD else node.operands[1:4]
    assert isinstance(x, Ref) and isinstance(target, Ref), "neither is optional"
    if x.dtype not in TYPES or any(r.dtype is not x.dtype for r in node.refs if r is not target):
        return "elements of another type"
    if target.dtype is not torch.int64 or len(x.shape) != 2 or not x.layout.numel:
        return "no rows with a class each"
    if x.shape[0] > MOST_ROWS:
        return "many rows: PyTorch adds them up in parallel"
    weights = weight if isinstance(weight, Ref) else None
    if node.op.name == FORWARD:
        return _forward(node, x, target, weights)
    return _backward(node, x, target, weights)


def _forward(node: Node, x: Ref, target: Ref, weight: Ref | None) -> Claim:
    kind, how = MEMORY[x.dtype], node.op.attr("reduction")
    row, col = x.layout.strides
    loss, passed = f"-w * x[t * {row} + c * {col}]", ""
    if how == NONE:
        loss, passed = f"loss[t] = {loss};", "loss[t] = 0; "
        end = "*weights = 0;"
    else:
        loss = f"sum += (double){loss};\n        total += w;"
        mean = " / total" if how == MEAN else ""
        end = f"*loss = sum{mean};\n    *weights = total;"
    body = f"""\
    const {kind} *restrict x = b[0];
    const int64_t *restrict target = b[1];
    {kind} *restrict loss = b[2], *restrict weights = b[3];
{_weights(weight, 4)}    double sum = 0, total = 0;
    for (int64_t t = 0; t < {x.shape[0]}; t++) {{
        const int64_t c = target[t * {target.layout.strides[0]}];
        if (c == {node.op.attr("ignore_index")}) {{ {passed}continue; }}
        if (c < 0 || c >= {x.shape[1]}) {{
            ss_declined = 1;
            return;
        }}
        const {kind} w = {_weight(weight)};
        {loss}
    }}
    {end}"""
    results = tuple(Ref(out, row_major(out.shape)) for out in node.outs)
    pointers = (x, target, *results, *([weight] if weight else []))
    comment = comment_of("the loss of rows by their classes", node)
    return Claim("nll_loss", comment, body, pointers, (2, 3), declines=True)


def _backward(node: Node, x: Ref, target: Ref, weight: Ref | None) -> Claim:
    """A class that there is not has no gradient: the forward pass has found it."""
    kind, how, (rows, classes) = MEMORY[x.dtype], node.op.attr("reduction"), x.shape
    grad, total = node.refs[0], node.refs[-1]
    given = f"grad[t * {grad.layout.strides[0]}]" if how == NONE else "*grad"
    given += " / *total" if how == MEAN else ""
    body = f"""\
    const {kind} *restrict grad = b[0], *restrict total = b[1];
    const int64_t *restrict target = b[2];
    {kind} *restrict out = b[3];
{_weights(weight, 4)}{fork(rows * classes, PARALLEL)}\
    for (int64_t t = 0; t < {rows}; t++) {{
        {kind} *restrict row = out + t * {classes};
        for (int64_t j = 0; j < {classes}; j++) row[j] = 0;
        const int64_t c = target[t * {target.layout.strides[0]}];
        if (c == {node.op.attr("ignore_index")} || c < 0 || c >= {classes}) continue;
        row[c] = -{_weight(weight)} * ({given});
    }}"""
    out = Ref(node.outs[0], row_major(node.outs[0].shape))
    pointers = (grad, total, target, out, *([weight] if weight else []))
    comment = comment_of("the gradient of the loss of rows by their classes", node)
    return Claim("nll_loss_backward", comment, body, pointers, (3,))


def _weights(weight: Ref | None, at: int) -> str:
    """Declares the weights of classes, if there are any."""
    if weight is None:
        return ""
    return f"    const {MEMORY[weight.dtype]} *restrict of_class = b[{at}];\n"


def _weight(weight: Ref | None) -> str:
    return "1" if weight is None else f"of_class[c * {weight.layout.strides[0]}]"
