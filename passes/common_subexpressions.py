"""Computes equal values once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from shoestring.ir import Function, Op, Operand, Phase, Value
from shoestring.ir.inference import attrs_key

from .base import Numerics, Pass, PassReport
from .editing import reading


@dataclass(frozen=True)
class CommonSubexpressions(Pass):
    """Replaces an op by an earlier one with equal name, operands, attributes and result types.

    A draw of random numbers is equal to another one of the same key and site. What activation
    checkpointing recomputes is never merged with what it recomputes: that would keep alive what
    the user chose to drop.

    Before:

        func @f {
          batch %x: f32[4] "x"
          %a: f32[4] = aten.exp.default(%x)
          %b: f32[4] = aten.exp.default(%x)
          %c: f32[4] = aten.mul.Tensor(%a, %b)
          return y=%c
        }

    After:

        func @f {
          batch %x: f32[4] "x"
          %a: f32[4] = aten.exp.default(%x)
          %c: f32[4] = aten.mul.Tensor(%a, %a)
          return y=%c
        }
    """

    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, function: Function) -> tuple[Function, PassReport]:
        report = PassReport()
        seen: dict[object, dict[str | None, Op]] = {}
        subst: dict[Value, Value] = {}
        ops: list[Op] = []
        for old in function.ops:
            op = reading(old, subst)
            twins = seen.setdefault(_key(op), {}) if op.opdef.pure else {}
            twin = twins.setdefault(_region(op), op)
            if twin is op:
                ops.append(op)
            else:
                subst.update(zip(op.results, twin.results, strict=True))
            _count(report, op, twin, twins)
        return (function.with_ops(ops, subst) if subst else function), report


def _count(report: PassReport, op: Op, twin: Op, twins: dict[str | None, Op]) -> None:
    if twin is not op:
        report.matched += 1
        report.changed += 1
    elif len(twins) > 1:
        report.matched += 1
        report.skip("recomputed on purpose (activation checkpointing)", op.loc)


def _region(op: Op) -> str | None:
    """Ops merge within one region: each recomputed module is its own."""
    return op.loc.module if op.loc.phase is Phase.RECOMPUTE else None


def _key(op: Op) -> object:
    operands = tuple(_operand_key(o) for o in op.operands)
    return (op.name, operands, attrs_key(op), tuple(r.type for r in op.results))


def _operand_key(operand: Operand) -> object:
    """Values by identity; numbers by text, for 1, 1.0 and True, or 0.0 and -0.0, are not equal."""
    return operand if isinstance(operand, (Value, tuple)) else repr(operand)
