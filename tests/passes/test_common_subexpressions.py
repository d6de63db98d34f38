"""What merges and what must not."""

import pytest

from shoestring.ir import parse
from shoestring.passes.common_subexpressions import CommonSubexpressions

KEY = 'rng %k: i64[2] "#rng"'
DRAW = "f32[4] = rng.uniform.default(%k) {{site={}, shape=[4], dtype=f32}}"
EXP = "f32[4] = aten.exp.default(%x)"
RECOMPUTED = 'loc("m.py":1 "{}" recompute)'


def left(*lines: str) -> int:
    """How many of these ops stay; each one's result is an output."""
    ops = "\n".join(f"%v{i}: {line}" for i, line in enumerate(lines))
    outputs = ", ".join(f"o{i}=%v{i}" for i in range(len(lines)))
    f = parse(f'func @f {{\n {KEY}\n batch %x: f32[4] "x"\n {ops}\n return {outputs}\n}}')
    g, report = CommonSubexpressions().run(f)
    assert report.changed == len(f.ops) - len(g.ops)
    return len(g.ops)


def test_equal_ops_merge() -> None:
    assert left(EXP, EXP, EXP) == 1


def test_numbers_are_compared_with_type_and_sign() -> None:
    variants = ("2", "2.0", "0.0", "-0.0", "true", "1")
    assert left(*(f"f32[4] = aten.mul.Tensor(%x, {n})" for n in variants)) == len(variants)


@pytest.mark.parametrize(("sites", "expected"), [((0, 0), 1), ((0, 1), 2)])
def test_draws_merge_by_site(sites: tuple[int, int], expected: int) -> None:
    assert left(*(DRAW.format(s) for s in sites)) == expected


def test_recomputation_is_kept() -> None:
    assert left(EXP, f"{EXP} {RECOMPUTED.format('a')}") == 2
    assert left(EXP, *(f"{EXP} {RECOMPUTED.format(m)}" for m in "aab")) == 3


def test_kept_recomputation_is_reported() -> None:
    again = f"%b: {EXP} {RECOMPUTED.format('a')}"
    f = parse(f'func @f {{\n batch %x: f32[4] "x"\n %a: {EXP}\n {again}\n return a=%a, b=%b\n}}')
    g, report = CommonSubexpressions().run(f)
    assert g is f and report.matched == 1
    assert "recomputed on purpose" in str(report) and "m.py:1 (a)" in str(report)


def test_list_operands_merge() -> None:
    assert left(*["f32[8] = aten.cat.default([%x, %x])"] * 2) == 1
