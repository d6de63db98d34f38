"""How the sides of a matrix product lie in memory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .layout import contiguous_runs

if TYPE_CHECKING:
    from .nodes import Node, Ref

DIGITS = 4  # SS_DIGITS of gemm.h
ALIGNMENT = 64
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
    """

    before: tuple[int, ...]
    inner: tuple[int, ...]
    size: tuple[int, ...]

    @property
    def is_needed(self) -> bool:
        return any(self.before) or self.inner != self.size

    def numbers(self, ref: Ref) -> tuple[Numbers, Numbers, Numbers, Numbers]:
        """What an `ss_frame` of gemm.h holds behind the size of an element."""
        missing = len(self.size) + 2 - len(ref.shape)
        strides = (*ref.layout.strides[:2], *(0,) * missing, *ref.layout.strides[2:])
        return (*ref.shape[:2], *self.inner), strides, self.before, self.size

    def nbytes(self, ref: Ref) -> int:
        """Bytes of the copy, up to where something else may begin."""
        count = math.prod((*ref.shape[:2], *self.size))
        return -(-count * ref.dtype.itemsize // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Sides:
    """A product's operands.

    Attributes:
        a, b: left and right.
        summed: the size of the dimension that both have.
        frame: where the right one is read from a copy of it within zeros.
        phase: which elements of a strided convolution's input the product is of, by dimension.
    """

    a: Side
    b: Side
    summed: int
    frame: Frame | None = None
    phase: Numbers = ()

    def lists(self) -> dict[str, Digits]:
        """The dimensions that take several strides, by their names in an `ss_gemm`."""
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


def count_of(digits: Digits) -> int:
    """The size of a dimension."""
    return math.prod(size for size, _ in digits)


def written_out(digits: Digits) -> tuple[Numbers, Numbers]:
    """The sizes and the strides of an `ss_digits`."""
    whole = ((1, 0),) * (DIGITS - len(digits)) + digits
    return tuple(size for size, _ in whole), tuple(stride for _, stride in whole)


def of_matrices(node: Node) -> Sides:
    """The sides of a product of matrices."""
    a, b = (_side(ref) for ref in node.refs[:2])
    return Sides(a, b, node.refs[0].shape[-1])


def _side(ref: Ref) -> Side:
    batch, row, col = (0, 0, 0, *ref.layout.strides)[-3:]
    rows, cols = ref.shape[-2:]
    return Side(ref, batch, ((rows, row),), ((cols, col),))
