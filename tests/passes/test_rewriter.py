"""The pattern engine: captures, guards, names, sums of sets, bounds."""

import pytest

from shoestring.ir import Function, parse, verify
from shoestring.ir.errors import PassError
from shoestring.passes.rewriter import Rule, RuleSet, number, op, rewrite, rules, value

x, y, n = value("x"), value("y"), number("n")
TANH, EXP, NEG = "aten.tanh.default", "aten.exp.default", "aten.neg.default"


def program(*lines: str) -> Function:
    ops = "\n".join(f"%v{i}: f32[4] = {line}" for i, line in enumerate(lines))
    return parse(f'func @f {{\n batch %x: f32[4] "x"\n {ops}\n return y=%v{len(lines) - 1}\n}}')


def names(f: Function) -> list[str]:
    verify(f)
    return [o.name for o in f.ops]


def test_nested_replacement_gets_fresh_names() -> None:
    f = program(f"{TANH}(%x)", f"{TANH}(%v0)")
    g, report = rewrite(f, rules((op(TANH, x), op(NEG, op(EXP, x)))))
    assert names(g) == [EXP, NEG, EXP, NEG] and report.changed == 2
    assert g.outputs[0].value is f.outputs[0].value


def test_sets_add_in_order() -> None:
    a, b = rules((op(TANH, x), op(EXP, x))), rules((op(TANH, x), op(NEG, x)))
    f = program(f"{TANH}(%x)")
    assert names(rewrite(f, a + b)[0]) == [EXP] and names(rewrite(f, b + a)[0]) == [NEG]
    assert len(a + b) == 2


def test_one_variable_twice_means_equal() -> None:
    same = rules((op("aten.mul.Tensor", x, x), x))
    assert names(rewrite(program("aten.mul.Tensor(%x, %x)"), same)[0]) == []
    assert len(rewrite(program(f"{EXP}(%x)", "aten.mul.Tensor(%x, %v0)"), same)[0].ops) == 2


@pytest.mark.parametrize(
    ("found", "matches"), [("0.0", True), ("-0.0", False), ("0", False), ("false", False)]
)
def test_number_literals_match_type_and_sign(found: str, matches: bool) -> None:
    f = program(f"aten.sub.Tensor(%x, {found})")
    assert (rewrite(f, rules((op("aten.sub.Tensor", x, 0.0), x)))[0] is not f) is matches


def test_attributes_are_captured_and_compared() -> None:
    f = program("aten.add.Tensor(%x, 2) {alpha=3}")
    assert rewrite(f, rules((op("aten.add.Tensor", x, n, alpha=1), x)))[0] is f
    to = op("aten.sub.Tensor", x, n, alpha=number("a"))
    g, _ = rewrite(f, rules((op("aten.add.Tensor", x, n, alpha=number("a")), to)))
    assert g.ops[0].attr("alpha") == 3


def test_types_are_kept() -> None:
    f = parse(
        'func @f {\n batch %x: i64[4] "x"\n %y: f32[4] = aten.div.Tensor(%x, 1)\n return y=%y\n}'
    )
    g, report = rewrite(f, rules((op("aten.div.Tensor", x, 1), x)))
    assert g is f and "would change" in str(report)


def test_cycles_are_an_error() -> None:
    cycle = rules((op(TANH, x), op(EXP, x)), (op(EXP, x), op(TANH, x)))
    with pytest.raises(PassError) as error:
        rewrite(program(f"{TANH}(%x)"), cycle)
    assert error.value.code == "SS3005" and "do not come to an end" in str(error.value)


def test_unbound_variable_is_an_error() -> None:
    with pytest.raises(PassError) as error:
        Rule(op(TANH, x), op(EXP, y))
    assert error.value.code == "SS3006" and "found y" in str(error.value)


def test_empty_set() -> None:
    f = program(f"{TANH}(%x)")
    assert rewrite(f, RuleSet())[0] is f
