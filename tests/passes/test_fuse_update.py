"""Which updates move up to their gradients."""

from shoestring.ir import Function, Phase, parse
from shoestring.passes.fuse_update import FuseUpdate

U = 'loc("m.py":3 "" update)'
B = 'loc("m.py":1 "layer" backward)'


def step(update: str) -> Function:
    return parse(f"""
func @f {{
  parameter %a: f32[4] "a" -> %a.new
  parameter %b: f32[4] "b" -> %b.new
  hyper %lr: f32[] "group0.lr"
  batch %x: f32[4] "x"
  %ga: f32[4] = aten.exp.default(%x) {B}
  %gb: f32[4] = aten.neg.default(%x) {B}
{update}
  return
}}
""")


def test_plain_updates_move() -> None:
    f = step(f"""
  %d: f32[4] = aten.mul.Tensor(%ga, %lr) {U}
  %a.new: f32[4] = aten.sub.Tensor(%a, %d) {U}
  %e: f32[4] = aten.mul.Tensor(%gb, %lr) {U}
  %b.new: f32[4] = aten.sub.Tensor(%b, %e) {U}""")
    g, report = FuseUpdate().run(f)
    assert [op.results[0].name for op in g.ops] == ["ga", "d", "a.new", "gb", "e", "b.new"]
    assert "2 of 2 gradients are consumed at once (32 of 32 B)" in report.notes


def test_ops_without_gradient_wait_for_their_reader() -> None:
    """Weight decay reads no gradient: at the top of the step it would only take memory."""
    f = step(f"""
  %decayed: f32[4] = aten.mul.Tensor(%b, 0.9) {U}
  %a.new: f32[4] = aten.sub.Tensor(%a, %ga) {U}
  %b.new: f32[4] = aten.sub.Tensor(%decayed, %gb) {U}""")
    g, _ = FuseUpdate().run(f)
    assert [op.results[0].name for op in g.ops] == ["ga", "a.new", "gb", "decayed", "b.new"]


def test_global_norm_holds_every_gradient() -> None:
    f = step(f"""
  %sa: f32[] = aten.sum.default(%ga) {U}
  %sb: f32[] = aten.sum.default(%gb) {U}
  %s: f32[] = aten.add.Tensor(%sa, %sb) {U}
  %ca: f32[4] = aten.mul.Tensor(%ga, %s) {U}
  %cb: f32[4] = aten.mul.Tensor(%gb, %s) {U}
  %a.new: f32[4] = aten.sub.Tensor(%a, %ca) {U}
  %b.new: f32[4] = aten.sub.Tensor(%b, %cb) {U}""")
    _, report = FuseUpdate().run(f)
    assert "clipping by the global norm" in str(report) and "m.py:1 (layer)" in str(report)


def test_forward_functions_have_no_gradients() -> None:
    f = parse(
        'func @f {\n batch %x: f32[4] "x"\n %y: f32[4] = aten.exp.default(%x)\n return y=%y\n}'
    )
    g, report = FuseUpdate().run(f)
    assert g is f and "matched nothing" in str(report)
    assert all(op.loc.phase is Phase.FORWARD for op in g.ops)
