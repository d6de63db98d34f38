"""Building functions op by op, with result types inferred."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .function import Function, Loc, Op, Operand, Output, Param, Role, Value
from .ops import lookup
from .types import TensorType

NOWHERE = Loc()


class Builder:
    """Collects parameters, ops and outputs of one function.

    Example:
        >>> b = Builder("double")
        >>> x = b.param(parse_type("f32[4]"), Role.BATCH, "x")
        >>> b.output("y", b.emit("aten.add.Tensor", x, x))
    """

    def __init__(self, name: str, prefix: str = "") -> None:
        self.name = name
        self.prefix = prefix
        self.params: list[Param] = []
        self.ops: list[Op] = []
        self.outputs: list[Output] = []
        self._count = 0

    def fresh(self, type_: TensorType) -> Value:
        """A value with an unused name."""
        self._count += 1
        return Value(type_, f"{self.prefix}{self._count - 1}")

    def param(self, type_: TensorType, role: Role, path: str) -> Value:
        value = Value(type_, f"{role.value}.{len(self.params)}")
        self.params.append(Param(value, role, path))
        return value

    def emit_all(
        self, name: str, /, *operands: Operand, loc: Loc = NOWHERE, **attrs: Any
    ) -> tuple[Value, ...]:
        """Appends an op; its results, with inferred types."""
        op = make_op(name, operands, attrs, loc)
        results = tuple(self.fresh(t) for t in op.opdef.infer(op))
        self.ops.append(Op(op.opdef, op.operands, op.attrs, results, loc))
        return results

    def emit(self, name: str, /, *operands: Operand, loc: Loc = NOWHERE, **attrs: Any) -> Value:
        """Appends an op with one result."""
        (value,) = self.emit_all(name, *operands, loc=loc, **attrs)
        return value

    def output(self, name: str, value: Value) -> None:
        self.outputs.append(Output(name, value))

    def replace_state(self, value: Value, new: Value) -> None:
        """Declares that a parameter holds `new` after the step."""
        (index,) = (i for i, p in enumerate(self.params) if p.value is value)
        old = self.params[index]
        self.params[index] = Param(old.value, old.role, old.path, new)

    def build(self) -> Function:
        return Function(self.name, tuple(self.params), tuple(self.ops), tuple(self.outputs))


def make_op(
    name: str, operands: tuple[Operand, ...], attrs: Mapping[str, Any], loc: Loc = NOWHERE
) -> Op:
    """An op without results yet; attributes not given take their defaults."""
    opdef = lookup(name)
    return Op(opdef, operands, {**opdef.attr_defaults, **attrs}, (), loc)
