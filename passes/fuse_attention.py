"""Attention that a model writes out: products, a softmax, perhaps a dropout."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from shoestring.ir import Function, Loc, Op, Operand, Value, make_op

from .base import Numerics, Pass, PassReport
from .constants import Constants
from .dead_code import DeadCode
from .editing import Names
from .group_heads import BACKWARD, FORWARD, OWN, OWN_BACKWARD
from .rewriter import rewrite
from .rules import ALGEBRA

SOFTMAX, SAFE_SOFTMAX = "aten._softmax.default", "aten._safe_softmax.default"
SOFTMAXES = frozenset({SOFTMAX, SAFE_SOFTMAX})
SOFTMAX_BACKWARD = "aten._softmax_backward_data.default"
VIEW = "aten.view.default"
PERMUTE, BMM = "aten.permute.default", "aten.bmm.default"
ADD, MUL, DIV, WHERE = "aten.add.Tensor", "aten.mul.Tensor", "aten.div.Tensor", "aten.where.self"
FILL, FILL_TENSOR = "aten.masked_fill.Scalar", "aten.masked_fill.Tensor"
FILLS = (FILL, FILL_TENSOR)
NOT, AND = "aten.logical_not.default", "aten.logical_and.default"
UNIFORM, LESS, COPY = "rng.uniform.default", "aten.lt.Scalar", "aten._to_copy.default"
TURNED = (0, 2, 1)
FLOATS = (torch.float32, torch.float64)
FEW = 1 << 20  # the most bytes that are evaluated to know a number

Shape = tuple[int, ...]


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Makes attention that is written out one op, and its gradients another.

    Weights of all queries and keys are then never in memory: kernels compute them block by block,
    twice. So it is with models that write out attention themselves, and with PyTorch's own where it
    has no kernel for it: where it drops weights in training, as BERT and GPT-2 do unless told
    otherwise, and where values have another size than keys, as in DeepSeek's models. The same
    weights are dropped: those that the random numbers of the program say.

    A mask may be added to scores, or fill some of them in. A query that sees nothing gets what the
    softmax gives it: NaN, 0, or the mean of all values where hidden scores are finite.

    Attention stays as it is where something else reads scores or weights, and where a mask has
    gradients.

    Before:

        func @f {
          batch %q: f32[6,5,4] "q"
          batch %k: f32[6,4,7] "k"
          batch %v: f32[6,7,4] "v"
          %s: f32[6,5,7] = aten.bmm.default(%q, %k)
          %h: f32[6,5,7] = aten.mul.Tensor(%s, 0.5)
          %p: f32[6,5,7] = aten._softmax.default(%h) {dim=-1, half_to_float=false}
          %o: f32[6,5,4] = aten.bmm.default(%p, %v)
          return o=%o
        }

    After:

        func @f {
          batch %q: f32[6,5,4] "q"
          batch %k: f32[6,4,7] "k"
          batch %v: f32[6,7,4] "v"
          %q.1: f32[6,1,5,4] = aten.view.default(%q) {size=[6, 1, 5, 4]}
          %k.1: f32[6,7,4] = aten.permute.default(%k) {dims=[0, 2, 1]}
          %k.1.1: f32[6,1,7,4] = aten.view.default(%k.1) {size=[6, 1, 7, 4]}
          %v.1: f32[6,1,7,4] = aten.view.default(%v) {size=[6, 1, 7, 4]}
          %o.1: f32[6,1,5,4], %o.2: f32[6,1,5] = aten._scaled_dot_product_flash_attention_for_cpu.default(%q.1, %k.1.1, %v.1, _) {scale=0.5}
          %o: f32[6,5,4] = aten.view.default(%o.1) {size=[6, 5, 4]}
          return o=%o
        }
    """  # noqa: E501  (IR text)

    numerics: ClassVar[Numerics] = Numerics.REASSOCIATING

    def run(self, function: Function) -> tuple[Function, PassReport]:
        report = PassReport()
        if not any(op.name in SOFTMAXES for op in function.ops):
            return function, report
        live, _ = DeadCode().run(function)
        reader, writer = _Reader(live), _Writer(live)
        for op in live.ops:
            if op.name not in SOFTMAXES:
                continue
            try:
                found = reader.attention(op)
            except _NotAttention as reason:
                report.matched += bool(str(reason))
                if str(reason):
                    report.skip(str(reason), op.loc)
                continue
            report.matched += 1
            report.changed += 1
            writer.write(found)
        if not report.changed:
            return function, report
        return DeadCode().run(rewrite(writer.function(), ALGEBRA)[0])[0], report


