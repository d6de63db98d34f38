"""Keeps sigmoids and tanhs for the backward pass in the type in which autocast keeps them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from shoestring.ir import Function, Op, Phase, Value

from .base import Numerics, Pass, PassReport
from .editing import Names, reading
from .lower_precision import DTYPES, check_dtype, is_wide, low_type, make_convert

# Under autocast these give what they take: after a product, the lower type. Their results lie
# between -1 and 1, and their gradients are made of them.
SAVED_LOW = frozenset({"aten.sigmoid.default", "aten.tanh.default"})


@dataclass(frozen=True)
class RoundSaved(Pass):
    """Rounds to bf16 what the backward pass reads of f32 sigmoids and tanhs of the forward pass.

    So does autocast; here the forward pass itself still reads them in f32. The gates of a recurrent
    net are most of what it keeps. After `rematerialize`, so that what is computed again from other
    values is not concerned. Error: 2^-9 of each of them, in the gradient alone.

    Attributes:
        dtype: `bf16`, the type in which they are kept.

    Raises:
        PassError: SS3011 for another `dtype`.

    Before:

        func @f {
          batch %x: f32[8] "x"
          %s: f32[8] = aten.sigmoid.default(%x)
          %y: f32[8] = aten.mul.Tensor(%s, %x)
          %g: f32[8] = aten.sigmoid_backward.default(%x, %s) loc("m.py":1 "" backward)
          return y=%y, g=%g
        }

    After:

        func @f {
          batch %x: f32[8] "x"
          %s: f32[8] = aten.sigmoid.default(%x)
          %s.1: bf16[8] = aten._to_copy.default(%s) {dtype=bf16}
          %y: f32[8] = aten.mul.Tensor(%s, %x)
          %s.2: f32[8] = aten._to_copy.default(%s.1) {dtype=f32} loc("m.py":1 "" backward)
          %g: f32[8] = aten.sigmoid_backward.default(%x, %s.2) loc("m.py":1 "" backward)
          return y=%y, g=%g
        }
    """

    dtype: str = "bf16"

    numerics: ClassVar[Numerics] = Numerics.LOSSY

    def __post_init__(self) -> None:
        check_dtype(self.name, self.dtype)

    def run(self, function: Function) -> tuple[Function, PassReport]:
        report = PassReport()
        later = {v for op in function.ops if _is_later(op) for v in op.inputs}
        ends = set(function.results)
        names, dtype = Names(function), DTYPES[self.dtype]
        rounded: dict[Value, Value] = {}
        subst: dict[Value, Value] = {}
        ops: list[Op] = []
        for op in function.ops:
            for v in op.inputs if _is_later(op) else ():
                if v in rounded and v not in subst:
                    subst[v] = names.fresh(v.type, v.name)
                    ops.append(make_convert(rounded[v], subst[v], op.loc))
            ops.append(reading(op, subst) if _is_later(op) else op)
            if op.name not in SAVED_LOW or op.loc.phase is not Phase.FORWARD:
                continue
            v = op.result
            if not is_wide(v) or v not in later:
                continue
            report.matched += 1
            if v in ends:
                report.skip("it is a result of the step", op.loc)
                continue
            rounded[v] = names.fresh(low_type(v, dtype), v.name)
            ops.append(make_convert(v, rounded[v], op.loc))
            report.changed += 1
        return (function.with_ops(ops) if report.changed else function), report


def _is_later(op: Op) -> bool:
    return op.loc.phase in (Phase.BACKWARD, Phase.RECOMPUTE)
