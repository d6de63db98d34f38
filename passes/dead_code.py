"""Removes ops whose results nobody reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from shoestring.ir import Function, Op

from .base import Numerics, Pass, PassReport


@dataclass(frozen=True)
class DeadCode(Pass):
    """Removes ops from which no output and no next value is computed.

    Before:

        func @f {
          batch %x: f32[4] "x"
          %a: f32[4] = aten.exp.default(%x)
          %b: f32[4] = aten.neg.default(%a)
          %c: f32[4] = aten.abs.default(%x)
          return y=%c
        }

    After:

        func @f {
          batch %x: f32[4] "x"
          %c: f32[4] = aten.abs.default(%x)
          return y=%c
        }
    """

    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, function: Function) -> tuple[Function, PassReport]:
        kept: list[Op] = []
        needed = set(function.results)
        for op in reversed(function.ops):
            if op.opdef.pure and needed.isdisjoint(op.results):
                continue
            needed.update(op.inputs)
            kept.append(op)
        removed = len(function.ops) - len(kept)
        report = PassReport(matched=removed, changed=removed)
        return (function.with_ops(reversed(kept)) if removed else function), report