class _NotAttention(Exception):
    """Why a softmax stays; empty where nothing about it looks like attention."""


@dataclass(frozen=True)
class _Side:
    """Queries, keys or values, as something that has them in rows or, `turned`, in columns.

    Attributes:
        source: [N,length,D] or [B,H,length,D]; the last two the other way round where `turned`.
        gradient: the value that is the gradient of `source`, or of a view of it; None in a
            forward pass.
        turned: whether a column is what belongs to one query or key.
    """

    source: Value
    gradient: Value | None = None
    turned: bool = False


@dataclass(frozen=True)
class _Mask:
    """What is added to scores; or conditions, one of which makes a score `fill`.

    Attributes:
        added: the former.
        conditions: the latter, the first first, each with what it is where a score stays.
    """

    added: Value | None = None
    conditions: tuple[tuple[Value, bool], ...] = ()
    fill: float = -math.inf


@dataclass(frozen=True)
class _Dropout:
    """Weights are kept where the random number is less than `keep`, and divided by that."""

    factors: Value
    rng: Value
    site: int
    keep: float


@dataclass(frozen=True)
class _Backward:
    """Gradients of the two products of attention, and the first op that reads the output's."""

    first: Op
    grad: Value
    of_query: Value
    of_key: Value
    of_value: Value


@dataclass(frozen=True)
class _Attention:
    """What stands around a softmax; `shape` is B, H, T, S.

    Attributes:
        safe: whether a query that sees nothing gets 0, or NaN.
    """

    shape: Shape
    query: _Side
    key: _Side
    value: _Side
    mask: _Mask
    safe: bool
    scale: float
    dropout: _Dropout | None
    output: Op
    backward: _Backward | None


