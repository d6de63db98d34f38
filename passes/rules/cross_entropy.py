"""Cross-entropy written out: `_log_softmax`, `nll_loss` and their gradients as ops on rows.

Everything that depends on targets alone (weights, their total, the scale of a row's gradient) has
one element a row and is computed apart from the logits, so that rows do not wait for each other.

N: rows, C: classes, in dimension 1. t: targets [N, ...], x: logits [N, C, ...].
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from shoestring.ir import Function, Loc, Number, Op, Operand, Value, make_op

from ..editing import Names, append

LOG_SOFTMAX = "aten._log_softmax.default"
LOG_SOFTMAX_BACKWARD = "aten._log_softmax_backward_data.default"
FORWARD = ("aten.nll_loss_forward.default", "aten.nll_loss2d_forward.default")
BACKWARD = ("aten.nll_loss_backward.default", "aten.nll_loss2d_backward.default")
EXPANDED = frozenset({LOG_SOFTMAX, LOG_SOFTMAX_BACKWARD, *FORWARD, *BACKWARD})

NONE, MEAN, SUM = 0, 1, 2  # PyTorch's numbers of `reduction`


@dataclass(frozen=True)
class _Normalized:
    """log_softmax(x) = x - largest - log(total), with x in the type of the arithmetic."""

    x: Value
    largest: Value
    shifted: Value
    powers: Value  # exp(shifted)
    total: Value  # their sum
    dim: int


@dataclass(frozen=True)
class _Rows:
    """What targets say of each row.

    Attributes:
        ignored: bool[N, ...].
        weight: the weight of its class; 0 where ignored.
    """

    ignored: Value
    weight: Value


@dataclass(frozen=True)
class _Hit:
    """A gradient of log-probabilities that is -scale at targets and 0 elsewhere."""

    log_p: Value
    t: Value
    scale: Value


class CrossEntropy:
    """Writes the given ops of a function out; every other op stays."""

    def __init__(self, function: Function, chosen: Iterable[Op]) -> None:
        self.function, self.chosen = function, set(chosen)
        self.names = Names(function)
        self.ops: list[Op] = []
        self.normalized: dict[Value, _Normalized] = {}
        self.rows: dict[tuple[object, ...], _Rows] = {}
        self.hits: dict[Value, _Hit] = {}
        self.loc, self.base = Loc(), ""

    def run(self) -> Function:
        """The function with the chosen ops written out."""
        write = {LOG_SOFTMAX: self._log_softmax, LOG_SOFTMAX_BACKWARD: self._log_softmax_backward}
        write |= dict.fromkeys(FORWARD, self._loss) | dict.fromkeys(BACKWARD, self._loss_backward)
        for op in self.function.ops:
            if op not in self.chosen:
                self.ops.append(op)
                continue
            self.loc, self.base = op.loc, op.results[0].name
            write[op.name](op)
        kept = set(self.function.ops)
        return self.function.with_ops(_without_dead(self.function, self.ops, kept))

    # -- writing ops ---------------------------------------------------------------------------

    def emit(
        self, name: str, *operands: Operand, result: Value | None = None, **attrs: Any
    ) -> Value:
        op = make_op(name, operands, attrs, self.loc)
        return append(self.ops, self.names, op, self.base, result)

    def cast(self, x: Value, dtype: torch.dtype, result: Value | None = None) -> Value:
        if x.type.dtype is dtype and result is None:
            return x
        return self.emit("aten._to_copy.default", x, result=result, dtype=dtype)

    def fill(self, x: Value, mask: Value, value: Number, result: Value | None = None) -> Value:
        return self.emit("aten.masked_fill.Scalar", x, mask, result=result, value=value)

    def over(self, name: str, x: Value, dim: int) -> Value:
        return self.emit(name, x, dim=(dim,), keepdim=True)

    # -- log_softmax ---------------------------------------------------------------------------

    def _log_softmax(self, op: Op) -> None:
        x, out = op.inputs[0], op.result
        wide = self.cast(x, _wide(x.type.dtype))
        dim = op.attr("dim") % x.type.rank
        largest = self.over("aten.amax.default", wide, dim)
        shifted = self.emit("aten.sub.Tensor", wide, largest)
        powers = self.emit("aten.exp.default", shifted)
        total = self.over("aten.sum.dim_IntList", powers, dim)
        self.normalized[out] = _Normalized(wide, largest, shifted, powers, total, dim)
        self._log_probabilities(self.normalized[out], out)

    def _log_probabilities(self, n: _Normalized, result: Value | None = None) -> Value:
        """Written anew for the backward pass: kept, they would be as large as the logits."""
        shifted = self.emit("aten.sub.Tensor", n.x, n.largest)
        log_total = self.emit("aten.log.default", n.total)
        narrow = result is not None and result.type.dtype is not shifted.type.dtype
        final = None if narrow else result
        value = self.emit("aten.sub.Tensor", shifted, log_total, result=final)
        return self.cast(value, result.type.dtype, result) if narrow and result else value

    def _log_softmax_backward(self, op: Op) -> None:
        """grad - softmax * sum(grad)."""
        grad, log_p = op.inputs
        dim = op.attr("dim") % grad.type.rank
        hit = self.hits.get(grad)
        if hit is not None and hit.log_p is log_p and dim == 1:
            self._both_backward(hit, op)
            return
        wide = self.cast(grad, _wide(grad.type.dtype))
        p = self.emit("aten.exp.default", self._log_p(log_p))
        total = self.over("aten.sum.dim_IntList", wide, dim)
        product = self.emit("aten.mul.Tensor", p, total)
        self._finish("aten.sub.Tensor", wide, product, result=op.result)

    def _log_p(self, log_p: Value) -> Value:
        if log_p in self.normalized:
            return self._log_probabilities(self.normalized[log_p])
        return self.cast(log_p, _wide(log_p.type.dtype))

    def _softmax(self, log_p: Value) -> Value:
        """Of a row whose exponentials are there, these over their sum."""
        n = self.normalized.get(log_p)
        if n is None:
            return self.emit("aten.exp.default", self._log_p(log_p))
        inverse = self.emit("aten.reciprocal.default", n.total)
        return self.emit("aten.mul.Tensor", n.powers, inverse)

    def _finish(self, name: str, *operands: Operand, result: Value) -> None:
        """The last op of an expansion, with a conversion where the result is of a narrower type."""
        first = operands[0]
        assert isinstance(first, Value)
        if result.type.dtype is first.type.dtype:
            self.emit(name, *operands, result=result)
        else:
            self.cast(self.emit(name, *operands), result.type.dtype, result)

    # -- nll_loss ------------------------------------------------------------------------------

    def _loss(self, op: Op) -> None:
        loss, total = op.results
        log_p, t, class_weight = op.operands
        assert isinstance(log_p, Value) and isinstance(t, Value)
        rows = self._rows(op, log_p, t, class_weight)
        reduction = op.attr("reduction")
        picked = self._picked(log_p, t)
        weighted = self.emit("aten.mul.Tensor", self.emit("aten.neg.default", picked), rows.weight)
        each = self.fill(weighted, rows.ignored, 0.0, loss if reduction == NONE else None)
        if reduction == NONE:
            self.emit(
                "aten.full.default", size=(), fill_value=0.0, dtype=total.type.dtype, result=total
            )
            return
        self.emit("aten.sum.default", rows.weight, dtype=None, result=total)
        if reduction == SUM:
            self.emit("aten.sum.default", each, dtype=None, result=loss)
            return
        whole = self.emit("aten.sum.default", each, dtype=None)
        self.emit("aten.div.Tensor", whole, total, result=loss)

    def _rows(self, op: Op, log_p: Value, t: Value, class_weight: Operand) -> _Rows:
        ignore, classes, dtype = (
            op.attr("ignore_index"),
            log_p.type.static_shape[1],
            log_p.type.dtype,
        )
        key = (t, class_weight, ignore, classes, dtype)
        if key not in self.rows:
            ignored = self.emit("aten.eq.Scalar", t, other=ignore)
            if not isinstance(class_weight, Value):
                class_weight = self.emit(
                    "aten.full.default", size=(classes,), fill_value=1.0, dtype=dtype
                )
            weight = self._class_weights(class_weight, self.fill(t, ignored, 0))
            self.rows[key] = _Rows(ignored, self.fill(weight, ignored, 0.0))
        return self.rows[key]

    def _class_weights(self, weight: Value, t: Value) -> Value:
        """Looked up, so that a target that is no class is an error, and no parameter is updated."""
        flat = self.emit("aten.view.default", self.cast(t, torch.int64), size=(t.type.numel,))
        picked = self.emit("aten.index_select.default", weight, flat, dim=0)
        return self.emit("aten.view.default", picked, size=t.type.shape)

    def _is_target(self, name: str, t: Value, shape: tuple[int, ...]) -> Value:
        """bool[N, C, ...]: whether a class is (`eq`) or is not (`ne`) the row's target."""
        classes = self.emit(
            "aten.arange.start_step", start=0, end=shape[1], step=1, dtype=torch.int32
        )
        column = (shape[1], *(1 for _ in shape[2:]))
        if len(column) > 1:
            classes = self.emit("aten.view.default", classes, size=column)
        small = self.cast(t, torch.int32)
        small = self.emit("aten.view.default", small, size=(shape[0], 1, *shape[2:]))
        return self.emit(f"aten.{name}.Tensor", classes, small)

    def _picked(self, log_p: Value, t: Value) -> Value:
        """log_p at the target; something finite or not where the row is ignored."""
        n = self.normalized.get(log_p)
        if n is None or n.dim != 1:
            source = self.cast(log_p, _wide(log_p.type.dtype))
        else:
            source = n.shifted
        shape = log_p.type.static_shape
        alone = self.fill(source, self._is_target("ne", t, shape), 0.0)
        picked = self.over("aten.sum.dim_IntList", alone, 1)
        if n is not None and n.dim == 1:
            picked = self.emit("aten.sub.Tensor", picked, self.emit("aten.log.default", n.total))
        return self.emit(
            "aten.view.default", self.cast(picked, log_p.type.dtype), size=t.type.shape
        )

    def _loss_backward(self, op: Op) -> None:
        """-scale at the target, 0 elsewhere."""
        grad, log_p, t, class_weight, total = op.operands
        assert isinstance(log_p, Value) and isinstance(t, Value) and isinstance(grad, Value)
        rows = self._rows(op, log_p, t, class_weight)
        if op.attr("reduction") == MEAN:
            grad = self.emit("aten.div.Tensor", grad, total)
        scale = self.fill(self.emit("aten.mul.Tensor", rows.weight, grad), rows.ignored, 0.0)
        shape = log_p.type.static_shape
        scale = self.cast(scale, _wide(scale.type.dtype))
        column = self.emit("aten.view.default", scale, size=(shape[0], 1, *shape[2:]))
        self.hits[op.result] = _Hit(log_p, t, column)
        spread = self.emit("aten.mul.Tensor", self._hit(t, shape, scale.type.dtype), column)
        self._finish("aten.neg.default", spread, result=op.result)

    def _hit(self, t: Value, shape: tuple[int, ...], dtype: torch.dtype) -> Value:
        return self.cast(self._is_target("eq", t, shape), dtype)

    def _both_backward(self, hit: _Hit, op: Op) -> None:
        """(softmax - hit) * scale: where only the target has a gradient, their sum is -scale."""
        p = self._softmax(hit.log_p)
        one = self._hit(hit.t, hit.log_p.type.static_shape, p.type.dtype)
        difference = self.emit("aten.sub.Tensor", p, one)
        self._finish("aten.mul.Tensor", difference, hit.scale, result=op.result)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _without_dead(function: Function, ops: list[Op], kept: set[Op]) -> list[Op]:
    """The ops without those of ours that nothing reads."""
    read = set(function.results)
    alive: list[Op] = []
    for op in reversed(ops):
        if op in kept or not read.isdisjoint(op.results):
            alive.append(op)
            read.update(op.inputs)
    return alive[::-1]
