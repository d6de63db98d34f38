"""Library ops that generated code of our own carries out instead.

A claimer looks at a node whose work is `LIBRARY` and gives the C function that does it, the reason
why it cannot, or None where the op is not its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shoestring.ir import DTYPE_NAMES, Op

if TYPE_CHECKING:
    from .nodes import Base, Node, NodeOperand, Ref


@dataclass(frozen=True)
class Claim:
    """A C function for one node.

    Attributes:
        stem: a short name.
        comment: what it computes, as C comments.
        body: its text without name, reading pointers `b[i]`.
        pointers: what each `b[i]` points to; `b[len(pointers)]` is the scratch if there is any.
        written: positions in `pointers` that it writes.
        scratch: bytes that it needs while it runs; planned like any buffer.
        declines: whether it may set `ss_declined` and leave the work to PyTorch.
        helper: functions that the body calls; `@` stands for the kernel's name, here and there.
    """

    stem: str
    comment: str
    body: str
    pointers: tuple[Ref, ...]
    written: tuple[int, ...]
    scratch: int = 0
    declines: bool = False
    helper: str = ""


Claimer = Callable[["Node"], Claim | str | None]
Orders = tuple[tuple[int, ...], ...]


def claim(node: Node) -> Claim | str | None:
    """The C for a library node, or why there is none; None where nobody knows the op."""
    from . import attention, copies, losses, packing, pooling, recurrence, rows

    claimers: tuple[Claimer, ...] = (
        attention.claim,
        rows.claim,
        copies.claim,
        pooling.claim,
        losses.claim,
        packing.claim,
        recurrence.claim,
    )
    return next((found for c in claimers if (found := c(node)) is not None), None)


def fork(elements: int, least: int) -> str:
    """The line before a loop that threads share, where it does more than `least` elements."""
    return "#pragma omp parallel for schedule(static)\n" if elements > least else ""


def comment_of(what: str, node: Node) -> str:
    """A kernel's comment: what it does, and to which of the user's values."""
    out = node.outs[0]
    shape = ",".join(map(str, out.shape))
    place = f"%{node.op.results[0].name}, {node.loc.module}"
    return f"// {what}: {DTYPE_NAMES[out.dtype]}[{shape}] {place}"


def result_orders(op: Op, operands: tuple[NodeOperand, ...]) -> Orders | None:
    """The order in which a claimed op stores the dimensions of each result, outermost first.

    None where results are stored row-major, as those of every other op.
    """
    from . import attention

    return attention.result_orders(op, operands)


def may_overwrite(node: Node, old: Base, new: Base) -> bool:
    """Whether the C for a library node writes a result over an operand as it reads it."""
    from . import recurrence

    return recurrence.may_overwrite(node, old, new)
