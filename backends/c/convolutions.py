"""Convolutions as matrix products, one side of which is walked by several strides.

With x in a frame of zeros, element (channel, tap) of the window of position (image, place) is where
channel + tap + image + place lead. So each of the three products needs no copy of the windows:

    result[o, (n, p)]     = sum over (i, t)   weight[o, (i, t)]    x[(i, t), (n, p)]
    grad of x[i, (n, p)]  = sum over (o, t)   weight[(o, t), i]    grad[(o, t reversed), (n, p)]
    grad of weight[o, (i, t)] = sum over (n, p)   grad[o, (n, p)]  x[(n, p), (i, t)]

Where windows have several taps, the frame holds the channels of a place side by side. The first
two are then computed the other way round, with windows as rows of the left side, nothing of which
is packed, and the result is turned. Of the third, columns are vectors of neighbouring channels,
which are put in order afterwards.

Where windows are several elements apart, an element of x meets only every so many taps: which ones,
its phase says. So the gradient of x is one product a phase, and none multiplies the zeros that are
between the elements of grad. A transposed convolution is the gradient of one, and its gradients are
one, and one's gradient of the weight.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from shoestring.ir import Op, TensorType, Value

from .layout import row_major
from .sides import (
    Digits,
    Frame,
    Numbers,
    Order,
    Side,
    Sides,
    Target,
    Windows,
    count_of,
    positions,
    simplified,
)

if TYPE_CHECKING:
    from .nodes import Node, Ref

FORWARD, BACKWARD = "aten.convolution.default", "aten.convolution_backward.default"
SPATIAL = 3  # dimensions of every image here; those that it does not have are of size 1
LEAST = 4  # channels in a row of the product; of fewer, the library makes more
MANY = 32  # places of an image that fill the columns of a product
LANES = 16  # neighbouring columns of a weight's gradient that are computed together
PHASES = 9  # the most products that a gradient falls apart into


class Role(Enum):
    """Which of the three products: a transposed convolution has those of its gradient."""

    RESULT = "result"
    INPUT = "gradient of the input"
    WEIGHT = "gradient of the weight"


Mask = tuple[bool, bool, bool]


@dataclass(frozen=True)
class Convolution:
    """A product: what it is, its sides, and the type of what it makes."""

    role: Role
    left: Value
    right: Value
    result: TensorType


def role_of(op: Op, mask: Mask | None = None) -> Role | None:
    """The product that an op is; None where it is not one that generated code takes.

    Args:
        op: any.
        mask: which gradients are asked for, if not those of the op's own `output_mask`.
    """
    found = convolution_of(op, mask)
    if found is None or op.attr("groups") != 1:
        return None
    weight = op.inputs[1 if op.name == FORWARD else 2]
    rank = weight.type.rank - 2
    if not 1 <= rank <= SPATIAL or any(v.type.rank != rank + 2 for v in op.inputs[:2]):
        return None
    backwards = found.role is Role.INPUT
    if backwards and not _phases_are_alike(op, found.result.static_shape[2:]):
        return None
    rows = weight.type.static_shape[1 if backwards else 0]
    return found.role if rows >= LEAST else None


def convolution_of(op: Op, mask: Mask | None = None) -> Convolution | None:
    """An op as one product, whoever computes it; None where it is none, or several."""
    if op.name == FORWARD:
        x, weight = op.inputs[:2]
        role = Role.INPUT if op.attr("transposed") else Role.RESULT
        return Convolution(role, weight, x, op.result.type)
    if op.name != BACKWARD:
        return None
    to_x, to_weight, to_bias = mask or op.attr("output_mask")
    if to_bias or to_x == to_weight:
        return None
    grad, x, weight = op.inputs[:3]
    if to_x:
        role = Role.RESULT if op.attr("transposed") else Role.INPUT
        return Convolution(role, weight, grad, x.type)
    sides = (x, grad) if op.attr("transposed") else (grad, x)
    return Convolution(Role.WEIGHT, *sides, weight.type)


def _phases_are_alike(op: Op, size: Sequence[int]) -> bool:
    """Whether the phases of an input's gradient are few, and equally large."""
    steps, gaps = strides_of(op), _spatial(op, "dilation", len(size))
    numbers = zip(_spatially(size), steps, gaps, strict=True)
    alike = all(s == 1 or (n % s == 0 and g == 1) for n, s, g in numbers)
    return alike and math.prod(steps) <= PHASES


def parts_of(op: Op) -> list[Mask]:
    """The output masks of the ops, one a result, into which a backward convolution falls apart."""
    mask = op.attr("output_mask")
    masks = [(True, False, False), (False, True, False), (False, False, True)]
    return [m for m, wanted in zip(masks, mask, strict=True) if wanted]


