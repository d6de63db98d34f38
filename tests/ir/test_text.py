"""The text form: `parse(print_function(f))` is `f`; complaints name the line."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoestring.ir import (
    DTYPE_NAMES,
    Function,
    Loc,
    Op,
    Operand,
    Output,
    Param,
    Phase,
    Role,
    Symbol,
    TensorType,
    Value,
    lookup,
    parse,
    print_function,
    print_op,
    same_structure,
)
from shoestring.ir.errors import IRError
from shoestring.ir.text import print_attr

from .test_types import types

STEP = """func @step {
  parameter %w: f32[8,4] "linear.weight" -> %w.new
  hyper %lr: f64[] "#group0.lr"
  batch %x: f32[2,8] "#batch.0"
  %y: f32[2,4] = aten.mm.default(%x, %w) loc("model.py":12 "linear" forward)
  %s: f32[] = aten.sum.default(%y)
  %w.new: f32[8,4] = aten.mul.Tensor(%w, 0.5) loc("":0 "" update)
  return loss=%s
}
"""
NAMES = st.text(max_size=8)
NUMBERS = (
    st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats()
    | st.builds(complex, st.floats(), st.floats())
)
SCALARS = NUMBERS | st.none() | st.text(max_size=5) | st.sampled_from(list(DTYPE_NAMES))
ATTRS: st.SearchStrategy[Any] = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3).map(tuple), max_leaves=6
)


@st.composite
def functions(draw: st.DrawFn) -> Function:
    """Any function that can be written down; types and signatures need not fit."""
    names = iter(draw(st.lists(NAMES, min_size=12, max_size=12, unique=True)))
    paths = draw(st.lists(NAMES, min_size=3, max_size=3))
    values = [Value(draw(types()), next(names)) for _ in range(draw(st.integers(0, 3)))]
    params = list(values)
    ops = [_op(draw, values, names) for _ in range(draw(st.integers(0, 3)))]
    made = tuple(
        Param(v, draw(st.sampled_from(Role)), path, draw(st.none() | st.sampled_from(values)))
        for v, path in zip(params, paths, strict=False)
    )
    outputs = (
        draw(st.lists(st.tuples(NAMES, st.sampled_from(values)), max_size=3)) if values else []
    )
    return Function(draw(NAMES), made, tuple(ops), tuple(Output(n, v) for n, v in outputs))


def _op(draw: st.DrawFn, values: list[Value], names: Any) -> Op:
    """An op that reads any of `values`, to which its results are added."""
    operand: st.SearchStrategy[Operand] = st.none() | NUMBERS
    if values:
        read = st.sampled_from(values)
        operand |= read | st.lists(read | st.none(), max_size=3).map(tuple)
    opdef = lookup(
        draw(st.sampled_from(["aten.mm.default", "aten.sort.stable", "rng.bits.default"]))
    )
    attrs = {**opdef.attr_defaults, **draw(st.dictionaries(st.sampled_from("abc"), ATTRS))}
    results = tuple(Value(draw(types()), next(names)) for _ in range(draw(st.integers(0, 2))))
    loc = Loc(draw(NAMES), draw(st.integers(0, 99)), draw(NAMES), draw(st.sampled_from(Phase)))
    op = Op(opdef, tuple(draw(st.lists(operand, max_size=3))), attrs, results, loc)
    values.extend(results)
    return op


# Drawing functions is slow on a busy machine, and that is no defect.
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(functions())
def test_text_gives_the_function_back(function: Function) -> None:
    text = print_function(function)
    again = parse(text)
    assert same_structure(function, again), text
    assert print_function(again) == text


def test_the_documented_example() -> None:
    function = parse(STEP)
    assert print_function(function) == STEP
    assert function.params[0].next is function.ops[2].result
    assert [str(op.loc) for op in function.ops] == ["model.py:12 (linear)", "unknown", "unknown"]
    assert "loc(" not in print_function(function, locs=False)


def test_comments_and_space_do_not_matter() -> None:
    text = "// a step\n" + STEP.replace("\n", "  // note\n").replace(", ", " ,\n  ")
    assert same_structure(parse(text), parse(STEP))


def test_defaults_are_left_out_and_come_back() -> None:
    function = parse(
        'func @f {\n batch %x: f32[4] "x"\n %y: f32[4] = aten.gelu.default(%x)\n return y=%y\n}'
    )
    assert dict(function.ops[0].attrs) == {"approximate": "none"}
    assert print_op(function.ops[0]) == "%y: f32[4] = aten.gelu.default(%x)"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.0, 1e300, 5e-324])
def test_special_numbers(value: float) -> None:
    x = Value(TensorType(torch.float32, (Symbol("batch"),)), "x")
    op = Op(lookup("aten.add.Tensor"), (x, value), {"alpha": value}, (Value(x.type, "y"),))
    function = Function("f", (Param(x, Role.BATCH, "x"),), (op,), ())
    again = parse(print_function(function)).ops[0]
    assert repr(again.operands[1]) == repr(value) and repr(again.attrs["alpha"]) == repr(value)


def test_what_has_no_text() -> None:
    with pytest.raises(IRError, match="SS2004.*an attribute must be a number, text or list"):
        print_attr(object())


COMPLAINTS = [
    ("func @step", "func step", "'@' is required here", 1),
    ("parameter", "weight", "one of batch, buffer, constant, .* is required here", 2),
    ('f32[8,4] "l', 'g32[8,4] "l', "a type such as f32.* is required here", 2),
    ('"linear.weight" ->', "linear ->", "quoted text is required here", 2),
    (
        "mm.default(%x",
        "mm.default(%z",
        "a value that is defined above .%z is not. is required here",
        5,
    ),
    ("(%y)", "(%y", "'\\)' is required here", 7),
    ("%s: f32[] =", "%y: f32[] =", "a name other than %y, which is taken, is required here", 6),
    ("0.5)", "half)", "a number, text, list, element type, .* is required here", 7),
    ("return loss=%s", "return loss %s", "'=' is required here", 8),
    ("}\n", "}\nfunc", "the end of the text is required here", 10),
]


@pytest.mark.parametrize(("old", "new", "wanted", "line"), COMPLAINTS)
def test_complaints_name_the_line(old: str, new: str, wanted: str, line: int) -> None:
    with pytest.raises(IRError) as caught:
        parse(STEP.replace(old, new, 1))
    assert caught.value.code == "SS2005"
    assert re.fullmatch(wanted, caught.value.what), caught.value.what
    assert caught.value.where.startswith(f"line {line}: "), caught.value.where


def test_unknown_next_value_and_unknown_op() -> None:
    with pytest.raises(IRError, match="SS2005.*a definition of %other, the next value"):
        parse(STEP.replace("-> %w.new", "-> %other"))
    with pytest.raises(IRError, match="SS2003.*a known operation is required, found 'aten.mmm"):
        parse(STEP.replace("aten.mm.", "aten.mmm."))
