"""Matrix products that generated code carries out, and the loops of what follows them.

A product has axes: matrices of a batch, rows, and columns, which may be those of several images
side by side, or those that a stride skips to. Its epilogue is called with blocks of rows and
columns; so what the epilogue reads and writes must be walked by one stride an axis.
"""

from __future__ import annotations

import math
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

COLUMNS = ("image", "depth", "line", "col")  # outermost first
PHASES = ("depth0", "line0", "col0")  # what a phase adds to what lies `stride` elements apart
AXES = ("batch", "row", *COLUMNS, *PHASES)
Axes = dict[str, Run]

INTEGERS = "aten._int_mm.default"
PRODUCTS = frozenset({"aten.mm.default", "aten.bmm.default", INTEGERS})
BIASED = frozenset({"aten.addmm.default", "aten.baddbmm.default"})
GROUPED = "aten._grouped_mm.default"
FACTORS = {torch.float32: "SS_F32", torch.bfloat16: "SS_BF16", torch.int8: "SS_I8"}
"""What is multiplied, by its name in gemm.h."""
LEAST = 4  # rows and columns; below, a product is a sum over memory, which the library does better
COLS = 48  # at least what gemm.c rounds columns up to
FEW = 3 << 18  # multiply-adds, of columns rounded up, that take no longer than a library's call


def bias_of(op: Op) -> Value | None:
    """What is added to a product before it is rounded."""
    if op.name in BIASED:
        return op.inputs[0]
    if op.name == convolutions.FORWARD and isinstance(op.operands[2], Value):
        return op.operands[2]
    return None


def matrices_of(op: Op) -> Sequence[Value]:
    """The operands that are multiplied, the left one first; behind them, where groups end."""
    found = convolutions.convolution_of(op)
    return op.inputs[op.name in BIASED :] if found is None else (found.left, found.right)


def sides_of(node: Node) -> tuple[Sides, ...]:
    """How both sides lie in memory, for each of the products that the node is."""
    role = role_of(node.op)
    return (of_matrices(node),) if role is None else convolutions.sides_of(node, role)


def is_product(op: Op) -> bool:
    """Whether generated code takes the op: f32, bf16 or int8 matrices that are not vectors."""
    role = role_of(op)
    if op.name in BIASED:
        known = op.attrs.get("alpha", 1) == op.attrs.get("beta", 1) == 1
    else:
        known = role is not None or op.name in PRODUCTS or _is_grouped(op)
    if not known:
        return False
    types = [v.type for v in operand_values(op.operands)]
    out = op.result.type
    factor = torch.int8 if op.name == INTEGERS else out.dtype
    same = all(t.dtype is factor for t in types if t.dtype is not torch.int32)
    fits = role is not None or min(out.static_shape[-2:]) >= LEAST or _is_small(op)
    known = factor in FACTORS and (factor is torch.int8) == (op.name == INTEGERS)
    return same and fits and known and all(t.numel for t in (*types, out))


def _is_small(op: Op) -> bool:
    *batch, rows, cols = op.result.type.static_shape
    summed = matrices_of(op)[0].type.static_shape[-1]
    return math.prod(batch) * rows * max(cols, COLS) * summed <= FEW


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


def split_dims(atoms: Atoms, node: Node, dims: Sequence[Run]) -> None:
    """Makes loops over the phases of a product within those of its result."""
    for run, stride in zip(dims[2:], _strides(node), strict=False):
        if stride > 1:
            (loop,) = run
            atoms.split(loop, stride)


def _strides(node: Node) -> Sequence[int]:
    """How far apart the elements of one product are, by dimension of an image; empty for 1."""
    if role_of(node.op) is not Role.INPUT:
        return ()
    strides = convolutions.strides_of(node.op)
    return strides[2 - len(node.outs[0].shape) :] if max(strides) > 1 else ()


def axes_of(atoms: Atoms, node: Node, dims: Sequence[Run]) -> Axes:
    """The loops of a product's axes; `dims` are those of its result."""
    runs = [atoms.resolve(run) for run in dims]
    role = role_of(node.op)
    if role is None:
        *batch, rows, cols = runs
        return {"batch": _joined(batch), "row": rows, "col": cols}
    if role is Role.WEIGHT:
        return {"row": runs[0], "col": _joined(runs[1:])}
    images, rows, *places = runs
    strides = _strides(node)
    count = atoms.size(_joined(places)) // math.prod(strides)
    axes = {"batch" if convolutions.by_image(count) else "image": images, "row": rows}
    if not strides:
        return axes | {"col": _joined(places)}
    halves = [_cut(atoms, run, s) for run, s in zip(places, strides, strict=True)]
    rank = len(places)
    axes |= zip(COLUMNS[-rank:], (outer for outer, _ in halves), strict=True)
    return axes | dict(zip(PHASES[-rank:], (inner for _, inner in halves), strict=True))


def _cut(atoms: Atoms, run: Run, inner: int) -> tuple[Run, Run]:
    """The outer and the inner loops of a dimension, these of `inner` elements."""
    at = len(run)
    while atoms.size(run[at:]) < inner:
        at -= 1
    return run[:at], run[at:]


def _joined(runs: Sequence[Run]) -> Run:
    return tuple(a for run in runs for a in run)


def walks(atoms: Atoms, axes: Axes, strides: Mapping[int, int]) -> bool:
    """Whether memory is walked by one stride an axis, and along columns element by element.

    Columns that a stride skips to are not neighbours in memory.
    """
    straight = all(
        strides.get(outer, 0) == strides.get(inner, 0) * atoms.sizes[inner]
        for axis in axes.values()
        for outer, inner in zip(axis, axis[1:], strict=False)
    )
    cols = axes["col"]
    return straight and (not cols or "col0" in axes or strides.get(cols[-1], 0) in (0, 1))
