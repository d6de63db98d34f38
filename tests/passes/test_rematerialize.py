"""Which forward values are computed again."""

from shoestring.ir import Function, Phase, parse, print_function
from shoestring.passes.common_subexpressions import CommonSubexpressions
from shoestring.passes.liveness import measure
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
    assert again(f) == ["aten.exp.default"]
    assert report.changed == 1 and "others are computed again from it" in str(report)
    merged, _ = CommonSubexpressions().run(g)
    assert len(merged.ops) == len(g.ops)


def test_a_sum_is_kept_instead_of_its_summands() -> None:
    f = program(
        "%i: f32[8,8] = aten.mm.default(%h, %x)\n%b: f32[8,8] = aten.add.Tensor(%h, %i)\n"
        "%e: f32[8,8] = aten.exp.default(%b)\n%a: f32[8,8] = aten.tanh.default(%e)",
        f"%c: f32[8,8] = aten.mul.Tensor(%p, %b) {B}\n%d: f32[8,8] = aten.mul.Tensor(%c, %e) {B}\n"
        f"%g: f32[8,8] = aten.mul.Tensor(%d, %a) {B}",
    )
    g, _ = Rematerialize().run(f)
    assert again(f) == ["aten.exp.default", "aten.tanh.default"]
    assert measure(g).peak < measure(f).peak


def test_random_draws_are_repeated_with_their_key() -> None:
    f = program(
        "%u: f32[8,8] = rng.uniform.default(%k) {site=0, shape=[8, 8], dtype=f32}\n"
        "%a: f32[8,8] = aten.mul.Tensor(%h, %u)",
        f"%c: f32[8,8] = aten.mul.Tensor(%p, %u) {B}\n%d: f32[8,8] = aten.mul.Tensor(%c, %h) {B}\n"
        f"%g: f32[8,8] = aten.mul.Tensor(%d, %a) {B}",
    )
    g, _ = Rematerialize().run(f)
    draws = [op for op in g.ops if op.name == "rng.uniform.default"]
    assert [op.loc.phase for op in draws] == [Phase.FORWARD, Phase.RECOMPUTE]
    assert draws[0].operands == draws[1].operands and draws[0].attrs == draws[1].attrs
    assert measure(g).peak < measure(f).peak


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


def again(f: Function) -> list[str]:
    g, _ = Rematerialize().run(f)
    return [op.name for op in g.ops if op.loc.phase is Phase.RECOMPUTE]


def test_views_of_what_is_kept_do_not_keep_more() -> None:
    """The view of a product is no saved value of its own: an activation of it is computed again."""
    f = program(
        "%v: f32[64] = aten.view.default(%h) {size=[64]}\n"
        "%s: f32[64] = aten.silu.default(%v)\n"
        "%a: f32[8,8] = aten.view.default(%s) {size=[8, 8]}",
        f"%c: f32[64] = aten.sigmoid.default(%v) {B}\n"
        f"%d: f32[64] = aten.mul.Tensor(%c, %s) {B}\n"
        f"%e: f32[8,8] = aten.view.default(%d) {{size=[8, 8]}} {B}\n"
        f"%g: f32[8,8] = aten.mul.Tensor(%p, %e) {B}",
    )
    assert again(f) == ["aten.silu.default"]


def test_layer_norms_keep_their_statistics() -> None:
    backward = (
        f"%c: f32[8,8] = aten.mul.Tensor(%p, %a) {B}\n%d: f32[8,8] = aten.mul.Tensor(%c, %h) {B}\n"
        f"%e: f32[8,8] = aten.mul.Tensor(%d, %r) {B}\n%g: f32[8,8] = aten.sub.Tensor(%e, %u) {B}"
    )
    f = program(
        "%a: f32[8,8], %u: f32[8,1], %r: f32[8,1] = aten.native_layer_norm.default(%h, _, _)"
        " {normalized_shape=[8], eps=1e-5}",
        backward,
    )
    g, report = Rematerialize().run(f)
    (copy,) = [op for op in g.ops if op.loc.phase is Phase.RECOMPUTE]
    assert copy.name == "aten.native_layer_norm.default" and report.changed == 1
    read = {v.name for op in g.ops if op.loc.phase is Phase.BACKWARD for v in op.inputs}
    assert {"u", "r", copy.results[0].name} <= read and "a" not in read


def test_group_norms_are_computed_again() -> None:
    f = program(
        "%a: f32[8,8], %u: f32[8,2], %r: f32[8,2] = aten.native_group_norm.default(%h, _, _)"
        " {N=8, C=8, HxW=1, group=2, eps=1e-5}",
        f"%c: f32[8,8] = aten.mul.Tensor(%p, %a) {B}\n%g: f32[8,8] = aten.mul.Tensor(%c, %h) {B}",
    )
    assert again(f) == ["aten.native_group_norm.default"]


def test_gathered_rows_are_gathered_again() -> None:
    f = program(
        "%i: i64[8] = aten.arange.default() {end=8, dtype=i64}\n"
        "%a: f32[8,8] = aten.index.Tensor(%h, [%i])",
        f"%c: f32[8,8] = aten.mul.Tensor(%p, %a) {B}\n%g: f32[8,8] = aten.mul.Tensor(%c, %h) {B}",
    )
    assert again(f)[-1] == "aten.index.Tensor"


