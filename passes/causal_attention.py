"""Attention that knows which keys come later, instead of reading it from a mask."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from shoestring.ir import Function, Kind, Op, Value, run_op
from shoestring.ir.ops.contractions import query_key

from .base import Numerics, Pass, PassReport
from .constants import Constants
from .group_heads import BACKWARD, FORWARD, OWN, OWN_BACKWARD

ATTENTION = frozenset({FORWARD, BACKWARD, OWN, OWN_BACKWARD})
AND = frozenset({"aten.bitwise_and.Tensor", "aten.logical_and.default"})
OR = frozenset({"aten.bitwise_or.Tensor", "aten.logical_or.default"})
NOT = frozenset({"aten.bitwise_not.default", "aten.logical_not.default"})
WHERE, ADD = "aten.where.self", "aten.add.Tensor"
PAIRS = AND | OR | {ADD}
# A score of that or less weighs nothing beside one that a query may see.
LOWEST = -1e9
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
        places = {op: mask for op in function.ops if (mask := _mask(op)) is not None}
        report.matched = len(places)
        if not places:
            return function, report
        masks = _Masks(function, self.limit)
        found: dict[object, tuple[bool, bool] | str] = {}
        told: dict[Op, Op] = {}
        for op, mask in places.items():
            case = (mask, bool(op.attrs.get("is_causal", False)), _square(op), _fill(op))
            if case not in found:
                found[case] = masks.read(*case)
            what = found[case]
            if isinstance(what, str):
                report.skip(what, op.loc)
            else:
                told[op] = _told(op, *what)
        if not told:
            return function, report
        report.changed = len(told)
        kept = sum(_mask(op) is not None for op in told.values())
        report.note(f"{len(told) - kept} need no mask any more, {kept} keep it")
        return function.with_ops([told.get(op, op) for op in function.ops]), report


def _place(op: Op) -> int:
    return op.opdef.operand_names.index("attn_mask")


def _mask(op: Op) -> Value | None:
    if op.name not in ATTENTION:
        return None
    mask = op.operands[_place(op)]
    static = all(v.type.is_static for v in op.inputs)
    return mask if isinstance(mask, Value) and static else None


def _fill(op: Op) -> float:
    """What scores are that a mask of bools hides."""
    return float(op.attr("fill")) if op.name in (OWN, OWN_BACKWARD) else -math.inf


def _square(op: Op) -> tuple[int, int]:
    """How many queries and keys."""
    q, k = query_key(op)
    return q.type.static_shape[-2], k.type.static_shape[-2]


def _told(op: Op, causal: bool, needed: bool) -> Op:
    operands = list(op.operands)
    if not needed:
        operands[_place(op)] = None
    attrs = {**op.attrs, "is_causal": True} if causal else dict(op.attrs)
    for name in ("fill", "safe") if not needed and op.name in (OWN, OWN_BACKWARD) else ():
        attrs[name] = op.opdef.attr_defaults[name]
    return replace(op, operands=tuple(operands), attrs=attrs)


class _Masks:
    """What is known of masks and conditions, be it that they depend on the batch in part.

    Bounds are tensors of bool that broadcast to what they are of; None says nothing.
    """

    def __init__(self, function: Function, limit: int) -> None:
        self._function = function
        self._limit = limit
        self._constants = Constants(function, limit)
        self._known: dict[tuple[Value, bool | None], Tensor | None] = {}

    def read(
        self, mask: Value, causal: bool, square: tuple[int, int], fill: float
    ) -> tuple[bool, bool] | str:
        """Whether attention with this mask is causal, and whether it needs the mask; or why not."""
        if math.prod(square) > self._limit:
            return TOO_LARGE
        earlier = torch.ones(square, dtype=torch.bool).tril()
        elements = self._constants.elements(mask) if mask in self._constants else None
        if elements is not None:
            chooses = elements.dtype is torch.bool
            hidden = ~elements if chooses else elements <= LOWEST
            plain = fill <= LOWEST if chooses else bool(((elements == 0) | hidden).all())
            if plain:
                if bool((~hidden | ~earlier if causal else ~hidden).all()):
                    return causal, False
                if not causal and bool((~hidden == earlier).all()):
                    return True, False
        if causal or bool(earlier.all()):
            return "the mask hides more than later keys"
        if mask.type.dtype is torch.bool and fill > -math.inf:
            return "a query that sees nothing gets the mean of all values"
        seen = self.seen(mask)
        if seen is not None and not bool((seen & ~earlier).any()):
            return True, True
        if mask in self._constants and elements is None:
            return TOO_LARGE
        return "later keys may be seen"

    def seen(self, mask: Value) -> Tensor | None:
        """Where a mask may be more than -inf, or true."""
        return self._bound(mask, True if mask.type.dtype is torch.bool else None, 0)

    def may(self, condition: Value, be: bool) -> Tensor | None:
        """Where a condition may be true, or false."""
        return self._bound(condition, be, 0) if condition.type.dtype is torch.bool else None

    def _bound(self, v: Value, be: bool | None, depth: int) -> Tensor | None:
        """Where a condition may `be` so; of None, where a mask may be more than -inf."""
        if (v, be) not in self._known:
            self._known[v, be] = self._find(v, be, depth)
        return self._known[v, be]

    def _find(self, v: Value, be: bool | None, depth: int) -> Tensor | None:
        op = self._function.producer(v)
        if op is None or depth > DEEPEST or (be is not None) != (v.type.dtype is torch.bool):
            return None
        if v in self._constants:
            elements = self._constants.elements(v)
            return None if elements is None else elements != (-math.inf if be is None else not be)
        if op.opdef.kind is Kind.VIEW and len(op.inputs) == 1:
            (source,) = op.inputs
            bound = self._bound(source, be, depth + 1)
            if bound is None or not source.type.is_static:
                return None
            return run_op(op, {source: bound.expand(source.type.static_shape)})[0]
        if op.name == WHERE and len(op.inputs) == 3 and be is None:
            condition, x, y = op.inputs
            if_true, if_false = (self._bound(condition, b, depth + 1) for b in (True, False))
            shown, other = (self._bound(o, None, depth + 1) for o in (x, y))
            return _either(_both(if_true, shown), _both(if_false, other))
        if op.name in NOT and be is not None:
            return self._bound(op.inputs[0], not be, depth + 1)
        if op.name in PAIRS and len(op.inputs) == 2 and op.attrs.get("alpha", 1) == 1:
            bounds = [self._bound(o, be, depth + 1) for o in op.inputs]
            every = op.name == ADD or (op.name in AND) == be
            return _both(*bounds) if every else _either(*bounds)
        return None


def _both(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    """The and of those that say something."""
    return y if x is None else x if y is None else x & y


def _either(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return None if x is None or y is None else x | y
