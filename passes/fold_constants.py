"""Computes at compile time what does not depend on any parameter."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from shoestring.ir import Function, Kind, Number, Op, Operand, Value, make_op, run_op
from shoestring.ir.inference import infer_types, same_types

from .base import Numerics, Pass, PassReport
from .constants import CONSTANT, FULL, is_foldable

# A number in the place of a tensor is known to torch for these; it is then a wrapped number,
# which takes part in type promotion less than a tensor does, so result types are compared.
TAKES_NUMBERS = frozenset(
    {"aten.add.Tensor", "aten.sub.Tensor", "aten.mul.Tensor", "aten.div.Tensor"}
)
EVALUATED_ELEMENTS = 4096  # larger intermediates are not worth compile time


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Evaluates ops on constants with the reference; keeps small or uniform results.

    Random numbers are never folded, nor is memory that `empty` leaves undefined.

    Attributes:
        limit: the most elements of a result that is not uniform.

    Before:

        func @f {
          batch %x: f32[4] "x"
          %a: f32[4] = aten.full.default() {size=[4], fill_value=2.0}
          %b: f32[4] = aten.sqrt.default(%a)
          %c: f32[4] = aten.mul.Tensor(%x, %b)
          %i: i64[3] = aten.arange.start_step() {start=0, end=3, step=1}
          %j: i64[3] = aten.mul.Tensor(%i, 2)
          return y=%c, j=%j
        }

    After:

        func @f {
          batch %x: f32[4] "x"
          %a: f32[4] = ir.constant.default() {data=[2.0], shape=[4], dtype=f32}
          %b: f32[4] = ir.constant.default() {data=[1.4142135381698608], shape=[4], dtype=f32}
          %c: f32[4] = aten.mul.Tensor(%x, 1.4142135381698608)
          %i: i64[3] = ir.constant.default() {data=[0, 1, 2], shape=[3], dtype=i64}
          %j: i64[3] = ir.constant.default() {data=[0, 2, 4], shape=[3], dtype=i64}
          return y=%c, j=%j
        }
    """

    limit: int = 64

    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, function: Function) -> tuple[Function, PassReport]:
        report = PassReport()
        known: dict[Value, torch.Tensor] = {}
        ops: list[Op] = []
        for old in function.ops:
            op = _with_numbers(old, known)
            new = self._fold(op, known, report)
            report.changed += new is not old
            report.matched += new is not old
            ops.append(new)
        return (function.with_ops(ops) if report.changed else function), report

    def _fold(self, op: Op, known: dict[Value, torch.Tensor], report: PassReport) -> Op:
        """The op as a constant where it can be one; its elements go into `known`."""
        if not is_foldable(op) or any(v not in known for v in op.inputs):
            return op
        try:
            elements = _evaluate(op, known)
        except RuntimeError:  # torch has no kernel for this element type, or divides by zero
            report.skip("the reference refuses the constants", op.loc)
            return op
        if elements is None:
            return op
        data = _data(elements, self.limit)
        if data is None:
            report.matched += 1
            report.skip(f"more than {self.limit} elements, not all equal", op.loc)
            return op
        type_ = op.result.type
        new = make_op(
            CONSTANT, (), {"data": data, "shape": type_.shape, "dtype": type_.dtype}, op.loc
        )
        if not _equal_bits(run_op(new, {})[0], elements):
            return op
        known[op.result] = elements
        return op if op.name == CONSTANT else Op(new.opdef, (), new.attrs, op.results, op.loc)