def test_what_was_too_far_is_nearer_to_what_is_kept_meanwhile() -> None:
    """A residual stream: `%b` can only be kept; then `%a` is one op away from it."""
    chain = "\n".join(
        f"%v{i}: f32[8,8] = aten.exp.default(%{'h' if i == 0 else f'v{i - 1}'})" for i in range(6)
    )
    f = program(
        f"{chain}\n%q: f32[8,8] = aten.mm.default(%v5, %x)\n"
        "%b: f32[8,8] = aten.add.Tensor(%v5, %q)\n%a: f32[8,8] = aten.tanh.default(%b)",
        f"%c: f32[8,8] = aten.mul.Tensor(%p, %a) {B}\n%d: f32[8,8] = aten.mul.Tensor(%c, %b) {B}\n"
        f"%g: f32[8,8] = aten.mul.Tensor(%d, %v0) {B}",
    )
    g, report = Rematerialize(max_chain=3).run(f)
    names = [op.name for op in g.ops if op.loc.phase is Phase.RECOMPUTE]
    assert "aten.tanh.default" in names, str(report)


def rounded(between: int, then: str = "", last: str = "g") -> Function:
    """A weight in bf16, read once in each direction, with so many products between; then more."""
    chain = "\n".join(
        f"  %c{i + 1}: bf16[256,256] = aten.mm.default(%c{i}, %xb)" for i in range(between)
    )
    return parse(f"""
func @f {{
  parameter %w: f32[256,256] "w"
  batch %x: f32[256,256] "x"
  %xb: bf16[256,256] = aten._to_copy.default(%x) {{dtype=bf16}}
  %b: bf16[256,256] = aten._to_copy.default(%w) {{dtype=bf16}}
  %c0: bf16[256,256] = aten.mm.default(%xb, %b)
{chain}
  %g: bf16[256,256] = aten.mm.default(%c{between}, %b) {B}
{then}
  return {last}=%{last}
}}
""")


def test_weights_are_rounded_again() -> None:
    """Where the backward pass is far away; the first copy lives no longer than its readers."""
    f = rounded(between=70)
    assert again(f) == ["aten._to_copy.default"]
    g, _ = Rematerialize().run(f)
    assert measure(g).peak < measure(f).peak


def test_weights_that_are_read_again_soon_are_rounded_once() -> None:
    assert again(rounded(between=3)) == []


def test_weights_that_the_forward_pass_reads_again_are_rounded_once() -> None:
    """As in a loss in chunks: forward, backward, then forward again."""
    then = f"""\
  %d: bf16[256,256] = aten.mm.default(%xb, %b)
  %h: bf16[256,256] = aten.mm.default(%d, %g) {B}"""
    assert again(rounded(between=70, then=then, last="h")) == []


def test_a_weight_of_a_recurrence_is_rounded_again_once() -> None:
    """Each step of the backward pass reads it soon after the one before."""
    reads = "\n".join(
        f"  %g{i + 1}: bf16[256,256] = aten.mm.default(%g{i}, %b) {B}\n"
        f"  %n{i + 1}: bf16[256,256] = aten.neg.default(%g{i + 1}) {B}"
        for i in range(200)
    )
    first = f"  %g0: bf16[256,256] = aten.neg.default(%g) {B}\n"
    assert again(rounded(70, first + reads, "n200")) == ["aten._to_copy.default"]


def layers(count: int) -> Function:
    """x -> (product with 64 columns, exp, product back) `count` times, and back through them."""
    forward, backward = list[str](), list[str]()
    for i in range(count):
        forward += [
            f"  %h{i}: f32[256,64] = aten.mm.default(%x{i}, %w)",
            f"  %e{i}: f32[256,64] = aten.exp.default(%h{i})",
            f"  %x{i + 1}: f32[256,8] = aten.mm.default(%e{i}, %v)",
        ]
    for i in reversed(range(count)):
        backward += [
            f"  %a{i}: f32[256,64] = aten.mm.default(%g{i + 1}, %w) {B}",
            f"  %b{i}: f32[256,64] = aten.mul.Tensor(%a{i}, %h{i}) {B}",
            f"  %d{i}: f32[256,8] = aten.mm.default(%b{i}, %v) {B}",
            f"  %g{i}: f32[256,8] = aten.add.Tensor(%d{i}, %x{i}) {B}",
        ]
    first = f"  %g{count}: f32[256,8] = aten.neg.default(%x{count}) {B}"
    return parse("\n".join([
        "func @f {", '  parameter %w: f32[8,64] "w"', '  parameter %v: f32[64,8] "v"',
        '  batch %x0: f32[256,8] "x"', *forward, first, *backward, "  return g=%g0", "}",
    ]))  # fmt: skip


def products_again(f: Function, rematerialize: Rematerialize) -> list[str]:
    """The products that are computed again, by what they read."""
    g, _ = rematerialize.run(f)
    return [
        str(op.inputs[0].name)
        for op in g.ops
        if op.loc.phase is Phase.RECOMPUTE and op.name == "aten.mm.default"
    ]


def test_a_few_products_are_computed_again() -> None:
    """The first ones, which would be kept for longest, as many as the limit allows."""
    f = layers(20)
    g, report = Rematerialize().run(f)
    assert products_again(f, Rematerialize()) == ["x3", "x2", "x1", "x0"], "4 of 80 products"
    assert products_again(f, Rematerialize(products=0.03)) == ["x1", "x0"]
    saved = 256 * 64 * 4
    assert measure(f).peak - measure(g).peak == 4 * saved
    assert report.changed == 4 and "also aten.mm.default" in str(report)


def test_products_that_are_not_worth_their_work() -> None:
    f = layers(20)
    assert products_again(f, Rematerialize(products=0)) == []
    assert products_again(f, Rematerialize(worth=20)) == []


def test_products_of_unknown_size_are_not_computed_again() -> None:
    text = print_function(layers(20)).replace("256", "n")
    g, _ = Rematerialize().run(parse(text))
    assert all(op.loc.phase is not Phase.RECOMPUTE for op in g.ops)
