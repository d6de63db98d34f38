"""What each backend does with each op: the table of the documentation."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from shoestring.ir import Kind, OpDef, core_set

from .c.direct import DIRECT
from .c.expressions import EXPRESSIONS
from .c.layout import VIEWS
from .c.library import find_out_variant
from .c.reductions import REDUCTIONS


class Support(Enum):
    """How a backend carries out an op.

    Attributes:
        INTERPRETED: by the definition's reference.
        KERNEL: generated code, fused with its neighbours.
        ALIAS: no code; other strides over the same memory.
        LIBRARY: a PyTorch kernel that writes where the result belongs.
        COPIED: a PyTorch kernel in memory of its own, and a copy.
        REFUSED: an error that names the op.
    """

    INTERPRETED = "interpreted"
    KERNEL = "kernel"
    ALIAS = "alias"
    LIBRARY = "library"
    COPIED = "library, copied"
    REFUSED = "refused"


@dataclass(frozen=True)
class Row:
    """One op of the matrix."""

    op: str
    kind: Kind
    reference: Support
    c: Support


def support_in_c(op: OpDef) -> Support:
    """What the C backend does with an op of plain element types."""
    if op.name in VIEWS:
        return Support.ALIAS
    creates = op.name in ("aten.full.default", "ir.constant.default")
    if op.name in EXPRESSIONS or op.name in REDUCTIONS or creates:
        return Support.KERNEL
    if op.name in DIRECT or (op.name.startswith("aten.") and find_out_variant(op.name)):
        return Support.LIBRARY
    return Support.COPIED


def matrix() -> list[Row]:
    """Every core op, by name."""
    return [Row(op.name, op.kind, Support.INTERPRETED, support_in_c(op)) for op in core_set()]


def matrix_text() -> str:
    """The matrix as a Markdown table."""
    lines = ["| op | kind | reference | c |", "|---|---|---|---|"]
    lines += [
        f"| `{r.op}` | {r.kind.value} | {r.reference.value} | {r.c.value} |" for r in matrix()
    ]
    return "\n".join(lines) + "\n"
