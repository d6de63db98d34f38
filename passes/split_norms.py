"""Writes what a batch norm makes of its input as pointwise ops of its statistics."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from shoestring.ir import Function, Op, TensorType, Value, trace

from .base import Numerics, Pass, PassReport
from .editing import Names, inline
from .rewriter import rewrite
from .rules import CANONICAL
from .rules.decompositions import computing_type

NORMS = frozenset({
    "aten._native_batch_norm_legit_functional.default",
    "aten._native_batch_norm_legit.no_stats",
})  # fmt: skip


@dataclass(frozen=True)
class SplitNorms(Pass):
    """Leaves to a batch norm that trains its statistics, and computes its result from them.

    The backward pass needs the input of the norm and its statistics. So the result, and what an
    activation makes of it, are cheap to compute again: `rematerialize` does, where it is pointwise.

    Before:

        func @f {
          batch %x: f32[4,2] "x"
          parameter %w: f32[2] "w"
          %y: f32[4,2], %m: f32[2], %r: f32[2] =
            aten._native_batch_norm_legit.no_stats(%x, %w, _)
            {training=true, momentum=0.1, eps=1e-05}
          return y=%y
        }

    After:

        func @f {
          batch %x: f32[4,2] "x"
          parameter %w: f32[2] "w"
          %y.1: f32[4,2], %m: f32[2], %r: f32[2] =
            aten._native_batch_norm_legit.no_stats(%x, %w, _)
            {training=true, momentum=0.1, eps=1e-05}
          %y.2: f32[1,2] = aten.view.default(%w) {size=[1, 2]}
          %y.3: f32[1,2] = aten.view.default(%m) {size=[1, 2]}
          %y.4: f32[1,2] = aten.view.default(%r) {size=[1, 2]}
          %y.5: f32[4,2] = aten.sub.Tensor(%x, %y.3)
          %y.6: f32[4,2] = aten.mul.Tensor(%y.5, %y.4)
          %y: f32[4,2] = aten.mul.Tensor(%y.6, %y.2)
          return y=%y
        }
    """

    numerics: ClassVar[Numerics] = Numerics.REASSOCIATING

    def run(self, function: Function) -> tuple[Function, PassReport]:
        report = PassReport()
        names = Names(function)
        ops: list[Op] = []
        for op in function.ops:
            if op.name not in NORMS:
                ops.append(op)
                continue
            report.matched += 1
            why = _refusal(op)
            if why:
                report.skip(why, op.loc)
                ops.append(op)
            else:
                report.changed += 1
                ops += _split(op, names)
        return (function.with_ops(ops) if report.changed else function), report


def _refusal(op: Op) -> str:
    """Why a norm stays whole; empty where it does not."""
    if not op.attr("training"):
        return "its statistics are not those of its input"
    return "" if op.inputs[0].type.is_static else "it has symbolic shapes"


def _split(op: Op, names: Names) -> list[Op]:
    """The op for its statistics alone, and its result."""
    out, mean, rstd, *_ = op.results
    unused = names.fresh(out.type, out.name)
    statistics = replace(op, results=(unused, *op.results[1:]))
    given = [v for v in op.operands[:3] if isinstance(v, Value)]
    body = _body(op, [v.type for v in (*given, mean, rstd)])
    return [statistics, *inline(body, [*given, mean, rstd], [out], names, {}, op.loc)]


_BODIES: dict[object, Function] = {}


def _body(op: Op, types: list[TensorType]) -> Function:
    """The result from x, the weight and the bias if there are, the mean and 1 / deviation."""
    affine = tuple(isinstance(v, Value) for v in op.operands[1:3])
    key = (*types, affine)
    if key not in _BODIES:
        body = trace(lambda *tensors: _normalized(affine, *tensors), types, "body")
        _BODIES[key], _ = rewrite(body, CANONICAL)
    return _BODIES[key]


def _normalized(affine: tuple[bool, ...], x: Tensor, *rest: Tensor) -> Tensor:
    shape = [1, -1, *(1 for _ in x.shape[2:])]
    dtype = computing_type(x)
    *scales, mean, rstd = (t.to(dtype).reshape(shape) for t in rest)
    y = (x.to(dtype) - mean) * rstd
    if affine[0]:
        y = y * scales[0]
    return (y + scales[-1] if affine[1] else y).to(x.dtype)
