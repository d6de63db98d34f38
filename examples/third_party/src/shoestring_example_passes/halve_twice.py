"""Multiplies once where a program multiplies by two powers of two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from shoestring.ir import Function
from shoestring.passes import Numerics, Pass, PassReport
from shoestring.passes.rewriter import op, rewrite, rules, value

x = value("x")

RULES = rules(
    (
        op("aten.mul.Tensor", op("aten.mul.Tensor", x, 0.5), 0.5),
        op("aten.mul.Tensor", x, 0.25),
    ),  # (x * 1/2) * 1/2 -> x * 1/4
)


@dataclass(frozen=True)
class HalveTwice(Pass):
    """Halves twice in one multiplication.

    Reassociating, not exact: for the smallest numbers the first half is already rounded.

    Before:

        func @f {
          batch %x: f32[4] "x"
          %a: f32[4] = aten.mul.Tensor(%x, 0.5)
          %b: f32[4] = aten.mul.Tensor(%a, 0.5)
          return y=%b
        }

    After:

        func @f {
          batch %x: f32[4] "x"
          %a: f32[4] = aten.mul.Tensor(%x, 0.5)
          %b: f32[4] = aten.mul.Tensor(%x, 0.25)
          return y=%b
        }
    """

    numerics: ClassVar[Numerics] = Numerics.REASSOCIATING

    def run(self, function: Function) -> tuple[Function, PassReport]:
        return rewrite(function, RULES)
