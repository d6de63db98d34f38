"""The text form: one line an op; `parse(print_function(f))` is `f` again.

    func @step {
      parameter %w: f32[4,8] "linear.weight" -> %w.new
      batch %x: f32[2,8] "batch.0"
      %y: f32[2,4] = aten.mm.default(%x, %wt) loc("model.py":12 "linear" forward)
      return loss=%y
    }

Operands: `%name`, `_` (absent), a number, or `[%a, _, %b]`. Attributes follow in braces, those
equal to the schema's default left out. Attribute values: numbers, `true`, `false`, `none`,
`"text"`, element types, lists. A name that is not one word is quoted: `%"my value"`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import torch

from .errors import IRError
from .function import Function, Loc, Number, Op, Operand, Output, Param, Phase, Role, Value
from .ops import lookup
from .types import DTYPE_NAMES, DTYPES, TensorType, match_type


def print_function(function: Function, *, locs: bool = True) -> str:
    """The whole function as text."""
    lines = [f"func @{_name(function.name)} {{"]
    lines += [f"  {_param(p)}" for p in function.params]
    lines += [f"  {print_op(op, locs=locs)}" for op in function.ops]
    outputs = ", ".join(f"{_name(o.name)}={_value(o.value)}" for o in function.outputs)
    lines += [f"  return {outputs}".rstrip(), "}"]
    return "\n".join(lines) + "\n"


def print_op(op: Op, *, locs: bool = True) -> str:
    """One op as one line."""
    results = ", ".join(f"{_value(r)}: {r.type}" for r in op.results)
    operands = ", ".join(print_operand(o) for o in op.operands)
    head = f"{results} = " if results else ""
    text = f"{head}{op.name}({operands})"
    shown = {k: v for k, v in op.attrs.items() if not _is_default(op, k, v)}
    if shown:
        text += " {" + ", ".join(f"{k}={print_attr(v)}" for k, v in shown.items()) + "}"
    if locs and op.loc != Loc():
        file, module = json.dumps(op.loc.file), json.dumps(op.loc.module)
        text += f" loc({file}:{op.loc.line} {module} {op.loc.phase.value})"
    return text


def print_operand(operand: Operand) -> str:
    if isinstance(operand, Value):
        return _value(operand)
    if operand is None:
        return "_"
    if isinstance(operand, tuple):
        return "[" + ", ".join(print_operand(v) for v in operand) + "]"
    return print_attr(operand)


def print_attr(value: Any) -> str:
    """An attribute value as text.

    Raises:
        IRError: SS2004 for a value that has no text form.
    """
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, complex):
        return f"complex({value.real!r}, {value.imag!r})"
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, torch.dtype):
        return DTYPE_NAMES[value]
    if isinstance(value, tuple):
        return "[" + ", ".join(print_attr(v) for v in value) + "]"  # pyright: ignore[reportUnknownVariableType]
    raise IRError("SS2004", f"an attribute must be a number, text or list, found {value!r}")


def _is_default(op: Op, name: str, value: Any) -> bool:
    defaults = op.opdef.attr_defaults
    return (
        name in defaults
        and type(defaults[name]) is type(value)
        and (repr(defaults[name]) == repr(value))
    )


def _param(p: Param) -> str:
    text = f"{p.role.value} {_value(p.value)}: {p.value.type} {json.dumps(p.path)}"
    return text if p.next is None else f"{text} -> {_value(p.next)}"


def _value(value: Value) -> str:
    plain = re.fullmatch(r"[\w.]+", value.name, re.ASCII)
    return f"%{value.name if plain else json.dumps(value.name)}"


def _name(name: str) -> str:
    """The name of a function or an output; quoted where it is not one word."""
    return name if _NAME.fullmatch(name) else json.dumps(name)


_SPACE = re.compile(r"(?:\s|//[^\n]*)*")
_NAME = re.compile(r"[A-Za-z_][\w.]*", re.ASCII)
_VALUE = re.compile(r"%([\w.]+)", re.ASCII)
_NUMBER = re.compile(r"-?(?:inf\b|nan\b|\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')


class _Reader:
    """A cursor over text; every complaint names the line."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def fail(self, wanted: str) -> IRError:
        line = self.text.count("\n", 0, self.at) + 1
        start = self.text.rfind("\n", 0, self.at) + 1
        end = self.text.find("\n", self.at)
        source = self.text[start : end if end >= 0 else None]
        return IRError("SS2005", f"{wanted} is required here", f"line {line}: {source.strip()}")

    def skip(self) -> None:
        m = _SPACE.match(self.text, self.at)
        assert m is not None
        self.at = m.end()

    def peek(self, token: str) -> bool:
        self.skip()
        return self.text.startswith(token, self.at)

    def accept(self, token: str) -> bool:
        found = self.peek(token)
        if found:
            self.at += len(token)
        return found

    def expect(self, token: str) -> None:
        if not self.accept(token):
            raise self.fail(f"'{token}'")

    def match(self, pattern: re.Pattern[str], wanted: str) -> str:
        self.skip()
        m = pattern.match(self.text, self.at)
        if m is None:
            raise self.fail(wanted)
        self.at = m.end()
        return m[m.lastindex or 0]

    def value_name(self) -> str:
        """`%x`, or `%"any text"`."""
        self.skip()
        if self.text.startswith('%"', self.at):
            self.at += 1
            return self.string()
        return self.match(_VALUE, "a value name such as %x")

    def name(self, wanted: str) -> str:
        """One word, or quoted text."""
        return self.string() if self.peek('"') else self.match(_NAME, wanted)

    def string(self) -> str:
        try:
            return str(json.loads(self.match(_STRING, "quoted text")))
        except json.JSONDecodeError:
            raise self.fail("quoted text") from None

    def integer(self) -> int:
        return int(self.match(re.compile(r"\d+"), "a whole number"))

    def type(self) -> TensorType:
        self.skip()
        found = match_type(self.text, self.at)
        if found is None:
            raise self.fail("a type such as f32[8,256]")
        self.at = found[1]
        return found[0]

    def sequence(self, close: str) -> Iterator[None]:
        """Yields once an item of a comma-separated list up to `close`."""
        while not self.accept(close):
            yield
            if not self.accept(","):
                self.expect(close)
                return


