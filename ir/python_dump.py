"""A function as a Python module that needs PyTorch and nothing else.

`print_python(f)` defines `def step(arg0, ...)`: one line an op, the user's names in comments. It
returns what `interpret` returns: the outputs, and path -> next value. Ops whose meaning is written
in Python (`rng.*`, constants, reshapes) bring their source along.
"""

from __future__ import annotations

import dis
import inspect
import math
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any

import torch

from .errors import IRError
from .function import Function, Loc, Op, Operand, Value
from .interpreter import TAKES_STRIDES

_HEAD = '''"""{name}: written by shoestring. `step` returns outputs and next values."""

from __future__ import annotations

{imports}


def _results(outcome):
    """Every tensor of a call's outcome, in order."""
    if isinstance(outcome, torch.Tensor) or outcome is None:
        return [] if outcome is None else [outcome]
    return [t for part in outcome for t in _results(part)]
'''


def print_python(function: Function) -> str:
    """The source of a module with `step(arg0, ...)`, which computes the function.

    Raises:
        IRError: SS2006 for an op whose meaning has no source.
    """
    helpers = _Helpers()
    names = {p.value: f"arg{i}" for i, p in enumerate(function.params)}
    count = 0
    lines: list[str] = []
    for op in function.ops:
        call = _call(op, names, helpers)
        for r in op.results:
            names[r] = f"v{count}"
            count += 1
        lines.append(_assign(op, call, names) + _comment(op))
    body = "\n".join(f"    {line}" for line in lines)
    head = _HEAD.format(name=function.name, imports="\n".join(sorted(helpers.imports)))
    parts = [head, *helpers.sources.values()]
    parts.append(f"@torch.no_grad()\n{_signature(function)}\n{body}\n{_return(function, names)}")
    return "\n\n".join(part.strip("\n") + "\n" for part in parts)


def _signature(function: Function) -> str:
    if not function.params:
        return "def step():"
    params = "\n".join(
        f"    arg{i},  # {p.value.type} {p.role.value} {p.path!r}"
        for i, p in enumerate(function.params)
    )
    return f"def step(\n{params}\n):"


def _return(function: Function, names: dict[Value, str]) -> str:
    outputs = "".join(f"        {names[o.value]},  # {o.name}\n" for o in function.outputs)
    nexts = "".join(
        f"        {p.path!r}: {names[p.next]},\n" for p in function.params if p.next is not None
    )
    return (
        f"    outputs = [\n{outputs}    ]\n    nexts = {{\n{nexts}    }}\n    return outputs, nexts"
    )


def _comment(op: Op) -> str:
    types = ", ".join(str(r.type) for r in op.results)
    place = "" if op.loc == Loc() else f" {op.loc}"
    return f"  # {types}{place}".replace("\n", " ").replace("\r", " ")


def _assign(op: Op, call: str, names: dict[Value, str]) -> str:
    targets = [names[r] for r in op.results]
    if len(targets) == 1 and _returns(op) == 1:
        return f"{targets[0]} = {call}"
    if len(targets) == _returns(op):
        return f"{', '.join(targets)} = {call}"
    left = f"({', '.join(targets)},) = " if targets else ""
    return f"{left}_results({call})"


def _returns(op: Op) -> int:
    """How many tensors a call gives; 0 where the schema does not say."""
    overload = getattr(op.opdef.reference, "overload", None)
    if overload is None:
        return 1
    returns = overload._schema.returns  # pyright: ignore[reportPrivateUsage]
    return len(returns) if all(str(r.type) == "Tensor" for r in returns) else 0


def _call(op: Op, names: dict[Value, str], helpers: _Helpers) -> str:
    # As the interpreter: kernels see row-major operands, so that results agree to the bit.
    settle = "" if op.opdef.kind in TAKES_STRIDES else ".contiguous()"
    shown = {v: names[v] + settle for v in op.inputs}
    operands = [_operand(o, shown) for o in op.operands]
    overload = getattr(op.opdef.reference, "overload", None)
    if overload is None:
        name = helpers.add(op.opdef.reference, op)
        attrs = [f"{k}={_literal(v)}" for k, v in op.attrs.items()]
        return f"{name}({', '.join([*operands, *attrs])})"
    return f"torch.ops.{op.name}({', '.join(_schema_arguments(op, operands))})"


def _schema_arguments(op: Op, operands: list[str]) -> list[str]:
    """Positional ones up to the last that is not its default, then the others by keyword."""
    rest = iter(operands)
    plan = op.opdef.reference.argument_plan  # type: ignore[attr-defined]
    given = [(next(rest) if t else _literal(op.attr(n)), n, kw, t, d) for t, n, kw, d in plan]
    positional = [g for g in given if not g[2]]
    while positional and not positional[-1][3] and positional[-1][0] == _literal(positional[-1][4]):
        positional.pop()
    by_name = [f"{n}={text}" for text, n, kw, t, d in given if kw and text != _literal(d)]
    return [*(g[0] for g in positional), *by_name]


def _operand(operand: Operand, names: dict[Value, str]) -> str:
    if isinstance(operand, Value):
        return names[operand]
    if isinstance(operand, tuple):
        return f"[{', '.join('None' if v is None else names[v] for v in operand)}]"
    return _literal(operand)


def _literal(value: Any) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, complex):
        return f"complex({_literal(value.real)}, {_literal(value.imag)})"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_literal(v) for v in value)}]"  # pyright: ignore
    return repr(value)


class _Helpers:
    """Source of the Python functions that ops refer to, and of what those refer to."""

    def __init__(self) -> None:
        self.imports = {"import torch"}
        self.sources: dict[str, str] = {}
        self._seen: dict[str, object] = {}

    def add(self, function: Callable[..., Any], op: Op) -> str:
        """The name under which `function` can be called."""
        if not isinstance(function, FunctionType) or function.__closure__:
            raise IRError("SS2006", f"{op.name} has no source that can be printed")
        name = function.__name__
        if not name.isidentifier() or self._seen.setdefault(name, function) is not function:
            raise IRError("SS2006", f"{op.name} has no source of its own that can be printed")
        if name not in self.sources:
            self.sources[name] = ""
            for used, value in _globals_used(function):
                self._use(used, value, op)
            del self.sources[name]  # what it refers to comes first
            self.sources[name] = inspect.getsource(function)
        return name

    def _use(self, name: str, value: object, op: Op) -> None:
        if isinstance(value, ModuleType):
            self.imports.add(f"import {value.__name__}" + _as(value.__name__, name))
        elif isinstance(value, FunctionType):
            self.add(value, op)
        elif isinstance(value, (bool, int, float, str, tuple, torch.dtype)):
            self.sources[name] = f"{name} = {_literal(value)}"
        else:
            raise IRError("SS2006", f"{op.name} refers to {name}, which has no source")


def _as(module: str, name: str) -> str:
    return "" if module == name else f" as {name}"


def _globals_used(function: FunctionType) -> Iterator[tuple[str, object]]:
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += [c for c in code.co_consts if inspect.iscode(c)]
        for name in {i.argval: None for i in dis.get_instructions(code) if i.opname == _GLOBAL}:
            if name in function.__globals__:
                yield name, function.__globals__[name]


_GLOBAL = "LOAD_GLOBAL"
