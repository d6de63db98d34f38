"""What the compiler knows about one kind of operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch

from .types import TensorType

if TYPE_CHECKING:
    from .function import Op


class Kind(Enum):
    """The family of an op: what a code generator has to do for it."""

    POINTWISE = "pointwise"
    REDUCTION = "reduction"
    CONTRACTION = "contraction"
    VIEW = "view"
    CREATION = "creation"
    INDEXING = "indexing"
    RANDOM = "random"
    COMPOSITE = "composite"
    OPAQUE = "opaque"


@dataclass(frozen=True, slots=True)
class Cost:
    """Floating-point operations and bytes moved by one execution of an op."""

    flops: int
    bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class FactorMap:
    """How the dimensions of an op's operands and results are tied together.

    Each dimension of each operand and result carries a factor name or None (None: must stay
    whole). Splitting every dimension that carries a factor, running the op on each part and
    joining the parts gives the op's result: concatenated where the result carries the factor,
    combined with `reduce[factor]` where it does not. So one map yields every sharding of the op.

    Attributes:
        operands: per tensor operand (flattened), per dimension.
        results: per result, per dimension.
        reduce: factor -> `sum`, `max`, `min` for the factors that results do not carry.
    """

    operands: tuple[tuple[str | None, ...], ...]
    results: tuple[tuple[str | None, ...], ...]
    reduce: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def factors(self) -> list[str]:
        """Every factor that an operand carries, in order of first appearance."""
        return list(dict.fromkeys(f for dims in self.operands for f in dims if f is not None))


Infer = Callable[["Op"], tuple[TensorType, ...]]
CostRule = Callable[["Op"], Cost]
FactorRule = Callable[["Op"], "FactorMap | None"]


@dataclass(frozen=True, eq=False)
class OpDef:
    """One kind of operation: its meaning and everything that follows from it.

    Attributes:
        name: `namespace.op.overload`, e.g. `aten.mm.default`.
        kind: the family.
        reference: the meaning, as a torch expression of (operands..., attributes by keyword).
        operand_names: schema names of tensor operands, in order.
        attr_defaults: attribute -> default; attributes without a default are absent.
        infer: result types from operand types and attributes.
        cost: FLOPs and bytes of one op.
        factors: the sharding rule; None where the op must be replicated.
        core: belongs to the set that every code generator implements.
        pure: same operands, same result, nothing else happens.
        sizes_only: positions of operands whose elements are never read.
        doc: one sentence.
    """

    name: str
    kind: Kind
    reference: Callable[..., Any]
    operand_names: tuple[str, ...]
    attr_defaults: dict[str, Any]
    infer: Infer
    cost: CostRule
    factors: FactorRule
    core: bool = False
    pure: bool = True
    sizes_only: tuple[int, ...] = ()
    doc: str = ""

    def __repr__(self) -> str:
        return f"OpDef({self.name})"


def results_of(outcome: Any, attrs: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    """The results that an op has: neither absent ones nor those that its `output_mask` leaves out.

    Kernels give nothing in the place of the latter, rules for sizes and types may give a tensor.
    """
    flat = as_tuple(outcome)
    mask = attrs.get("output_mask")
    if isinstance(mask, (tuple, list)) and len(mask) == len(flat):
        flat = tuple(t if wanted else None for t, wanted in zip(flat, mask, strict=True))
    return tuple(t for t in flat if t is not None)


def as_tuple(outcome: Any) -> tuple[torch.Tensor | None, ...]:
    """A torch call's outcome as a flat tuple of tensors."""
    if isinstance(outcome, torch.Tensor) or outcome is None:
        return (outcome,)
    flat: list[torch.Tensor | None] = []
    for part in outcome:
        flat.extend(as_tuple(part) if isinstance(part, Sequence) else (part,))
    return tuple(flat)
