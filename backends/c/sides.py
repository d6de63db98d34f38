"""How the sides of a matrix product lie in memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..memory import aligned
from .layout import contiguous_runs, row_major

if TYPE_CHECKING:
    from .nodes import Node, Ref

DIGITS = 4  # SS_DIGITS of gemm.h
Numbers = tuple[int, ...]
Digits = tuple[tuple[int, int], ...]
"""(size, stride) of nested loops over one dimension, outermost first: `ss_digits` of gemm.h."""


@dataclass(frozen=True)
class Side:
    """A matrix for each product of a batch.

    Attributes:
        ref: where it is.
        batch: from one matrix to the next, in elements, as all strides.
        rows, cols: along its two dimensions.
        offset: of its first element, from where `ref` begins.
    """

    ref: Ref
    batch: int
    rows: Digits
    cols: Digits
    offset: int = 0


@dataclass(frozen=True)
class Frame:
    """A copy of images within zeros.

    Attributes:
        before: zeros ahead of each dimension of an image.
        inner: what is copied of each dimension.
        size: each dimension with its zeros.
        by_place: whether the channels of a place are neighbours in memory, not the places of one.
    """

    before: tuple[int, ...]
    inner: tuple[int, ...]
    size: tuple[int, ...]
    by_place: bool = False

    @property
    def is_needed(self) -> bool:
        return self.by_place or any(self.before) or self.inner != self.size

    def strides(self, ref: Ref) -> Numbers:
        """Of the copy: images, channels, and the dimensions of an image."""
        images, channels = ref.shape[:2]
        if not self.by_place:
            return row_major((images, channels, *self.size)).strides
        image, *places, channel = row_major((images, *self.size, self._channels(ref))).strides
        return (image, channel, *places)

    def _channels(self, ref: Ref) -> int:
        """Channels of the copy: by place, a whole number of words."""
        word = 4 // ref.dtype.itemsize if self.by_place else 1
        return -(-ref.shape[1] // word) * word

    def numbers(self, ref: Ref) -> tuple[Numbers, Numbers, Numbers, Numbers]:
        """What an `ss_frame` of gemm.h holds behind the size of an element."""
        missing = len(self.size) + 2 - len(ref.shape)
        strides = (*ref.layout.strides[:2], *(0,) * missing, *ref.layout.strides[2:])
        return (*ref.shape[:2], *self.inner), strides, self.before, self.size

    def nbytes(self, ref: Ref) -> int:
        """Bytes of the copy, up to where something else may begin."""
        count = math.prod((ref.shape[0], self._channels(ref), *self.size))
        return aligned(count * ref.dtype.itemsize)


@dataclass(frozen=True)
class Windows:
    """Images as the left side of a product, and weights as the right one: `ss_windows` of gemm.h.

    Attributes:
        channels: of an image, and of the weights of one column.
        a_taps, b_taps: where the taps of a window are, in images by place, and in the weights.
        rows: where the windows begin.
        places: of an image, or of all, side by side.
    """

    channels: int
    a_taps: Numbers
    b_taps: Numbers
    rows: Digits
    places: int


@dataclass(frozen=True)
class Order:
    """Right sides whose columns are in another order than the result's: `ss_order` of gemm.h.

    Attributes:
        at: where each column of the result is, within a matrix.
        matrices: into which the columns fall.
        count: all columns of the result.
    """

    at: Digits
    matrices: int
    count: int


@dataclass(frozen=True)
class Sides:
    """A product's operands.

    Attributes:
        a, b: left and right.
        summed: the size of the dimension that both have.
        frame: where images are read from a copy of them within zeros.
        phase: which elements of a strided convolution's input the product is of, by dimension.
        windows: where the left side is images; elsewhere the right one is, or neither.
        order: of columns, where it is not the result's.
    """

    a: Side
    b: Side
    summed: int
    frame: Frame | None = None
    phase: Numbers = ()
    windows: Windows | None = None
    order: Order | None = None

    @property
    def images(self) -> Side:
        """The side that is in a frame, if there is one."""
        return self.b if self.windows is None else self.a

    def lists(self) -> dict[str, Digits]:
        """The dimensions that take several strides, by their names in an `ss_gemm`."""
        if self.windows is not None:
            return {}
        walked = {"a_sum": self.a.cols, "b_sum": self.b.rows, "b_cols": self.b.cols}
        return {name: digits for name, digits in walked.items() if stride_of(digits) is None}


@dataclass(frozen=True)
class Target:
    """Where the elements of a product's result belong: strides, and the first of them."""

    batch: int
    row: int
    cols: Digits
    offset: int = 0


def simplified(digits: Iterable[tuple[int, int]]) -> Digits:
    """The same elements in the same order, with as few digits as possible."""
    return tuple(contiguous_runs(digits))


def stride_of(digits: Digits) -> int | None:
    """The one stride along a dimension; None where it takes several."""
    if len(digits) > 1:
        return None
    return digits[0][1] if digits else 0


def positions(digits: Iterable[tuple[int, int]]) -> Numbers:
    """Where each element of a dimension is, counted from the first."""
    steps = (range(0, size * stride, stride) if stride else (0,) * size for size, stride in digits)
    return tuple(map(sum, itertools.product(*steps)))


def count_of(digits: Digits) -> int:
    """The size of a dimension."""
    return math.prod(size for size, _ in digits)


def written_out(digits: Digits) -> tuple[Numbers, Numbers]:
    """The sizes and the strides of an `ss_digits`."""
    whole = ((1, 0),) * (DIGITS - len(digits)) + digits
    return tuple(size for size, _ in whole), tuple(stride for _, stride in whole)


def of_matrices(node: Node) -> Sides:
    """The sides of a product of matrices."""
    a, b = (side_of(ref) for ref in node.refs[:2])
    return Sides(a, b, node.refs[0].shape[-1])


def side_of(ref: Ref) -> Side:
    """A matrix, or one for each product of a batch."""
    batch, row, col = (0, 0, 0, *ref.layout.strides)[-3:]
    rows, cols = ref.shape[-2:]
    return Side(ref, batch, ((rows, row),), ((cols, col),))
