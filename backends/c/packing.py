"""Right sides that are packed once: for many small products, windows, or all rows of a product.

A product reads its right side in panels, which it packs first: of a few rows, as in each step of a
recurrence, that takes as long as half of the multiplications. Of many, each block of rows packs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from shoestring.ir import DTYPE_NAMES, Function, Op, Value

from ..memory import aligned
from .claims import Claim
from .convolutions import reads_windows, role_of
from .layout import row_major
from .products import COLS, FACTORS, GROUPED, is_product, matrices_of
from .room import FLOAT, this_machine, units_of
from .room import MOST_ROWS as SHARING
from .sides import Sides, count_of

if TYPE_CHECKING:
    from .nodes import Node, Ref

NAME = "pack"
USES = 4  # fewer products do not share
MOST_ROWS = 128  # of the left side; more make up for packing
FEW_WINDOWS = 512  # up to which each thread packs weights for itself
MOST_PACKED = 2 << 20  # bytes; to pack more than that again takes less than memory is worth
MOST_PLAIN = 3 << 20  # the same of a product of matrices
MOST_ROUNDINGS = 2  # readers of weights that round them while they pack; more take longer
UNITS = 16  # at least what gemm.c rounds K up to


def shared_sides(function: Function) -> set[Value]:
    """The right sides that are packed before they are used."""
    products = (op for op in function.ops if is_product(op) and takes_packed(op))
    few = (op for op in products if op.result.type.static_shape[0] <= MOST_ROWS)
    uses = Counter(matrices_of(op)[1] for op in few)
    return {v for v, count in uses.items() if count >= USES}


def takes_packed(op: Op) -> bool:
    """Whether a product is of two matrices: no batch, no groups, no images."""
    return role_of(op) is None and op.name != GROUPED and op.result.type.rank == 2


def packed_floats(shape: Sequence[int]) -> int:
    """Room for a right side [K, N], on any machine."""
    summed, cols = shape
    return (summed + UNITS) * (cols + COLS)


def packed_bytes(sides: Sides) -> int:
    """Room for weights that are packed once for all windows of a product; 0 where they are not."""
    if sides.windows is None or count_of(sides.a.rows) <= FEW_WINDOWS:
        return 0
    room = FLOAT * packed_floats((sides.summed, count_of(sides.b.cols)))
    return aligned(room) if room <= MOST_PACKED else 0


def packed_once(op: Op, sides: Sides, rows: int) -> int:
    """Room for the right side of `rows` rows that is packed before they are multiplied; or 0.

    Otherwise each block of rows packs it again, which takes up to a tenth of the time.
    """
    if sides.windows is not None:
        return packed_bytes(sides)
    if not takes_packed(op) or sides.lists() or is_packed(sides.b.ref) or rows <= SHARING:
        return 0
    room = packed_room(sides.b.ref.dtype, sides.summed, count_of(sides.b.cols))
    return room if room <= MOST_PLAIN else 0


def packed_room(dtype: torch.dtype, summed: int, cols: int) -> int:
    """Bytes for a right side that one kernel packs for itself."""
    return aligned(FLOAT * packed_floats((units_of(this_machine(), dtype, summed), cols)))


def weights_read(op: Op, v: Value) -> int | None:
    """How often a convolution packs a value, its weights; None where an op reads it otherwise."""
    if role_of(op) is None:
        return None
    left, right = matrices_of(op)
    if v is not left and v is not right:
        return 0  # all that counts is its size
    return 1 if reads_windows(op) and v is not right else None


def is_packed(side: Ref) -> bool:
    return side.base.node is not None and side.base.node.name == NAME


def claim(node: Node) -> Claim | None:
    """The kernel that packs."""
    if node.name != NAME:
        return None
    (side,), (out,) = node.refs, node.outs
    (summed, cols), (row, col) = side.shape, side.layout.strides
    body = f"""\
    static const ss_gemm g = {{
        1, 1, {cols}, {summed}, {FACTORS[side.dtype]},  // matrices, rows, columns, summed
        0, 0, 0,  // A
        0, {row}, {col},  // B
    }};
    ss_gemm_pack(&g, b[0], b[1]);"""
    shape = f"{DTYPE_NAMES[side.dtype]}[{summed},{cols}]"
    comment = f"// packed for all products with it: {shape} {side.base.label}"
    whole = replace(side, base=out, layout=row_major(out.shape))
    return Claim(NAME, comment, body, (side, whole), (1,))
