"""Core reductions: how they combine, from where they start and what they do at the end."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shoestring.ir import Op
from shoestring.ir.ops.factors import normalize_dims

from .expressions import FLOATS


@dataclass(frozen=True)
class Reduction:
    """One kind of reduction.

    Attributes:
        how: `sum`, `prod`, `max`, `min`, `any`, `all`, `argmax`, `argmin`.
        mean: divide by the number of elements at the end.
    """

    how: str
    mean: bool = False


REDUCTIONS: dict[str, Reduction] = {
    "aten.sum.dim_IntList": Reduction("sum"),
    "aten.sum.default": Reduction("sum"),
    "aten.mean.dim": Reduction("sum", mean=True),
    "aten.mean.default": Reduction("sum", mean=True),
    "aten.amax.default": Reduction("max"),
    "aten.amin.default": Reduction("min"),
    "aten.max.default": Reduction("max"),
    "aten.min.default": Reduction("min"),
    "aten.prod.default": Reduction("prod"),
    "aten.prod.dim_int": Reduction("prod"),
    "aten.any.default": Reduction("any"),
    "aten.any.dim": Reduction("any"),
    "aten.all.default": Reduction("all"),
    "aten.all.dim": Reduction("all"),
}


def has_reduction(op: Op) -> bool:
    """Whether generated code can carry out the reduction."""
    return op.name in REDUCTIONS and op.inputs[0].type.rank > 0


def reduced_dims(op: Op) -> tuple[int, ...]:
    """The dimensions that are combined, counted from the front."""
    dim = op.attr("dim") if "dim" in op.opdef.attr_defaults else None
    return tuple(sorted(set(normalize_dims(dim, op.inputs[0].type.rank))))


def keeps_dims(op: Op) -> bool:
    """Whether combined dimensions stay, with size one."""
    return bool(op.attr("keepdim")) if "keepdim" in op.opdef.attr_defaults else False


def accumulator(how: str, dtype: torch.dtype) -> torch.dtype:
    """The type in which a reduction of elements of `dtype` (the result's type) accumulates."""
    if how in ("any", "all"):
        return torch.bool
    if dtype in FLOATS:
        return torch.float64 if dtype is torch.float64 else torch.float32
    return dtype
