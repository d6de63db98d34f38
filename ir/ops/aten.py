"""OpDefs made from PyTorch's own schemas: the safe defaults of an ATen op without an entry."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode

from ..errors import IRError
from ..fake import empty, fake_mode
from ..function import Op, Operand, Value, map_types
from ..opdef import Cost, FactorMap, Infer, Kind, OpDef, results_of
from ..types import TensorType, type_of

TENSOR_TYPES = frozenset({"Tensor", "Optional[Tensor]", "List[Tensor]", "List[Optional[Tensor]]"})
# Where data lives and how it is laid out is a backend's business, not the program's.
PLACEMENT_ARGS = frozenset({"device", "layout", "pin_memory", "memory_format", "non_blocking"})
MOST_INFERRED = 1 << 12  # ops whose result types are remembered
_inferred: dict[Any, tuple[TensorType, ...]] = {}


def is_tensor_arg(arg: Any) -> bool:
    """Whether a schema argument holds tensors."""
    return str(arg.type) in TENSOR_TYPES


def freeze(value: Any) -> Any:
    """An attribute as an immutable value: lists become tuples, sizes become integers."""
    if isinstance(value, (list, tuple)):
        return tuple(freeze(v) for v in value)
    return value


@cache
def find_overload(name: str) -> OpOverload:
    """The PyTorch operator called `namespace.op.overload`.

    Raises:
        IRError: SS2003 where PyTorch has none of that name.
    """
    parts = name.split(".")
    try:
        namespace, op, overload = parts
        found = getattr(getattr(getattr(torch.ops, namespace), op), overload)
    except (ValueError, AttributeError):
        found = None
    if not isinstance(found, OpOverload):
        raise IRError("SS2003", f"a known operation is required, found {name!r}")
    return found


def overload_name(overload: OpOverload) -> str:
    """`namespace.op.overload` of a PyTorch operator."""
    schema = overload._schema  # pyright: ignore[reportPrivateUsage]
    return f"{schema.name.replace('::', '.')}.{schema.overload_name or 'default'}"


def split_arguments(
    overload: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Any], dict[str, Any]]:
    """A call's tensor arguments in schema order, and its other arguments by name."""
    operands: list[Any] = []
    attrs: dict[str, Any] = {}
    for i, arg in enumerate(overload._schema.arguments):  # pyright: ignore[reportPrivateUsage]
        given = args[i] if i < len(args) else kwargs.get(arg.name, arg.default_value)
        if is_tensor_arg(arg):
            operands.append(tuple(given) if isinstance(given, (list, tuple)) else given)
        elif arg.name not in PLACEMENT_ARGS:
            attrs[arg.name] = freeze(given)
    return operands, attrs


def _caller(overload: OpOverload) -> Callable[..., Any]:
    """`overload` as a function of operands by position and attributes by name."""
    plan = [
        (is_tensor_arg(a), a.name, a.kwarg_only, a.default_value)
        for a in overload._schema.arguments  # pyright: ignore[reportPrivateUsage]
        if a.name not in PLACEMENT_ARGS
    ]
    positional = [entry for entry in plan if not entry[2]]
    by_name = [entry for entry in plan if entry[2]]

    def call(*operands: Any, **attrs: Any) -> Any:
        rest = iter(operands)
        args = [next(rest) if t else attrs.get(n, d) for t, n, _, d in positional]
        kwargs = {n: next(rest) if t else attrs.get(n, d) for t, n, _, d in by_name}
        return overload(*args, **kwargs)

    call.overload = overload  # type: ignore[attr-defined]
    call.argument_plan = plan  # type: ignore[attr-defined]
    return call


@cache
def inference_mode() -> FakeTensorMode:
    """The fake tensor mode in which result types are inferred."""
    return fake_mode()


def infer_by_running(op: Op) -> tuple[TensorType, ...]:
    """Result types, from running the reference on tensors without data; of equal ops, once."""
    attrs = tuple([(k, type(v), v) for k, v in op.attrs.items()])
    key = (op.opdef.reference, torch.get_default_dtype(), map_types(op.operands), attrs)
    try:
        types = _inferred.get(key)
    except TypeError:  # a list among the attributes
        return _run(op)
    if types is None:
        if len(_inferred) >= MOST_INFERRED:
            _inferred.clear()
        types = _inferred[key] = _run(op)
    return types


def _run(op: Op) -> tuple[TensorType, ...]:
    mode = inference_mode()

    def fake(v: Value) -> torch.Tensor:
        return empty(mode, v.type.dtype, v.type.static_shape, None)

    operands = [_substitute(o, fake) for o in op.operands]
    with mode:
        outcome = op.opdef.reference(*operands, **op.attrs)
    return tuple(type_of(t) for t in results_of(outcome, op.attrs))


def _substitute(operand: Operand, f: Callable[[Value], torch.Tensor]) -> Any:
    if isinstance(operand, Value):
        return f(operand)
    if isinstance(operand, tuple):
        return [None if v is None else f(v) for v in operand]
    return operand


def bytes_moved(op: Op) -> int:
    """Bytes of every distinct operand and result."""
    return sum(v.type.nbytes for v in dict.fromkeys((*op.inputs, *op.results)))


def default_cost(op: Op) -> Cost:
    return Cost(0, bytes_moved(op))


def pointwise_cost(op: Op) -> Cost:
    return Cost(sum(r.type.numel for r in op.results), bytes_moved(op))


def view_cost(op: Op) -> Cost:
    return Cost(0, 0)


def replicate(op: Op) -> FactorMap | None:
    """No sharding rule: the op runs whole."""
    return None


@cache
def from_schema(name: str) -> OpDef:
    """The definition of an ATen op, all from its schema: run as is, replicated."""
    return define(name, Kind.OPAQUE)


def define(
    name: str,
    kind: Kind,
    *,
    reference: Callable[..., Any] | None = None,
    infer: Infer = infer_by_running,
    cost: Callable[[Op], Cost] | None = None,
    factors: Callable[[Op], FactorMap | None] = replicate,
    core: bool = False,
    sizes_only: tuple[int, ...] = (),
    doc: str = "",
) -> OpDef:
    """An ATen op's definition: the schema's facts and whatever is given here."""
    overload = find_overload(name)
    arguments = [
        a
        for a in overload._schema.arguments  # pyright: ignore[reportPrivateUsage]
        if a.name not in PLACEMENT_ARGS
    ]
    costs = {Kind.POINTWISE: pointwise_cost, Kind.VIEW: view_cost}
    return OpDef(
        name=name,
        kind=kind,
        reference=reference or _caller(overload),
        operand_names=tuple(a.name for a in arguments if is_tensor_arg(a)),
        attr_defaults={a.name: freeze(a.default_value) for a in arguments if not is_tensor_arg(a)},
        infer=infer,
        cost=cost or costs.get(kind, default_cost),
        factors=factors,
        core=core,
        sizes_only=sizes_only,
        doc=doc,
    )
