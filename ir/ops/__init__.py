"""Every operation: one `OpDef` each, by family; any other ATen op gets the schema's defaults."""

from __future__ import annotations

from ..opdef import OpDef
from . import (
    attention,
    contractions,
    indexing,
    linalg,
    networks,
    pointwise,
    random,
    recurrence,
    reductions,
    views,
)
from .aten import find_overload, from_schema, overload_name, split_arguments

FAMILIES = (
    pointwise, reductions, contractions, attention, recurrence, views, indexing, networks, linalg,
    random,
)  # fmt: skip
REGISTRY: dict[str, OpDef] = {op.name: op for family in FAMILIES for op in family.OPS}


def lookup(name: str) -> OpDef:
    """The definition of `namespace.op.overload`.

    Raises:
        IRError: SS2003 where neither shoestring nor PyTorch knows it.
    """
    return REGISTRY.get(name) or from_schema(name)


def core_set() -> list[OpDef]:
    """The ops that every code generator implements, by name."""
    return sorted((op for op in REGISTRY.values() if op.core), key=lambda op: op.name)


__all__ = [
    "FAMILIES",
    "REGISTRY",
    "core_set",
    "find_overload",
    "from_schema",
    "lookup",
    "overload_name",
    "split_arguments",
]
