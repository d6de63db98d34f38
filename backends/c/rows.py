"""Rows of a table by their positions, in C: gathered, put, and added up.

A position outside of the table is an error of PyTorch's, which C cannot raise: the kernel looks at
all positions first, and declines where it finds one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .claims import Claim, comment_of, fork
from .expressions import MEMORY, REGISTER, load, rounded, store
from .layout import reshape, row_major
from .nodes import Node, Ref

PARTS = 16  # of the table's rows, dealt out in turns: frequent rows are often neighbours
PARALLEL = 1 << 16  # elements below which one thread is faster
WHOLE = (torch.float32, torch.float64)
ROUNDED = "sums of rows in 16 bits are rounded as PyTorch rounds them"


def claim(node: Node) -> Claim | str | None:
    """The kernel for an op on rows, or why PyTorch does it."""
    if node.op.name == "aten.embedding.default":
        rows, at = node.refs
        return _gather(node, rows, at, from_end=False)
    if node.op.name == "aten.embedding_dense_backward.default":
        return _embedding_backward(node)
    if node.op.name in ("aten.index_select.default", "aten.index_add.default"):
        return _along(node, *node.refs)
    if node.op.name not in ("aten.index.Tensor", "aten.index_put.default"):
        return None
    table, given = node.operands[:2]
    assert isinstance(table, Ref) and isinstance(given, tuple)
    positions, *others = given
    if positions is None or any(o is not None for o in others):
        return "indexed by something else than the first dimension"
    if node.op.name == "aten.index.Tensor":
        return _gather(node, table, positions, from_end=True)
    add = bool(node.op.attr("accumulate"))
    return _put(node, table, positions, node.refs[-1], add=add, from_end=True)


def _along(node: Node, table: Ref, positions: Ref, *values: Ref) -> Claim | str:
    """`index_select` and `index_add`, which know no positions from the end."""
    if node.op.attr("dim") not in (0, -len(table.shape)) or len(positions.shape) != 1:
        return "indexed by something else than the first dimension"
    if not values:
        return _gather(node, table, positions, from_end=False)
    if node.op.attr("alpha") != 1:
        return "scaled before it is added"
    if table.dtype not in WHOLE:
        return ROUNDED
    return _put(node, table, positions, values[0], add=True, from_end=False)


@dataclass(frozen=True)
class _Rows:
    """`count` rows of `width` elements: element j of row r is at r * stride + j * step."""

    count: int
    width: int
    stride: int
    step: int = 1

    def at(self, row: str) -> str:
        """Where element `j` of a row is."""
        return f"{row} * {self.stride} + j * {self.step}"


def _rows_of(ref: Ref, dims: int = 1) -> _Rows | None:
    """A view as rows, the first `dims` dimensions being one; None where elements lie otherwise.

    Elements of a row are neighbours, or all of them one.
    """
    shape = math.prod(ref.shape[:dims]), math.prod(ref.shape[dims:])
    matrix = reshape(ref.layout, shape)
    if matrix is None or matrix.strides[1] not in (0, 1):
        return None
    return _Rows(*shape, *matrix.strides)


def _reasons(table: Ref, positions: Ref) -> str:
    """Why none of these kernels can do it; empty where one can."""
    if table.dtype not in MEMORY:
        return "elements of a type that C lacks"
    if positions.dtype not in (torch.int64, torch.int32):
        return "positions of another type"
    if table.layout.numel == 0 or positions.layout.numel == 0:
        return "no elements"
    return ""


def _gather(node: Node, table: Ref, positions: Ref, from_end: bool) -> Claim | str:
    """out[t] = table[positions[t]]"""
    reason, rows = _reasons(table, positions), _rows_of(table)
    if reason or rows is None:
        return reason or "rows in another order"
    out = Ref(node.outs[0], row_major(node.outs[0].shape))
    kind, count = MEMORY[table.dtype], positions.layout.numel
    forked = fork(count * rows.width, PARALLEL)
    body = f"""\
    const {kind} *restrict table = b[0];
    const {REGISTER[positions.dtype]} *restrict positions = b[1];
    {kind} *restrict out = b[2];
{_check(rows, positions, from_end)}
{forked}    for (int64_t t = 0; t < {count}; t++) {{
        const int64_t r = {_row(rows, positions, from_end)};
        {kind} *restrict row = out + t * {rows.width};
        for (int64_t j = 0; j < {rows.width}; j++) row[j] = table[{rows.at("r")}];
    }}"""
    comment = comment_of("rows by their positions", node)
    return Claim("gather_rows", comment, body, (table, positions, out), (2,), declines=True)


def _put(
    node: Node, table: Ref, positions: Ref, values: Ref, *, add: bool, from_end: bool
) -> Claim | str:
    """A copy of the table; rows are put in it or added, in the order of their positions."""
    dims = len(positions.shape)
    reason, rows = _reasons(table, positions), _rows_of(table)
    added = _rows_of(values, dims) if values.dtype is table.dtype else None
    if reason or rows is None or added is None:
        return reason or "rows in another order"
    if values.shape != (*positions.shape, *table.shape[1:]):
        return "one value for several elements"
    if add and table.dtype not in (*WHOLE, torch.bfloat16):
        return "sums of another type"
    out = Ref(node.outs[0], row_major(node.outs[0].shape))
    body = _loops(table, positions, values, start=f"table[{rows.at('r')}]", add=add,
                  check=_check(rows, positions, from_end), rows=rows, added=added,
                  row=_row(rows, positions, from_end))  # fmt: skip
    what = "added up" if add else "put"
    comment = comment_of(f"rows {what} by their positions", node)
    pointers = (values, positions, table, out)
    return Claim("add_rows" if add else "put_rows", comment, body, pointers, (3,), declines=True)


def _embedding_backward(node: Node) -> Claim | str:
    """Rows of the gradient, added to zeros; a position outside, or of padding, is passed over."""
    grad, positions = node.refs
    if node.op.attr("scale_grad_by_freq"):
        return "scaled by frequency: PyTorch counts the positions"
    if grad.dtype not in WHOLE:
        return ROUNDED
    added, reason = _rows_of(grad, len(positions.shape)), _reasons(grad, positions)
    if reason or added is None:
        return reason or "rows in another order"
    out = Ref(node.outs[0], row_major(node.outs[0].shape))
    padding = node.op.attr("padding_idx")
    rows = _Rows(out.shape[0], added.width, added.width)
    body = _loops(None, positions, grad, start="0", add=True, check="", rows=rows, added=added,
                  row=_position(positions),
                  passed=f"r < 0 || r >= {rows.count} || r == {padding}")  # fmt: skip
    comment = comment_of("rows added up by their positions", node)
    return Claim("embedding_backward", comment, body, (grad, positions, out), (2,))


def _loops(
    table: Ref | None, positions: Ref, values: Ref, *, start: str, add: bool, check: str,
    rows: _Rows, added: _Rows, row: str, passed: str = "0",
) -> str:  # fmt: skip
    """Each part does rows of its own, in order: equal for every number of threads."""
    dtype, count, width = values.dtype, positions.layout.numel, rows.width
    kind, at = MEMORY[dtype], f"out[r * {width} + j]"
    new = f"values[{added.at('t')}]"
    total = rounded(f"{load(at, dtype)} + {load(new, dtype)}", dtype)
    lines = [f"const {kind} *restrict values = b[0];",
             f"const {REGISTER[positions.dtype]} *restrict positions = b[1];",
             *([f"const {kind} *restrict table = b[2];"] if table else []),
             f"{kind} *restrict out = b[{3 if table else 2}];"]  # fmt: skip
    head = "\n".join(f"    {line}" for line in lines)
    forked = fork(max(rows.count, count) * width, PARALLEL)
    return f"""\
{head}
{check}
{forked}    for (int64_t r = 0; r < {rows.count}; r++)
        for (int64_t j = 0; j < {width}; j++) {at} = {start};
{forked}    for (int64_t part = 0; part < {PARTS}; part++) {{
        for (int64_t t = 0; t < {count}; t++) {{
            const int64_t r = {row};
            if (r % {PARTS} != part || {passed}) continue;
            for (int64_t j = 0; j < {width}; j++) {at} = {store(total, dtype) if add else new};
        }}
    }}"""


def _position(positions: Ref) -> str:
    """Position number `t`, from wherever it is in memory."""
    if positions.layout.strides == row_major(positions.shape).strides:
        return "positions[t]"
    inner, digits = positions.layout.numel, list[str]()
    for size, stride in zip(positions.shape, positions.layout.strides, strict=True):
        inner //= size
        if size > 1 and stride:
            digits.append(f"t / {inner} % {size} * {stride}")
    return f"positions[{' + '.join(digits) or 0}]"


def _check(rows: _Rows, positions: Ref, from_end: bool) -> str:
    """Declines where a position is outside of the table."""
    lowest = -rows.count if from_end else 0
    return f"""\
    for (int64_t t = 0; t < {positions.layout.numel}; t++) {{
        const int64_t r = {_position(positions)};
        if (r < {lowest} || r >= {rows.count}) {{
            ss_declined = 1;
            return;
        }}
    }}"""


def _row(rows: _Rows, positions: Ref, from_end: bool) -> str:
    """The row at position t, which may count from the end."""
    row = _position(positions)
    return f"{row} + ({row} < 0 ? {rows.count} : 0)" if from_end else row
