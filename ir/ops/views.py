"""Ops that rearrange elements without computing: reshape, permute, slice, and their inverses.

In the IR a value is its elements in row-major order; there are no strides. So `view` means
reshape, `as_strided` counts in the row-major order of its operand, and none of them aliases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..function import Op
from ..opdef import FactorMap, Kind, OpDef
from .aten import define, replicate
from .factors import Dims, keep_all_but, keep_whole, letters, normalize, replaced, reshape


def _reshape(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    return torch.reshape(x, list(size))


def _as_strided(
    x: torch.Tensor, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> torch.Tensor:
    return torch.as_strided(x.contiguous(), list(size), list(stride), storage_offset or 0)


def _view_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.contiguous().view(dtype)


def reshape_factors(op: Op) -> FactorMap:
    old, new = reshape(op.inputs[0].type.shape, op.results[0].type.shape)
    return FactorMap((old,), (new,))


def squeeze_factors(op: Op) -> FactorMap:
    """A named dimension that is not one must not become one in a part: it stays whole."""
    shape, dims = op.inputs[0].type.shape, op.attr("dim")
    named = {normalize(d, len(shape)) for d in (dims if isinstance(dims, tuple) else (dims,))}
    names: Dims = tuple(None if i in named else f"d{i}" for i in range(len(shape)))
    kept = [i for i, d in enumerate(shape) if not (i in named and d == 1)]
    return FactorMap((names,), (tuple(names[i] for i in kept),))


def permute_factors(order: Callable[[Op], Sequence[int]]) -> Callable[[Op], FactorMap]:
    def rule(op: Op) -> FactorMap:
        names = letters(op.inputs[0].type.rank)
        return FactorMap((names,), (tuple(names[i] for i in order(op)),))

    return rule


def _permutation(op: Op) -> list[int]:
    rank = op.inputs[0].type.rank
    return [normalize(d, rank) for d in op.attr("dims")]


def _transposition(op: Op) -> list[int]:
    rank = op.inputs[0].type.rank
    order = list(range(rank))
    if rank:
        a, b = normalize(op.attr("dim0"), rank), normalize(op.attr("dim1"), rank)
        order[a], order[b] = order[b], order[a]
    return order


def _reversed(op: Op) -> list[int]:
    return list(reversed(range(op.inputs[0].type.rank)))


def expand_factors(op: Op) -> FactorMap:
    src, out = op.inputs[0].type.shape, op.results[0].type.shape
    offset = len(out) - len(src)
    names: list[str | None] = [None] * len(out)
    operand: list[str | None] = [None] * len(src)
    for i, d in enumerate(src):
        if d == out[offset + i]:
            operand[i] = names[offset + i] = f"d{i}"
    return FactorMap((tuple(operand),), (tuple(names),))


def all_but_dim(op: Op) -> FactorMap:
    """Same rank in and out: slice, flip, cat and scatter leave the other dimensions free."""
    return keep_all_but(op, [normalize(op.attr("dim"), op.results[0].type.rank)])


def select_factors(op: Op) -> FactorMap:
    rank = op.inputs[0].type.rank
    dim = normalize(op.attr("dim"), rank)
    operand: Dims = tuple(None if i == dim else f"d{i}" for i in range(rank))
    return FactorMap((operand,), (tuple(f for i, f in enumerate(operand) if i != dim),))


def diagonal_factors(op: Op) -> FactorMap:
    """The two dimensions stay whole; the result has theirs last."""
    x = op.inputs[0].type
    gone = {normalize(op.attr("dim1"), x.rank), normalize(op.attr("dim2"), x.rank)}
    names: Dims = tuple(None if i in gone else f"d{i}" for i in range(x.rank))
    return FactorMap((names,), ((*(f for f in names if f), None),))


def windows_factors(op: Op) -> FactorMap:
    """unfold: the dimension that is cut into windows stays whole; windows come last."""
    rank = op.inputs[0].type.rank
    if not rank:
        return keep_whole(op)
    names = replaced(letters(rank), normalize(op.attr("dimension"), rank), None)
    return FactorMap((names,), ((*names, None),))


def bits_factors(op: Op) -> FactorMap:
    """view.dtype: the last dimension is regrouped where the sizes of elements differ."""
    names = letters(op.inputs[0].type.rank)
    if op.inputs[0].type.dtype.itemsize != op.results[0].type.dtype.itemsize:
        names = replaced(names, len(names) - 1, None)
    return FactorMap((names,), (names,))


def as_real_factors(op: Op) -> FactorMap:
    names = letters(op.inputs[0].type.rank)
    return FactorMap((names,), ((*names, None),))


def as_complex_factors(op: Op) -> FactorMap:
    names = letters(op.results[0].type.rank)
    return FactorMap(((*names, None),), (names,))


def pad_factors(op: Op) -> FactorMap:
    """Dimensions that are not padded are free; `pad` counts from the last."""
    rank = op.inputs[0].type.rank
    pad = op.attr("pad")
    return keep_all_but(op, [rank - 1 - i // 2 for i, n in enumerate(pad) if n])


def select_scatter_factors(op: Op) -> FactorMap:
    rank = op.inputs[0].type.rank
    names = replaced(letters(rank), normalize(op.attr("dim"), rank), None)
    return FactorMap((names, tuple(f for f in names if f)), (names,))


def diagonal_scatter_factors(op: Op) -> FactorMap:
    rank = op.inputs[0].type.rank
    gone = {normalize(op.attr("dim1"), rank), normalize(op.attr("dim2"), rank)}
    names: Dims = tuple(None if i in gone else f"d{i}" for i in range(rank))
    return FactorMap((names, (*(f for f in names if f), None)), (names,))


def flip_factors(op: Op) -> FactorMap:
    return keep_all_but(op, [normalize(d, op.results[0].type.rank) for d in op.attr("dims")])


def roll_factors(op: Op) -> FactorMap:
    """Without `dims` the elements roll as one row."""
    return flip_factors(op) if op.attr("dims") else keep_whole(op)


def slice_backward_factors(op: Op) -> FactorMap:
    return keep_all_but(op, [normalize(op.attr("dim"), op.results[0].type.rank)])


def select_backward_factors(op: Op) -> FactorMap:
    rank = op.results[0].type.rank
    names = replaced(letters(rank), normalize(op.attr("dim"), rank), None)
    return FactorMap((tuple(f for f in names if f),), (names,))


def diagonal_backward_factors(op: Op) -> FactorMap:
    rank = op.results[0].type.rank
    gone = {normalize(op.attr("dim1"), rank), normalize(op.attr("dim2"), rank)}
    names: Dims = tuple(None if i in gone else f"d{i}" for i in range(rank))
    return FactorMap(((*(f for f in names if f), None),), (names,))


def unfold_backward_factors(op: Op) -> FactorMap:
    rank = op.results[0].type.rank
    if not rank:
        return keep_whole(op)
    names = replaced(letters(rank), normalize(op.attr("dim"), rank), None)
    return FactorMap(((*names, None),), (names,))


def cat_factors(op: Op) -> FactorMap:
    """Dimensions other than `dim` are free, unless an operand is the legacy empty `[0]`."""
    rank = op.results[0].type.rank
    return keep_all_but(op, [normalize(op.attr("dim"), rank)])


def stack_factors(op: Op) -> FactorMap:
    rank = op.results[0].type.rank
    names = replaced(letters(rank), normalize(op.attr("dim"), rank), None)
    return FactorMap(tuple(tuple(f for f in names if f) for _ in op.inputs), (names,))


def matrix_factors(op: Op) -> FactorMap:
    """tril, triu: the matrix stays whole, the batch is free."""
    rank = op.inputs[0].type.rank
    return keep_all_but(op, [rank - 2, rank - 1])


def _view(name: str, factors: Callable[[Op], Any] | None = None, **more: Any) -> OpDef:
    return define(f"aten.{name}", Kind.VIEW, core=True, factors=factors or replicate, **more)


OPS: tuple[OpDef, ...] = (
    _view(
        "view.default",
        reshape_factors,
        reference=_reshape,
        doc="The same elements in row-major order under another shape.",
    ),
    _view(
        "_unsafe_view.default",
        reshape_factors,
        reference=_reshape,
        doc="The same elements in row-major order under another shape.",
    ),
    _view("squeeze.default", doc="Without the dimensions of size one."),
    _view("squeeze.dim", squeeze_factors, doc="Without one dimension, if its size is one."),
    _view(
        "squeeze.dims",
        squeeze_factors,
        doc="Without those of the given dimensions whose size is one.",
    ),
    _view("unsqueeze.default", reshape_factors, doc="With one more dimension of size one."),
    _view("permute.default", permute_factors(_permutation), doc="The dimensions in another order."),
    _view("transpose.int", permute_factors(_transposition), doc="Two dimensions exchanged."),
    _view("t.default", permute_factors(_reversed), doc="The transpose of a matrix."),
    _view("expand.default", expand_factors, doc="Dimensions of size one repeated."),
    _view(
        "slice.Tensor",
        all_but_dim,
        doc="Every `step`-th position of one dimension from `start` to `end`.",
    ),
    _view("select.int", select_factors, doc="One position of one dimension, which disappears."),
    _view(
        "diagonal.default", diagonal_factors, doc="The diagonal of two dimensions, as the last one."
    ),
    _view(
        "unfold.default", windows_factors, doc="Windows of one dimension, as a last dimension more."
    ),
    _view(
        "as_strided.default",
        reference=_as_strided,
        doc="Elements of the row-major order, counted by strides.",
    ),
    _view(
        "view.dtype",
        bits_factors,
        reference=_view_dtype,
        doc="The same bytes as another element type.",
    ),
    _view(
        "view_as_real.default",
        as_real_factors,
        doc="Complex numbers as pairs in a last dimension more.",
    ),
    _view(
        "view_as_complex.default",
        as_complex_factors,
        doc="Pairs in the last dimension as complex numbers.",
    ),
    _view(
        "alias.default",
        permute_factors(lambda op: range(op.inputs[0].type.rank)),
        doc="The same elements.",
    ),
    _view(
        "detach.default",
        permute_factors(lambda op: range(op.inputs[0].type.rank)),
        doc="The same elements, without a gradient.",
    ),
    define(
        "aten.cat.default",
        Kind.INDEXING,
        factors=cat_factors,
        core=True,
        doc="Tensors one after the other along one dimension.",
    ),
    define(
        "aten.flip.default",
        Kind.INDEXING,
        factors=flip_factors,
        core=True,
        doc="Dimensions in reverse order.",
    ),
    define(
        "aten.constant_pad_nd.default",
        Kind.INDEXING,
        factors=pad_factors,
        core=True,
        doc="Padded with one value; with negative sizes, cropped.",
    ),
    define(
        "aten.slice_scatter.default",
        Kind.INDEXING,
        factors=all_but_dim,
        core=True,
        doc="x with a slice replaced.",
    ),
    define(
        "aten.select_scatter.default",
        Kind.INDEXING,
        factors=select_scatter_factors,
        core=True,
        doc="x with one position of a dimension replaced.",
    ),
    define(
        "aten.diagonal_scatter.default",
        Kind.INDEXING,
        factors=diagonal_scatter_factors,
        core=True,
        doc="x with a diagonal replaced.",
    ),
    define(
        "aten.as_strided_scatter.default",
        Kind.INDEXING,
        core=True,
        doc="x with the elements that `as_strided` shows replaced.",
    ),
    define("aten.stack.default", Kind.INDEXING, factors=stack_factors),
    define("aten.roll.default", Kind.INDEXING, factors=roll_factors),
    define("aten.tril.default", Kind.INDEXING, factors=matrix_factors),
    define("aten.triu.default", Kind.INDEXING, factors=matrix_factors),
    define("aten.slice_backward.default", Kind.INDEXING, factors=slice_backward_factors),
    define("aten.select_backward.default", Kind.INDEXING, factors=select_backward_factors),
    define(
        "aten.diagonal_backward.default",
        Kind.INDEXING,
        factors=diagonal_backward_factors,
    ),
    define("aten.unfold_backward.default", Kind.INDEXING, factors=unfold_backward_factors),
)
