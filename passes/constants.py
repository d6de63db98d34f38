"""What a function computes from nothing: no parameter, no batch, no random number."""

from __future__ import annotations

import torch

from shoestring.ir import Function, Kind, Op, Value, run_op

CONSTANT = "ir.constant.default"
FULL = "aten.full.default"
UNFOLDABLE = frozenset({Kind.RANDOM, Kind.OPAQUE})


def is_foldable(op: Op) -> bool:
    """Whether an op on constants gives a constant: no random numbers, no undefined memory."""
    named = op.name in (CONSTANT, FULL) or op.opdef.kind not in UNFOLDABLE
    plain = len(op.results) == 1 and op.opdef.pure and "empty" not in op.name
    return named and plain and op.result.type.is_static and not op.result.type.dtype.is_complex


class Constants:
    """The values of a function that depend on nothing, evaluated where somebody asks.

    Args:
        function: whose values.
        limit: the most bytes that all evaluated values may take together.
    """

    def __init__(self, function: Function, limit: int) -> None:
        self._function = function
        self._left = limit
        self._values: set[Value] = set()
        self._elements: dict[Value, torch.Tensor | None] = {}
        for op in function.ops:
            if is_foldable(op) and self._values.issuperset(op.inputs):
                self._values.update(op.results)

    def __contains__(self, value: object) -> bool:
        return value in self._values

    def elements(self, value: Value) -> torch.Tensor | None:
        """A constant's elements; None beyond the limit, or where the reference refuses them."""
        waiting = [value]
        while waiting:
            v = waiting[-1]
            op = self._function.producer(v)
            if op is None or v in self._elements:
                waiting.pop()
                continue
            missing = [x for x in op.inputs if x not in self._elements]
            if missing:
                waiting += missing
                continue
            self._elements[v] = self._evaluate(op)
            waiting.pop()
        return self._elements.get(value)

    def _evaluate(self, op: Op) -> torch.Tensor | None:
        known = {v: e for v in op.inputs if (e := self._elements[v]) is not None}
        type_ = op.result.type
        size = type_.numel * type_.dtype.itemsize
        if len(known) < len(set(op.inputs)) or size > self._left:
            return None
        try:
            (elements,) = run_op(op, known)
        except RuntimeError:  # torch has no kernel for this element type, or divides by zero
            return None
        self._left -= size
        return elements
