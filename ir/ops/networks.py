"""Layers that PyTorch has as one op: normalization, pooling, padding, resampling, losses."""

from __future__ import annotations

from collections.abc import Callable

from ..function import Op, Value
from ..opdef import FactorMap, Kind, OpDef
from ..types import TensorType
from .aten import define, infer_by_running
from .factors import Dims, broadcast, keep_whole, leading

# Ops by the number of trailing dimensions that they work on; batch and channels are free.
ONE = """
avg_pool1d.default reflection_pad1d.default
reflection_pad1d_backward.default replication_pad1d.default replication_pad1d_backward.default
upsample_linear1d.default upsample_linear1d_backward.default upsample_nearest1d.default
upsample_nearest1d_backward.default _upsample_nearest_exact1d.default
_upsample_nearest_exact1d_backward.default
""".split()
TWO = """
_adaptive_avg_pool2d.default _adaptive_avg_pool2d_backward.default adaptive_max_pool2d.default
adaptive_max_pool2d_backward.default avg_pool2d.default avg_pool2d_backward.default
max_pool2d_with_indices.default max_pool2d_with_indices_backward.default max_unpool2d.default
reflection_pad2d.default reflection_pad2d_backward.default replication_pad2d.default
replication_pad2d_backward.default upsample_bicubic2d.default upsample_bicubic2d_backward.default
upsample_bilinear2d.default upsample_bilinear2d_backward.default upsample_nearest2d.default
upsample_nearest2d_backward.default _upsample_nearest_exact2d.default
_upsample_nearest_exact2d_backward.default _upsample_bicubic2d_aa.default
_upsample_bilinear2d_aa.default
""".split()
THREE = """
_adaptive_avg_pool3d.default _adaptive_avg_pool3d_backward.default adaptive_max_pool3d.default
adaptive_max_pool3d_backward.default avg_pool3d.default avg_pool3d_backward.default
max_pool3d_with_indices.default max_pool3d_with_indices_backward.default max_unpool3d.default
reflection_pad3d.default reflection_pad3d_backward.default replication_pad3d.default
replication_pad3d_backward.default upsample_nearest3d.default upsample_nearest3d_backward.default
upsample_trilinear3d.default upsample_trilinear3d_backward.default
_upsample_nearest_exact3d.default _upsample_nearest_exact3d_backward.default
""".split()
# One example at a time; channels are regrouped.
IMAGES = "pixel_shuffle.default pixel_unshuffle.default".split()
# (input, target, ...) -> loss by `reduction`.
LOSSES = """
binary_cross_entropy.default binary_cross_entropy_with_logits.default huber_loss.default
mse_loss.default smooth_l1_loss.default soft_margin_loss.default
""".split()
LOSS_GRADIENTS = """
binary_cross_entropy_backward.default huber_loss_backward.default mse_loss_backward.default
smooth_l1_loss_backward.default soft_margin_loss_backward.default
""".split()
# Their kernels make the result like `self`; PyTorch's rules for types promote.
TYPED_BY_INPUT = frozenset(
    f"aten.{name}.default"
    for name in """huber_loss huber_loss_backward soft_margin_loss mse_loss_backward
    smooth_l1_loss_backward soft_margin_loss_backward""".split()
)
# (grad, self, ..., indices): where the gradient goes is known from the indices.
SIZES_ONLY = frozenset(
    f"aten.{name}_backward.default"
    for name in """max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d
    adaptive_max_pool3d""".split()
)
NONE, MEAN, SUM = 0, 1, 2  # PyTorch's codes of `reduction`


def batch_only(op: Op) -> FactorMap:
    """The first dimension of everything that has as many rows as the input."""
    rows = op.inputs[0].type.shape[:1]

    def of(v: Value) -> Dims:
        split = v.type.rank > 0 and v.type.shape[:1] == rows
        return ("n" if split else None, *(None,) * (v.type.rank - 1)) if v.type.rank else ()

    if any(v.type.shape[:1] != rows for v in (*op.inputs, *op.results)):
        return keep_whole(op)
    return FactorMap(tuple(map(of, op.inputs)), tuple(map(of, op.results)))


def loss_factors(op: Op) -> FactorMap:
    """Elements by themselves, or summed; a mean divides by a size that a part does not know."""
    if op.attr("reduction") == MEAN:
        return keep_whole(op)
    if op.attr("reduction") == NONE:
        return broadcast(op)
    names = tuple(f"d{i}" for i in range(op.inputs[0].type.rank))
    shape = op.inputs[0].type.shape
    if any(v.type.shape != shape for v in op.inputs):
        return keep_whole(op)
    return FactorMap(tuple(names for _ in op.inputs), ((),), {f: "sum" for f in names})


def loss_gradient_factors(op: Op) -> FactorMap:
    return keep_whole(op) if op.attr("reduction") == MEAN else broadcast(op)


def nll_factors(op: Op) -> FactorMap:
    """(scores [n, c, ...], target [n, ...], weight?) -> (loss, total weight): n is free."""
    scores, target = op.inputs[0].type, op.inputs[1].type
    if op.attr("reduction") == MEAN or scores.rank == 1:
        return keep_whole(op)
    spatial = tuple(f"d{i}" for i in range(scores.rank - 2))
    rows: Dims = ("n", *spatial)
    weight = tuple((None,) for _ in op.inputs[2:])
    loss: Dims = rows[: target.rank] if op.attr("reduction") == NONE else ()
    reduce = {str(f): "sum" for f in rows}
    return FactorMap((("n", None, *spatial), rows, *weight), (loss, ()), reduce)


