"""Larger ops as core ops, in the form that the kernels of this backend carry out fastest.

They stay whole above: passes recognise a layer norm or a softmax by its op, and another backend may
take it as it is. Here each becomes pointwise ops and reductions, and so part of a kernel with its
neighbours. Numbers follow PyTorch's CPU kernels: statistics in f32 for narrower types, a variance
from centered elements, one rounding at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shoestring.ir import Function, Op, Value, trace
from shoestring.ir.inference import signature

from . import recurrence
from .convolutions import parts_of, role_of

aten = torch.ops.aten
Body = Callable[..., Any]


def _wide(x: Tensor) -> Tensor:
    """f32 for narrower floats: the type in which kernels compute."""
    return x.to(torch.float32) if x.dtype in (torch.bfloat16, torch.float16) else x


def _sum(x: Tensor, dims: Sequence[int], keep: bool = False) -> Tensor:
    # No dimensions mean all of them to PyTorch.
    result: Tensor = aten.sum.dim_IntList(x, list(dims), keep) if len(dims) else x
    return result


def _mean(x: Tensor, dims: Sequence[int]) -> Tensor:
    result: Tensor = aten.mean.dim(x, list(dims), True)
    return result


# -- softmax -------------------------------------------------------------------------------------


def softmax(op: Op, x: Tensor) -> Tensor:
    dim = [op.attr("dim")]
    wide = _wide(x)
    e = torch.exp(wide - aten.amax(wide, dim, True))
    return torch.div(e, _sum(e, dim, True)).to(op.result.type.dtype)


def log_softmax(op: Op, x: Tensor) -> Tensor:
    dim = [op.attr("dim")]
    wide = _wide(x)
    shifted: Tensor = wide - aten.amax(wide, dim, True)
    return (shifted - torch.log(_sum(torch.exp(shifted), dim, True))).to(op.result.type.dtype)


def softmax_backward(op: Op, grad: Tensor, y: Tensor) -> Tensor:
    grad, y = _wide(grad), _wide(y)
    total = _sum(grad * y, [op.attr("dim")], True)
    return ((grad - total) * y).to(op.result.type.dtype)


def log_softmax_backward(op: Op, grad: Tensor, y: Tensor) -> Tensor:
    grad, y = _wide(grad), _wide(y)
    total = _sum(grad, [op.attr("dim")], True)
    return (grad - torch.exp(y) * total).to(op.result.type.dtype)


# -- layer norm ----------------------------------------------------------------------------------


def _normalized(x: Tensor, dims: Sequence[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(x - mean) / sqrt(var + eps), mean, 1 / sqrt(var + eps) over `dims`."""
    mean = _mean(x, dims)
    centered = x - mean
    rstd = torch.rsqrt(_mean(centered * centered, dims) + eps)
    return centered * rstd, mean, rstd


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def layer_norm(
    op: Op, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    dims = range(x.dim() - len(op.attr("normalized_shape")), x.dim())
    out, mean, rstd = _normalized(_wide(x), dims, op.attr("eps"))
    y, *statistics = (r.type.dtype for r in op.results)
    return _affine(out, weight, bias).to(y), mean.to(statistics[0]), rstd.to(statistics[1])


def _norm_gradient(grad: Tensor, normal: Tensor, rstd: Tensor, dims: Sequence[int]) -> Tensor:
    """The gradient of `_normalized`, from that of its first result."""
    along = _mean(grad * normal, dims)
    return rstd * (grad - _mean(grad, dims) - normal * along)


def layer_norm_backward(
    op: Op, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor,
    weight: Tensor | None, bias: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    split = x.dim() - len(op.attr("normalized_shape"))
    grad, mean, rstd = _wide(grad), _wide(mean), _wide(rstd)
    normal = (_wide(x) - mean) * rstd
    scaled = grad if weight is None else grad * weight
    to_x, to_weight, to_bias = op.attr("output_mask")
    dx = _norm_gradient(scaled, normal, rstd, range(split, x.dim())) if to_x else None
    dweight = _sum(grad * normal, range(split)) if to_weight and weight is not None else None
    dbias = _sum(grad, range(split)) if to_bias and bias is not None else None
    return _in_types(op, dx, dweight, dbias)


def _in_types(op: Op, *results: Tensor | None) -> tuple[Tensor | None, ...]:
    types = iter(r.type.dtype for r in op.results)
    return tuple(None if r is None else r.to(next(types)) for r in results)


# -- batch norm and group norm -------------------------------------------------------------------


def _per_channel(x: Tensor, *values: Tensor | None) -> list[Tensor | None]:
    shape = [1, -1, *(1 for _ in x.shape[2:])]
    return [None if v is None else _wide(v).reshape(shape) for v in values]


def _all_but_channel(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def batch_norm(
    op: Op,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None = None,
    var: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """With or without the averages over all batches."""
    dims, momentum = _all_but_channel(x), op.attr("momentum")
    wide = _wide(x)
    weight, bias = _per_channel(x, weight, bias)
    found = _mean(wide, dims)
    centered = wide - found
    biased = _mean(centered * centered, dims)
    rstd = torch.rsqrt(biased + op.attr("eps"))
    count = x.numel() // x.shape[1]
    flat, unbiased = found.reshape(-1), biased.reshape(-1) * (count / (count - 1))
    averages = [
        new * momentum + _wide(old) * (1 - momentum)
        for new, old in ((flat, mean), (unbiased, var))
        if old is not None
    ]
    y = _affine(centered * rstd, weight, bias)
    return _in_types(op, y, flat, rstd.reshape(-1), *averages)


def batch_norm_backward(
    op: Op, grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor | None,
    var: Tensor | None, save_mean: Tensor | None, save_rstd: Tensor | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    dims = _all_but_channel(x)
    grad = _wide(grad)
    weight, mean, rstd = _per_channel(x, weight, save_mean, save_rstd)
    assert mean is not None and rstd is not None, "training saves its statistics"
    normal = (_wide(x) - mean) * rstd
    to_x, to_weight, to_bias = op.attr("output_mask")
    scale = rstd if weight is None else rstd * weight
    along, total = _sum(grad * normal, dims, True), _sum(grad, dims, True)
    count = x.numel() // x.shape[1]
    dx = scale * (grad - total / count - normal * (along / count)) if to_x else None
    return _in_types(
        op, dx, along.reshape(-1) if to_weight else None, total.reshape(-1) if to_bias else None
    )


def group_norm(
    op: Op, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    n, groups = x.shape[0], op.attr("group")
    out, mean, rstd = _normalized(_wide(x).reshape(n, groups, -1), [2], op.attr("eps"))
    weight, bias = _per_channel(x, weight, bias)
    y = _affine(out.reshape(x.shape), weight, bias)
    return _in_types(op, y, mean.reshape(n, groups), rstd.reshape(n, groups))


def group_norm_backward(
    op: Op, grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Sums within each channel serve the weight's gradient, and summed up x's."""
    n, channels, groups = x.shape[0], x.shape[1], op.attr("group")
    count = x.numel() // (n * groups)
    shape = (n, groups, channels // groups, -1)
    grad, wide = _wide(grad).reshape(shape), _wide(x).reshape(shape)
    mean, rstd = (_wide(s).reshape(n, groups, 1, 1) for s in (mean, rstd))
    normal = (wide - mean) * rstd
    along, total = _sum(grad * normal, [3], True), _sum(grad, [3], True)
    w = None if weight is None else _wide(weight).reshape(1, groups, -1, 1)
    inner_along = _sum(along if w is None else along * w, [2], True) / count
    inner_total = _sum(total if w is None else total * w, [2], True) / count
    scaled = grad if w is None else grad * w
    to_x, to_weight, to_bias = op.attr("output_mask")
    dx = rstd * (scaled - inner_total - normal * inner_along) if to_x else None
    return _in_types(
        op,
        None if dx is None else dx.reshape(x.shape),
        _sum(along, [0]).reshape(channels) if to_weight else None,
        _sum(total, [0]).reshape(channels) if to_bias else None,
    )


# -- convolutions --------------------------------------------------------------------------------


def convolution_backward(op: Op, grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Each gradient by an op of its own: two are products, the third is a sum."""
    rest = [op.attr(name) for name in CONVOLUTION]
    found: list[Tensor] = []
    for mask in parts_of(op):
        if mask[2]:
            others = [d for d in range(grad.dim()) if d != 1]
            found.append(_sum(_wide(grad), others).to(grad.dtype))
            continue
        parts = aten.convolution_backward(grad, x, weight, None, *rest, mask)
        found.append(parts[0] if mask[0] else parts[1])
    return tuple(found)


CONVOLUTION = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")

# -- which ops -----------------------------------------------------------------------------------


def _has_dims(op: Op) -> bool:
    return op.inputs[0].type.rank > 0


def _normalizes_some(op: Op) -> bool:
    return bool(op.attr("normalized_shape"))


def _many_per_channel(op: Op) -> bool:
    """A variance of one element has no unbiased form: PyTorch's own answer stands."""
    x = op.inputs[0].type.static_shape
    return bool(op.attr("training")) and math.prod(x) // x[1] > 1


def _has_products(op: Op) -> bool:
    """Whether generated code takes some of a convolution's gradients, and they are several."""
    masks = parts_of(op)
    plain = op.inputs[0].type.dtype in (torch.float32, torch.bfloat16)
    return plain and len(masks) > 1 and any(role_of(op, m) is not None for m in masks)


def _trains(op: Op) -> bool:
    return bool(op.attr("train"))


def _has_no_kernel(op: Op) -> bool:
    return not recurrence.takes(op)


def _as_defined(op: Op, *operands: Tensor | None) -> Any:
    """What the op means, in PyTorch's ops."""
    return op.opdef.reference(*operands, **op.attrs)


Condition = Callable[[Op], bool]
BODIES: dict[str, tuple[Condition, Body]] = {
    "aten._softmax.default": (_has_dims, softmax),
    "aten._log_softmax.default": (_has_dims, log_softmax),
    "aten._softmax_backward_data.default": (_has_dims, softmax_backward),
    "aten._log_softmax_backward_data.default": (_has_dims, log_softmax_backward),
    "aten.native_layer_norm.default": (_normalizes_some, layer_norm),
    "aten.native_layer_norm_backward.default": (_normalizes_some, layer_norm_backward),
    "aten._native_batch_norm_legit_functional.default": (_many_per_channel, batch_norm),
    "aten._native_batch_norm_legit.no_stats": (_many_per_channel, batch_norm),
    "aten.native_batch_norm_backward.default": (_trains, batch_norm_backward),
    "aten.convolution_backward.default": (_has_products, convolution_backward),
    "aten.native_group_norm.default": (_has_dims, group_norm),
    "aten.native_group_norm_backward.default": (_has_dims, group_norm_backward),
    **{name: (_has_no_kernel, _as_defined) for name in recurrence.NAMES},
}


def decompose(function: Function) -> Function:
    """The function with larger ops written as core ops. Parameters and outputs stay as they are."""
    subst: dict[Value, Value] = {}
    ops: list[Op] = []
    for op in function.ops:
        body = _body_of(op)
        if body is None:
            ops.append(op.map_operands(lambda v: subst.get(v, v)) if subst else op)
        else:
            ops += _inline(body, op, subst)
    if len(ops) == len(function.ops):
        return function
    return _without_dead(function.with_ops(ops, subst))


def _without_dead(function: Function) -> Function:
    """Drops what nobody reads: bodies also compute results that the step does not use."""
    live = {o.value for o in function.outputs} | {p.next for p in function.params if p.next}
    kept: list[Op] = []
    for op in reversed(function.ops):
        if live.intersection(op.results):
            kept.append(op)
            live.update(op.inputs)
    return function.with_ops(reversed(kept))


_TRACED: dict[object, Function] = {}


def _body_of(op: Op) -> Function | None:
    """The op's decomposition as a function of its operands; cached by operands and attributes."""
    if op.name not in BODIES:
        return None
    condition, body = BODIES[op.name]
    types = [v.type for v in (*op.inputs, *op.results)]
    if any(not t.is_static or t.numel == 0 or not t.dtype.is_floating_point for t in types):
        return None
    if not condition(op):
        return None
    key = signature(op)
    if key not in _TRACED:
        _TRACED[key] = trace(
            lambda *tensors: _call(op, body, tensors), [v.type for v in op.inputs], "body"
        )
    return _TRACED[key]


def _call(op: Op, body: Body, tensors: tuple[Tensor, ...]) -> Any:
    """Calls with the traced tensors in the places of the op's operands."""
    rest = iter(tensors)
    return body(op, *(next(rest) if isinstance(o, Value) else None for o in op.operands))


def _inline(body: Function, op: Op, subst: dict[Value, Value]) -> list[Op]:
    """The body's ops on the op's operands; its results take over those of the op."""
    table = dict(zip((p.value for p in body.params), op.inputs, strict=True))
    table = {inner: subst.get(v, v) for inner, v in table.items()}
    made = {r for inner in body.ops for r in inner.results}
    for output, result in zip(body.outputs, op.results, strict=True):
        if output.value in made and output.value not in table:
            table[output.value] = result
        else:
            subst[result] = table[output.value]
    ops: list[Op] = []
    for inner in body.ops:
        for r in inner.results:
            table.setdefault(r, Value(r.type, f"{op.results[0].name}.{r.name}"))
        bound = inner.map_operands(table.__getitem__)
        results = tuple(table[r] for r in inner.results)
        ops.append(Op(inner.opdef, bound.operands, inner.attrs, results, op.loc))
    return ops
