"""Convolutions as matrix products, one side of which is walked by several strides.

With x in a frame of zeros, element (channel, tap) of the window of position (image, place) is where
channel + tap + image + place lead. So each of the three products needs no copy of the windows:

    result[o, (n, p)]     = sum over (i, t)   weight[o, (i, t)]    x[(i, t), (n, p)]
    grad of x[i, (n, p)]  = sum over (o, t)   weight[(o, t), i]    grad[(o, t reversed), (n, p)]
    grad of weight[o, (i, t)] = sum over (n, p)   grad[o, (n, p)]  x[(n, p), (i, t)]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from shoestring.ir import Op

from .layout import row_major
from .sides import Digits, Frame, Side, Sides, count_of, simplified

if TYPE_CHECKING:
    from .nodes import Node, Ref

FORWARD, BACKWARD = "aten.convolution.default", "aten.convolution_backward.default"
SPATIAL = 3  # dimensions of every image here; those that it does not have are of size 1
LEAST = 4  # channels in a row of the product; of fewer, the library makes more
MANY = 32  # places of an image that fill the columns of a product


class Role(Enum):
    """Which of the three products of a convolution."""

    RESULT = "result"
    INPUT = "gradient of the input"
    WEIGHT = "gradient of the weight"


Mask = tuple[bool, bool, bool]


def role_of(op: Op, mask: Mask | None = None) -> Role | None:
    """The product that an op is; None where it is not one that generated code takes.

    Args:
        op: any.
        mask: which gradients are asked for, if not those of the op's own `output_mask`.
    """
    if op.name == FORWARD:
        role, grad, x, weight = Role.RESULT, op.result, op.inputs[0], op.inputs[1]
    elif op.name == BACKWARD:
        to_x, to_weight, to_bias = mask or op.attr("output_mask")
        if to_bias or to_x == to_weight:
            return None
        role = Role.INPUT if to_x else Role.WEIGHT
        grad, x, weight = op.inputs[:3]
    else:
        return None
    shape = weight.type.static_shape
    rank = len(shape) - 2
    if op.attr("transposed") or op.attr("groups") != 1 or not 1 <= rank <= SPATIAL:
        return None
    if any(v.type.rank != rank + 2 for v in (grad, x)):
        return None
    if role is not Role.INPUT:
        return role if shape[0] >= LEAST else None
    whole = max(_spatial(op, "stride", rank)) == 1 and min(_reversed_padding(op, shape[2:])) >= 0
    return role if whole and shape[1] >= LEAST else None


def parts_of(op: Op) -> list[Mask]:
    """The output masks of the ops, one a result, into which a backward convolution falls apart."""
    mask = op.attr("output_mask")
    masks = [(True, False, False), (False, True, False), (False, False, True)]
    return [m for m, wanted in zip(masks, mask, strict=True) if wanted]


def by_image(shape: Sequence[int]) -> bool:
    """Whether the places of one image fill the columns of a product; small images are joined."""
    return math.prod(shape[2:]) >= MANY


def _spatial(op: Op, name: str, rank: int, missing: int = 1) -> tuple[int, ...]:
    """An attribute for each of the three dimensions."""
    given = tuple(op.attr(name))
    given = given * rank if len(given) == 1 else given
    return (missing,) * (SPATIAL - rank) + given


def _reversed_padding(op: Op, kernel: Sequence[int]) -> tuple[int, ...]:
    """The zeros around the gradient that the gradient of the input is a convolution of."""
    rank = len(kernel)
    sizes = (1,) * (SPATIAL - rank) + tuple(kernel)
    pads, gaps = _spatial(op, "padding", rank, 0), _spatial(op, "dilation", rank)
    return tuple(d * (k - 1) - p for d, k, p in zip(gaps, sizes, pads, strict=True))


def _in_three(values: Sequence[int], fill: int) -> tuple[int, ...]:
    """Numbers of the dimensions of images, two others ahead of them, for three dimensions."""
    return (*values[:2], *(fill,) * (SPATIAL + 2 - len(values)), *values[2:])


def sides_of(node: Node, role: Role) -> Sides:
    """How both sides of the product are walked."""
    left, right = node.refs
    geometry = _geometry(node, role)
    shape, steps = _in_three(left.shape, 1), _in_three(left.layout.strides, 0)
    images, channels = right.shape[:2]
    image_step, channel_step = geometry.along[:2]
    window = simplified([(channels, channel_step), *geometry.taps])
    row, summed = (0, 1) if role is Role.RESULT else (1, 0)
    rows = ((shape[row], steps[row]),)
    sums = simplified([(shape[summed], steps[summed]), *zip(shape[2:], steps[2:], strict=True)])
    together = simplified([(images, image_step), *geometry.places])
    a = Side(left, 0, rows, sums)
    if role is Role.WEIGHT:
        b, joined = Side(right, 0, together, window), 1
    elif by_image(node.outs[0].shape):
        places = simplified(geometry.places)
        b, joined = Side(right, image_step, window, places, geometry.first), 1
    else:
        b, joined = Side(right, 0, window, together, geometry.first), images
    frame = geometry.frame if geometry.frame.is_needed else None
    return Sides(a, b, count_of(sums), frame, joined)


@dataclass(frozen=True)
class _Geometry:
    """How the right side of a product is walked.

    Attributes:
        frame: the images, with the zeros around them.
        along: the strides of the images in it: image, channel, three dimensions.
        taps, places: size and stride of the windows and of their positions, for each dimension.
        first: the element at which the first window begins.
    """

    frame: Frame
    along: tuple[int, ...]
    taps: Digits
    places: Digits
    first: int


def _geometry(node: Node, role: Role) -> _Geometry:
    left, right = node.refs
    op, rank = node.op, len(right.shape) - 2
    gaps, steps = _spatial(op, "dilation", rank), _spatial(op, "stride", rank)
    left_size, out_size = _in_three(left.shape, 1)[2:], _in_three(node.outs[0].shape, 1)[2:]
    taps, places = (out_size, left_size) if role is Role.WEIGHT else (left_size, out_size)
    if role is Role.INPUT:
        before = _reversed_padding(op, left.shape[2:])
    else:
        before = _spatial(op, "padding", rank, 0)
    numbers = zip(places, steps, taps, gaps, strict=True)
    frame = _frame(right, before, tuple((p - 1) * s + (t - 1) * g + 1 for p, s, t, g in numbers))
    if frame.is_needed:
        along = row_major((*right.shape[:2], *frame.size)).strides
    else:
        along = _in_three(right.layout.strides, 0)
    tap_steps = [g * a for g, a in zip(gaps, along[2:], strict=True)]
    first = 0
    if role is Role.INPUT:  # the last tap comes first
        first = sum((t - 1) * a for t, a in zip(taps, tap_steps, strict=True))
        tap_steps = [-a for a in tap_steps]
    place_steps = [s * a for s, a in zip(steps, along[2:], strict=True)]
    windows, positions = zip(taps, tap_steps, strict=True), zip(places, place_steps, strict=True)
    return _Geometry(frame, along, tuple(windows), tuple(positions), first)


def _frame(images: Ref, before: tuple[int, ...], size: tuple[int, ...]) -> Frame:
    """As much of the images as windows reach."""
    given = _in_three(images.shape, 1)[2:]
    before = tuple(min(b, s) for b, s in zip(before, size, strict=True))
    inner = tuple(min(n, s - b) for n, s, b in zip(given, size, before, strict=True))
    return Frame(before, inner, size)
