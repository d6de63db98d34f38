"""What a sharding rule means: one part of an op, and how parts are put together again."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..function import Op
from ..opdef import FactorMap
from ..types import TensorType
from .factors import Dims

# Attributes that repeat sizes of the (first) result.
RESULT_SIZES = ("size", "input_sizes", "input_size")
_COMBINE: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sum": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
}


def factor_size(op: Op, rule: FactorMap, factor: str) -> int:
    """Into how many units a factor can be split.

    Dimensions that share a factor may differ in size (a reshape regroups them); they are split
    at the same fractions, so the unit is their greatest common divisor.
    """
    return math.gcd(
        *(
            n
            for t, dims in _sides(op, rule)
            for n, f in zip(t.static_shape, dims, strict=True)
            if f == factor
        )
    )


def _sides(op: Op, rule: FactorMap) -> list[tuple[TensorType, Dims]]:
    operands = zip((v.type for v in op.inputs), rule.operands, strict=True)
    results = zip((r.type for r in op.results), rule.results, strict=True)
    return [*operands, *results]


def local_shape(type_: TensorType, dims: Dims, factor: str, units: int, of: int) -> tuple[int, ...]:
    """The shape of a part that holds `units` of the factor's `of` units."""
    sizes = zip(type_.static_shape, dims, strict=True)
    return tuple(n * units // of if f == factor else n for n, f in sizes)


def local_attrs(op: Op, rule: FactorMap, factor: str, units: int, of: int) -> Mapping[str, Any]:
    """The op's attributes in one part: those that repeat sizes have the part's."""
    attrs = dict(op.attrs)
    first = local_shape(op.results[0].type, rule.results[0], factor, units, of)
    for name in RESULT_SIZES:
        if isinstance(attrs.get(name), tuple) and len(attrs[name]) == len(first):
            attrs[name] = first
    if op.name.startswith("aten.native_group_norm") and factor == "n":
        attrs["N"] = attrs["N"] * units // of
    if op.name == "aten.convolution_backward.default" and factor == "o" and attrs["bias_sizes"]:
        attrs["bias_sizes"] = tuple(n * units // of for n in attrs["bias_sizes"])
    return attrs


def take(
    tensor: torch.Tensor, dims: Dims, factor: str, start: int, stop: int, of: int
) -> torch.Tensor:
    """Units `start` to `stop` of a tensor, row-major; all of it where it lacks the factor."""
    for i, f in enumerate(dims):
        if f == factor:
            n = tensor.shape[i]
            tensor = tensor.narrow(i, start * n // of, (stop - start) * n // of)
    return tensor.contiguous()


def join(
    parts: Sequence[torch.Tensor], dims: Dims, rule: FactorMap, factor: str
) -> torch.Tensor | None:
    """The whole from its parts; None where the rule does not say how."""
    if factor in dims:
        return torch.cat(list(parts), dims.index(factor))
    how = rule.reduce.get(factor)
    if how is None:
        return None
    whole = parts[0]
    for part in parts[1:]:
        whole = _COMBINE[how](whole, part)
    return whole
