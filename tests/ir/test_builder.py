"""Building, running and rewiring functions by hand."""

from __future__ import annotations

import pytest
import torch

from shoestring.ir import (
    Builder,
    Function,
    Loc,
    Op,
    Role,
    Value,
    interpret,
    make_op,
    map_operand,
    operand_values,
    parse,
    parse_type,
    same_structure,
    verify,
)
from shoestring.ir.errors import IRError


def counter() -> Function:
    """state' = state + x; output the old state doubled."""
    b = Builder("counter")
    state = b.param(parse_type("f32[3]"), Role.BUFFER, "total")
    x = b.param(parse_type("f32[3]"), Role.BATCH, "#batch.0")
    new = b.emit("aten.add.Tensor", state, x)
    b.output("doubled", b.emit("aten.mul.Tensor", state, 2.0, loc=Loc("model.py", 3)))
    b.replace_state(state, new)
    return b.build()


def test_built_function() -> None:
    function = counter()
    verify(function)
    assert [v.name for v in function.values] == ["buffer.0", "batch.1", "0", "1"]
    assert function.ops[0].attr("alpha") == 1
    assert function.ops[1].loc == Loc("model.py", 3)
    assert function.results == (function.ops[1].result, function.ops[0].result)


def test_interpreted() -> None:
    state, x = torch.tensor([1.0, 2, 3]), torch.tensor([10.0, 20, 30])
    seen: list[str] = []
    outputs, nexts = interpret(counter(), [state, x], lambda op, _: seen.append(op.name))
    assert outputs[0].tolist() == [2, 4, 6]
    assert nexts["total"].tolist() == [11, 22, 33]
    assert state.tolist() == [1, 2, 3], "arguments are not written to"
    assert seen == ["aten.add.Tensor", "aten.mul.Tensor"]


def test_strided_arguments_are_their_elements() -> None:
    function = parse(
        'func @f {\n batch %x: f32[2,3] "x"\n %y: f32[6] = aten.view.default(%x) {size=[6]}\n'
        " %z: f32[3] = aten.as_strided.default(%x) {size=[3], stride=[2]}\n return y=%y, z=%z\n}"
    )
    x = torch.arange(6.0).reshape(3, 2).t()
    y, z = interpret(function, [x])[0]
    assert y.tolist() == [0, 2, 4, 1, 3, 5]
    assert z.tolist() == [0, 4, 3]


def test_list_operands_and_several_results() -> None:
    b = Builder("f")
    x = b.param(parse_type("f32[2,3]"), Role.BATCH, "x")
    both = b.emit("aten.cat.default", (x, x), dim=0)
    values, indices = b.emit_all("aten.sort.default", both, dim=0, descending=True)
    b.output("values", values)
    b.output("indices", indices)
    function = b.build()
    verify(function)
    assert (str(values.type), str(indices.type)) == ("f32[4,3]", "i64[4,3]")
    assert function.ops[0].inputs == (x, x)
    assert function.users()[x] == [function.ops[0]]
    assert function.producer(indices) is function.ops[1] and function.producer(x) is None


def test_an_unknown_op() -> None:
    with pytest.raises(IRError, match="SS2003.*found 'aten.nothing'"):
        make_op("aten.nothing", (), {})


def test_operands_are_mapped() -> None:
    a, b = (Value(parse_type("f32[]"), n) for n in "ab")
    assert map_operand((a, None, a), {a: b}.__getitem__) == (b, None, b)
    assert map_operand(1.5, {a: b}.__getitem__) == 1.5
    assert list(operand_values((a, None, 2, (b, None, a)))) == [a, b, a]
    op = Op(make_op("aten.add.Tensor", (), {}).opdef, (a, a), {}, (b,))
    assert op.map_operands({a: b}.__getitem__).inputs == (b, b)


def test_results_follow_substitutions() -> None:
    function = counter()
    add, double = function.ops
    again = function.with_ops([add], {double.result: add.result})
    assert again.outputs[0].value is add.result
    assert again.params[0].next is add.result


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("@counter", "@other"),
        ("%batch.1", "%x"),
        ("doubled", "twice"),
        ("2.0", "2"),
        ("aten.mul.Tensor", "aten.add.Tensor"),
        ("total", "sum"),
        ("buffer %", "moment %"),
        (" -> %0", ""),
        ("doubled=%1", "doubled=%0"),
        ('"model.py":3', '"model.py":4'),
    ],
)
def test_structure_tells_functions_apart(old: str, new: str) -> None:
    from shoestring.ir import print_function

    text = print_function(counter())
    assert old in text
    assert same_structure(parse(text), counter())
    assert not same_structure(parse(text.replace(old, new)), counter())
