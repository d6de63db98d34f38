"""Larger ops as torch programs over smaller ones, where PyTorch's own table has none that fits.

Arguments are those of the ATen schema, in order. Numbers follow the CPU kernels: statistics in
f32 for narrower types, one pass over the centered elements for a variance.
"""

# mypy: disable-error-code="no-any-return"
# torch.ops is untyped: every call through it gives Any.

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._decomp import (
    core_aten_decompositions,
    decomposition_table,  # pyright: ignore[reportUnknownVariableType]
)
from torch._ops import OpOverload

from . import attention, pooling

aten = torch.ops.aten
FLASH = "aten._scaled_dot_product_flash_attention_for_cpu"
Body = Callable[..., Any]

# -- numbers as operands of ops that take tensors only -------------------------------------------


def as_tensor(x: Tensor, n: Any) -> Tensor:
    """A number as a tensor without dimensions, of the type in which `x op n` is computed."""
    return torch.full((), n, dtype=torch.result_type(x, n))


def _scalar_form(tensor_form: OpOverload) -> Body:
    def body(x: Tensor, n: Any) -> Any:
        return tensor_form(x, as_tensor(x, n))

    return body


def pow_scalar(x: Tensor, n: Any) -> Tensor:
    """x ** n; the kernel computes these exponents by the same simpler ops."""
    if x.dtype.is_floating_point and n in _POWERS:
        return _POWERS[n](x)
    return aten.pow.Tensor_Tensor(x, as_tensor(x, n))


_POWERS: dict[float, Callable[[Tensor], Tensor]] = {
    0.5: aten.sqrt.default,
    2.0: lambda x: x * x,
    3.0: lambda x: x * x * x,
    -0.5: aten.rsqrt.default,
    -1.0: aten.reciprocal.default,
    -2.0: lambda x: aten.reciprocal(x * x),
}


def scalar_pow(n: Any, x: Tensor) -> Tensor:
    return aten.pow.Tensor_Tensor(as_tensor(x, n), x)


# -- pointwise -----------------------------------------------------------------------------------


def computing_type(x: Tensor) -> torch.dtype:
    """f32 for narrower floats: the type in which kernels compute."""
    narrow = x.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if narrow else x.dtype


def in_computing_type(f: Callable[..., Tensor]) -> Body:
    """`f` computed in f32 where its first operand is narrower, rounded once at the end."""

    def body(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dtype = computing_type(x)
        wide = [a.to(dtype) if isinstance(a, Tensor) else a for a in (x, *args)]
        return f(*wide, **kwargs).to(x.dtype)

    return body


def _phi(x: Tensor) -> Tensor:
    return (torch.erf(x * math.sqrt(0.5)) + 1.0) * 0.5


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """x * Phi(x), or its tanh form (Hendrycks, Gimpel, 2016)."""
    if approximate == "none":
        return x * 0.5 * (1.0 + torch.erf(x * math.sqrt(0.5)))
    inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * (x * x * x))
    return 0.5 * x * (1.0 + torch.tanh(inner))


def gelu_backward(grad: Tensor, x: Tensor, *, approximate: str = "none") -> Tensor:
    if approximate == "none":
        density = torch.exp(x * x * -0.5) * (1.0 / math.sqrt(2.0 * math.pi))
        return grad * (_phi(x) + x * density)
    scale = math.sqrt(2.0 / math.pi)
    t = torch.tanh(scale * (x + 0.044715 * (x * x * x)))
    slope = scale * (1.0 + 3.0 * 0.044715 * (x * x))
    return grad * (0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope)


def silu(x: Tensor) -> Tensor:
    return x / (1.0 + torch.exp(-x))


def silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    s = 1.0 / (1.0 + torch.exp(-x))
    return grad * s * (1.0 + x * (1.0 - s))


