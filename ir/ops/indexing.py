"""Ops that read or write at positions held in a tensor, and ops that make tensors from nothing."""

from __future__ import annotations

import torch

from ..function import Op, Value
from ..opdef import Cost, FactorMap, Kind, OpDef
from ..types import Dim, TensorType, type_of
from .aten import define, replicate
from .factors import Dims, keep_all_but, keep_whole, letters, normalize, replaced


def embedding_factors(op: Op) -> FactorMap:
    """weight [v, e], indices [...] -> [..., e]"""
    names = letters(op.inputs[1].type.rank)
    return FactorMap(((None, "e"), names), ((*names, "e"),))


def embedding_backward_factors(op: Op) -> FactorMap:
    """grad [..., e], indices [...] -> [v, e], a sum over the positions."""
    names = letters(op.inputs[1].type.rank)
    if op.attr("scale_grad_by_freq"):
        return FactorMap(((*(None for _ in names), "e"), (None,) * len(names)), ((None, "e"),))
    return FactorMap(((*names, "e"), names), ((None, "e"),), {str(n): "sum" for n in names})


def gather_factors(op: Op) -> FactorMap:
    """Dimensions other than `dim` are free where operand and index agree on their size."""
    x, index = op.inputs[0].type, op.inputs[1].type
    dim = normalize(op.attr("dim"), index.rank)
    free = [x.shape[i] == index.shape[i] and i != dim for i in range(min(x.rank, index.rank))]
    if x.rank != index.rank:
        free = [False] * index.rank
    shared: Dims = tuple(f"d{i}" if free[i] else None for i in range(index.rank))
    source: Dims = tuple(f"d{i}" if i < len(free) and free[i] else None for i in range(x.rank))
    whole_index: Dims = tuple("i" if i == dim else s for i, s in enumerate(shared))
    return FactorMap((source, whole_index), (whole_index,))


def index_select_factors(op: Op) -> FactorMap:
    rank = op.inputs[0].type.rank
    dim = normalize(op.attr("dim"), rank)
    source: Dims = tuple(None if i == dim else f"d{i}" for i in range(rank))
    result: Dims = tuple("i" if i == dim else f"d{i}" for i in range(rank))
    index: Dims = ("i",) if op.inputs[1].type.rank else ()
    if not rank or not index:
        return FactorMap(((None,) * rank, (None,) * len(index)), ((None,) * rank,))
    return FactorMap((source, index), (result,))


def _indexed(op: Op) -> tuple[Dims, list[Dims], Dims] | None:
    """Factors of x, of each index and of `x[indices]`; None for masks, whose sizes differ."""
    x = op.inputs[0].type
    given = op.operands[1]
    assert isinstance(given, tuple)
    at = [i for i, v in enumerate(given) if v is not None]
    indices = [v for v in given if v is not None]
    if not at or any(v.type.dtype in (torch.bool, torch.uint8) for v in indices):
        return None
    shape = max((v.type.shape for v in indices), key=len)
    rank = len(shape)
    size = [max((_dim(v.type, i - rank) for v in indices), key=_extent) for i in range(rank)]
    names = letters(rank, "i")

    def of(v: Value) -> Dims:
        offset = rank - v.type.rank
        dims = enumerate(v.type.shape)
        return tuple(names[offset + i] if d == size[offset + i] else None for i, d in dims)

    free: Dims = tuple(None if i in at else f"d{i}" for i in range(x.rank))
    adjacent = at == list(range(at[0], at[-1] + 1))
    first = at[0] if adjacent else 0
    rest = [f for f in free if f is not None]
    result: Dims = (*rest[:first], *names, *rest[first:])
    return free, [of(v) for v in indices], result


def _dim(type_: TensorType, index: int) -> Dim:
    """A dimension counted from the last; 1 where there is none."""
    return type_.shape[index] if -index <= type_.rank else 1


def _extent(dim: Dim) -> int:
    return dim if isinstance(dim, int) else 2


def index_factors(op: Op) -> FactorMap:
    """Dimensions that are not indexed are free; so are those of the indices."""
    found = _indexed(op)
    if found is None:
        return keep_whole(op)
    x, indices, result = found
    return FactorMap((x, *indices), (result,))


def index_put_factors(op: Op) -> FactorMap:
    """Dimensions that are not indexed are free; positions are not: the last write wins."""
    found = _indexed(op)
    if found is None:
        return keep_whole(op)
    x, indices, result = found
    free: Dims = tuple(f if f in x else None for f in result)
    values = op.inputs[-1].type
    offset = len(result) - values.rank
    if offset < 0:
        return keep_whole(op)
    sizes = {f: d for f, d in zip(x, op.inputs[0].type.shape, strict=True) if f}
    dims = tuple(
        f if f is not None and values.shape[i] == sizes[f] else None
        for i, f in enumerate(free[offset:])
    )
    return FactorMap((x, *((None,) * len(i) for i in indices), dims), (x,))


def index_add_factors(op: Op) -> FactorMap:
    """x, index, source: dimensions other than `dim` are free."""
    rank = op.inputs[0].type.rank
    if not rank or op.inputs[2].type.rank != rank:
        return keep_whole(op)
    names = replaced(letters(rank), normalize(op.attr("dim"), rank), None)
    return FactorMap((names, (None,) * op.inputs[1].type.rank, names), (names,))