def strides_of(op: Op) -> Numbers:
    """From one window to the next, in three dimensions."""
    return _spatial(op, "stride", op.inputs[0].type.rank - 2)


def by_image(places: int) -> bool:
    """Whether the places of one image fill the columns of a product; those of fewer are joined."""
    return places >= MANY


def _spatial(op: Op, name: str, rank: int, missing: int = 1) -> Numbers:
    """An attribute for each of the three dimensions."""
    given = tuple(op.attr(name))
    return _spatially(given * rank if len(given) == 1 else given, missing)


def _spatially(numbers: Sequence[int], missing: int = 1) -> Numbers:
    """A number for each of the three dimensions."""
    return (missing,) * (SPATIAL - len(numbers)) + tuple(numbers)


@dataclass(frozen=True)
class _Walk:
    """How a product goes along one dimension of images.

    Attributes:
        phase: of the places that it computes.
        tap, apart, taps: the first tap that it uses of a window, from one to the next, how many.
        places: of windows, or of the elements that one phase has.
        start: the element of the image that meets the first tap at the first place.
        tap_step, place_step: how far the next tap, and the next place, is from there.
    """

    phase: int
    tap: int
    apart: int
    taps: int
    places: int
    start: int
    tap_step: int
    place_step: int

    @property
    def reach(self) -> tuple[int, int]:
        """The first and the last element of the image; none where the last is before the first."""
        if not self.taps:
            return 0, -1
        steps = [(self.taps - 1) * self.tap_step, (self.places - 1) * self.place_step]
        before, after = (sum(f(0, s) for s in steps) for f in (min, max))
        return self.start + before, self.start + after


Walks = list[tuple[_Walk, ...]]


def reads_windows(op: Op) -> bool:
    """Whether a convolution reads images as its left side, by windows, and packs its weights."""
    found = convolution_of(op)
    if found is None or found.role is Role.WEIGHT:
        return False
    return _by_place(
        _walks(op, found.role, found.left.type.static_shape, found.result.static_shape)
    )


def _by_place(walks: Walks) -> bool:
    return any(w.taps > 1 for walk in walks for w in walk)


def _walks(op: Op, role: Role, left_shape: Numbers, result: Numbers) -> Walks:
    """Of each product, how it goes along the three dimensions."""
    rank = len(result) - 2
    left, out = (_spatially(shape[2:]) for shape in (left_shape, result))
    windows, places = (out, left) if role is Role.WEIGHT else (left, out)
    steps, gaps = strides_of(op), _spatial(op, "dilation", rank)
    numbers = zip(windows, places, steps, gaps, _spatial(op, "padding", rank, 0), strict=True)
    if role is Role.INPUT:
        return list(itertools.product(*(list(_backwards(*n)) for n in numbers)))
    return [tuple(_Walk(0, 0, 1, w, p, -pad, gap, step) for w, p, step, gap, pad in numbers)]


