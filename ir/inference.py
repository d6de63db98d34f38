"""Result types, remembered: layers repeat, so most ops of a step have been seen before."""

from __future__ import annotations

from .function import Op, Operand, Value
from .types import TensorType

_CACHE: dict[object, tuple[TensorType, ...]] = {}


def signature(op: Op) -> object:
    """All that the result types depend on, as a key: 1, 1.0 and True differ, so do 0.0 and -0.0."""
    operands = tuple(_operand_key(o) for o in op.operands)
    return (op.opdef, operands, attrs_key(op))


def attrs_key(op: Op) -> str:
    """The attributes as text, defaults filled in, in one order."""
    return repr(sorted({**op.opdef.attr_defaults, **op.attrs}.items())) if op.attrs else ""


def _operand_key(operand: Operand) -> object:
    if isinstance(operand, Value):
        return operand.type
    if isinstance(operand, tuple):
        return tuple(None if v is None else v.type for v in operand)
    return repr(operand)


def infer_types(op: Op) -> tuple[TensorType, ...]:
    """The types that the definition infers, without running the inference twice.

    Raises:
        Exception: whatever the reference raises where it refuses its operands.
    """
    key = signature(op)
    if key not in _CACHE:
        _CACHE[key] = op.opdef.infer(op)
    return _CACHE[key]


def same_types(a: tuple[TensorType, ...], b: tuple[TensorType, ...]) -> bool:
    """Whether element types and shapes agree."""
    return [(t.dtype, t.shape) for t in a] == [(t.dtype, t.shape) for t in b]
