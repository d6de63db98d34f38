"""Sharding rules by brute force: split each factor, run the parts, put them together, compare."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from shoestring.ir import FactorMap, Function, Op, Value, interpret
from shoestring.ir.opdef import results_of
from shoestring.ir.ops.parts import factor_size, join, local_attrs, take

from .opinfo import Tolerance, differs

LOOSE = Tolerance(1e-4, 1e-4, 1e-4)


@dataclass
class Call:
    """An op with the data that it reads and what it gives."""

    op: Op
    inputs: list[torch.Tensor]
    results: list[torch.Tensor]

    @property
    def key(self) -> str:
        """Calls of one key teach nothing new."""
        types = ",".join(str(v.type) for v in self.op.inputs)
        return f"{self.op.name}({types}){dict(self.op.attrs)}"


def calls(function: Function, arguments: Sequence[torch.Tensor]) -> list[Call]:
    """Every op of a function with its data."""
    env: dict[Value, torch.Tensor] = {
        p.value: t.detach() for p, t in zip(function.params, arguments, strict=True)
    }
    found: list[Call] = []

    def observe(op: Op, results: tuple[torch.Tensor, ...]) -> None:
        env.update(zip(op.results, results, strict=True))
        found.append(Call(op, [env[v] for v in op.inputs], list(results)))

    interpret(function, arguments, observe)
    return found


def broken(call: Call) -> Iterator[str]:
    """What is wrong with the op's sharding rule; nothing where it holds."""
    rule = call.op.opdef.factors(call.op)
    if rule is None:
        return
    yield from shape_errors(call.op, rule)
    for factor in rule.factors:
        size = factor_size(call.op, rule, factor)
        if size < 2:
            continue
        cut = (size + 2) // 3  # uneven from three on
        try:
            yield from _compare(call, rule, factor, [0, cut, size])
        except Exception as error:
            line = (str(error).splitlines() or [""])[0]
            yield f"{call.key} split by {factor}: {type(error).__name__}: {line}"


def shape_errors(op: Op, rule: FactorMap) -> Iterator[str]:
    ranks = [len(d) for d in rule.operands], [len(d) for d in rule.results]
    wanted = [v.type.rank for v in op.inputs], [r.type.rank for r in op.results]
    if ranks != wanted:
        yield f"{op.name}: the rule is for ranks {ranks}, the op has {wanted}"
    for dims in (*rule.operands, *rule.results):
        named = [f for f in dims if f is not None]
        if len(named) != len(set(named)):
            yield f"{op.name}: a factor twice in {dims}"


def _compare(call: Call, rule: FactorMap, factor: str, cuts: list[int]) -> Iterator[str]:
    op, size = call.op, cuts[-1]
    parts: list[tuple[torch.Tensor, ...]] = []
    for start, stop in zip(cuts, cuts[1:], strict=False):
        local = [
            take(t, dims, factor, start, stop, size)
            for t, dims in zip(call.inputs, rule.operands, strict=True)
        ]
        rest = iter(local)
        operands = [_bind(o, rest) for o in op.operands]
        attrs = local_attrs(op, rule, factor, stop - start, size)
        outcome = op.opdef.reference(*operands, **attrs)
        parts.append(results_of(outcome, attrs))
    for i, (whole, dims) in enumerate(zip(call.results, rule.results, strict=True)):
        pieces = [p[i] for p in parts]
        again = join(pieces, dims, rule, factor)
        if again is None:
            yield f"{op.name}: {factor} is neither in result {i} nor reduced"
            continue
        what = differs(again, whole, LOOSE)
        if what:
            yield f"{call.key} split by {factor}: result {i}: {what}"


def _bind(operand: object, rest: Iterator[torch.Tensor]) -> object:
    if isinstance(operand, Value):
        return next(rest)
    if isinstance(operand, tuple):
        return [None if v is None else next(rest) for v in operand]
    return operand