class _Parser(_Reader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.values: dict[str, Value] = {}

    def define(self) -> Value:
        name = self.value_name()
        self.expect(":")
        if name in self.values:
            raise self.fail(f"a name other than %{name}, which is taken,")
        self.values[name] = Value(self.type(), name)
        return self.values[name]

    def use(self) -> Value:
        name = self.value_name()
        if name not in self.values:
            raise self.fail(f"a value that is defined above (%{name} is not)")
        return self.values[name]

    def function(self) -> Function:
        self.expect("func")
        self.expect("@")
        name = self.name("a function name")
        self.expect("{")
        params, nexts = self.params()
        ops: list[Op] = []
        while not self.accept("return"):
            ops.append(self.op())
        outputs = self.outputs()
        final = tuple(
            Param(p.value, p.role, p.path, self.resolve(n))
            for p, n in zip(params, nexts, strict=True)
        )
        return Function(name, final, tuple(ops), outputs)

    def resolve(self, name: str | None) -> Value | None:
        if name is None:
            return None
        if name not in self.values:
            raise self.fail(f"a definition of %{name}, the next value of a parameter,")
        return self.values[name]

    def params(self) -> tuple[list[Param], list[str | None]]:
        params: list[Param] = []
        nexts: list[str | None] = []
        roles = {r.value: r for r in Role}
        while not self.peek("%") and not self.peek("return"):
            save = self.at
            word = self.match(_NAME, "a parameter's role, an op or 'return'")
            if word not in roles:
                self.at = save
                if self.peek(word) and not re.match(r"[\w.]+\s*\(", self.text[self.at :]):
                    raise self.fail(f"one of {', '.join(sorted(roles))}")
                break
            value = self.define()
            params.append(Param(value, roles[word], self.string()))
            nexts.append(self.value_name() if self.accept("->") else None)
        return params, nexts

    def outputs(self) -> tuple[Output, ...]:
        outputs: list[Output] = []
        for _ in self.sequence("}"):
            name = self.name("an output's name")
            self.expect("=")
            outputs.append(Output(name, self.use()))
        return tuple(outputs)

    def op(self) -> Op:
        names: list[tuple[str, TensorType]] = []
        start = self.at
        while self.peek("%"):
            name = self.value_name()
            self.expect(":")
            names.append((name, self.type()))
            if not self.accept(","):
                self.expect("=")
                break
        opdef = lookup(self.match(_NAME, "an operation"))
        self.expect("(")
        operands = tuple([self.operand() for _ in self.sequence(")")])
        attrs = dict(opdef.attr_defaults)
        if self.accept("{"):
            for _ in self.sequence("}"):
                key = self.match(_NAME, "an attribute's name")
                self.expect("=")
                attrs[key] = self.attr()
        loc = self.loc() if self.accept("loc(") else Loc()
        for name, _ in names:
            if name in self.values:
                self.at = start
                raise self.fail(f"a name other than %{name}, which is taken,")
        results = tuple(Value(type_, name) for name, type_ in names)
        self.values.update({r.name: r for r in results})
        return Op(opdef, operands, attrs, results, loc)

    def operand(self) -> Operand:
        if self.peek("%"):
            return self.use()
        if self.accept("_"):
            return None
        if self.accept("["):
            items = [None if self.accept("_") else self.use() for _ in self.sequence("]")]
            return tuple(items)
        return self.number()

    def number(self) -> Number:
        value = self.attr()
        if not isinstance(value, (bool, int, float, complex)):
            raise self.fail("an operand")
        return value

    def attr(self) -> Any:
        if self.accept("["):
            return tuple([self.attr() for _ in self.sequence("]")])
        if self.peek('"'):
            return self.string()
        if self.accept("complex("):
            real = float(self.match(_NUMBER, "a number"))
            self.expect(",")
            imag = float(self.match(_NUMBER, "a number"))
            self.expect(")")
            return complex(real, imag)
        self.skip()
        m = _NUMBER.match(self.text, self.at)
        if m is not None:
            self.at = m.end()
            return int(m[0]) if m[0].lstrip("-").isdigit() else float(m[0])
        word = self.match(_NAME, "an attribute value")
        words: dict[str, Any] = {"none": None, "true": True, "false": False, **DTYPES}
        if word not in words:
            raise self.fail("a number, text, list, element type, true, false or none")
        return words[word]

    def loc(self) -> Loc:
        file = self.string()
        self.expect(":")
        line, module = self.integer(), self.string()
        phase = Phase(self.match(_NAME, "a phase"))
        self.expect(")")
        return Loc(file, line, module, phase)


def parse(text: str) -> Function:
    """The function written as `text`.

    Raises:
        IRError: SS2003, SS2005: the line, and what is required there.
    """
    parser = _Parser(text)
    function = parser.function()
    parser.skip()
    if parser.at != len(text):
        raise parser.fail("the end of the text")
    return function
