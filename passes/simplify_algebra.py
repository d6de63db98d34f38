"""Removes arithmetic and rearrangements that do nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from shoestring.ir import Function

from .base import Numerics, Pass, PassReport
from .rewriter import rewrite
from .rules import ALGEBRA


@dataclass(frozen=True)
class SimplifyAlgebra(Pass):
    """Applies the identities of `rules/algebra.py`, all of which hold to the last bit.

    Before:

        func @f {
          batch %x: f32[2,3] "x"
          %a: f32[2,3] = aten.mul.Tensor(%x, 1.0)
          %b: f32[2,3] = aten.add.Tensor(%a, 0.0)
          %c: f32[2,3] = aten.div.Tensor(%b, 4)
          %d: f32[3,2] = aten.view.default(%c) {size=[3, 2]}
          %e: f32[6] = aten.view.default(%d) {size=[6]}
          return y=%e
        }

    After (`x + 0.0` stays: it turns -0.0 into 0.0):

        func @f {
          batch %x: f32[2,3] "x"
          %b: f32[2,3] = aten.add.Tensor(%x, 0.0)
          %c: f32[2,3] = aten.mul.Tensor(%b, 0.25)
          %d: f32[3,2] = aten.view.default(%c) {size=[3, 2]}
          %e: f32[6] = aten.view.default(%c) {size=[6]}
          return y=%e
        }
    """

    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, function: Function) -> tuple[Function, PassReport]:
        return rewrite(function, ALGEBRA)
