"""Pooling, resizing and repeats as views, sums and convolutions.

N: batch, C: channels, H, W: height and width.
"""

# mypy: disable-error-code="no-any-return"
# torch.ops is untyped: every call through it gives Any.

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

aten = torch.ops.aten
Pair = Sequence[int]


def _two(x: Pair, default: Pair = ()) -> tuple[int, int]:
    given = list(x) or list(default)
    return (given[0], given[-1])


def _output(size: int, kernel: int, stride: int, padding: int, ceil: bool) -> int:
    """Windows along one dimension; with `ceil` the last one must begin inside the input."""
    steps = (size + 2 * padding - kernel) / stride
    count = (math.ceil(steps) if ceil else math.floor(steps)) + 1
    return count - 1 if ceil and (count - 1) * stride >= size + padding else count


def _counts(
    size: int, kernel: int, stride: int, padding: int, n: int, pad_counts: bool
) -> list[int]:
    """Elements that each window divides by."""
    starts = [i * stride - padding for i in range(n)]
    ends = [min(s + kernel, size + padding) for s in starts]
    if pad_counts:
        return [e - s for s, e in zip(starts, ends, strict=True)]
    return [min(e, size) - max(s, 0) for s, e in zip(starts, ends, strict=True)]


def _divisor(
    x: Tensor,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    out: Pair,
    counted: bool,
    fixed: int | None,
) -> Tensor | float:
    """What each window's sum [H, W] is divided by."""
    if fixed:
        return float(fixed)
    sizes = x.shape[-2:]
    h, w = (_counts(sizes[i], kernel[i], stride[i], padding[i], out[i], counted) for i in (0, 1))
    table = {a * b for a in h for b in w}
    if len(table) == 1:
        return float(table.pop())
    rows = _vector(h, x.dtype).unsqueeze(-1)
    return rows * _vector(w, x.dtype)


def _vector(numbers: list[int], dtype: torch.dtype) -> Tensor:
    return torch.cat([torch.full((1,), float(n), dtype=dtype) for n in numbers])


def avg_pool2d(
    x: Tensor,
    kernel_size: Pair,
    stride: Pair = (),
    padding: Pair = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    kernel, padding = _two(kernel_size), _two(padding)
    stride = _two(stride, kernel)
    out = [_output(x.shape[i - 2], kernel[i], stride[i], padding[i], ceil_mode) for i in (0, 1)]
    need = [(out[i] - 1) * stride[i] + kernel[i] - x.shape[i - 2] - padding[i] for i in (0, 1)]
    edges = [padding[1], max(need[1], 0), padding[0], max(need[0], 0)]
    padded = aten.constant_pad_nd(x, edges, 0.0)
    windows = padded.unfold(-2, kernel[0], stride[0]).unfold(-2, kernel[1], stride[1])
    windows = windows[..., : out[0], : out[1], :, :]
    total = aten.sum(windows, [-2, -1])
    by = _divisor(x, kernel, stride, padding, out, count_include_pad, divisor_override)
    return total / by


def avg_pool2d_backward(
    grad: Tensor,
    x: Tensor,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """The transpose of a convolution with ones, channel by channel."""
    kernel, padding = _two(kernel_size), _two(padding)
    stride = _two(stride, kernel)
    out = grad.shape[-2:]
    by = _divisor(x, kernel, stride, padding, out, count_include_pad, divisor_override)
    channels = x.shape[-3]
    spread = grad / by
    weight = torch.full((channels, 1, *kernel), 1.0, dtype=grad.dtype)
    whole = aten.convolution(
        spread, weight, None, list(stride), [0, 0], [1, 1], True, [0, 0], channels
    )
    rest = [x.shape[i - 2] + padding[i] - whole.shape[i - 2] for i in (0, 1)]
    grown = aten.constant_pad_nd(whole, [0, max(rest[1], 0), 0, max(rest[0], 0)], 0.0)
    top, left = padding
    return grown[..., top : top + x.shape[-2], left : left + x.shape[-1]]


def adaptive_avg_pool2d_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Where windows do not overlap: each element gets its window's share."""
    factors = [x.shape[i] // grad.shape[i] for i in (-2, -1)]
    if any(x.shape[i] % grad.shape[i] for i in (-2, -1)):
        raise NotImplementedError("adaptive pooling with overlapping windows")
    return _stretch(grad / float(factors[0] * factors[1]), factors)


def _stretch(x: Tensor, factors: Sequence[int]) -> Tensor:
    """Each element repeated along height and width."""
    *lead, h, w = x.shape
    a, b = factors
    wide = x.reshape(*lead, h, 1, w, 1).expand(*lead, h, a, w, b)
    return wide.reshape(*lead, h * a, w * b)


def upsample_nearest2d_backward(
    grad: Tensor, output_size: Pair, input_size: Pair, scale_h: float | None = None,
    scale_w: float | None = None,
) -> Tensor:  # fmt: skip
    """Whole factors: the sum over the copies of each element."""
    *lead, h, w = input_size
    a, b = output_size[0] // h, output_size[1] // w
    if output_size[0] != a * h or output_size[1] != b * w:
        raise NotImplementedError("resizing by a factor that is not whole")
    return aten.sum(grad.reshape(*lead, h, a, w, b), [-3, -1])


def repeat(x: Tensor, repeats: Sequence[int]) -> Tensor:
    lead = len(repeats) - x.dim()
    shape = [1] * lead + list(x.shape)
    split = x.reshape([d for s in shape for d in (1, s)])
    wide = split.expand([d for r, s in zip(repeats, shape, strict=True) for d in (r, s)])
    return wide.reshape([r * s for r, s in zip(repeats, shape, strict=True)])
