"""Conditions that rules share."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..rewriter import Match


def is_positive_zero(n: Any) -> bool:
    """0 or +0.0, the number that may be subtracted from any x, -0.0 included."""
    return not isinstance(n, complex) and n == 0 and math.copysign(1.0, n) > 0


def is_negative_zero(n: Any) -> bool:
    """-0.0, the number that may be added to any x."""
    return isinstance(n, float) and n == 0.0 and math.copysign(1.0, n) < 0


def is_one(n: Any) -> bool:
    return not isinstance(n, complex) and n == 1


def is_power_of_two(n: Any) -> bool:
    """Whether division by n is multiplication by 1/n, for each element type."""
    return not isinstance(n, complex) and n != 0 and math.isfinite(n) and abs(
        math.frexp(n)[0]
    ) == 0.5 and 2.0**-14 <= abs(n) <= 2.0**14  # fmt: skip


def is_real(m: Match) -> bool:
    """Whether the result is no complex number: inf * (1+0i) has a NaN."""
    return not m.result.dtype.is_complex


def is_float(m: Match) -> bool:
    return m.result.dtype.is_floating_point


def is_integer(m: Match) -> bool:
    """Integers, without bool."""
    dtype = m.result.dtype
    return not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool)


_EXPONENT_MANTISSA = {
    torch.float64: (11, 52),
    torch.float32: (8, 23),
    torch.bfloat16: (8, 7),
    torch.float16: (5, 10),
}


def widens(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether every number of one type is one of the other, in floats or from bool."""
    if source is torch.bool:
        return not target.is_complex
    if source not in _EXPONENT_MANTISSA or target not in _EXPONENT_MANTISSA:
        return False
    (e1, m1), (e2, m2) = _EXPONENT_MANTISSA[source], _EXPONENT_MANTISSA[target]
    return e1 <= e2 and m1 <= m2