def index_fill_factors(op: Op) -> FactorMap:
    rank = op.inputs[0].type.rank
    names = replaced(letters(rank), normalize(op.attr("dim"), rank), None)
    return FactorMap((names, *((None,) * v.type.rank for v in op.inputs[1:])), (names,))


def scatter_factors(op: Op) -> FactorMap:
    """Dimensions other than `dim` are free where x, index and source agree on their size."""
    x = op.inputs[0].type
    if any(v.type.rank != x.rank for v in op.inputs):
        return keep_whole(op)
    dim = normalize(op.attr("dim"), x.rank)
    names: Dims = tuple(
        f"d{i}" if i != dim and all(v.type.shape[i] == d for v in op.inputs) else None
        for i, d in enumerate(x.shape)
    )
    return FactorMap(tuple(names for _ in op.inputs), (names,))


def topk_factors(op: Op) -> FactorMap:
    return keep_all_but(op, [normalize(op.attr("dim"), op.inputs[0].type.rank)])


def sorted_positions_factors(op: Op) -> FactorMap:
    """bucketize: each element by itself, the boundaries whole."""
    names = letters(op.inputs[0].type.rank)
    return FactorMap((names, (None,) * op.inputs[1].type.rank), (names,))


def _constant(
    *, data: tuple[bool | int | float, ...], shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """Elements in row-major order; one element stands for all."""
    if len(data) == 1:
        return torch.full(shape, data[0], dtype=dtype)
    return torch.tensor(data, dtype=dtype).reshape(shape)


CONSTANT = OpDef(
    name="ir.constant.default",
    kind=Kind.CREATION,
    reference=_constant,
    operand_names=(),
    attr_defaults={},
    infer=lambda op: (
        type_of(torch.empty(op.attrs["shape"], dtype=op.attrs["dtype"], device="meta")),
    ),
    cost=lambda op: Cost(0, op.result.type.nbytes),
    factors=replicate,
    core=True,
    doc="Elements written in the program.",
)

OPS: tuple[OpDef, ...] = (
    CONSTANT,
    define(
        "aten.embedding.default",
        Kind.INDEXING,
        factors=embedding_factors,
        core=True,
        doc="Rows of a table.",
    ),
    define(
        "aten.embedding_dense_backward.default",
        Kind.INDEXING,
        factors=embedding_backward_factors,
        core=True,
        doc="The gradient of a table from those of its rows.",
    ),
    define(
        "aten.gather.default",
        Kind.INDEXING,
        factors=gather_factors,
        core=True,
        doc="Elements of one dimension at given positions.",
    ),
    define(
        "aten.index_select.default",
        Kind.INDEXING,
        factors=index_select_factors,
        core=True,
        doc="Positions of one dimension, in any order.",
    ),
    define(
        "aten.index.Tensor",
        Kind.INDEXING,
        factors=index_factors,
        core=True,
        doc="Elements at positions given by one tensor a dimension.",
    ),
    define(
        "aten.index_put.default",
        Kind.INDEXING,
        factors=index_put_factors,
        core=True,
        doc="x with elements at given positions replaced or added to.",
    ),
    define(
        "aten.index_add.default",
        Kind.INDEXING,
        factors=index_add_factors,
        core=True,
        doc="x with slices of a source added at positions of one dimension.",
    ),
    define(
        "aten.scatter.src",
        Kind.INDEXING,
        factors=scatter_factors,
        core=True,
        doc="x with elements of a source written at positions of one dimension.",
    ),
    define(
        "aten.scatter.value",
        Kind.INDEXING,
        factors=scatter_factors,
        core=True,
        doc="x with one value written at positions of one dimension.",
    ),
    define(
        "aten.scatter_add.default",
        Kind.INDEXING,
        factors=scatter_factors,
        core=True,
        doc="x with elements of a source added at positions of one dimension.",
    ),
    define(
        "aten.topk.default",
        Kind.INDEXING,
        factors=topk_factors,
        core=True,
        doc="The greatest or least `k` elements of one dimension, and their positions.",
    ),
    define("aten.index_copy.default", Kind.INDEXING, factors=index_add_factors),
    define("aten.index_fill.int_Scalar", Kind.INDEXING, factors=index_fill_factors),
    define("aten.index_fill.int_Tensor", Kind.INDEXING, factors=index_fill_factors),
    define("aten.scatter.reduce", Kind.INDEXING, factors=scatter_factors),
    define("aten.scatter.value_reduce", Kind.INDEXING, factors=scatter_factors),
    define("aten.scatter_reduce.two", Kind.INDEXING, factors=scatter_factors),
    define("aten.bucketize.Tensor", Kind.INDEXING, factors=sorted_positions_factors),
    define("aten.full.default", Kind.CREATION, core=True, doc="One value everywhere."),
    define(
        "aten.arange.start_step",
        Kind.CREATION,
        core=True,
        doc="Numbers from `start` to `end` in steps.",
    ),
    define("aten.empty.memory_format", Kind.CREATION),
)
