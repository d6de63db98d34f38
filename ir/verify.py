"""The verifier. Invariants of every function, checked after every pass:

1. Each value is defined once, by a parameter or one op, before every use (SS2101, SS2102).
2. Names of values are unique within the function (SS2103).
3. An op has the operands that its definition names, and no unknown attribute (SS2104).
4. The results have the types that the definition infers (SS2105).
5. Outputs and next values are defined; a next value has its parameter's type; only state, and
   what the caller passes in, has a next value (SS2106).
6. Paths of parameters are unique; those that the user did not name begin with # (SS2107).
"""

from __future__ import annotations

from .errors import IRError
from .function import STATE_ROLES, Function, Op, Role, Value
from .inference import infer_types, same_types
from .text import print_op

CONTEXT_LINES = 2
CARRIES_NEXT = STATE_ROLES | {Role.CONSTANT, Role.BATCH}


def verify(function: Function, *, types: bool = True) -> None:
    """Checks every invariant; `types=False` leaves out the fourth, which runs the inference.

    Raises:
        IRError: SS21xx, with the lines of IR around the offending one.
    """
    defined: set[Value] = set()
    names: dict[str, Value] = {}

    def define(value: Value, index: int) -> None:
        if value in defined:
            raise _complaint(function, index, "SS2101", f"%{value.name} is defined twice")
        if value.name in names:
            raise _complaint(function, index, "SS2103", f"two values are named %{value.name}")
        defined.add(value)
        names[value.name] = value

    for p in function.params:
        define(p.value, 0)
    for index, op in enumerate(function.ops):
        for v in op.inputs:
            if v not in defined:
                what = f"{op.name} reads %{v.name} before it is defined"
                raise _complaint(function, index, "SS2102", what)
        _check_signature(function, index, op)
        for r in op.results:
            define(r, index)
        if types:
            _check_types(function, index, op)
    _check_results(function, defined)


def _check_signature(function: Function, index: int, op: Op) -> None:
    names = op.opdef.operand_names
    if len(op.operands) != len(names):
        what = (
            f"{op.name} takes {len(names)} operands ({', '.join(names)}), found {len(op.operands)}"
        )
        raise _complaint(function, index, "SS2104", what)
    unknown = set(op.attrs) - set(op.opdef.attr_defaults)
    if unknown and op.opdef.attr_defaults:
        what = f"{op.name} has no attribute {', '.join(sorted(unknown))}"
        raise _complaint(function, index, "SS2104", what)


def _check_types(function: Function, index: int, op: Op) -> None:
    if not all(v.type.is_static for v in (*op.inputs, *op.results)):
        return
    try:
        inferred = infer_types(op)
    except Exception as error:  # the reference refuses its operands in its own words
        what = f"{op.name} refuses its operands: {str(error).splitlines()[0]}"
        raise _complaint(function, index, "SS2105", what) from error
    found = tuple(r.type for r in op.results)
    if not same_types(inferred, found):
        shown = ", ".join(map(str, inferred))
        raise _complaint(
            function,
            index,
            "SS2105",
            f"{op.name} gives {shown}, written {', '.join(map(str, found))}",
        )


def _check_results(function: Function, defined: set[Value]) -> None:
    end = len(function.ops) - 1
    for o in function.outputs:
        if o.value not in defined:
            raise _complaint(function, end, "SS2106", f"output {o.name} is not defined")
    paths: set[str] = set()
    for p in function.params:
        if p.path in paths:
            raise _complaint(function, 0, "SS2107", f"two parameters are called {p.path!r}")
        paths.add(p.path)
        if p.next is None:
            continue
        if p.next not in defined:
            raise _complaint(
                function, end, "SS2106", f"the next value of {p.path!r} is not defined"
            )
        if p.role not in CARRIES_NEXT:
            raise _complaint(function, end, "SS2106", f"{p.role.value} {p.path!r} has a next value")
        if (p.next.type.dtype, p.next.type.shape) != (p.value.type.dtype, p.value.type.shape):
            what = f"{p.path!r} is {p.value.type}, its next value {p.next.type}"
            raise _complaint(function, end, "SS2106", what)


def _complaint(function: Function, index: int, code: str, what: str) -> IRError:
    ops = function.ops
    if not ops:
        return IRError(code, f"in @{function.name}: {what}")
    first, last = max(0, index - CONTEXT_LINES), min(len(ops), index + CONTEXT_LINES + 1)
    lines = [f"{'>' if i == index else ' '} {print_op(ops[i])}" for i in range(first, last)]
    where = str(ops[index].loc) if index >= 0 else ""
    return IRError(code, f"in @{function.name}: {what}", where + "\n" + "\n".join(lines))