def clamp(x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    """min(max(x, low), high), NaN kept."""
    if low is not None:
        low = low if isinstance(low, Tensor) else as_tensor(x, low)
        x = aten.maximum(*_alike(x, low))
    if high is not None:
        high = high if isinstance(high, Tensor) else as_tensor(x, high)
        x = aten.minimum(*_alike(x, high))
    return x


def clamp_max(x: Tensor, high: Any) -> Tensor:
    return clamp(x, None, high)


def _alike(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.result_type(x, y)
    return x.to(dtype), y.to(dtype)


def leaky_relu(x: Tensor, slope: float = 0.01) -> Tensor:
    return torch.where(x > 0, x, x * slope)


def elu(x: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Tensor:
    negative = torch.expm1(x * input_scale) * (alpha * scale)
    return torch.where(x > 0, x * scale, negative)


def copysign(x: Tensor, sign: Tensor) -> Tensor:
    magnitude = torch.abs(x)
    return torch.where(torch.signbit(sign), -magnitude, magnitude)


# -- reductions and normalization ----------------------------------------------------------------


def softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    if not x.numel():
        return x
    wide = x.to(computing_type(x))
    shifted = torch.exp(wide - aten.amax(wide, [dim], True))
    result = shifted / aten.sum(shifted, [dim], True)
    return result if half_to_float else result.to(x.dtype)


def log_softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    if not x.numel():
        return x
    wide = x.to(computing_type(x))
    shifted = wide - aten.amax(wide, [dim], True)
    result = shifted - torch.log(aten.sum(torch.exp(shifted), [dim], True))
    return result if half_to_float else result.to(x.dtype)


def statistics_type(x: Tensor, weight: Tensor | None) -> torch.dtype:
    """f32 where narrow elements meet f32 weights, else the elements' own type."""
    mixed = weight is not None and weight.dtype != x.dtype
    return computing_type(x) if mixed else x.dtype


def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd); statistics in f32 for narrower types."""
    wide = x.to(computing_type(x))
    dims = list(range(x.dim() - len(shape), x.dim()))
    mean = aten.mean(wide, dims, True)
    centered = wide - mean
    rstd = torch.rsqrt(aten.mean(centered * centered, dims, True) + eps)
    out = centered * rstd
    out = out if weight is None else out * weight
    out = out if bias is None else out + bias
    stats = statistics_type(x, weight)
    return out.to(x.dtype), mean.to(stats), rstd.to(stats)


def vector_norm(
    x: Tensor, order: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    wide = x.to(dtype or x.dtype).to(computing_type(x))
    dims = list(range(x.dim())) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    absolute = torch.abs(wide)
    if order == math.inf:
        result = aten.amax(absolute, dims, keepdim)
    elif order == -math.inf:
        result = aten.amin(absolute, dims, keepdim)
    elif order == 0:
        result = aten.sum((wide != 0).to(wide.dtype), dims, keepdim)
    elif order == 1:
        result = aten.sum(absolute, dims, keepdim)
    elif order == 2:
        result = torch.sqrt(aten.sum(wide * wide, dims, keepdim))
    else:
        result = aten.sum(absolute**order, dims, keepdim) ** (1.0 / order)
    return result.to(dtype or x.dtype)


def var_mean(
    x: Tensor, dim: Any = None, *, correction: Any = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    dims = list(range(x.dim())) if dim is None else list(dim)
    variance = aten.var.correction(x, dims, correction=correction, keepdim=keepdim)
    return variance, aten.mean(x, dims, keepdim)


def stable_sort(
    x: Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor]:
    """The core sort keeps the order of equal elements."""
    return tuple(aten.sort.default(x, dim, descending))


def group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, c: int, hw: int, groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, mean [n, groups], rstd [n, groups])."""
    wide = x.to(computing_type(x)).reshape(n, groups, (c // groups) * hw)
    mean = aten.mean(wide, [-1], True)
    centered = wide - mean
    rstd = torch.rsqrt(aten.mean(centered * centered, [-1], True) + eps)
    out = (centered * rstd).reshape(x.shape)
    affine = [1, c, *(1 for _ in x.shape[2:])]
    out = out if weight is None else out * weight.reshape(affine)
    out = out if bias is None else out + bias.reshape(affine)
    stats = statistics_type(x, weight)
    return out.to(x.dtype), mean.reshape(n, groups).to(stats), rstd.reshape(n, groups).to(stats)


def _extreme(value: OpOverload) -> Body:
    def body(x: Tensor) -> Tensor:
        return value(x, list(range(x.dim())))

    return body


def _extreme_along(value: OpOverload, position: OpOverload) -> Body:
    def body(x: Tensor, dim: int, keepdim: bool = False) -> tuple[Tensor, Tensor]:
        return value(x, [dim], keepdim), position(x, dim, keepdim)

    return body


def fmax(x: Tensor, y: Tensor) -> Tensor:
    """The larger one; the other where one is NaN."""
    return _ignoring_nan(aten.maximum.default, x, y)


def fmin(x: Tensor, y: Tensor) -> Tensor:
    return _ignoring_nan(aten.minimum.default, x, y)


def _ignoring_nan(choose: OpOverload, x: Tensor, y: Tensor) -> Tensor:
    x, y = _alike(x, y)
    return torch.where(torch.isnan(x), y, torch.where(torch.isnan(y), x, choose(x, y)))


_AS_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def signbit(x: Tensor) -> Tensor:
    """The sign as it is stored: -0.0 has one, and so may NaN."""
    stored = x.view(_AS_INTEGER[x.dtype.itemsize]) if x.dtype.is_floating_point else x
    return stored < as_tensor(stored, 0)


def addbmm(self: Tensor, x: Tensor, y: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return self * beta + aten.sum(aten.bmm(x, y), [0]) * alpha


def masked_scatter(x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """The n-th place where the mask holds gets the n-th element of the source."""
    mask = mask.expand(x.shape) if mask.shape != x.shape else mask
    nth = aten.cumsum(mask.reshape(-1).to(torch.int64), 0) - 1
    taken = aten.index_select(source.reshape(-1), 0, clamp(nth, 0, source.numel() - 1))
    return torch.where(mask, taken.reshape(x.shape), x)


_COMPARISONS = "eq ne lt le gt ge fmod remainder bitwise_and bitwise_or bitwise_xor".split()

OWN: dict[str, Body] = {
    **{f"aten.{n}.Scalar": _scalar_form(getattr(aten, n).Tensor) for n in _COMPARISONS},
    "aten.pow.Tensor_Scalar": pow_scalar,
    "aten.pow.Scalar": scalar_pow,
    "aten.gelu.default": in_computing_type(gelu),
    "aten.gelu_backward.default": in_computing_type(gelu_backward),
    "aten.silu.default": in_computing_type(silu),
    "aten.silu_backward.default": in_computing_type(silu_backward),
    "aten.clamp.default": clamp,
    "aten.clamp.Tensor": clamp,
    "aten.clamp_min.default": clamp,
    "aten.clamp_min.Tensor": clamp,
    "aten.clamp_max.default": clamp_max,
    "aten.clamp_max.Tensor": clamp_max,
    "aten.hardtanh.default": clamp,
    "aten.leaky_relu.default": leaky_relu,
    "aten.elu.default": in_computing_type(elu),
    "aten.copysign.Tensor": copysign,
    "aten._softmax.default": softmax,
    "aten._log_softmax.default": log_softmax,
    "aten.native_layer_norm.default": layer_norm,
    "aten.linalg_vector_norm.default": vector_norm,
    "aten.var_mean.correction": var_mean,
    "aten.sort.stable": stable_sort,
    "aten.native_group_norm.default": group_norm,
    "aten.max.dim": _extreme_along(aten.amax.default, aten.argmax.default),
    "aten.min.dim": _extreme_along(aten.amin.default, aten.argmin.default),
    "aten.max.default": _extreme(aten.amax.default),
    "aten.min.default": _extreme(aten.amin.default),
    "aten.fmax.default": fmax,
    "aten.fmin.default": fmin,
    "aten.signbit.default": signbit,
    "aten.addbmm.default": addbmm,
    "aten.masked_scatter.default": masked_scatter,
    "aten.repeat.default": pooling.repeat,
    "aten.avg_pool2d.default": pooling.avg_pool2d,
    "aten.avg_pool2d_backward.default": pooling.avg_pool2d_backward,
    "aten._adaptive_avg_pool2d_backward.default": pooling.adaptive_avg_pool2d_backward,
    "aten.upsample_nearest2d_backward.default": pooling.upsample_nearest2d_backward,
    f"{FLASH}.default": attention.attention,
    f"{FLASH}_backward.default": attention.attention_backward,
}

# PyTorch's decompositions of these lose accuracy or change what is computed.
REFUSED = frozenset({"aten.nextafter.default"})


@cache
def _core_table() -> dict[Any, Body]:
    """PyTorch's table; its references in terms of `prims` are left out."""
    table: dict[Any, Body] = decomposition_table  # pyright: ignore[reportUnknownVariableType]
    plain = {op: body for op, body in table.items() if not _is_reference(body)}
    return {**plain, **core_aten_decompositions()}


def _is_reference(body: Body) -> bool:
    return getattr(body, "__module__", "").startswith(("torch._refs", "torch._prims"))


def find_body(overload: OpOverload, name: str) -> Body | None:
    """The torch program of an ATen op, or None."""
    if name in REFUSED:
        return None
    return OWN.get(name) or _core_table().get(overload)
