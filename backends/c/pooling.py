"""The largest element of each window, where it is, and the gradient of that, in C."""

from __future__ import annotations

import math

import torch

from shoestring.ir import Op

from .claims import Claim, comment_of, fork
from .expressions import MEMORY, REGISTER, load, rounded, store
from .layout import row_major
from .nodes import Base, Node, Ref

FORWARD = "aten.max_pool2d_with_indices.default"
BACKWARD = "aten.max_pool2d_with_indices_backward.default"
TYPES = (torch.float32, torch.float64, torch.bfloat16)
PARALLEL = 1 << 13  # results below which one thread is faster
WIDEST = 4096  # results of a row, which are on the stack
LARGEST = 1 << 31  # elements of an image, which 32 bits count


def claim(node: Node) -> Claim | str | None:
    """The kernel for `max_pool2d_with_indices` or its gradient."""
    if node.op.name == FORWARD:
        return _forward(node)
    return _backward(node) if node.op.name == BACKWARD else None


def _forward(node: Node) -> Claim | str:
    (x,), (values, indices) = node.refs, node.outs
    if x.dtype not in TYPES:
        return "elements of another type"
    if not (x.layout.numel and values.nbytes) or x.layout.strides != row_major(x.shape).strides:
        return "an operand in another order"
    if values.shape[-1] > WIDEST or x.shape[-1] * x.shape[-2] >= LARGEST:
        return "larger than this kernel's images"
    results = tuple(Ref(out, row_major(out.shape)) for out in (values, indices))
    comment = comment_of("the largest of each window", node)
    return Claim("max_pool2d", comment, _body(node.op, x, values.shape), (x, *results), (1, 2))


def _backward(node: Node) -> Claim | str:
    grad, indices = (o for i, o in enumerate(node.operands) if i != 1 and isinstance(o, Ref))
    (out,) = node.outs
    if grad.dtype not in TYPES or out.dtype is not grad.dtype or indices.dtype is not torch.int64:
        return "elements of another type"
    if not (grad.layout.numel and out.nbytes):
        return "no elements"
    if any(r.layout.strides != row_major(r.shape).strides for r in (grad, indices)):
        return "an operand in another order"
    comment = comment_of("gradients go to the largest of each window", node)
    pointers = (grad, indices, Ref(out, row_major(out.shape)))
    return Claim("max_pool2d_backward", comment, _scatter(grad, out), pointers, (2,))


def _scatter(grad: Ref, out: Base) -> str:
    """One plane at a time, in the order of the windows.

    The place that PyTorch gives a window without elements is outside of the plane, and its own
    gradient writes there; here it is left out.
    """
    size, count = math.prod(out.shape[-2:]), math.prod(grad.shape[-2:])
    planes = math.prod(out.shape[:-2])
    kind = MEMORY[out.dtype]
    total = f"{load('image[at]', out.dtype)} + {load('from[i]', out.dtype)}"
    return f"""\
    const {kind} *restrict grad = b[0];
    const int64_t *restrict places = b[1];
    {kind} *restrict out = b[2];
{fork(planes * count, PARALLEL)}    for (int64_t plane = 0; plane < {planes}; plane++) {{
        {kind} *restrict image = out + plane * {size};
        const {kind} *restrict from = grad + plane * {count};
        const int64_t *restrict place = places + plane * {count};
        memset(image, 0, {size * out.dtype.itemsize});
        for (int64_t i = 0; i < {count}; i++) {{
            const uint64_t at = (uint64_t)place[i];
            if (at < {size}) image[at] = {store(rounded(total, out.dtype), out.dtype)};
        }}
    }}"""


def _pair(given: list[int] | tuple[int, ...]) -> tuple[int, int]:
    return (given[0], given[-1])


def _body(op: Op, x: Ref, shape: tuple[int, ...]) -> str:
    """One row of results at a time, tap by tap, so that columns are lanes. NaN is the largest."""
    kernel = _pair(op.attr("kernel_size"))
    stride = _pair(op.attr("stride") or kernel)
    pad, gap = _pair(op.attr("padding")), _pair(op.attr("dilation"))
    (height, width), (rows, cols) = x.shape[-2:], shape[-2:]
    kind, number = MEMORY[x.dtype], REGISTER[x.dtype]
    planes = x.layout.numel // (height * width)

    def inside(name: str, i: int) -> str:
        """The first tap that is not before the image."""
        skip = f"({gap[i] - 1} - {name}) / {gap[i]} * {gap[i]}" if gap[i] > 1 else f"-{name}"
        return f"if ({name} < 0) {name} += {skip};"

    def tap(at: int) -> str:
        """One column of the windows, for those whose tap is within the image."""
        first = max(0, (stride[1] - 1 - at) // stride[1])
        last = min(cols, (width - 1 - at) // stride[1] + 1)
        return f"""
                #pragma omp simd
                for (int64_t j = {first}; j < {last}; j++) {{
                    const int32_t c = (int32_t)(j * {stride[1]} + {at});
                    const {number} v = {load("line[c]", x.dtype)};
                    const int larger = v > most[j] || v != v;
                    most[j] = larger ? v : most[j];
                    place[j] = larger ? begin + c : place[j];
                }}"""

    taps = "".join(tap(k * gap[1] - pad[1]) for k in range(kernel[1]))
    return f"""\
    const {kind} *restrict x = b[0];
    {kind} *restrict values = b[1];
    int64_t *restrict places = b[2];
{fork(planes * rows * cols, PARALLEL)}    for (int64_t plane = 0; plane < {planes}; plane++) {{
        const {kind} *restrict image = x + plane * {height * width};
        {number} most[{cols}];
        int32_t place[{cols}];
        for (int64_t i = 0; i < {rows}; i++) {{
            int64_t r0 = i * {stride[0]} - {pad[0]}, r1 = r0 + {(kernel[0] - 1) * gap[0]};
            {inside("r0", 0)}
            if (r1 > {height - 1}) r1 = {height - 1};
            for (int64_t j = 0; j < {cols}; j++) {{
                int64_t c0 = j * {stride[1]} - {pad[1]};
                {inside("c0", 1)}
                most[j] = -INFINITY;
                place[j] = (int32_t)(r0 * {width} + c0);
            }}
            for (int64_t r = r0; r <= r1; r += {gap[0]}) {{
                const {kind} *restrict line = image + r * {width};
                const int32_t begin = (int32_t)(r * {width});{taps}
            }}
            const int64_t out = (plane * {rows} + i) * {cols};
            for (int64_t j = 0; j < {cols}; j++) {{
                values[out + j] = {store("most[j]", x.dtype)};
                places[out + j] = place[j];
            }}
        }}
    }}"""
