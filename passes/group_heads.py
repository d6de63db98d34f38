"""Attention that reads heads of keys and values as often as queries share them, without copies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from shoestring.ir import Function, Op, TensorType, Value, make_op

from .base import Numerics, Pass, PassReport
from .editing import Names

FORWARD = "aten._scaled_dot_product_flash_attention_for_cpu.default"
BACKWARD = "aten._scaled_dot_product_flash_attention_for_cpu_backward.default"
VIEW, EXPAND, SUM = "aten.view.default", "aten.expand.default", "aten.sum.dim_IntList"
OWN, OWN_BACKWARD = "attention.softmax.default", "attention.softmax_backward.default"
KEY = {
    FORWARD: 1,
    BACKWARD: 2,
    OWN: 1,
    OWN_BACKWARD: 2,
}  # where the keys are among the operands; values follow
HEADS, COPIES = 1, 2  # dimensions of [batch, heads, copies, length, size]


@dataclass(frozen=True)
class GroupHeads(Pass):
    """Gives attention the heads of keys and values themselves where a model repeats each of them.

    Models with grouped queries repeat heads before attention, which takes a copy as large as the
    queries, kept for the backward pass. Kernels read a head once for all queries that share it, and
    add up its gradients themselves: in another order than the sum that goes with the copy.

    Before:

        func @f {
          batch %q: f32[2,4,8,16] "q"
          batch %k: f32[2,2,8,16] "k"
          batch %v: f32[2,2,8,16] "v"
          %k.1: f32[2,2,1,8,16] = aten.view.default(%k) {size=[2, 2, 1, 8, 16]}
          %k.2: f32[2,2,2,8,16] = aten.expand.default(%k.1) {size=[2, 2, 2, 8, 16]}
          %k.3: f32[2,4,8,16] = aten.view.default(%k.2) {size=[2, 4, 8, 16]}
          %v.1: f32[2,2,1,8,16] = aten.view.default(%v) {size=[2, 2, 1, 8, 16]}
          %v.2: f32[2,2,2,8,16] = aten.expand.default(%v.1) {size=[2, 2, 2, 8, 16]}
          %v.3: f32[2,4,8,16] = aten.view.default(%v.2) {size=[2, 4, 8, 16]}
          %out: f32[2,4,8,16], %lse: f32[2,4,8] = aten._scaled_dot_product_flash_attention_for_cpu.default(%q, %k.3, %v.3, _)
          return out=%out
        }

    After:

        func @f {
          batch %q: f32[2,4,8,16] "q"
          batch %k: f32[2,2,8,16] "k"
          batch %v: f32[2,2,8,16] "v"
          %k.1: f32[2,2,1,8,16] = aten.view.default(%k) {size=[2, 2, 1, 8, 16]}
          %k.2: f32[2,2,2,8,16] = aten.expand.default(%k.1) {size=[2, 2, 2, 8, 16]}
          %k.3: f32[2,4,8,16] = aten.view.default(%k.2) {size=[2, 4, 8, 16]}
          %v.1: f32[2,2,1,8,16] = aten.view.default(%v) {size=[2, 2, 1, 8, 16]}
          %v.2: f32[2,2,2,8,16] = aten.expand.default(%v.1) {size=[2, 2, 2, 8, 16]}
          %v.3: f32[2,4,8,16] = aten.view.default(%v.2) {size=[2, 4, 8, 16]}
          %k.1.1: f32[2,2,8,16] = aten.view.default(%k.1) {size=[2, 2, 8, 16]}
          %v.1.1: f32[2,2,8,16] = aten.view.default(%v.1) {size=[2, 2, 8, 16]}
          %out: f32[2,4,8,16], %lse: f32[2,4,8] = aten._scaled_dot_product_flash_attention_for_cpu.default(%q, %k.1.1, %v.1.1, _)
          return out=%out
        }
    """  # noqa: E501  (IR text)

    numerics: ClassVar[Numerics] = Numerics.REASSOCIATING

    def run(self, function: Function) -> tuple[Function, PassReport]:
        report = PassReport()
        names, uses = Names(function), _uses(function)
        ops: dict[Op, list[Op]] = {op: [op] for op in function.ops}
        for op in function.ops:
            repeated = _repeated(function, op)
            if repeated is None:
                continue
            report.matched += 1
            sums = _sums(op, repeated, uses) if op.name in (BACKWARD, OWN_BACKWARD) else []
            if sums is None:
                report.skip("gradients of repeated heads that are not only added up", op.loc)
                continue
            report.changed += 1
            ops[op] = _grouped(op, repeated, sums, names)
            ops.update((replaced, []) for pair in sums for replaced in pair)
        if not report.changed:
            return function, report
        return function.with_ops([new for op in function.ops for new in ops[op]]), report


def _uses(function: Function) -> dict[Value, list[Op]]:
    """Value -> the ops that read it; none for results of the function."""
    uses: dict[Value, list[Op]] = {}
    for op in function.ops:
        for v in dict.fromkeys(op.inputs):
            uses.setdefault(v, []).append(op)
    return uses | {v: [] for v in function.results}


def _repeated(function: Function, op: Op) -> tuple[Value, Value] | None:
    """Keys and values before they were repeated: [batch, heads, 1, length, size]."""
    at = KEY.get(op.name)
    if at is None:
        return None
    key, value = (_before_repeat(function, v) for v in op.operands[at : at + 2])
    if key is None or value is None or key.type.shape[:2] != value.type.shape[:2]:
        return None
    return key, value


def _before_repeat(function: Function, v: object) -> Value | None:
    merged = function.producer(v) if isinstance(v, Value) else None
    if merged is None or merged.name != VIEW or merged.result.type.rank != 4:
        return None
    repeated = function.producer(merged.inputs[0])
    if repeated is None or repeated.name != EXPAND:
        return None
    (source,) = repeated.inputs
    small, large, flat = source.type, repeated.result.type, merged.result.type
    if small.rank != 5 or large.rank != 5 or not (small.is_static and large.is_static):
        return None
    batch, heads, copies, *rest = large.static_shape
    only_copies = small.shape == (batch, heads, 1, *rest)
    return source if only_copies and flat.shape == (batch, heads * copies, *rest) else None


def _sums(
    op: Op, repeated: tuple[Value, Value], uses: Mapping[Value, list[Op]]
) -> list[tuple[Op, Op]] | None:
    """For each gradient the ops that add up copies, if nobody else reads it: a view and a sum."""
    found: list[tuple[Op, Op]] = []
    for gradient, source in zip(op.results[1:], repeated, strict=True):
        batch, heads, _, *rest = source.type.static_shape
        split = _only_use(gradient, VIEW, uses)
        total = _only_use(split.result, SUM, uses) if split is not None else None
        if split is None or total is None:
            return None
        copies = gradient.type.static_shape[HEADS] // heads
        if split.result.type.shape != (batch, heads, copies, *rest):
            return None
        if list(total.attr("dim")) != [COPIES] or total.result.type.dtype != gradient.type.dtype:
            return None
        found.append((split, total))
    return found


def _only_use(v: Value, name: str, uses: Mapping[Value, list[Op]]) -> Op | None:
    readers = uses.get(v, [])
    return readers[0] if len(readers) == 1 and readers[0].name == name else None


def _grouped(
    op: Op, repeated: tuple[Value, Value], sums: list[tuple[Op, Op]], names: Names
) -> list[Op]:
    """Attention on the heads themselves; what sums of its gradients gave is now a view of them."""
    at = KEY[op.name]
    narrow = [_view(v, names.fresh(_without_copies(v.type), v.name), op) for v in repeated]
    operands = list(op.operands)
    operands[at : at + 2] = [view.result for view in narrow]
    results = list(op.results)
    views: list[Op] = []
    for i, (_, total) in enumerate(sums):
        type_ = _without_copies(repeated[i].type)
        gradient = results[1 + i] = names.fresh(type_, op.results[1 + i].name)
        views.append(_view(gradient, total.result, total))
    return [*narrow, replace(op, operands=tuple(operands), results=tuple(results)), *views]


def _without_copies(type_: TensorType) -> TensorType:
    batch, heads, _, *rest = type_.static_shape
    return TensorType(type_.dtype, (batch, heads, *rest))


def _view(v: Value, result: Value, place: Op) -> Op:
    op = make_op(VIEW, (v,), {"size": result.type.static_shape}, place.loc)
    return replace(op, results=(result,))