class _Reader:
    """Finds attention around a softmax."""

    def __init__(self, function: Function) -> None:
        self._function = function
        self._users = function.users()
        self._ends = set(function.results)
        self._constants = Constants(function, FEW)
        self._place = {op: i for i, op in enumerate(function.ops)}

    def attention(self, softmax: Op) -> _Attention:
        """The attention whose weights a softmax makes.

        Raises:
            _NotAttention: with the reason.
        """
        weights = softmax.result
        if not weights.type.is_static or weights.type.rank not in (3, 4):
            raise _NotAttention
        shape = weights.type.static_shape
        if softmax.attr("dim") not in (-1, len(shape) - 1) or not math.prod(shape):
            raise _NotAttention
        product, mask, scale = self._scores(softmax.inputs[0])
        if any(v.type.dtype not in FLOATS for v in (weights, *product.inputs)):
            raise _NotAttention("scores of a type that kernels do not add up in")
        left, right = product.inputs
        dropout, output, rest = self._second(softmax)
        value = output.inputs[1]
        back = self._backward(rest, product, scale, mask, output, dropout) if rest else None
        query, first = self._unscaled_side(left, back.of_query if back else None)
        key, second = self._unscaled_side(right, back.of_key if back else None)
        return _Attention(
            shape if len(shape) == 4 else (shape[0], 1, *shape[1:]),
            query,
            replace(key, turned=True),
            _Side(self._unmerged(value), back.of_value if back else None),
            mask,
            softmax.name == SAFE_SOFTMAX,
            scale * first * second,
            dropout,
            output,
            back,
        )

    # -- small steps ---------------------------------------------------------------------------

    def _made_by(self, v: Operand, *names: str) -> Op | None:
        op = self._function.producer(v) if isinstance(v, Value) else None
        return op if op is not None and op.name in names else None

    def _readers(self, v: Value) -> set[Op]:
        if v in self._ends:
            raise _NotAttention("scores, weights or their gradients are results")
        return set(self._users.get(v, ()))

    def _only(self, v: Value, *names: str) -> Op:
        """Who reads a value, if that is one op of these names."""
        readers = self._readers(v)
        for op in readers if len(readers) == 1 else ():
            if op.name in names:
                return op
        raise _NotAttention("something else reads scores, weights or their gradients")

    def _unscaled(self, v: Value) -> tuple[Value, float]:
        """A value before it was multiplied by a number, and that number."""
        op = self._made_by(v, MUL, DIV)
        number = _number(op)
        if op is None or number is None or op.inputs[0].type != v.type:
            return v, 1.0
        return op.inputs[0], number

    def _unmerged(self, v: Value) -> Value:
        """[B,H,...] that was viewed as [B * H,...], or the value itself."""
        op = self._made_by(v, VIEW)
        if op is None or op.inputs[0].type.rank != 4 or not op.inputs[0].type.is_static:
            return v
        batch, heads, *rest = op.inputs[0].type.static_shape
        return op.inputs[0] if v.type.shape == (batch * heads, *rest) else v

    def _are_turned(self, x: Value, y: Value) -> bool:
        """Whether one is the other with rows and columns exchanged."""
        (one, order), (other, wanted) = self._unpermuted(x), self._unpermuted(y)
        return one is other and order == tuple(wanted[d] for d in TURNED)

    def _unpermuted(self, v: Value) -> tuple[Value, Shape]:
        """A value before its dimensions were put in order, and the order."""
        op = self._made_by(v, PERMUTE)
        if op is None:
            return v, tuple(range(v.type.rank))
        return op.inputs[0], tuple(op.attr("dims"))

    # -- forward -------------------------------------------------------------------------------

    def _scores(self, v: Value) -> tuple[Op, _Mask, float]:
        """The product of queries and keys, its mask, what it is multiplied by before."""
        v, filled = self._unfilled(v)
        added = self._made_by(v, ADD)
        pairs: list[tuple[Value, Value | None]] = [(v, None)]
        if added is not None and len(added.inputs) == 2 and added.attr("alpha") == 1:
            x, y = added.inputs
            pairs = [(a, b) for a, b in ((x, y), (y, x)) if a.type.shape == v.type.shape]
        for x, mask in pairs:
            source, scale = self._unscaled(x)
            product = self._made_by(self._merged(source), BMM)
            if product is None or not scale > 0:
                continue
            if mask is None:
                return product, filled, scale
            if filled.conditions:
                raise _NotAttention("scores that a mask is added to and others fill in")
            if mask.type.dtype is not v.type.dtype:
                raise _NotAttention("a mask of another type than scores")
            return product, _Mask(mask), scale
        raise _NotAttention

    def _merged(self, v: Value) -> Value:
        """[B * H,...] of which a value of four dimensions is a view."""
        op = self._made_by(v, VIEW)
        if op is None or v.type.rank != 4:
            return v
        batch, heads, *rest = v.type.static_shape
        return op.inputs[0] if op.inputs[0].type.shape == (batch * heads, *rest) else v

    def _unfilled(self, v: Value) -> tuple[Value, _Mask]:
        """Scores before conditions filled some in with one number, and the conditions."""
        conditions: list[tuple[Value, bool]] = []
        fill: float | None = None
        while (found := self._choice(v)) is not None and fill in (None, found[3]):
            source, condition, kept, fill = found
            conditions.insert(0, (condition, kept))
            v = source
        return v, _Mask(None, tuple(conditions), -math.inf if fill is None else fill)

    def _choice(self, v: Value) -> tuple[Value, Value, bool, float] | None:
        """Elements, the condition for them, whether it is true there, and the number elsewhere."""
        op = self._made_by(v, WHERE, *FILLS)
        if op is None:
            return None
        if op.name == WHERE:
            condition, x, y = op.inputs
            choices = [(x, True, self._number_of(y)), (y, False, self._number_of(x))]
        else:
            x, condition = op.inputs[:2]
            given = op.attr("value") if op.name == FILL else self._number_of(op.inputs[2])
            choices = [(x, False, None if given is None else float(given))]
        for source, kept, number in choices:
            if number is not None and number < math.inf and source.type == v.type:
                return source, condition, kept, number
        return None

    def _number_of(self, v: Value) -> float | None:
        """What a constant of no dimension is."""
        known = self._constants.elements(v) if not v.type.rank and v in self._constants else None
        return None if known is None else float(known)

    def _second(self, softmax: Op) -> tuple[_Dropout | None, Op, set[Op]]:
        """Dropout, the product of weights and values, and who else reads the softmax and weights.

        The latter are nobody, or two ops of the backward pass.
        """
        weights = softmax.result
        readers = self._readers(weights)
        rest = {op for op in readers if op.name == SOFTMAX_BACKWARD}
        dropout: _Dropout | None = None
        for op in readers - rest:
            dropout = dropout or self._dropout(op, weights)
        if dropout is not None:
            weights = self._only_of(readers - rest, MUL).result
            readers = self._readers(weights)
        if weights.type.rank == 4:
            batch, heads, *square = weights.type.static_shape
            merged = self._only_of(readers - rest, VIEW).result
            if merged.type.shape != (batch * heads, *square):
                raise _NotAttention("weights that are multiplied otherwise than scores were")
            readers = self._readers(merged)
        turned = {op for op in readers if op.name == PERMUTE and tuple(op.attr("dims")) == TURNED}
        output = self._only_of(readers - rest - turned, BMM)
        if output.inputs[0] in {op.result for op in turned} or len(turned) != len(rest):
            raise _NotAttention("something else reads weights")
        return dropout, output, rest | turned

    def _only_of(self, ops: set[Op], name: str) -> Op:
        for op in ops if len(ops) == 1 else ():
            if op.name == name:
                return op
        raise _NotAttention("something else reads weights")

    def _dropout(self, op: Op, weights: Value) -> _Dropout | None:
        """What a product of weights and factors drops; None where they are something else."""
        if op.name != MUL or len(op.inputs) != 2:
            return None
        x, y = op.inputs
        factors = y if x is weights else x
        kept, factor = self._unscaled(factors)
        copied = self._made_by(kept, COPY)
        less = self._made_by(copied.inputs[0], LESS) if copied is not None else None
        drawn = self._made_by(less.inputs[0], UNIFORM) if less is not None else None
        if less is None or drawn is None or drawn.result.type.dtype is not torch.float32:
            return None
        keep = float(less.attr("other"))
        if factors.type != weights.type or not 0 < keep or abs(factor * keep - 1) > 1e-6:
            return None
        return _Dropout(factors, drawn.inputs[0], int(drawn.attr("site")), keep)

    # -- backward ------------------------------------------------------------------------------

    def _backward(
        self,
        rest: set[Op],
        product: Op,
        scale: float,
        mask: _Mask,
        output: Op,
        dropout: _Dropout | None,
    ) -> _Backward:
        """The gradients of both products, `rest` being who reads weights in the backward pass."""
        if len(rest) != 2:
            raise _NotAttention("gradients of a part")
        softmax, turned = sorted(rest, key=lambda op: op.name == PERMUTE)
        of_value = self._only(turned.result, BMM)
        grad = of_value.inputs[1]
        of_weights = softmax.inputs[0]
        if dropout is not None:
            self._only(of_weights, SOFTMAX_BACKWARD)
            dropped = self._made_by(of_weights, MUL)
            if dropped is None or dropout.factors not in dropped.inputs:
                raise _NotAttention("gradients of weights that are not those that were kept")
            x, y = dropped.inputs
            of_weights = y if x is dropout.factors else x
        first = self._made_by(self._merged(of_weights), BMM)
        if first is None or first.inputs[0] is not grad:
            raise _NotAttention("gradients of weights that come from elsewhere")
        if not self._are_turned(first.inputs[1], output.inputs[1]):
            raise _NotAttention("gradients of weights that come from elsewhere")
        of_query, of_key = self._of_scores(softmax.result, product, scale, mask)
        start = min(first, of_value, key=self._place.__getitem__)
        return _Backward(start, grad, of_query.result, of_key.result, of_value.result)

    def _of_scores(self, v: Value, product: Op, scale: float, mask: _Mask) -> tuple[Op, Op]:
        """The two products that read the gradient of the scores."""
        for condition in reversed(mask.conditions):
            chosen = self._only(v, WHERE, *FILLS).result
            if self._choice(chosen) != (v, *condition, 0.0):
                raise _NotAttention("gradients of scores that are filled in otherwise")
            v = chosen
        if scale != 1:
            scaled = self._only(v, MUL, DIV)
            if _number(scaled) != scale:
                raise _NotAttention("gradients of scores that are scaled otherwise")
            v = scaled.result
        if v.type.rank == 4:
            v = self._only(v, VIEW).result
        readers = self._readers(v)
        left, right = product.inputs
        for a in readers if len(readers) == 2 else ():
            (b,) = readers - {a}
            if a.name == b.name == BMM and a.inputs[0] is v and b.inputs[1] is v:
                if self._are_turned(a.inputs[1], right) and self._are_turned(b.inputs[0], left):
                    return a, b
        raise _NotAttention("gradients of a part, or of a mask")

    def _unscaled_side(self, read: Value, gradient: Value | None) -> tuple[_Side, float]:
        """Queries or keys before a number multiplies them, if it does their gradient too."""
        whole = self._unmerged(read)
        source, factor = self._unscaled(whole)
        if factor == 1 or not factor > 0:
            return _Side(whole, gradient), 1.0
        if gradient is None:
            return _Side(source), factor
        try:
            v = self._only(gradient, VIEW).result if whole is not read else gradient
            scaled = self._only(v, MUL, DIV)
        except _NotAttention:
            return _Side(whole, gradient), 1.0
        if v.type != source.type or _number(scaled) != factor:
            return _Side(whole, gradient), 1.0
        return _Side(source, scaled.result), factor


