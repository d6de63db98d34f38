"""Attention that knows which keys come later, instead of reading it from a mask."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from shoestring.ir import Function, Kind, Op, Value, run_op

from .base import Numerics, Pass, PassReport
from .constants import Constants

ATTENTION = frozenset(
    {
        "aten._scaled_dot_product_flash_attention_for_cpu.default",
        "aten._scaled_dot_product_flash_attention_for_cpu_backward.default",
    }
)
AND = frozenset({"aten.bitwise_and.Tensor", "aten.logical_and.default"})
OR = frozenset({"aten.bitwise_or.Tensor", "aten.logical_or.default"})
NOT = frozenset({"aten.bitwise_not.default", "aten.logical_not.default"})
WHERE, ADD = "aten.where.self", "aten.add.Tensor"
# A score less than that weighs nothing beside one that a query may see.
LOWEST = torch.finfo(torch.bfloat16).min
TOO_LARGE = "the mask is too large to evaluate"
DEEPEST = 64  # ops between a mask and what is known of it


@dataclass(frozen=True)
class CausalAttention(Pass):
    """Tells attention that no query sees later keys, where its mask says so whatever the batch is.

    Models compute masks from positions, which are known: such a mask is evaluated. Where it hides
    later keys and no others, or none, attention goes without it; where it hides later keys and,
    depending on the batch, more (padding), attention keeps it. Kernels leave out the later half of
    the scores. A key that is infinite or no number does not reach queries that may not see it.

    Attributes:
        limit: the most bytes of masks and what they are made from that are evaluated.

    Before:

        func @f {
          batch %q: f32[1,1,2,4] "q"
          %seen: bool[2,2] = ir.constant.default() {data=[true, false, true, true], shape=[2, 2], dtype=bool}
          %zero: f32[] = ir.constant.default() {data=[0.0], shape=[], dtype=f32}
          %never: f32[] = ir.constant.default() {data=[-inf], shape=[], dtype=f32}
          %mask: f32[2,2] = aten.where.self(%seen, %zero, %never)
          %out: f32[1,1,2,4], %lse: f32[1,1,2] = aten._scaled_dot_product_flash_attention_for_cpu.default(%q, %q, %q, %mask)
          return out=%out
        }

    After:

        func @f {
          batch %q: f32[1,1,2,4] "q"
          %seen: bool[2,2] = ir.constant.default() {data=[true, false, true, true], shape=[2, 2], dtype=bool}
          %zero: f32[] = ir.constant.default() {data=[0.0], shape=[], dtype=f32}
          %never: f32[] = ir.constant.default() {data=[-inf], shape=[], dtype=f32}
          %mask: f32[2,2] = aten.where.self(%seen, %zero, %never)
          %out: f32[1,1,2,4], %lse: f32[1,1,2] = aten._scaled_dot_product_flash_attention_for_cpu.default(%q, %q, %q, _) {is_causal=true}
          return out=%out
        }
    """  # noqa: E501  (IR text)

    limit: int = 1 << 29

    numerics: ClassVar[Numerics] = Numerics.REASSOCIATING

    def run(self, function: Function) -> tuple[Function, PassReport]:
        report = PassReport()
        masks = _Masks(function, self.limit)
        found: dict[object, tuple[bool, bool] | str] = {}
        ops: list[Op] = []
        without = 0
        for op in function.ops:
            mask = _mask(op)
            if mask is None:
                ops.append(op)
                continue
            report.matched += 1
            causal, square = bool(op.attrs.get("is_causal", False)), _square(op)
            case = (mask, causal, square)
            if case not in found:
                found[case] = masks.read(mask, causal, square)
            what = found[case]
            if isinstance(what, str):
                report.skip(what, op.loc)
                ops.append(op)
                continue
            report.changed += 1
            without += not what[1]
            ops.append(_told(op, *what))
        if report.changed:
            report.note(f"{without} need no mask any more, {report.changed - without} keep it")
        return (function.with_ops(ops) if report.changed else function), report


def _place(op: Op) -> int:
    return op.opdef.operand_names.index("attn_mask")


def _mask(op: Op) -> Value | None:
    if op.name not in ATTENTION:
        return None
    mask = op.operands[_place(op)]
    static = all(v.type.is_static for v in op.inputs)
    return mask if isinstance(mask, Value) and static else None


def _square(op: Op) -> tuple[int, int]:
    """How many queries and keys."""
    query = op.opdef.operand_names.index("query")
    q, k = op.inputs[query : query + 2]
    return q.type.static_shape[-2], k.type.static_shape[-2]


def _told(op: Op, causal: bool, needed: bool) -> Op:
    operands = list(op.operands)
    if not needed:
        operands[_place(op)] = None
    attrs = {**op.attrs, "is_causal": True} if causal else op.attrs
    return replace(op, operands=tuple(operands), attrs=attrs)


class _Masks:
    """What is known of masks and conditions, be it that they depend on the batch in part.

    Bounds are tensors of bool that broadcast to what they are of; None says nothing.
    """

    def __init__(self, function: Function, limit: int) -> None:
        self._function = function
        self._limit = limit
        self._constants = Constants(function, limit)
        self._known: dict[tuple[str, Value], Tensor | None] = {}

    def read(self, mask: Value, causal: bool, square: tuple[int, int]) -> tuple[bool, bool] | str:
        """Whether attention with this mask is causal, and whether it needs the mask; or why not."""
        if math.prod(square) > self._limit:
            return TOO_LARGE
        earlier = torch.ones(square, dtype=torch.bool).tril()
        elements = self._constants.elements(mask) if mask in self._constants else None
        if elements is not None:
            hidden = elements <= (-math.inf if elements.dtype is torch.float16 else LOWEST)
            if bool(((elements == 0) | hidden).all()):
                if bool((~hidden | ~earlier if causal else ~hidden).all()):
                    return causal, False
                if not causal and bool((~hidden == earlier).all()):
                    return True, False
        if causal or bool(earlier.all()):
            return "the mask hides more than later keys"
        seen = self.seen(mask)
        if seen is not None and not bool((seen & ~earlier).any()):
            return True, True
        if mask in self._constants and elements is None:
            return TOO_LARGE
        return "later keys may be seen"

    def seen(self, mask: Value, depth: int = 0) -> Tensor | None:
        """Where a mask may be more than -inf."""
        return self._bound("seen", mask, depth, self._seen)

    def most(self, condition: Value, depth: int = 0) -> Tensor | None:
        """Where a condition may be true."""
        return self._bound("most", condition, depth, self._most)

    def least(self, condition: Value, depth: int = 0) -> Tensor | None:
        """Where a condition is true in any case."""
        return self._bound("least", condition, depth, self._least)

    def _bound(
        self, kind: str, v: Value, depth: int, rule: Callable[[Op, int], Tensor | None]
    ) -> Tensor | None:
        if (kind, v) not in self._known:
            self._known[kind, v] = None
            self._known[kind, v] = self._find(kind, v, depth, rule)
        return self._known[kind, v]

    def _find(
        self, kind: str, v: Value, depth: int, rule: Callable[[Op, int], Tensor | None]
    ) -> Tensor | None:
        op = self._function.producer(v)
        if op is None or depth > DEEPEST or (kind != "seen") != (v.type.dtype is torch.bool):
            return None
        if v in self._constants:
            elements = self._constants.elements(v)
            return elements != -math.inf if elements is not None and kind == "seen" else elements
        if op.opdef.kind is Kind.VIEW and len(op.inputs) == 1:
            (source,) = op.inputs
            bound = self._bound(kind, source, depth + 1, rule)
            if bound is None or not source.type.is_static:
                return None
            return run_op(op, {source: bound.expand(source.type.static_shape)})[0]
        return rule(op, depth + 1)

    def _seen(self, op: Op, depth: int) -> Tensor | None:
        if op.name == WHERE and len(op.inputs) == 3:
            condition, x, y = op.inputs
            if_true = _all_of(self.most(condition, depth), self.seen(x, depth))
            if_false = _all_of(_not(self.least(condition, depth)), self.seen(y, depth))
            return None if if_true is None or if_false is None else if_true | if_false
        if op.name == ADD and len(op.inputs) == 2 and op.attrs.get("alpha", 1) == 1:
            return _all_of(*(self.seen(v, depth) for v in op.inputs))
        return None

    def _most(self, op: Op, depth: int) -> Tensor | None:
        if op.name in AND:
            return _all_of(*(self.most(v, depth) for v in op.inputs))
        if op.name in NOT:
            return _not(self.least(op.inputs[0], depth))
        if op.name in OR and len(op.inputs) == 2:
            x, y = (self.most(v, depth) for v in op.inputs)
            return None if x is None or y is None else x | y
        return None

    def _least(self, op: Op, depth: int) -> Tensor | None:
        if op.name in OR:
            return _not(_all_of(*(_not(self.least(v, depth)) for v in op.inputs)))
        if op.name in NOT:
            return _not(self.most(op.inputs[0], depth))
        if op.name in AND and len(op.inputs) == 2:
            x, y = (self.least(v, depth) for v in op.inputs)
            return None if x is None or y is None else x & y
        return None


def _not(bound: Tensor | None) -> Tensor | None:
    return None if bound is None else ~bound


def _all_of(*bounds: Tensor | None) -> Tensor | None:
    """The and of those that say something."""
    known = [b for b in bounds if b is not None]
    return functools.reduce(torch.logical_and, known) if known else None
