"""The program: values, operations and functions. Frozen; passes build new ones.

Function = name, params: Param*, ops: Op*, outputs: Output*
Param    = value, role, path (the user's name), next: the value that replaces it | None
Op       = def, operands: Operand*, attrs: {name: attr}, results: Value*, loc
Operand  = Value | number | None | (Value | None)*
Value    = type, name
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from .opdef import OpDef
from .types import TensorType

Number = bool | int | float | complex


@dataclass(frozen=True, eq=False, slots=True)
class Value:
    """One tensor of the program. Identity, not name, tells two values apart."""

    type: TensorType
    name: str

    def __repr__(self) -> str:
        return f"%{self.name}: {self.type}"


Operand = Value | Number | None | tuple[Value | None, ...]


class Role(Enum):
    """Where a parameter of a function comes from."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    MOMENT = "moment"
    GRADIENT = "gradient"
    RNG = "rng"
    HYPER = "hyper"
    BATCH = "batch"
    CONSTANT = "constant"


STATE_ROLES = frozenset({Role.PARAMETER, Role.BUFFER, Role.MOMENT, Role.GRADIENT, Role.RNG})


class Phase(Enum):
    """The part of the step in which an operation was captured."""

    FORWARD = "forward"
    BACKWARD = "backward"
    RECOMPUTE = "recompute"
    UPDATE = "update"


@dataclass(frozen=True, slots=True)
class Loc:
    """Where an operation comes from: the user's file and line, the module path, the phase."""

    file: str = ""
    line: int = 0
    module: str = ""
    phase: Phase = Phase.FORWARD

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.file else "unknown"
        return f"{place} ({self.module})" if self.module else place