def _number(op: Op | None) -> float | None:
    """What an op multiplies its only input by; None where it does something else."""
    if op is None or len(op.inputs) != 1 or op.name not in (MUL, DIV):
        return None
    number = op.operands[1]
    if not isinstance(number, int | float) or isinstance(number, bool) or not number:
        return None
    factor = float(number) if op.name == MUL else 1 / number
    return factor if math.isfinite(factor) else None


class _Writer:
    """Writes attention in the place of what was found.

    What made the output or a gradient is replaced; what nobody reads any more is dead code.
    """

    def __init__(self, function: Function) -> None:
        self._function = function
        self._names = Names(function)
        self._before: dict[Op, list[Op]] = defaultdict(list)
        self._instead: dict[Op, list[Op]] = {}

    def function(self) -> Function:
        """The function with everything that was written."""
        ops: list[Op] = []
        for op in self._function.ops:
            ops += self._before.get(op, [])
            ops += self._instead.get(op, [op])
        return self._function.with_ops(ops)

    def write(self, found: _Attention) -> None:
        """Attention, and its gradients if there are any."""
        ops = self._before[found.output]
        out = found.output.result
        add = _Adder(ops, self._names, found.output.loc)
        sides = [self._rows(add, s, found.shape) for s in (found.query, found.key, found.value)]
        mask = _written(add, found.mask, found.shape)
        attrs: dict[str, object] = {"scale": found.scale, "is_causal": False}
        if mask is not None:
            attrs |= {"fill": found.mask.fill, "safe": found.safe}
        names, more = (OWN, OWN_BACKWARD), list[Value | None]()
        if found.dropout is not None:
            attrs |= {"keep": found.dropout.keep, "site": found.dropout.site}
            more = [found.dropout.rng]
        elif sides[1].type != sides[2].type or mask is not None:
            more = [None]
        else:
            names = FORWARD, BACKWARD
            attrs["dropout_p"] = 0.0
        outs = add.all(names[0], (*sides, mask, *more), attrs, out.name)
        self._instead[found.output] = [_view(outs[0], out, found.output.loc)]
        back = found.backward
        if back is None:
            return
        add = _Adder(self._before[back.first], self._names, back.first.loc)
        grad = self._rows(add, _Side(back.grad), found.shape)
        given = (grad, *sides, *outs, mask, *more)
        gradients = add.all(names[1], given, attrs, back.grad.name)
        for side, gradient in zip((found.query, found.key, found.value), gradients, strict=True):
            self._define(side, gradient)

    def _rows(self, add: _Adder, side: _Side, shape: Shape) -> Value:
        """[B,H,length,D] of queries, keys, values or gradients."""
        v = side.source
        if side.turned:
            v = add(PERMUTE, v, dims=(*range(v.type.rank - 2), v.type.rank - 1, v.type.rank - 2))
        return add(VIEW, v, size=(*shape[:2], *v.type.static_shape[-2:]))

    def _define(self, side: _Side, gradient: Value) -> None:
        """Makes what stood for a gradient a view of the one that attention gives."""
        target = side.gradient
        assert target is not None
        op = self._function.producer(target)
        assert op is not None
        add = _Adder([], self._names, op.loc)
        if side.turned:
            gradient = add(PERMUTE, gradient, dims=(0, 1, 3, 2))
        self._instead[op] = [*add.ops, _view(gradient, target, op.loc)]


