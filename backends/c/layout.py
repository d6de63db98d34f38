"""View ops as changes of shape, strides and offset: no code where strides allow it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache

from shoestring.ir import Op

from ..instructions import contiguous_strides


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the elements of a view are within the row-major storage of its base."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@cache
def row_major(shape: tuple[int, ...]) -> Layout:
    """The layout of a tensor that is nobody's view."""
    return Layout(shape, contiguous_strides(shape))


def reshape(x: Layout, shape: tuple[int, ...]) -> Layout | None:
    """`x` in another shape, or None where that takes a copy. Numel must agree."""
    if x.numel == 0:
        return row_major(shape)
    runs = contiguous_runs(zip(x.shape, x.strides, strict=True))
    strides: list[int] = []
    left = 1  # elements of the current run not yet covered, counted from its innermost
    step = 1
    at = len(runs)
    for size in reversed(shape):
        if size == 1:
            strides.append(0)
            continue
        if left == 1:
            at -= 1
            left, step = runs[at]
        if left % size:
            return None
        strides.append(step)
        step, left = step * size, left // size
    strides.reverse()
    plain = contiguous_strides(shape)
    fixed = tuple(p if n == 1 else s for n, s, p in zip(shape, strides, plain, strict=True))
    return Layout(shape, fixed, x.offset)


def contiguous_runs(dims: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Dimensions as (size, stride), outermost first, with neighbours joined that one describes."""
    runs: list[tuple[int, int]] = []
    for size, stride in dims:
        if size == 1:
            continue
        if runs and runs[-1][1] == stride * size:
            runs[-1] = (runs[-1][0] * size, stride)
        else:
            runs.append((size, stride))
    return runs


def permute(x: Layout, order: list[int]) -> Layout:
    return Layout(tuple(x.shape[i] for i in order), tuple(x.strides[i] for i in order), x.offset)


def _permuted(op: Op, x: Layout) -> Layout:
    rank = len(x.shape)
    return permute(x, [d % rank for d in op.attr("dims")]) if rank else x


def _transposed(op: Op, x: Layout) -> Layout:
    order = list(range(len(x.shape)))
    if order:
        a, b = op.attr("dim0") % len(order), op.attr("dim1") % len(order)
        order[a], order[b] = order[b], order[a]
    return permute(x, order)


def _expanded(op: Op, x: Layout) -> Layout:
    shape = op.result.type.static_shape
    extra = len(shape) - len(x.shape)
    strides = [0] * extra
    for i, (size, stride) in enumerate(zip(x.shape, x.strides, strict=True)):
        strides.append(stride if size == shape[extra + i] else 0)
    return Layout(shape, tuple(strides), x.offset)


def first_of_slice(op: Op, size: int) -> int:
    """Where a slice of a dimension of this size begins: within it, counted from its beginning."""
    start = op.attr("start")
    start = 0 if start is None else start
    return min(max(start + size if start < 0 else start, 0), size)


def _sliced(op: Op, x: Layout) -> Layout:
    dim = op.attr("dim") % len(x.shape)
    size = x.shape[dim]
    start = first_of_slice(op, size)
    strides = list(x.strides)
    strides[dim] *= op.attr("step")
    offset = x.offset + start * x.strides[dim]
    return Layout(op.result.type.static_shape, tuple(strides), offset)


def _selected(op: Op, x: Layout) -> Layout:
    dim = op.attr("dim") % len(x.shape)
    index = op.attr("index") % x.shape[dim]
    strides = (*x.strides[:dim], *x.strides[dim + 1 :])
    return Layout(op.result.type.static_shape, strides, x.offset + index * x.strides[dim])


def flipped(op: Op, x: Layout) -> Layout:
    """Dimensions in reverse order: negative strides, which generated code reads; torch has none."""
    if not x.shape:
        return x  # a number has no order, though PyTorch lets it be flipped along 0
    strides, offset = list(x.strides), x.offset
    for dim in {d % len(x.shape) for d in op.attr("dims")}:
        offset += (x.shape[dim] - 1) * strides[dim]
        strides[dim] = -strides[dim]
    return Layout(x.shape, tuple(strides), offset)


def _diagonal(op: Op, x: Layout) -> Layout:
    rank = len(x.shape)
    a, b, k = op.attr("dim1") % rank, op.attr("dim2") % rank, op.attr("offset")
    start = k * x.strides[b] if k >= 0 else -k * x.strides[a]
    kept = [x.strides[i] for i in range(rank) if i not in (a, b)]
    shape = op.result.type.static_shape
    offset = x.offset + (start if math.prod(shape) else 0)
    return Layout(shape, (*kept, x.strides[a] + x.strides[b]), offset)


def _unfolded(op: Op, x: Layout) -> Layout | None:
    if not x.shape:
        return None
    dim = op.attr("dimension") % len(x.shape)
    strides = list(x.strides)
    strides[dim] *= op.attr("step")
    return Layout(op.result.type.static_shape, (*strides, x.strides[dim]), x.offset)


def _as_strided(op: Op, x: Layout) -> Layout | None:
    """Counts in the row-major order of the operand; so the operand must be in that order."""
    runs = contiguous_runs(zip(x.shape, x.strides, strict=True))
    if len(runs) > 1 or any(stride != 1 for _, stride in runs):
        return None
    return Layout(
        tuple(op.attr("size")),
        tuple(op.attr("stride")),
        x.offset + (op.attr("storage_offset") or 0),
    )


def _reshaped(op: Op, x: Layout) -> Layout | None:
    return reshape(x, op.result.type.static_shape)


def _same(op: Op, x: Layout) -> Layout:
    return x


VIEWS: dict[str, Callable[[Op, Layout], Layout | None]] = {
    "aten.view.default": _reshaped,
    "aten._unsafe_view.default": _reshaped,
    "aten.reshape.default": _reshaped,
    "aten.squeeze.default": _reshaped,
    "aten.squeeze.dim": _reshaped,
    "aten.squeeze.dims": _reshaped,
    "aten.unsqueeze.default": _reshaped,
    "aten.permute.default": _permuted,
    "aten.transpose.int": _transposed,
    "aten.t.default": lambda op, x: permute(x, list(reversed(range(len(x.shape))))),
    "aten.expand.default": _expanded,
    "aten.slice.Tensor": _sliced,
    "aten.select.int": _selected,
    "aten.diagonal.default": _diagonal,
    "aten.unfold.default": _unfolded,
    "aten.as_strided.default": _as_strided,
    "aten.alias.default": _same,
    "aten.detach.default": _same,
}


SPLITS = frozenset({
    "aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default", "aten.unbind.int",
    "aten.unsafe_split.Tensor", "aten.unsafe_split_with_sizes.default", "aten.unsafe_chunk.default",
})  # fmt: skip


def split_parts(op: Op, x: Layout) -> list[Layout] | None:
    """The pieces of a split, in order; None where `op` is not one."""
    if op.name not in SPLITS:
        return None
    dim = op.attr("dim") % len(x.shape)
    if op.name == "aten.unbind.int":
        strides = (*x.strides[:dim], *x.strides[dim + 1 :])
        return [
            Layout(r.type.static_shape, strides, x.offset + i * x.strides[dim])
            for i, r in enumerate(op.results)
        ]
    parts: list[Layout] = []
    at = 0
    for r in op.results:
        shape = r.type.static_shape
        parts.append(Layout(shape, x.strides, x.offset + at * x.strides[dim]))
        at += shape[dim]
    return parts
