"""Matrix products that generated code carries out, and the loops of what follows them.

A product has three axes: matrices of a batch, rows, columns. Its epilogue is called with blocks of
rows and columns; so what the epilogue reads and writes must be walked by one stride an axis.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from shoestring.ir import Op, Value, operand_values

from .atoms import Atoms, Run

Axes = tuple[Run, Run, Run]

PRODUCTS = frozenset({"aten.mm.default", "aten.bmm.default"})
BIASED = frozenset({"aten.addmm.default", "aten.baddbmm.default"})
GROUPED = "aten._grouped_mm.default"
TYPES = frozenset({torch.float32, torch.bfloat16})
LEAST = 4  # rows and columns; below, a product is a sum over memory, which the library does better


def has_bias(op: Op) -> bool:
    return op.name in BIASED


def is_product(op: Op) -> bool:
    """Whether generated code takes the op: f32 or bf16 matrices that are not vectors."""
    if has_bias(op):
        known = op.attrs.get("alpha", 1) == op.attrs.get("beta", 1) == 1
    else:
        known = op.name in PRODUCTS or (op.name == GROUPED and _has_groups(op))
    if not known:
        return False
    types = [v.type for v in operand_values(op.operands)]
    out = op.result.type
    same = all(t.dtype is out.dtype for t in types if t.dtype is not torch.int32)
    fits = out.dtype in TYPES and min(out.static_shape[-2:]) >= LEAST
    return same and fits and all(t.numel for t in types)


def _has_groups(op: Op) -> bool:
    """Whether each group of rows meets a matrix, or each group of the sum makes one."""
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


def axes_of(atoms: Atoms, dims: Sequence[Run]) -> Axes:
    """The loops of a product's batch, rows and columns."""
    *batch, rows, cols = (atoms.resolve(run) for run in dims)
    return tuple(a for run in batch for a in run), rows, cols


def walks(atoms: Atoms, axes: Axes, strides: Mapping[int, int]) -> bool:
    """Whether memory is walked by one stride an axis, and along columns element by element."""
    straight = all(
        strides.get(outer, 0) == strides.get(inner, 0) * atoms.sizes[inner]
        for axis in axes
        for outer, inner in zip(axis, axis[1:], strict=False)
    )
    cols = axes[2]
    return straight and (not cols or strides.get(cols[-1], 0) in (0, 1))
