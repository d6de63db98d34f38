"""Passes by name: those of this folder, and those of installed packages.

A package offers passes through the entry point group `shoestring.passes`:

    [project.entry-points."shoestring.passes"]
    double_negation = "my_package.double_negation:DoubleNegation"
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import fields
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from shoestring.ir.errors import PassError, UsageError

from .base import Pass, name_of
from .canonicalize import Canonicalize
from .causal_attention import CausalAttention
from .chunk_loss import ChunkLoss
from .common_subexpressions import CommonSubexpressions
from .dead_code import DeadCode
from .decompose import Decompose
from .fold_constants import FoldConstants
from .fuse_attention import FuseAttention
from .fuse_update import FuseUpdate
from .group_heads import GroupHeads
from .lower_precision import LowerPrecision
from .merge_products import MergeProducts
from .order_memory import OrderMemory
from .pipeline import unknown_pass
from .propagate_slices import PropagateSlices
from .rematerialize import Rematerialize
from .round_saved import RoundSaved
from .simplify_algebra import SimplifyAlgebra
from .split_norms import SplitNorms
from .swap_halves import SwapHalves

GROUP = "shoestring.passes"

BUILTIN: tuple[type[Pass], ...] = (
    Canonicalize,
    FoldConstants,
    SimplifyAlgebra,
    SwapHalves,
    CommonSubexpressions,
    FuseAttention,
    GroupHeads,
    PropagateSlices,
    CausalAttention,
    MergeProducts,
    DeadCode,
    ChunkLoss,
    Decompose,
    LowerPrecision,
    SplitNorms,
    Rematerialize,
    RoundSaved,
    FuseUpdate,
    OrderMemory,
)


# Of each precision what rounds the values of products, and what rounds values that are kept.
PRECISIONS: dict[str, tuple[tuple[Pass, ...], tuple[Pass, ...]]] = {
    "fp32": ((), ()),
    "bf16": ((LowerPrecision("bf16"),), (RoundSaved("bf16"),)),
}


def default_pipeline(keep: frozenset[str] | None = None, precision: str = "fp32") -> list[Pass]:
    """The passes that `compile` runs unless told otherwise: only other precisions are lossy.

    Args:
        keep: names of larger ops that the backend takes whole; all others are decomposed into
            core ops. None leaves every op as it was captured.
        precision: one of `PRECISIONS`.

    Raises:
        UsageError: SS7013 for another precision.
    """
    check_precision(precision)
    simplify: list[Pass] = [
        Canonicalize(),
        FoldConstants(),
        SimplifyAlgebra(),
        SwapHalves(),
        CommonSubexpressions(),
        *([FuseAttention()] if keep is None else []),  # other backends need not know these ops
        GroupHeads(),
        PropagateSlices(),
        CausalAttention(),  # slices go through attention with a mask, not through a causal one
        MergeProducts(),
        DeadCode(),
    ]
    lower: list[Pass] = [] if keep is None else [Decompose(keep)]
    # Rematerialized values must not meet common_subexpressions, nor schedules a new op.
    products, kept = PRECISIONS[precision]
    memory: list[Pass] = [SplitNorms(), Rematerialize(), *kept, FuseUpdate(), OrderMemory()]
    return [*lower, *simplify, ChunkLoss(), *products, *memory]


def check_precision(precision: str) -> None:
    """Refuses the name of a precision that there is not.

    Raises:
        UsageError: SS7013, with the nearest name.
    """
    if precision not in PRECISIONS:
        near = difflib.get_close_matches(str(precision), PRECISIONS, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]!r}?" if near else f"one of: {', '.join(PRECISIONS)}"
        what = f"the name of a precision is required, found {precision!r}"
        raise UsageError("SS7013", what, hint=hint)


def available() -> dict[str, type[Pass]]:
    """Every pass by name, the built-in ones first.

    Raises:
        PassError: SS3008, SS3009 where an installed package offers something unusable.
    """
    table = {name_of(cls): cls for cls in BUILTIN}
    for entry in sorted(entry_points(group=GROUP), key=lambda e: e.name):
        if entry.name in table:
            raise _unusable(entry, "a name that no other pass has is required")
        table[entry.name] = _load(entry)
    return table


def find_pass(name: str) -> type[Pass]:
    """The pass of that name.

    Raises:
        PassError: SS3001, with the nearest name.
    """
    table = available()
    if name not in table:
        raise unknown_pass(name, table, "looking up a pass")
    return table[name]


def make_pass(name: str, **options: Any) -> Pass:
    """A pass by name with options.

    Raises:
        PassError: SS3001 for an unknown name, SS3010 for an unknown option.
    """
    cls = find_pass(name)
    known = [f.name for f in fields(cls)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        what = f"making pass {name}: it has no option {', '.join(unknown)}"
        raise PassError("SS3010", what, hint=f"options: {', '.join(known) or 'none'}")
    return cls(**options)


def make_passes(names: Iterable[str]) -> list[Pass]:
    """Passes by name, with default options."""
    return [make_pass(name) for name in names]


def _load(entry: EntryPoint) -> type[Pass]:
    try:
        found = entry.load()
    except Exception as error:
        what = f"loading pass {entry.name!r} from {entry.value}: {type(error).__name__}: {error}"
        raise PassError(
            "SS3008", what, _origin(entry), "repair or uninstall the package"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Pass)):
        raise _unusable(entry, f"a subclass of Pass is required, found {found!r}")
    if name_of(found) != entry.name:
        raise _unusable(entry, f"the entry point must be named after its module {name_of(found)!r}")
    return found


def _unusable(entry: EntryPoint, required: str) -> PassError:
    what = f"loading pass {entry.name!r} from {entry.value}: {required}"
    return PassError("SS3009", what, _origin(entry), "repair or uninstall the package")


def _origin(entry: EntryPoint) -> str:
    return f"package {entry.dist.name}" if entry.dist is not None else ""
