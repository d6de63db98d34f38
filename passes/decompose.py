"""Replaces larger ops by core ops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from shoestring.ir import Function, Op, TensorType, Value, trace
from shoestring.ir.inference import same_types, signature
from shoestring.ir.ops import find_overload
from shoestring.ir.ops.aten import PLACEMENT_ARGS, is_tensor_arg

from .base import Numerics, Pass, PassReport
from .editing import Names, inline, reading
from .rewriter import rewrite
from .rules import CANONICAL
from .rules.decompositions import find_body

MAX_DEPTH = 8  # bodies within bodies; PyTorch's own table stays below four


@dataclass(frozen=True)
class Decompose(Pass):
    """Writes each op that is not core as the core ops of its decomposition.

    An op stays, with a reason in the report, where it has no decomposition or where that would
    give other element types or shapes.

    Attributes:
        keep: names of larger ops that the backend takes whole, e.g. `aten._softmax.default`.

    Before:

        func @f {
          batch %x: f32[4] "x"
          %y: f32[4] = aten.silu.default(%x)
          return y=%y
        }

    After:

        func @f {
          batch %x: f32[4] "x"
          %y.1: f32[4] = aten.neg.default(%x)
          %y.2: f32[4] = aten.exp.default(%y.1)
          %y.3: f32[4] = aten.add.Tensor(%y.2, 1.0)
          %y: f32[4] = aten.div.Tensor(%x, %y.3)
          return y=%y
        }
    """

    keep: frozenset[str] = field(default_factory=frozenset[str])

    numerics: ClassVar[Numerics] = Numerics.REASSOCIATING

    def run(self, function: Function) -> tuple[Function, PassReport]:
        # Sugar such as `mul.Scalar` is another spelling of a core op.
        canonical, spelled = rewrite(function, CANONICAL)
        report = PassReport()
        if spelled.changed:
            report.note(f"{spelled.changed} ops got their canonical spelling")
        result = self._decompose(canonical, report)
        return (function if result is canonical is function else result), report

    def _decompose(self, function: Function, report: PassReport) -> Function:
        names = Names(function)
        subst: dict[Value, Value] = {}
        ops: list[Op] = []
        for old in function.ops:
            op = reading(old, subst)
            if op.opdef.core or op.name in self.keep:
                ops.append(op)
                continue
            report.matched += 1
            body = find_function(op, self.keep)
            if isinstance(body, str):
                report.skip(f"{op.name} {body}", op.loc)
                ops.append(op)
            else:
                report.changed += 1
                ops += inline(body, op.inputs, op.results, names, subst, op.loc)
        _list_rest(ops, self.keep, report)
        return function.with_ops(ops, subst) if report.changed else function


def _list_rest(ops: list[Op], keep: frozenset[str], report: PassReport) -> None:
    """Notes what is neither core nor kept, so that nothing is left over unseen."""
    rest = sorted({op.name for op in ops if not op.opdef.core and op.name not in keep})
    if rest:
        report.note(f"not core: {', '.join(rest)}")


_BODIES: dict[object, Function | str] = {}


def find_function(op: Op, keep: frozenset[str] = frozenset()) -> Function | str:
    """The op's decomposition as a function of its operands, or why there is none. Cached."""
    key = (signature(op), keep)
    if key not in _BODIES:
        _BODIES[key] = _make_function(op, keep)
    return _BODIES[key]


def _make_function(op: Op, keep: frozenset[str]) -> Function | str:
    call = _python_body(op)
    if call is None:
        return "has no decomposition"
    if not all(v.type.is_static for v in op.inputs):
        return "has symbolic shapes"
    try:
        body = trace(lambda *tensors: _call(op, call, tensors), [v.type for v in op.inputs], "body")
    except Exception as error:  # PyTorch's own words: its decompositions refuse some arguments
        return f"refuses to decompose: {(str(error).splitlines() or [''])[0]}"
    body, _ = rewrite(body, CANONICAL)
    found = tuple(o.value.type for o in body.outputs)
    if not same_types(found, tuple(r.type for r in op.results)):
        return f"would become {_shown(found)}"
    if any(p.path not in {f"in{i}" for i in range(len(op.inputs))} for p in body.params):
        return "decomposes into random draws"
    if any(o.name == op.name for o in body.ops):
        return "has no decomposition"
    return _expand(body, keep, 0)


def _shown(types: tuple[TensorType, ...]) -> str:
    return ", ".join(map(str, types))


def _expand(body: Function, keep: frozenset[str], depth: int) -> Function:
    """The body with its own larger ops decomposed."""
    if depth == MAX_DEPTH or all(op.opdef.core or op.name in keep for op in body.ops):
        return body
    result, report = Decompose(keep).run(body)
    return _expand(result, keep, depth + 1) if report.changed else result


def _python_body(op: Op) -> Callable[..., Any] | None:
    """The torch program to trace: a decomposition, or the reference of an op that is not ATen's."""
    if not op.name.startswith("aten."):
        return lambda *operands, **attrs: op.opdef.reference(*operands, **attrs)
    overload = find_overload(op.name)
    body = find_body(overload, op.name)
    return None if body is None else _by_schema(overload, body)


def _by_schema(overload: Any, body: Callable[..., Any]) -> Callable[..., Any]:
    """`body`, which takes ATen's arguments, as a function of operands and attributes."""
    arguments = [a for a in overload._schema.arguments if a.name not in PLACEMENT_ARGS]

    def call(*operands: Any, **attrs: Any) -> Any:
        rest = iter(operands)
        given = {
            a.name: next(rest) if is_tensor_arg(a) else _listed(attrs[a.name]) for a in arguments
        }
        args = [given[a.name] for a in arguments if not a.kwarg_only]
        return body(*args, **{a.name: given[a.name] for a in arguments if a.kwarg_only})

    return call


def _listed(value: Any) -> Any:
    """Lists of an attribute as torch passes them."""
    return list(value) if isinstance(value, tuple) else value  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]


def _call(op: Op, call: Callable[..., Any], tensors: tuple[Any, ...]) -> Any:
    """Calls with the traced tensors in the places of the op's operands."""
    rest = iter(tensors)

    def bind(operand: Any) -> Any:
        if isinstance(operand, Value):
            return next(rest)
        if isinstance(operand, tuple):
            return [None if v is None else next(rest) for v in operand]  # pyright: ignore[reportUnknownVariableType]
        return operand

    operands = [bind(o) for o in op.operands]
    return call(*operands, **{**op.opdef.attr_defaults, **op.attrs})