def nll_backward_factors(op: Op) -> FactorMap:
    """(grad, scores, target, weight?, total weight) -> grad of scores: n is free."""
    grad, scores = op.inputs[0].type, op.inputs[1].type
    if scores.rank == 1:
        return keep_whole(op)
    spatial = tuple(f"d{i}" for i in range(scores.rank - 2))
    rows: Dims = ("n", *spatial)
    full: Dims = ("n", None, *spatial)
    rest = tuple((None,) * v.type.rank for v in op.inputs[3:])
    return FactorMap((rows if grad.rank else (), full, rows, *rest), (full,))


def group_norm_factors(op: Op) -> FactorMap:
    """(x [n, ...], weight?, bias?) -> (y, mean [n, g], rstd [n, g]): n is free."""
    full = _first(op.inputs[0])
    affine = tuple((None,) for _ in op.inputs[1:])
    return FactorMap((full, *affine), (full, ("n", None), ("n", None)))


def group_norm_backward_factors(op: Op) -> FactorMap:
    """(grad, x, mean, rstd, weight?) -> (dx, dweight, dbias): n is free, and summed."""
    grad, x, mean, rstd, *weight = op.inputs
    operands = (*map(_first, (grad, x, mean, rstd)), *((None,) for _ in weight))
    dims: tuple[Dims, ...] = (_first(x), (None,), (None,))
    results = [d for d, wanted in zip(dims, op.attr("output_mask"), strict=True) if wanted]
    return FactorMap(operands, tuple(results), {"n": "sum"})


def _first(v: Value) -> Dims:
    return ("n", *(None,) * (v.type.rank - 1))


def batch_norm_factors(op: Op) -> FactorMap:
    """Statistics are of a channel: channels are free. Without training the batch is too."""
    x = op.inputs[0].type
    channels = x.shape[1]
    batch = "n" if "training" not in op.opdef.attr_defaults and "no_training" in op.name else None
    full: Dims = (batch, "c", *(None,) * (x.rank - 2))

    def of(v: Value) -> Dims:
        if v.type.rank == x.rank:
            return full
        return ("c",) if v.type.shape == (channels,) else (None,) * v.type.rank

    results = tuple(map(of, op.results))
    empty = any(r.type.shape == (0,) for r in op.results)  # statistics that were not asked for
    reduce = {f: "sum" for f in (batch, "c") if f} if empty else {}
    return FactorMap(tuple(map(of, op.inputs)), results, reduce)


def grid_factors(op: Op) -> FactorMap:
    """(x [n, c, ...], grid [n, ..., d]) -> [n, c, ...]: examples and channels are free."""
    x, grid = op.inputs[0].type, op.inputs[1].type
    full: Dims = ("n", "c", *(None,) * (x.rank - 2))
    return FactorMap((full, ("n", *(None,) * (grid.rank - 1))), (full,))


def infer_by_input(op: Op) -> tuple[TensorType, ...]:
    """The shapes of PyTorch's rule with the element type of `self`.

    The rules for gradients divide by the number of elements, which may be zero.
    """
    place = op.opdef.operand_names.index("self")
    given = op.inputs[place].type
    if place and not given.numel:
        return (given,)
    return tuple(TensorType(given.dtype, t.shape) for t in infer_by_running(op))


def infer_group_norm_backward(op: Op) -> tuple[TensorType, ...]:
    """PyTorch's own rule divides by the size of a group, which may be zero."""
    x = op.inputs[1].type
    if x.numel:
        return infer_by_running(op)
    channels = x.with_shape((op.attr("C"),))
    return tuple(
        t
        for t, wanted in zip((x, channels, channels), op.attr("output_mask"), strict=True)
        if wanted
    )


def _family(names: list[str], rule: Callable[[Op], FactorMap], kind: Kind) -> list[OpDef]:
    return [
        define(
            name,
            kind,
            infer=infer_by_input if name in TYPED_BY_INPUT else infer_by_running,
            factors=rule,
            sizes_only=(1,) if name in SIZES_ONLY else (),
        )
        for name in (f"aten.{n}" for n in names)
    ]


OPS: tuple[OpDef, ...] = (
    *_family(ONE, leading(1), Kind.COMPOSITE),
    *_family(TWO, leading(2), Kind.COMPOSITE),
    *_family(THREE, leading(3), Kind.COMPOSITE),
    *_family(IMAGES, leading(3), Kind.COMPOSITE),
    *_family(LOSSES, loss_factors, Kind.COMPOSITE),
    *_family(LOSS_GRADIENTS, loss_gradient_factors, Kind.COMPOSITE),
    *_family(
        ["nll_loss_forward.default", "nll_loss2d_forward.default"], nll_factors, Kind.COMPOSITE
    ),
    *_family(
        ["nll_loss_backward.default", "nll_loss2d_backward.default"],
        nll_backward_factors,
        Kind.COMPOSITE,
    ),
    *_family(["im2col.default"], batch_only, Kind.COMPOSITE),
    *_family(["grid_sampler_2d.default", "grid_sampler_3d.default"], grid_factors, Kind.COMPOSITE),
    *_family(["native_group_norm.default"], group_norm_factors, Kind.COMPOSITE),
    define(
        "aten.native_group_norm_backward.default",
        Kind.COMPOSITE,
        infer=infer_group_norm_backward,
        factors=group_norm_backward_factors,
    ),
    *_family(
        [
            "_native_batch_norm_legit.no_stats",
            "_native_batch_norm_legit_functional.default",
            "_native_batch_norm_legit_no_training.default",
            "native_batch_norm_backward.default",
        ],
        batch_norm_factors,
        Kind.COMPOSITE,
    ),
)
