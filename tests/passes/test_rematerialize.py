"""Which forward values are computed again."""

from shoestring.ir import Function, Phase, parse
from shoestring.passes.common_subexpressions import CommonSubexpressions
from shoestring.passes.rematerialize import Rematerialize

B = 'loc("m.py":1 "" backward)'


def program(forward: str, backward: str, tail: str = "") -> Function:
    """x -> h (a product) -> `forward` -> m, then `backward` of m; all f32[8,8]."""
    return parse(f"""
func @f {{
  rng %k: i64[2] "#rng"
  batch %x: f32[8,8] "x"
  %h: f32[8,8] = aten.mm.default(%x, %x)
{forward}
  %m: f32[8,8] = aten.mm.default(%a, %x)
  %n: f32[8,8] = aten.mm.default(%m, %x)
  %p: f32[8,8] = aten.mm.default(%n, %m)
{backward}
{tail}
  return g=%g
}}
""")


def test_value_far_from_inputs_needs_one_kept() -> None:
    """One saved value of an input that nobody keeps: no gain."""
    f = program(
        "%a: f32[8,8] = aten.exp.default(%h)", f"%g: f32[8,8] = aten.mul.Tensor(%p, %a) {B}"
    )
    g, report = Rematerialize().run(f)
    assert g is f and "nobody else keeps them" in str(report)


def test_two_values_of_one_input() -> None:
    f = program(
        "%b: f32[8,8] = aten.tanh.default(%h)\n%a: f32[8,8] = aten.exp.default(%b)",
        f"%c: f32[8,8] = aten.mul.Tensor(%p, %b) {B}\n%g: f32[8,8] = aten.mul.Tensor(%c, %a) {B}",
    )
    g, report = Rematerialize().run(f)
    again = [op for op in g.ops if op.loc.phase is Phase.RECOMPUTE]
    assert [op.name for op in again] == ["aten.tanh.default", "aten.exp.default"]
    assert report.changed == 2
    merged, _ = CommonSubexpressions().run(g)
    assert len(merged.ops) == len(g.ops)


def test_random_draws_are_never_repeated() -> None:
    f = program(
        "%u: f32[8,8] = rng.uniform.default(%k) {site=0, shape=[8, 8], dtype=f32}\n"
        "%a: f32[8,8] = aten.mul.Tensor(%h, %u)",
        f"%c: f32[8,8] = aten.mul.Tensor(%p, %u) {B}\n%d: f32[8,8] = aten.mul.Tensor(%c, %h) {B}\n"
        f"%g: f32[8,8] = aten.mul.Tensor(%d, %a) {B}",
    )
    g, _ = Rematerialize().run(f)
    assert sum(op.name.startswith("rng") for op in g.ops) == 1


def test_chain_is_bounded() -> None:
    chain = "\n".join(
        f"%v{i}: f32[8,8] = aten.exp.default(%{'h' if i == 0 else f'v{i - 1}'})" for i in range(9)
    )
    f = program(
        f"{chain}\n%a: f32[8,8] = aten.neg.default(%v8)",
        f"%c: f32[8,8] = aten.mul.Tensor(%p, %a) {B}\n%g: f32[8,8] = aten.mul.Tensor(%c, %h) {B}",
    )
    assert Rematerialize(max_chain=9).run(f)[1].changed == 0
    assert Rematerialize(max_chain=10).run(f)[1].changed == 1


def test_nothing_to_do_without_backward() -> None:
    f = program("%a: f32[8,8] = aten.exp.default(%h)", "%g: f32[8,8] = aten.neg.default(%p)")
    g, report = Rematerialize().run(f)
    assert g is f and "matched nothing" in str(report)