@dataclass(frozen=True, eq=False, slots=True)
class Op:
    """One operation. `operands` follow the tensor arguments of the op's schema, in order.

    Attributes:
        inputs: every value read, flattened, with repeats.
    """

    opdef: OpDef
    operands: tuple[Operand, ...]
    attrs: Mapping[str, Any]
    results: tuple[Value, ...]
    loc: Loc = Loc()
    inputs: tuple[Value, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        values = tuple(operand_values(self.operands))
        object.__setattr__(self, "inputs", self.operands if values == self.operands else values)

    @property
    def name(self) -> str:
        return self.opdef.name

    @property
    def result(self) -> Value:
        """The only result of an op that has one."""
        (value,) = self.results
        return value

    def attr(self, name: str) -> Any:
        """An attribute, or its default."""
        return self.attrs[name] if name in self.attrs else self.opdef.attr_defaults[name]

    def map_operands(self, f: Callable[[Value], Operand]) -> Op:
        """The same op reading `f(value)` for each value."""
        return replace(self, operands=tuple(map_operand(o, f) for o in self.operands))


def operand_values(operands: Iterable[Operand]) -> Iterator[Value]:
    """The values among operands, lists included."""
    for operand in operands:
        if isinstance(operand, Value):
            yield operand
        elif isinstance(operand, tuple):
            yield from (v for v in operand if v is not None)


def map_types(operands: tuple[Operand, ...]) -> tuple[Any, ...]:
    """Operands with the type of each value in its place."""
    return tuple([_type_of(o) for o in operands])


def _type_of(operand: Operand) -> Any:
    if isinstance(operand, Value):
        return operand.type
    if isinstance(operand, tuple):
        return tuple([None if v is None else v.type for v in operand])
    return (type(operand), operand)


def map_operand(operand: Operand, f: Callable[[Value], Operand]) -> Operand:
    """The operand with each value replaced by `f(value)`."""
    if isinstance(operand, Value):
        return f(operand)
    if isinstance(operand, tuple):
        new = [None if v is None else f(v) for v in operand]
        assert all(v is None or isinstance(v, Value) for v in new), "a list operand holds values"
        return tuple(v for v in new if v is None or isinstance(v, Value))
    return operand


@dataclass(frozen=True, eq=False, slots=True)
class Param:
    """An input of a function.

    Attributes:
        value: the value inside the function.
        role: where it comes from.
        path: the user's qualified name, e.g. `transformer.wte.weight`.
        next: for state, the value that it holds after the step; None where it stays.
    """

    value: Value
    role: Role
    path: str
    next: Value | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Output:
    """A named result that is handed to the caller: `loss`, a metric, a model output."""

    name: str
    value: Value


@dataclass(frozen=True, eq=False)
class Function:
    """A straight-line program in single assignment form.

    A training step is a function (state, batch, rng key, hyper-parameters) -> (state', outputs).
    """

    name: str
    params: tuple[Param, ...]
    ops: tuple[Op, ...]
    outputs: tuple[Output, ...]
    _producers: dict[Value, Op] = field(init=False, repr=False, default_factory=dict[Value, Op])

    @property
    def results(self) -> tuple[Value, ...]:
        """Everything that must be alive at the end: outputs, then replaced state."""
        nexts = (p.next for p in self.params if p.next is not None)
        return (*(o.value for o in self.outputs), *nexts)

    @property
    def values(self) -> Iterator[Value]:
        """Every value, in order of definition."""
        yield from (p.value for p in self.params)
        for op in self.ops:
            yield from op.results

    def producer(self, value: Value) -> Op | None:
        """The op that makes `value`; None for a parameter."""
        if not self._producers and self.ops:
            self._producers.update({r: op for op in self.ops for r in op.results})
        return self._producers.get(value)

    def users(self) -> dict[Value, list[Op]]:
        """Value -> the ops that read it, each op once, in program order."""
        table: dict[Value, list[Op]] = {v: [] for v in self.values}
        for op in self.ops:
            for v in dict.fromkeys(op.inputs):
                table[v].append(op)
        return table

    def with_ops(self, ops: Iterable[Op], subst: Mapping[Value, Value] | None = None) -> Function:
        """The function with other ops, its results renamed through `subst` (chains followed)."""
        subst = subst or {}

        def final(v: Value) -> Value:
            while v in subst:
                v = subst[v]
            return v

        params = tuple(p if p.next is None else replace(p, next=final(p.next)) for p in self.params)
        outputs = tuple(replace(o, value=final(o.value)) for o in self.outputs)
        return Function(self.name, params, tuple(ops), outputs)


def same_structure(a: Function, b: Function, *, locations: bool = True) -> bool:
    """Whether two functions are equal up to the identity of their values, or also to locations."""
    pairs: dict[Value, Value] = {}

    def same(x: Operand, y: Operand) -> bool:
        if isinstance(x, Value) and isinstance(y, Value):
            return pairs.get(x) is y
        if isinstance(x, tuple) and isinstance(y, tuple):
            return len(x) == len(y) and all(same(i, j) for i, j in zip(x, y, strict=True))
        return type(x) is type(y) and repr(x) == repr(y)

    def define(xs: Iterable[Value], ys: Iterable[Value]) -> bool:
        xs, ys = list(xs), list(ys)
        pairs.update(zip(xs, ys, strict=False))
        return len(xs) == len(ys) and all(
            x.type == y.type and x.name == y.name for x, y in zip(xs, ys, strict=True)
        )

    if a.name != b.name or len(a.params) != len(b.params) or len(a.ops) != len(b.ops):
        return False
    if not define((p.value for p in a.params), (p.value for p in b.params)):
        return False
    for x, y in zip(a.ops, b.ops, strict=True):
        attrs_x, attrs_y = dict(x.attrs), dict(y.attrs)
        if x.name != y.name or repr(attrs_x) != repr(attrs_y) or (locations and x.loc != y.loc):
            return False
        if not same(x.operands, y.operands) or not define(x.results, y.results):  # type: ignore[arg-type]
            return False
    for p, q in zip(a.params, b.params, strict=True):
        if p.role is not q.role or p.path != q.path or (p.next is None) != (q.next is None):
            return False
        if p.next is not None and pairs.get(p.next) is not q.next:
            return False
    outs = zip(a.outputs, b.outputs, strict=False)
    return len(a.outputs) == len(b.outputs) and all(
        x.name == y.name and pairs.get(x.value) is y.value for x, y in outs
    )
