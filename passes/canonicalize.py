"""Gives each meaning one spelling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from shoestring.ir import Function

from .base import Numerics, Pass, PassReport
from .rewriter import rewrite
from .rules import CANONICAL


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Spells equal ops alike: numbers as operands, reshapes as `view`, transposes as `permute`.

    Copies and aliases disappear, since a value is its elements. Element types stay as they are.

    Before:

        func @f {
          batch %x: f32[2,3] "x"
          %a: f32[2,3] = aten.add.Scalar(%x) {other=2}
          %b: f32[3,2] = aten.t.default(%a)
          %c: f32[3,2] = aten.clone.default(%b)
          %d: f32[6] = aten._unsafe_view.default(%c) {size=[-1]}
          return y=%d
        }

    After:

        func @f {
          batch %x: f32[2,3] "x"
          %a: f32[2,3] = aten.add.Tensor(%x, 2)
          %b: f32[3,2] = aten.permute.default(%a) {dims=[1, 0]}
          %d: f32[6] = aten.view.default(%b) {size=[6]}
          return y=%d
        }
    """

    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, function: Function) -> tuple[Function, PassReport]:
        return rewrite(function, CANONICAL)
