"""Matrix products that generated code carries out, and the loops of what follows them.

A product has four axes: matrices of a batch, rows, and columns, which may be those of several
images side by side. Its epilogue is called with blocks of rows and columns; so what the epilogue
reads and writes must be walked by one stride an axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from shoestring.ir import Op, Value, operand_values

from . import convolutions
from .atoms import Atoms, Run
from .convolutions import Role, role_of
from .sides import Sides, of_matrices

if TYPE_CHECKING:
    from .nodes import Node

AXES = ("batch", "row", "image", "col")
Axes = tuple[Run, Run, Run, Run]

PRODUCTS = frozenset({"aten.mm.default", "aten.bmm.default"})
BIASED = frozenset({"aten.addmm.default", "aten.baddbmm.default"})
GROUPED = "aten._grouped_mm.default"
TYPES = {torch.float32: "SS_F32", torch.bfloat16: "SS_BF16"}  # by their names in gemm.h
LEAST = 4  # rows and columns; below, a product is a sum over memory, which the library does better


def bias_of(op: Op) -> Value | None:
    """What is added to a product before it is rounded."""
    if op.name in BIASED:
        return op.inputs[0]
    if op.name == convolutions.FORWARD and isinstance(op.operands[2], Value):
        return op.operands[2]
    return None


def matrices_of(op: Op) -> Sequence[Value]:
    """The operands that are multiplied, the left one first; behind them, where groups end."""
    role = role_of(op)
    if role is None:
        return op.inputs[op.name in BIASED :]
    if role is Role.RESULT:
        x, weight, *_ = op.inputs
        return weight, x
    grad, x, weight = op.inputs
    return (weight, grad) if role is Role.INPUT else (grad, x)


def sides_of(node: Node) -> Sides:
    """How both sides of a product lie in memory."""
    role = role_of(node.op)
    return of_matrices(node) if role is None else convolutions.sides_of(node, role)


def is_product(op: Op) -> bool:
    """Whether generated code takes the op: f32 or bf16 matrices that are not vectors."""
    role = role_of(op)
    if op.name in BIASED:
        known = op.attrs.get("alpha", 1) == op.attrs.get("beta", 1) == 1
    else:
        known = role is not None or op.name in PRODUCTS or _is_grouped(op)
    if not known:
        return False
    types = [v.type for v in operand_values(op.operands)]
    out = op.result.type
    same = all(t.dtype is out.dtype for t in types if t.dtype is not torch.int32)
    fits = role is not None or min(out.static_shape[-2:]) >= LEAST
    return same and fits and out.dtype in TYPES and all(t.numel for t in (*types, out))


def _is_grouped(op: Op) -> bool:
    """Whether each group of rows meets a matrix, or each group of the sum makes one."""
    if op.name != GROUPED:
        return False
    a, b, ends, bias = op.operands
    if not (isinstance(a, Value) and isinstance(b, Value) and isinstance(ends, Value)):
        return False
    return bias is None and a.type.rank == 2 and ends.type.dtype is torch.int32


def grouping_of(op: Op) -> tuple[str, int]:
    """The `ss_grouping` of a product, and how many groups it has."""
    if op.name != GROUPED:
        return "SS_UNGROUPED", 0
    _, b, ends = op.inputs
    return "SS_GROUPS_OF_ROWS" if b.type.rank == 3 else "SS_GROUPS_OF_SUM", ends.type.numel


def axes_of(atoms: Atoms, node: Node, dims: Sequence[Run]) -> Axes:
    """The loops of a product's batch, rows, images and columns; `dims` are those of its result."""
    runs = [atoms.resolve(run) for run in dims]
    role = role_of(node.op)
    if role is None:
        *batch, rows, cols = runs
        return _joined(batch), rows, (), cols
    if role is Role.WEIGHT:
        return (), runs[0], (), _joined(runs[1:])
    images, rows, *places = runs
    if convolutions.by_image(node.outs[0].shape):
        return images, rows, (), _joined(places)
    return (), rows, images, _joined(places)


def _joined(runs: Sequence[Run]) -> Run:
    return tuple(a for run in runs for a in run)


def walks(atoms: Atoms, axes: Axes, strides: Mapping[int, int]) -> bool:
    """Whether memory is walked by one stride an axis, and along columns element by element."""
    straight = all(
        strides.get(outer, 0) == strides.get(inner, 0) * atoms.sizes[inner]
        for axis in axes
        for outer, inner in zip(axis, axis[1:], strict=False)
    )
    cols = axes[-1]
    return straight and (not cols or strides.get(cols[-1], 0) in (0, 1))