def _evaluate(op: Op, known: dict[Value, torch.Tensor]) -> torch.Tensor | None:
    """The op's elements; a uniform result is evaluated on one element of each operand."""
    if op.name in (CONSTANT, FULL):
        size = op.result.type.static_shape
        if op.name == FULL or len(op.attrs["data"]) == 1:
            fill = op.attrs["fill_value"] if op.name == FULL else op.attrs["data"][0]
            return torch.full((), fill, dtype=op.result.type.dtype).expand(size)
    if _keeps_uniform(op) and all(_is_uniform(known[v]) for v in op.inputs):
        found = _evaluate_uniform(op, known)
        if found is not None:
            return found
    if op.result.type.numel > EVALUATED_ELEMENTS:
        return None
    (elements,) = run_op(op, known)
    return elements if elements.dtype == op.result.type.dtype else None


def _keeps_uniform(op: Op) -> bool:
    """Whether equal elements give equal elements; a bit cast may split them."""
    if not op.inputs or not op.result.type.numel:
        return False
    moves = op.opdef.kind is Kind.VIEW and op.inputs[0].type.dtype == op.result.type.dtype
    return moves or op.opdef.kind is Kind.POINTWISE


def _evaluate_uniform(op: Op, known: dict[Value, torch.Tensor]) -> torch.Tensor | None:
    """A uniform result by a few of its elements; None where they differ.

    Views only move elements. A pointwise kernel may round one in a vector otherwise than one behind
    the last vector.
    """
    size = op.result.type.static_shape
    if op.opdef.kind is Kind.VIEW:
        first = known[op.inputs[0]].as_strided((1,), (1,)).reshape(())
        return first.expand(size)
    samples = [run_op(op, {v: _sample(known[v], n) for v in op.inputs})[0] for n in SAMPLES]
    equal = len({repr(n) for sample in samples for n in _numbers(sample)}) == 1
    return samples[0].reshape(()).expand(size) if equal else None


SAMPLES = (1, 33)  # elements: one alone; two vectors and one more


def _sample(elements: torch.Tensor, count: int) -> torch.Tensor:
    """Some of a uniform operand. Rank decides on type promotion, so it is kept."""
    rank = elements.dim()
    return elements.as_strided((*(1,) * (rank - 1), count)[:rank], (0,) * rank)


def _is_uniform(elements: torch.Tensor) -> bool:
    """Whether all elements share one storage cell; says no rather than compare elements."""
    return elements.numel() > 0 and all(
        stride == 0 or size == 1
        for size, stride in zip(elements.shape, elements.stride(), strict=True)
    )


def _data(elements: torch.Tensor, limit: int) -> tuple[Number, ...] | None:
    """The elements as numbers, one for all where they are equal; None where there are too many."""
    if _is_uniform(elements):
        return (elements.as_strided((), ()).item(),)
    if elements.numel() > EVALUATED_ELEMENTS:
        return None
    flat = _numbers(elements)
    texts = {repr(n) for n in flat}
    if len(texts) == 1 and "nan" not in texts:
        return (flat[0],)
    return tuple(flat) if len(flat) <= limit and len(flat) != 1 else None


def _numbers(elements: torch.Tensor) -> list[Number]:
    flat: Any = elements.reshape(-1)
    return list(flat.tolist())


def _equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether elements agree with the sign of zeros; checked on one cell where both are uniform."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if _is_uniform(b) and a.numel():
        a, b = a.reshape(-1)[:1], b.as_strided((1,), (1,))
    return list(map(repr, _numbers(a))) == list(map(repr, _numbers(b)))


def _with_numbers(op: Op, known: dict[Value, torch.Tensor]) -> Op:
    """add, sub, mul and div with a number in the place of a uniform second operand."""
    if op.name not in TAKES_NUMBERS or len(op.inputs) != 2:
        return op
    operand = op.inputs[1]
    if operand not in known or not _is_uniform(known[operand]) or op.inputs[0] in known:
        return op
    number: Number = known[operand].as_strided((), ()).item()
    operands: tuple[Operand, ...] = (op.operands[0], number)
    new = Op(op.opdef, operands, op.attrs, op.results, op.loc)
    if isinstance(number, float) and not math.isfinite(number):
        return op
    return new if same_types(infer_types(new), (op.result.type,)) else op
