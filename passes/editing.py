"""Small tools of passes that build a function from another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from shoestring.ir import Function, Loc, Op, TensorType, Value

SIZES = {
    "aten.view.default": "size",
    "aten._unsafe_view.default": "size",
    "aten.expand.default": "size",
    "aten.slice_backward.default": "input_sizes",
}
"""Attributes that hold the shape of the result."""


class Names:
    """Unused value names of one function."""

    def __init__(self, function: Function) -> None:
        self._taken = {v.name for v in function.values}
        self._next: dict[str, int] = {}

    def fresh(self, type_: TensorType, base: str) -> Value:
        """A value called `base.1`, `base.2`, ... whichever is free first."""
        number = self._next.get(base, 0) + 1
        while f"{base}.{number}" in self._taken:
            number += 1
        self._next[base] = number
        name = f"{base}.{number}"
        self._taken.add(name)
        return Value(type_, name)


def resolve(value: Value, subst: Mapping[Value, Value]) -> Value:
    """What a value has been replaced by, chains followed."""
    while value in subst:
        value = subst[value]
    return value


def reading(op: Op, subst: Mapping[Value, Value]) -> Op:
    """The op with replaced operands; the same object where nothing is replaced."""
    if not any(v in subst for v in op.inputs):
        return op
    return op.map_operands(lambda v: resolve(v, subst))


def at(op: Op, **changes: object) -> Op:
    """The op with fields of its location changed."""
    return replace(op, loc=replace(op.loc, **changes))  # type: ignore[arg-type]


def resized(op: Op, type_: TensorType) -> Op:
    """The op with the shape of `type_` where it holds that of its result in an attribute."""
    if op.name not in SIZES:
        return op
    return replace(op, attrs={**op.attrs, SIZES[op.name]: type_.shape})


def append(ops: list[Op], names: Names, op: Op, base: str, result: Value | None = None) -> Value:
    """Appends an op that has one result: `result`, or a fresh value called after `base`."""
    if result is None:
        (type_,) = op.opdef.infer(op)
        result = names.fresh(type_, base)
    ops.append(replace(op, results=(result,)))
    return result


def inline(
    body: Function,
    inputs: Sequence[Value],
    results: Sequence[Value],
    names: Names,
    subst: dict[Value, Value],
    loc: Loc,
) -> list[Op]:
    """The ops of a traced body, on other inputs and at another location.

    Args:
        body: whose parameters are called `in0`, `in1`, ...
        inputs: what takes their places.
        results: what its outputs become; `subst` learns those that are other values already.
        names: for what is made on the way.
        subst: values that were replaced.
        loc: of all ops.
    """
    table: dict[Value, Value] = {}
    places = {f"in{i}": v for i, v in enumerate(inputs)}
    for p in body.params:
        table[p.value] = places[p.path]
    made = {r for inner in body.ops for r in inner.results}
    for output, result in zip(body.outputs, results, strict=True):
        if output.value in made and output.value not in table:
            table[output.value] = result
    ops: list[Op] = []
    for inner in body.ops:
        for r in inner.results:
            if r not in table:
                table[r] = names.fresh(r.type, results[0].name)
        bound = inner.map_operands(table.__getitem__)
        own = tuple(table[r] for r in inner.results)
        ops.append(Op(inner.opdef, bound.operands, inner.attrs, own, loc))
    for output, result in zip(body.outputs, results, strict=True):
        if table[output.value] is not result:
            subst[result] = resolve(table[output.value], subst)
    return ops