@dataclass
class _Adder:
    """Adds ops of one location to a list."""

    ops: list[Op]
    names: Names
    loc: Loc

    def __call__(self, name: str, v: Value, **attrs: object) -> Value:
        (made,) = self.all(name, (v,), attrs, v.name)
        return made

    def all(
        self, name: str, operands: tuple[Operand, ...], attrs: dict[str, object], base: str
    ) -> tuple[Value, ...]:
        """The results of an op."""
        op = make_op(name, operands, attrs, self.loc)
        results = tuple(self.names.fresh(t, base) for t in op.opdef.infer(op))
        self.ops.append(replace(op, results=results))
        return results


def _view(v: Value, result: Value, loc: Loc) -> Op:
    op = make_op(VIEW, (v,), {"size": result.type.static_shape}, loc)
    return replace(op, results=(result,))


def _written(add: _Adder, mask: _Mask, shape: Shape) -> Value | None:
    """A mask as attention reads it: added, or true where scores stay."""
    if mask.added is not None:
        return _of_four(add, mask.added, shape)
    whole: Value | None = None
    for condition, kept in mask.conditions:
        shown = _of_four(add, condition if kept else add(NOT, condition), shape)
        whole = shown if whole is None else add.all(AND, (whole, shown), {}, shown.name)[0]
    return whole


def _of_four(add: _Adder, mask: Value, shape: Shape) -> Value:
    """A mask of four dimensions; of three, the first is that of batch and heads."""
    rank, sizes = mask.type.rank, mask.type.static_shape
    if rank == 4:
        return mask
    of_three = shape[1] == 1 and rank == 3
    return add(
        VIEW, mask, size=(sizes[0], 1, *sizes[1:]) if of_three else (1,) * (4 - rank) + sizes
    )
