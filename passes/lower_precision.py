"""Products in bf16: the policy of PyTorch's CPU autocast, written out as conversions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import Flag, auto
from typing import ClassVar

import torch

from shoestring.ir import (
    Function,
    Kind,
    Loc,
    Op,
    Operand,
    Phase,
    Role,
    TensorType,
    Value,
    make_op,
    operand_values,
)
from shoestring.ir.errors import PassError
from shoestring.ir.inference import infer_types

from .base import Numerics, Pass, PassReport
from .dead_code import DeadCode
from .editing import Names, reading

DTYPES = {"bf16": torch.bfloat16}
CONVERT = "aten._to_copy.default"

# Products of matrices, by name -> operands that stay as they are.
LOWERED: dict[str, frozenset[str]] = {
    "aten.mm.default": frozenset(),
    "aten.addmm.default": frozenset(),
    "aten.bmm.default": frozenset(),
    "aten.baddbmm.default": frozenset(),
    "aten.addbmm.default": frozenset(),
    "aten.linear.default": frozenset(),
    "aten.convolution.default": frozenset(),
    "aten.convolution_backward.default": frozenset(),
    "aten._grouped_mm.default": frozenset(),
    # A mask often holds the least f32, which is -inf in bf16: a row of these would become NaN.
    "aten._scaled_dot_product_flash_attention_for_cpu.default": frozenset({"attn_mask"}),
    "aten._scaled_dot_product_flash_attention_for_cpu_backward.default": frozenset(
        {"attn_mask", "logsumexp"}
    ),
    "attention.softmax.default": frozenset({"attn_mask"}),
    "attention.softmax_backward.default": frozenset({"attn_mask", "statistics"}),
    # A state that is added up over all steps stays in f32.
    "recurrence.lstm.default": frozenset({"c0"}),
    "recurrence.lstm_backward.default": frozenset({"c", "grad_c"}),
    "recurrence.gru.default": frozenset({"h0"}),
    "recurrence.gru_backward.default": frozenset({"h"}),
    "recurrence.rnn.default": frozenset(),
    "recurrence.rnn_backward.default": frozenset(),
}
PRODUCT_OF = {
    "aten.addmm.default": "aten.mm.default",
    "aten.baddbmm.default": "aten.bmm.default",
}
# Ops that only move elements, so that they and a conversion may trade places.
MOVES = frozenset(
    f"aten.{name}"
    for name in """cat.default stack.default flip.default roll.default index_select.default
    index.Tensor gather.default repeat.default tril.default triu.default slice_backward.default
    select_backward.default diagonal_backward.default slice_scatter.default
    select_scatter.default split.Tensor split_with_sizes.default chunk.default
    unbind.int""".split()
)
# Views that read their operand as something else than its elements.
REINTERPRETS = frozenset({"aten.view.dtype", "aten.view_as_complex.default"})


@dataclass(frozen=True)
class LowerPrecision(Pass):
    """Rounds the operands of every f32 product to bf16; its result is bf16, widened for readers.

    Master weights, optimizer, reductions, normalizations, softmax and loss stay in f32, and kernels
    add up products in f32; so does a sum that a product is added to. Each value is rounded once,
    a weight once a step, and moves between products in bf16. Error: that of
    `torch.autocast("cpu", torch.bfloat16)`, less what autocast loses in normalizations,
    activations and sums, which it also computes from bf16 to bf16.

    Attributes:
        dtype: `bf16`, the type of operands and results.

    Raises:
        PassError: SS3011 for another `dtype`.

    Before:

        func @f {
          parameter %w: f32[8,8] "w"
          batch %x: f32[2,4,8] "x"
          %a: f32[8,8] = aten.view.default(%x) {size=[8, 8]}
          %h: f32[8,8] = aten.mm.default(%a, %w)
          %v: f32[2,4,8] = aten.view.default(%h) {size=[2, 4, 8]}
          %b: f32[2,8,4] = aten.permute.default(%v) {dims=[0, 2, 1]}
          %s: f32[2,4,4] = aten.bmm.default(%v, %b)
          %y: f32[2,4,4] = aten.exp.default(%s)
          return y=%y
        }

    After:

        func @f {
          parameter %w: f32[8,8] "w"
          batch %x: f32[2,4,8] "x"
          %x.1: bf16[2,4,8] = aten._to_copy.default(%x) {dtype=bf16}
          %a.1: bf16[8,8] = aten.view.default(%x.1) {size=[8, 8]}
          %w.1: bf16[8,8] = aten._to_copy.default(%w) {dtype=bf16}
          %h.1: bf16[8,8] = aten.mm.default(%a.1, %w.1)
          %v.1: bf16[2,4,8] = aten.view.default(%h.1) {size=[2, 4, 8]}
          %b.1: bf16[2,8,4] = aten.permute.default(%v.1) {dims=[0, 2, 1]}
          %s.1: bf16[2,4,4] = aten.bmm.default(%v.1, %b.1)
          %s: f32[2,4,4] = aten._to_copy.default(%s.1) {dtype=f32}
          %y: f32[2,4,4] = aten.exp.default(%s)
          return y=%y
        }
    """

    dtype: str = "bf16"

    numerics: ClassVar[Numerics] = Numerics.LOSSY

    def __post_init__(self) -> None:
        check_dtype(self.name, self.dtype)

    def run(self, function: Function) -> tuple[Function, PassReport]:
        return _Lowering(function, DTYPES[self.dtype]).run()


def check_dtype(name: str, dtype: str) -> None:
    """Refuses a type to which no pass rounds.

    Raises:
        PassError: SS3011, with the pass of that name and the types that there are.
    """
    if dtype not in DTYPES:
        what = f"{name} rounds to one of {', '.join(DTYPES)}, found {dtype!r}"
        raise PassError("SS3011", what)


class Use(Flag):
    """How a value is read."""

    LOW = auto()
    SUM = auto()
    WIDE = auto()


class _Lowering:
    """One sweep over a function. f32 values are "wide", those of the lower type "low".

    A wide value that a low one equals exactly is not made before something reads it.
    """

    def __init__(self, function: Function, dtype: torch.dtype) -> None:
        self.function = function
        self.dtype = dtype
        self.names = Names(function)
        self.report = PassReport()
        self.ops: list[Op] = []
        self.subst: dict[Value, Value] = {}
        self.parameters = {p.value for p in function.params}
        self.uses = self.find_uses()
        self.exact: dict[Value, Value] = {}  # wide -> the low value that it equals
        self.homes: dict[Value, Loc] = {}  # where these come from
        self.made: set[Value] = set()  # wide values among these that have an op
        self.rounded: dict[tuple[Value, str | None], Value] = {}
        self.movers: dict[Value, Op] = {}  # wide value -> the op that moved it there
        self.counts: Counter[str] = Counter()

    def run(self) -> tuple[Function, PassReport]:
        for op in self.function.ops:
            self.visit(reading(op, self.subst))
        self.report.matched = self.report.changed + sum(
            s.count for s in self.report.skipped.values()
        )
        if not self.report.changed:
            return self.function, self.report
        for v in self.function.results:
            self.widen([v], self.homes.get(v, Loc()))
        result, _ = DeadCode().run(self.function.with_ops(self.ops, self.subst))
        self.explain(result)
        return result, self.report

    def find_uses(self) -> dict[Value, Use]:
        """How wide values are read, be it through moves."""
        uses: dict[Value, Use] = dict.fromkeys(self.function.results, Use.WIDE)
        for op in reversed(self.function.ops):
            use = Use(0)
            for r in op.results if moves(op) else ():
                use |= uses.get(r, Use(0))
            if not moves(op):
                use = Use.SUM if is_gradient_sum(op) else Use.WIDE
            low = self.low_operands(op)
            for v in op.inputs:
                uses[v] = uses.get(v, Use(0)) | (Use.LOW if v in low else use)
        return uses

    def low_operands(self, op: Op) -> set[Value]:
        """What the op will read in the lower type."""
        if op.name == CONVERT and self.is_low(op.result):
            return set(op.inputs)
        if op.name not in LOWERED or self.refusal(op) != "":
            return set()
        return set(rounded_operands(op)) - (set(op.inputs[:1]) if accumulates(op) else set())

    # -- one op --------------------------------------------------------------------------------

    def visit(self, op: Op) -> None:
        if op.name == CONVERT and self.convert(op):
            return
        if op.name in LOWERED or op.opdef.kind is Kind.CONTRACTION:
            refusal = self.refusal(op)
            if refusal == "" and accumulates(op):
                self.accumulate(op)
                return
            if refusal == "" and self.lower(op):
                return
            if refusal:
                self.report.skip(refusal, op.loc)
        if moves(op) and self.move(op):
            return
        self.keep(op)

    def keep(self, op: Op) -> None:
        """The op as it is, after what it reads."""
        self.widen(op.inputs, op.loc)
        self.ops.append(op)
        if moves(op):
            self.movers.update(dict.fromkeys(op.results, op))
            return
        for r in op.results:
            if is_wide(r) and self.uses.get(r, Use(0)) in (Use.LOW, Use.LOW | Use.SUM):
                self.replace_by_rounded(r, op.loc)

    def replace_by_rounded(self, v: Value, loc: Loc) -> None:
        """Lets every reader read the low value: the wide one need not live on."""
        low = self.round(v, loc)
        again = self.names.fresh(v.type, v.name)
        self.subst[v], self.exact[again], self.homes[again] = again, low, loc

    def convert(self, op: Op) -> bool:
        """A conversion that the user's code has. False where it has to do with other types."""
        (x,), r = op.inputs, op.result
        if self.is_low(x) and is_wide(r):
            self.exact[r], self.homes[r] = x, op.loc
        elif is_wide(x) and self.is_low(r):
            self.subst[r] = self.round(x, op.loc)
        else:
            return False
        return True

    def refusal(self, op: Op) -> str | None:
        """Why a product stays in f32; empty where it need not, None where it is in no f32."""
        floats = [v for v in rounded_operands(op) if not is_integral(v)]
        if not any(map(is_wide, floats)):
            return None
        if not all(map(is_wide, floats)):
            others = sorted({str(v.type.dtype).removeprefix("torch.") for v in floats})
            return f"{op.name} mixes types ({', '.join(others)})"
        if any(v.type.encoding.kind != "dense" for v in (*op.inputs, *op.results)):
            return f"{op.name} has an operand that is not dense"
        if op.loc.phase is Phase.UPDATE:
            return f"{op.name} belongs to the optimizer, which stays in f32"
        return "" if op.name in LOWERED else f"{op.name} is no product of matrices"

    def lower(self, op: Op) -> bool:
        """The product in the lower type; False where the op takes no such operands."""
        trial = self.with_types(op)
        if trial is None:
            self.report.skip(f"{op.name} takes no operands of that type here", op.loc)
            return False
        chosen = set(rounded_operands(op))
        new = op.map_operands(lambda v: self.round(v, op.loc) if v in chosen and is_wide(v) else v)
        self.widen(new.inputs, op.loc)
        self.emit(op, new.operands, trial)
        self.report.changed += 1
        self.counts[op.name] += 1
        return True

    def accumulate(self, op: Op) -> None:
        """A product that is added to a sum of its own size: the sum stays in f32."""
        total, *factors = op.operands
        product = self.names.fresh(op.result.type, op.result.name)
        multiply = make_op(PRODUCT_OF[op.name], tuple(factors), {}, op.loc)
        add = make_op("aten.add.Tensor", (total, product), {}, op.loc)
        self.visit(replace(multiply, results=(product,)))
        self.visit(replace(add, results=op.results))

    def with_types(self, op: Op) -> list[bool] | None:
        """Which results are of the lower type where the operands are; None where that fails."""
        chosen = set(rounded_operands(op))
        wanted = {v: low_type(v, self.dtype) for v in op.inputs if v in chosen and is_wide(v)}
        trial = op.map_operands(lambda v: Value(wanted.get(v, v.type), v.name))
        try:
            types = infer_types(trial)
        except Exception:  # whatever the reference says: it does not take them
            return None
        shapes = [r.type.shape for r in op.results]
        if [t.shape for t in types] != shapes or any(
            t.dtype not in (self.dtype, torch.float32) for t in types
        ):
            return None
        return [t.dtype is self.dtype for t in types]

    def emit(self, op: Op, operands: tuple[Operand, ...], low: Iterable[bool]) -> None:
        """The op on other operands; its low results stand for the wide ones."""
        results: list[Value] = []
        for r, is_low in zip(op.results, low, strict=True):
            new = self.low_like(r) if is_low else r
            results.append(new)
            if is_low:
                self.exact[r], self.homes[r] = new, op.loc
        self.ops.append(Op(op.opdef, operands, op.attrs, tuple(results), op.loc))

    # -- conversions ---------------------------------------------------------------------------

    def low_like(self, v: Value) -> Value:
        return self.names.fresh(low_type(v, self.dtype), v.name)

    def is_low(self, v: Value) -> bool:
        return v.type.dtype is self.dtype

    def widen(self, values: Iterable[Value], loc: Loc) -> None:
        """Makes those wide values that so far only exist in the lower type."""
        for v in dict.fromkeys(values):
            if v in self.exact and v not in self.made:
                self.made.add(v)
                self.ops.append(make_convert(self.exact[v], v, loc))

    def round(self, v: Value, loc: Loc) -> Value:
        """The low value of a wide one: made once, and from the operand of views.

        What activation checkpointing computes again is rounded again: that keeps less alive.
        """
        if v in self.exact:
            return self.exact[v]
        again = loc.phase is Phase.RECOMPUTE and v not in self.parameters
        key = (v, loc.module if again else None)
        if key not in self.rounded:
            self.rounded[key] = self.round_anew(v, loc)
        return self.rounded[key]

    def round_anew(self, v: Value, loc: Loc) -> Value:
        new = self.low_like(v)
        mover = self.movers.get(v)
        if mover is None or not keeps_all(mover):
            self.ops.append(make_convert(v, new, loc))
            return new
        operands = tuple(self.round(o, loc) if isinstance(o, Value) else o for o in mover.operands)
        self.ops.append(Op(mover.opdef, operands, mover.attrs, (new,), mover.loc))
        return new

    def move(self, op: Op) -> bool:
        """Moves low elements where every wide operand equals a low one."""
        wide = [v for v in op.inputs if is_wide(v)]
        if not wide or not all(v in self.exact for v in wide):
            return False
        if not all(is_wide(r) for r in op.results):
            return False
        new = op.map_operands(lambda v: self.exact.get(v, v))
        self.emit(op, new.operands, [True] * len(op.results))
        return True

    # -- report --------------------------------------------------------------------------------

    def explain(self, result: Function) -> None:
        for name, count in sorted(self.counts.items()):
            self.report.note(f"{count} x {name} lowered")
        down = [op for op in result.ops if op.name == CONVERT and self.is_low(op.result)]
        own = {p.value for p in self.function.params if p.role is Role.PARAMETER}
        weights = sum(op.inputs[0] in own for op in down)
        up = sum(op.name == CONVERT and self.is_low(op.inputs[0]) for op in result.ops)
        self.report.note(
            f"{weights} parameters and {len(down) - weights} other values are rounded, once each;"
            f" {up} values are widened for f32 readers"
        )


