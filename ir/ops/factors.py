"""Builders of sharding rules shared by the op families."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from ..function import Op, Value
from ..opdef import FactorMap
from ..types import Dim

Dims = tuple[str | None, ...]


def letters(rank: int, prefix: str = "d") -> Dims:
    """`rank` distinct factors."""
    return tuple(f"{prefix}{i}" for i in range(rank))


def normalize(dim: int, rank: int) -> int:
    """A dimension index counted from the front."""
    return dim % rank if rank else 0


def normalize_dims(dims: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """Dimension indices counted from the front; all of them for None or ()."""
    if dims is None or dims == ():
        return tuple(range(rank))
    many = (dims,) if isinstance(dims, int) else tuple(dims)
    return tuple(normalize(d, rank) for d in many)


def broadcast(op: Op) -> FactorMap:
    """Pointwise: right-aligned dimensions of equal size share a factor."""
    out = op.results[0].type.shape
    names = letters(len(out))

    def of(v: Value) -> Dims:
        offset = len(out) - len(v.type.shape)
        dims = enumerate(v.type.shape)
        return tuple(names[offset + i] if d == out[offset + i] else None for i, d in dims)

    return FactorMap(tuple(of(v) for v in op.inputs), tuple(names for _ in op.results))


def keep_all_but(op: Op, dims: Iterable[int]) -> FactorMap:
    """Operands and results of one rank; `dims` must stay whole."""
    whole = set(dims)
    rank = op.results[0].type.rank
    names = tuple(None if i in whole else f"d{i}" for i in range(rank))
    if any(v.type.rank != rank for v in (*op.inputs, *op.results)):
        return keep_whole(op)
    return FactorMap(tuple(names for _ in op.inputs), tuple(names for _ in op.results))


def einsum(op: Op, spec: str) -> FactorMap:
    """A contraction written as `mk,kn->mn`; factors that the result lacks are summed."""
    lhs, rhs = spec.split("->")
    operands = tuple(tuple(part) for part in lhs.split(","))
    summed = {f for dims in operands for f in dims} - set(rhs)
    return FactorMap(operands, (tuple(rhs),), {f: "sum" for f in sorted(summed)})


def reshape(old: Sequence[Dim], new: Sequence[Dim]) -> tuple[Dims, Dims]:
    """Factors of a reshape: dimensions that stay, and the outermost of each regrouped run.

    `[6,4] -> [24]`: both outermost dimensions carry one factor of size gcd(6, 24) = 6; a part of
    n of its units is n rows of four before and 4 n elements after.
    """
    before: list[str | None] = [None] * len(old)
    after: list[str | None] = [None] * len(new)
    for (i, i_end), (j, j_end) in _runs(old, new):
        outer_i = next((k for k in range(i, i_end) if old[k] != 1), i)
        outer_j = next((k for k in range(j, j_end) if new[k] != 1), j)
        if outer_i < i_end and outer_j < j_end:
            before[outer_i] = after[outer_j] = f"d{outer_i}"
    return tuple(before), tuple(after)


def _runs(
    old: Sequence[Dim], new: Sequence[Dim]
) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """The shortest runs of dimensions of `old` and `new` that hold equally many elements."""
    i = j = 0
    while i < len(old) and j < len(new):
        first_i, first_j = i, j
        a, b = old[i], new[j]
        i, j = i + 1, j + 1
        while a != b:
            if not (isinstance(a, int) and isinstance(b, int)) or 0 in (a, b):
                return
            if a < b and i < len(old):
                more = old[i]
                i += 1
                if not isinstance(more, int):
                    return
                a *= more
            elif a > b and j < len(new):
                more = new[j]
                j += 1
                if not isinstance(more, int):
                    return
                b *= more
            else:
                return
        yield (first_i, i), (first_j, j)


def leading(spatial: int) -> Callable[[Op], FactorMap]:
    """Every dimension before the last `spatial` ones is free, in operands and results alike.

    Pooling, padding, upsampling (batch and channels), linear algebra (batches of matrices).
    """

    def rule(op: Op) -> FactorMap:
        lead = op.inputs[0].type.rank - spatial
        shape = op.inputs[0].type.shape[:lead]

        def of(v: Value) -> Dims:
            if lead <= 0 or v.type.shape[:lead] != shape:
                return (None,) * v.type.rank
            return tuple(f"d{i}" if i < lead else None for i in range(v.type.rank))

        results = tuple(of(r) for r in op.results)
        whole = any(not any(dims) for dims in results)
        return keep_whole(op) if whole else FactorMap(tuple(map(of, op.inputs)), results)

    return rule


def keep_whole(op: Op) -> FactorMap:
    """Every dimension stays whole."""
    return FactorMap(
        tuple((None,) * v.type.rank for v in op.inputs),
        tuple((None,) * r.type.rank for r in op.results),
    )


def replaced(dims: Dims, index: int, name: str | None) -> Dims:
    """`dims` with another factor at one place."""
    return tuple(name if i == index else f for i, f in enumerate(dims))
