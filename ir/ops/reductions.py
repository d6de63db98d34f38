"""Reductions over dimensions, scans, and the normalizations that are made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..function import Op
from ..opdef import Cost, FactorMap, Kind, OpDef
from .aten import bytes_moved, define, pointwise_cost, replicate
from .factors import Dims, keep_all_but, normalize, normalize_dims


def _reduce(op: Op, dims: tuple[int, ...], keepdim: bool, how: str | None) -> FactorMap:
    """Dimensions in `dims` are combined by `how` (None: they must stay whole)."""
    rank = op.inputs[0].type.rank
    gone = set(dims)
    operand: Dims = tuple(f"d{i}" if how or i not in gone else None for i in range(rank))
    kept = [None if i in gone else f"d{i}" for i in range(rank) if keepdim or i not in gone]
    reduce = {f"d{i}": how for i in sorted(gone)} if how else {}
    rest = tuple((None,) * v.type.rank for v in op.inputs[1:])
    return FactorMap((operand, *rest), tuple(tuple(kept) for _ in op.results), reduce)


def over_dims(how: str | None) -> Callable[[Op], FactorMap]:
    """The rule of `op(x, dim, keepdim)`; dim may be a list, a number or absent (all)."""

    def rule(op: Op) -> FactorMap:
        given: Any = op.attr("dim") if "dim" in op.opdef.attr_defaults else None
        keepdim = bool(op.attr("keepdim")) if "keepdim" in op.opdef.attr_defaults else False
        dims = normalize_dims(given, op.inputs[0].type.rank)
        return _reduce(op, dims, keepdim, how)

    return rule


def along_dim(op: Op) -> FactorMap:
    """Softmax, scan, sort: `dim` stays whole, all others are free."""
    dim: int = op.attr("dim")
    return keep_all_but(op, [normalize(dim, op.results[0].type.rank)])


def norm_forward(op: Op) -> FactorMap:
    """layer norm (x, weight?, bias?) -> (y, mean, rstd): leading dimensions are free."""
    rank = op.inputs[0].type.rank
    lead = rank - len(op.attr("normalized_shape"))
    full: Dims = tuple(f"d{i}" if i < lead else None for i in range(rank))
    affine = tuple((None,) * v.type.rank for v in op.inputs[1:])
    stats = tuple(tuple(full[: r.type.rank]) for r in op.results[1:])
    return FactorMap((full, *affine), (full, *stats))


def norm_backward(op: Op) -> FactorMap:
    """layer norm backward: gradients of weight and bias are sums over the leading dimensions."""
    rank = op.inputs[0].type.rank
    lead = rank - len(op.attr("normalized_shape"))
    full: Dims = tuple(f"d{i}" if i < lead else None for i in range(rank))
    affine: Dims = (None,) * (rank - lead)
    # grad, x, mean, rstd, then weight and bias where there are any
    operands = (full, full, full, full, *(affine for _ in op.inputs[4:]))
    results = [full, affine, affine]
    wanted = op.attr("output_mask")
    kept = [dims for dims, w in zip(results, wanted, strict=True) if w]
    reduce = {f"d{i}": "sum" for i in range(lead)}
    return FactorMap(operands, tuple(kept), reduce)


def over_one_dim(op: Op) -> FactorMap:
    """kthvalue, median, mode over `dim`: values and indices; all other dimensions are free."""
    rank = op.inputs[0].type.rank
    dims = (normalize(op.attr("dim"), rank),)
    return _reduce(op, dims, bool(op.attr("keepdim")), None)


def _core(
    name: str,
    how: str | None,
    doc: str,
    factors: Callable[[Op], FactorMap | None] | None = None,
) -> OpDef:
    return define(
        f"aten.{name}",
        Kind.REDUCTION,
        factors=factors or over_dims(how),
        cost=cost_of_input,
        core=True,
        doc=doc,
    )


def cost_of_input(op: Op) -> Cost:
    """One operation an input element."""
    return Cost(op.inputs[0].type.numel, bytes_moved(op))


OPS: tuple[OpDef, ...] = (
    _core("sum.dim_IntList", "sum", doc="The sum over dimensions."),
    _core("sum.default", "sum", doc="The sum of all elements."),
    _core("amax.default", "max", doc="The greatest element over dimensions."),
    _core("amin.default", "min", doc="The least element over dimensions."),
    _core("mean.dim", None, doc="The mean over dimensions."),
    _core("mean.default", None, doc="The mean of all elements.", factors=replicate),
    _core("prod.default", None, doc="The product of all elements.", factors=replicate),
    _core("prod.dim_int", None, doc="The product over one dimension."),
    _core("any.dim", "max", doc="Whether an element is not zero, over one dimension."),
    _core("any.default", "max", doc="Whether any element is not zero."),
    _core("all.dim", "min", doc="Whether every element is not zero, over one dimension."),
    _core("all.default", "min", doc="Whether every element is not zero."),
    _core("argmax.default", None, doc="The position of the greatest element."),
    _core("argmin.default", None, doc="The position of the least element."),
    _core(
        "var.correction", None, doc="The variance over dimensions, with a correction of the count."
    ),
    define("aten.var_mean.correction", Kind.REDUCTION, factors=over_dims(None)),
    define("aten.std.correction", Kind.REDUCTION, factors=over_dims(None)),
    define("aten.logsumexp.default", Kind.REDUCTION, factors=over_dims(None)),
    define("aten.linalg_vector_norm.default", Kind.REDUCTION, factors=over_dims(None)),
    define(
        "aten.cumsum.default",
        Kind.REDUCTION,
        factors=along_dim,
        core=True,
        doc="Running sums along one dimension.",
    ),
    define("aten.cumprod.default", Kind.REDUCTION, factors=along_dim),
    define(
        "aten.sort.default",
        Kind.REDUCTION,
        factors=along_dim,
        core=True,
        doc="Elements in order along one dimension, and where they were.",
    ),
    define("aten.sort.stable", Kind.REDUCTION, factors=along_dim),
    define("aten._softmax.default", Kind.COMPOSITE, factors=along_dim, cost=pointwise_cost),
    define("aten._log_softmax.default", Kind.COMPOSITE, factors=along_dim, cost=pointwise_cost),
    define("aten._softmax_backward_data.default", Kind.COMPOSITE, factors=along_dim),
    define("aten._log_softmax_backward_data.default", Kind.COMPOSITE, factors=along_dim),
    define("aten.cummax.default", Kind.REDUCTION, factors=along_dim),
    define("aten.cummin.default", Kind.REDUCTION, factors=along_dim),
    define("aten.logcumsumexp.default", Kind.REDUCTION, factors=along_dim),
    define("aten.std_mean.correction", Kind.REDUCTION, factors=over_dims(None)),
    define("aten.aminmax.default", Kind.REDUCTION, factors=over_dims(None)),
    define("aten.nansum.default", Kind.REDUCTION, factors=over_dims("sum")),
    define("aten.count_nonzero.dim_IntList", Kind.REDUCTION, factors=over_dims("sum")),
    define("aten.max.default", Kind.REDUCTION, factors=over_dims("max")),
    define("aten.min.default", Kind.REDUCTION, factors=over_dims("min")),
    define("aten.max.dim", Kind.REDUCTION, factors=over_one_dim),
    define("aten.min.dim", Kind.REDUCTION, factors=over_one_dim),
    define("aten.kthvalue.default", Kind.REDUCTION, factors=over_one_dim),
    define("aten.median.dim", Kind.REDUCTION, factors=over_one_dim),
    define("aten.nanmedian.dim", Kind.REDUCTION, factors=over_one_dim),
    define("aten.mode.default", Kind.REDUCTION, factors=over_one_dim),
    define("aten.native_layer_norm.default", Kind.COMPOSITE, factors=norm_forward),
    define("aten.native_layer_norm_backward.default", Kind.COMPOSITE, factors=norm_backward),
)