def _backwards(window: int, size: int, stride: int, gap: int, padding: int) -> Iterator[_Walk]:
    """From the elements of an input to those of the gradient which they contributed to.

    Element `phase + stride * i` met tap `tap + stride * t` in the window at `start + i - t`.
    """
    for phase in range(stride):
        tap, start = (phase + padding) % stride, (phase + padding) // stride
        taps = max(0, -(-(window - tap) // stride))
        yield _Walk(phase, tap, stride, taps, size // stride, start, -gap, 1)


def _in_three(values: Sequence[int], fill: int) -> Numbers:
    """Numbers of the dimensions of images, two others ahead of them, for three dimensions."""
    return (*values[:2], *_spatially(values[2:], fill))


def sides_of(node: Node, role: Role) -> tuple[Sides, ...]:
    """How both sides of a product are walked; of an input's gradient, phase by phase."""
    walks, images = _walks(node.op, role, node.refs[0].shape, node.outs[0].shape), node.refs[1]
    frame, before = _frame(images, walks, _by_place(walks))
    along = _in_three(images.layout.strides, 0) if frame is None else frame.strides(images)
    return tuple(_sides(node, role, w, frame, before, along) for w in walks)


def _frame(images: Ref, walks: Walks, by_place: bool) -> tuple[Frame | None, Numbers]:
    """The images within zeros or by place, if need be, and where their first element is then."""
    reach = [[w[d].reach for w in walks] for d in range(SPATIAL)]
    before = tuple(max(0, -min(first for first, _ in r)) for r in reach)
    size = tuple(max(last for _, last in r) + 1 + b for r, b in zip(reach, before, strict=True))
    zeros = tuple(min(b, s) for b, s in zip(before, size, strict=True))
    given = _spatially(images.shape[2:])
    inner = tuple(min(n, s - z) for n, s, z in zip(given, size, zeros, strict=True))
    frame = Frame(zeros, inner, size, by_place)
    return (frame if frame.is_needed else None), before


def _sides(
    node: Node,
    role: Role,
    walk: tuple[_Walk, ...],
    frame: Frame | None,
    before: Numbers,
    along: Numbers,
) -> Sides:
    """The sides of one product; `along` are the strides of images in their frame."""
    left, right = node.refs
    shape, steps = _in_three(left.shape, 1), _in_three(left.layout.strides, 0)
    images, channels = zip(right.shape[:2], along[:2], strict=True)
    dims = list(zip(walk, steps[2:], along[2:], strict=True))
    taps = [(w.taps, w.tap_step * a) for w, _, a in dims]
    places = [(w.places, w.place_step * a) for w, _, a in dims]
    first = sum((w.start + b) * a for (w, _, a), b in zip(dims, before, strict=True))
    row, summed = (0, 1) if role is Role.RESULT else (1, 0)
    rows, sums = (shape[row], steps[row]), (shape[summed], steps[summed])
    over = [(w.taps, w.apart * step) for w, step, _ in dims]
    start = sum(w.tap * step for w, step, _ in dims)
    phase = tuple(w.phase for w in walk)
    count = math.prod(w.places for w in walk)
    joined = simplified([images, *places])
    by_place = frame is not None and frame.by_place
    if role is Role.WEIGHT:
        over = [(w.places, step) for w, step, _ in dims]
        a = Side(left, 0, (rows,), simplified([sums, *over]), start)
        if by_place:
            cols, order = _ordered(channels[0], taps)
            b = Side(right, LANES, joined, cols, first)
            return Sides(a, b, count_of(a.cols), frame, phase, order=order)
        b = Side(right, 0, joined, simplified([channels, *taps]), first)
        return Sides(a, b, count_of(a.cols), frame, phase)
    if by_place:
        in_row = count if by_image(count) else count * right.shape[0]
        windows = Windows(shape[summed], positions(taps), positions(over), joined, in_row)
        a = Side(right, 0, joined, (channels,), first)
        b = Side(left, 0, (sums,), (rows,), start)
        return Sides(a, b, shape[summed] * len(windows.a_taps), frame, phase, windows)
    a = Side(left, 0, (rows,), simplified([sums, *over]), start)
    walked = simplified([channels, *taps])
    if by_image(count):
        b = Side(right, images[1], walked, simplified(places), first)
    else:
        b = Side(right, 0, walked, joined, first)
    return Sides(a, b, count_of(a.cols), frame, phase)


def _ordered(channels: int, taps: Sequence[tuple[int, int]]) -> tuple[Digits, Order]:
    """The columns of the gradient of a weight, as vectors of what lies side by side in images.

    Those are some channels of a tap; where there are few channels, all of a line of taps.
    """
    few, (count, step) = channels < LANES, taps[-1]
    room = -(-channels // 2) * 2
    if few and step <= room:
        lanes = -(-((count - 1) * step + channels) // LANES) * LANES
        vectors, along = list(taps[:-1]), step
    else:
        lanes, vectors, along = LANES, list(taps), 0
    matrix = [n for n, _ in vectors]
    strides = row_major((*matrix, lanes)).strides[:-1]
    at = [(min(channels, LANES), 1), *zip(matrix, strides, strict=True)]
    if along:
        at.append((count, along))
    groups = 1 if few else -(-channels // LANES)
    order = Order(simplified(at), groups, channels * math.prod(n for n, _ in taps))
    return simplified([*vectors, (lanes, 1)]), order


def target_of(node: Node, role: Role, phase: Numbers) -> Target:
    """Where the result of one product belongs in that of the op."""
    shape = node.outs[0].shape
    strides = _in_three(row_major(shape).strides, 0)
    if role is Role.WEIGHT:
        return Target(0, strides[0], ((math.prod(shape[1:]), 1),))
    steps = strides_of(node.op) if role is Role.INPUT else (1,) * SPATIAL
    dims = list(zip(_spatially(shape[2:]), steps, strides[2:], strict=True))
    places = [(n // s, s * stride) for n, s, stride in dims]
    offset = sum(p * stride for p, (_, _, stride) in zip(phase, dims, strict=True))
    if by_image(math.prod(n for n, _ in places)):
        return Target(strides[0], strides[1], simplified(places), offset)
    return Target(0, strides[1], simplified([(shape[0], strides[0]), *places]), offset)