def is_gradient_sum(op: Op) -> bool:
    """Whether it adds up a gradient, as that of a bias: under autocast, one in the lower type."""
    return op.name == "aten.sum.dim_IntList" and op.loc.phase is Phase.BACKWARD


def accumulates(op: Op) -> bool:
    """Whether the first operand is a sum, not a bias that is repeated."""
    if op.name not in PRODUCT_OF or op.attr("beta") != 1 or op.attr("alpha") != 1:
        return False
    return op.inputs[0].type.shape == op.result.type.shape


def rounded_operands(op: Op) -> list[Value]:
    """The operands that a product takes in its own type: no mask and no statistics."""
    kept = LOWERED.get(op.name, frozenset())
    pairs = zip(op.operands, op.opdef.operand_names, strict=False)
    return [v for o, name in pairs if name not in kept for v in operand_values((o,))]


def is_integral(v: Value) -> bool:
    return not (v.type.dtype.is_floating_point or v.type.dtype.is_complex)


def is_wide(v: Value) -> bool:
    return v.type.dtype is torch.float32


def moves(op: Op) -> bool:
    """Whether the results are elements of the operands, moved, and zeros."""
    if op.opdef.kind is Kind.VIEW:
        return op.name not in REINTERPRETS
    if op.name == "aten.constant_pad_nd.default":
        return op.attr("value") in (0, None)
    return op.name in MOVES


def keeps_all(op: Op) -> bool:
    """Whether it is a view with every element of its operand: rounding that is no more work."""
    if op.opdef.kind is not Kind.VIEW or len(op.results) != 1:
        return False
    if not (op.result.type.is_static and op.inputs[0].type.is_static):
        return False
    rearranged = op.name not in ("aten.as_strided.default", "aten.unfold.default")
    return rearranged and op.result.type.numel >= op.inputs[0].type.numel


def low_type(v: Value, dtype: torch.dtype) -> TensorType:
    """The type of a value, with other elements."""
    return replace(v.type, dtype=dtype)


def make_convert(old: Value, new: Value, loc: Loc) -> Op:
    """`new`, the elements of `old` in its own element type."""
    made = make_op(CONVERT, (old,), {"dtype": new.type.dtype}, loc)
    return replace(made, results=(new,))
