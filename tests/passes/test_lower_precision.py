"""Products in bf16: what is rounded, what stays, and what it does to training."""

from __future__ import annotations

import pytest
import torch

import shoestring
from shoestring.ir import Function, Op, parse, print_function, same_structure, verify
from shoestring.ir.errors import PassError, UsageError
from shoestring.passes import Numerics, default_pipeline, make_pass
from shoestring.passes.lower_precision import CONVERT, LowerPrecision

BF16, F32 = torch.bfloat16, torch.float32


def lowered(text: str) -> Function:
    """The function after the pass, checked by the verifier and by a round trip through text."""
    function, _ = LowerPrecision().run(parse(text))
    verify(function)
    assert same_structure(parse(print_function(function)), function)
    return function


def ops_of(function: Function, name: str) -> list[Op]:
    return [op for op in function.ops if op.name == f"aten.{name}"]


def conversions(function: Function, dtype: torch.dtype) -> list[str]:
    """The names of what is converted to a type, in order."""
    found = [op for op in function.ops if op.name == CONVERT and op.result.type.dtype is dtype]
    return [op.inputs[0].name for op in found]


# --- the rewrite --------------------------------------------------------------------------------


def test_weights_are_rounded_once_for_forward_and_backward() -> None:
    f = lowered("""
func @f {
  parameter %w: f32[4,4] "w"
  batch %x: f32[2,4] "x"
  %t: f32[4,4] = aten.permute.default(%w) {dims=[1, 0]}
  %y: f32[2,4] = aten.mm.default(%x, %t)
  %g: f32[2,4] = aten.exp.default(%y)
  %dx: f32[2,4] = aten.mm.default(%g, %w) loc("m.py":1 "" backward)
  return dx=%dx
}
""")
    assert conversions(f, BF16) == ["x", "w", "g"]
    assert conversions(f, F32) == ["y.1", "dx.1"]


def test_round_trips_vanish() -> None:
    f = lowered("""
func @f {
  batch %x: f32[4,4] "x"
  %y: f32[4,4] = aten.mm.default(%x, %x)
  %h: bf16[4,4] = aten._to_copy.default(%y) {dtype=bf16}
  %u: f32[4,4] = aten._to_copy.default(%h) {dtype=f32}
  %z: f32[4,4] = aten.mm.default(%u, %y)
  return z=%z
}
""")
    assert conversions(f, BF16) == ["x"] and conversions(f, F32) == ["z.1"]


def test_values_move_in_bf16() -> None:
    """Slices of a product, their concatenation and zeros around it: nothing is widened."""
    f = lowered("""
func @f {
  batch %x: f32[4,4] "x"
  %y: f32[4,4] = aten.mm.default(%x, %x)
  %a: f32[4,2] = aten.slice.Tensor(%y) {dim=1, start=0, end=2}
  %b: f32[4,2] = aten.slice.Tensor(%y) {dim=1, start=2, end=4}
  %c: f32[4,4] = aten.cat.default([%b, %a]) {dim=1}
  %p: f32[4,6] = aten.constant_pad_nd.default(%c) {pad=[1, 1], value=0.0}
  %z: f32[4,6] = aten.mm.default(%c, %p)
  return z=%z
}
""")
    assert conversions(f, F32) == ["z.1"]
    assert all(r.type.dtype is BF16 for op in f.ops[:-1] for r in op.results)


def test_a_move_with_an_f32_operand_stays_in_f32() -> None:
    f = lowered("""
func @f {
  batch %x: f32[4,4] "x"
  %y: f32[4,4] = aten.mm.default(%x, %x)
  %c: f32[4,8] = aten.cat.default([%y, %x]) {dim=1}
  %p: f32[4,6] = aten.constant_pad_nd.default(%y) {pad=[1, 1], value=0.1}
  return c=%c, p=%p
}
""")
    assert conversions(f, F32) == ["y.1"]
    assert f.outputs[0].value.type.dtype is F32


def test_a_part_is_rounded_rather_than_the_whole() -> None:
    f = lowered("""
func @f {
  batch %x: f32[64,4] "x"
  %last: f32[4,4] = aten.slice.Tensor(%x) {dim=0, start=60, end=64}
  %y: f32[4,4] = aten.mm.default(%last, %last)
  return y=%y
}
""")
    assert conversions(f, BF16) == ["last"]


def test_expanded_heads_are_rounded_before_they_are_repeated() -> None:
    f = lowered("""
func @f {
  batch %x: f32[1,4,4] "x"
  %e: f32[3,4,4] = aten.expand.default(%x) {size=[3, 4, 4]}
  %y: f32[3,4,4] = aten.bmm.default(%e, %e)
  return y=%y
}
""")
    assert conversions(f, BF16) == ["x"]


ATTENTION = """
func @f {
  batch %q: f32[2,2,8,4] "q"
  batch %m: f32[8,8] "m"
  batch %g: f32[2,2,8,4] "g"
  %o: f32[2,2,8,4], %l: f32[2,2,8] = aten._scaled_dot_product_flash_attention_for_cpu.default(%q, %q, %q, %m)
  %a: f32[2,2,8,4], %b: f32[2,2,8,4], %c: f32[2,2,8,4] = aten._scaled_dot_product_flash_attention_for_cpu_backward.default(%g, %q, %q, %q, %o, %l, %m) {dropout_p=0.0, is_causal=false}
  %s: f32[2,2,8] = aten.exp.default(%l)
  return a=%a, s=%s
}
"""  # noqa: E501


def test_attention_keeps_its_statistics_and_its_mask() -> None:
    f = lowered(ATTENTION)
    (forward,) = ops_of(f, "_scaled_dot_product_flash_attention_for_cpu.default")
    (backward,) = ops_of(f, "_scaled_dot_product_flash_attention_for_cpu_backward.default")
    assert [r.type.dtype for r in forward.results] == [BF16, F32]
    assert [v.type.dtype for v in backward.inputs] == [BF16] * 5 + [F32] * 2
    assert all(r.type.dtype is BF16 for r in backward.results)
    assert conversions(f, BF16) == ["q", "g"] and conversions(f, F32) == ["a.1"]


def test_what_stays_and_why() -> None:
    f = parse("""
func @f {
  batch %x: f32[4,4] "x"
  batch %v: f32[4] "v"
  batch %d: f64[4,4] "d"
  %a: f32[4] = aten.mv.default(%x, %v)
  %b: f64[4,4] = aten.mm.default(%d, %d)
  %c: f32[4,4] = aten.mm.default(%x, %x) loc("m.py":3 "" update)
  return a=%a, b=%b, c=%c
}
""")
    g, report = LowerPrecision().run(f)
    assert g is f and (report.matched, report.changed) == (2, 0)
    assert "aten.mv.default is no product of matrices" in str(report)
    assert "aten.mm.default belongs to the optimizer, which stays in f32 (first at m.py:3)" in str(
        report
    )


def test_no_product_matches_nothing() -> None:
    f = parse(
        'func @f {\n batch %x: f32[4] "x"\n %y: f32[4] = aten.exp.default(%x)\n return y=%y\n}'
    )
    g, report = LowerPrecision().run(f)
    assert g is f and "matched nothing" in str(report)


def test_recomputed_values_are_rounded_again() -> None:
    f = lowered("""
func @f {
  parameter %w: f32[4,4] "w"
  batch %x: f32[4,4] "x"
  %h: f32[4,4] = aten.exp.default(%x)
  %y: f32[4,4] = aten.mm.default(%h, %w)
  %z: f32[4,4] = aten.mm.default(%h, %w) loc("m.py":1 "block" recompute)
  return y=%y, z=%z, h=%h
}
""")
    assert conversions(f, BF16) == ["h", "w", "h"]


def test_what_nobody_reads_in_f32_is_rounded_where_it_is_made() -> None:
    f = lowered("""
func @f {
  batch %x: f32[4,4] "x"
  %h: f32[4,4] = aten.exp.default(%x)
  %g: f32[4,4] = aten.neg.default(%x)
  %a: f32[2,4], %b: f32[2,4] = aten.split.Tensor(%h) {split_size=2, dim=0}
  %y: f32[2,4] = aten.mm.default(%a, %h)
  %z: f32[2,4] = aten.mm.default(%b, %h) loc("m.py":1 "block" recompute)
  return y=%y, z=%z, g=%g
}
""")
    assert [op.results[0].name for op in f.ops[:2]] == ["h", "h.1"]
    assert conversions(f, BF16) == ["h"]


def test_zero_sizes() -> None:
    f = lowered("""
func @f {
  batch %x: f32[0,4] "x"
  batch %w: f32[4,3] "w"
  %y: f32[0,3] = aten.mm.default(%x, %w)
  return y=%y
}
""")
    assert ops_of(f, "mm.default")[0].result.type.dtype is BF16


# --- options ------------------------------------------------------------------------------------


def test_unknown_dtype() -> None:
    with pytest.raises(PassError) as error:
        make_pass("lower_precision", dtype="f8")
    assert error.value.code == "SS3011" and "bf16, found 'f8'" in str(error.value)


def test_only_when_asked_for() -> None:
    assert "lower_precision" not in [p.name for p in default_pipeline()]
    passes = default_pipeline(precision="bf16")
    names = [p.name for p in passes]
    assert names.index("dead_code") < names.index("lower_precision") < names.index("rematerialize")
    lossy = [p.name for p in passes if p.numerics is Numerics.LOSSY]
    assert lossy == ["lower_precision"]


def test_unknown_precision() -> None:
    with pytest.raises(UsageError) as error:
        shoestring.compile(
            torch.nn.Linear(2, 2), example_inputs=(torch.ones(1, 2),), precision="f16"
        )
    assert error.value.code == "SS7013" and "did you mean 'bf16'?" in str(error.value)


def test_precision_and_passes_do_not_go_together() -> None:
    with pytest.raises(UsageError) as error:
        shoestring.compile(
            torch.nn.Linear(2, 2), example_inputs=(torch.ones(1, 2),), precision="bf16", passes=[]
        )
    assert error.value.code == "SS7011"


# --- sums ---------------------------------------------------------------------------------------


def test_a_sum_of_products_stays_in_f32() -> None:
    f = lowered("""
func @f {
  batch %x: f32[4,4] "x"
  batch %b: f32[4] "b"
  %y: f32[4,4] = aten.addmm.default(%b, %x, %x)
  %z: f32[4,4] = aten.addmm.default(%y, %x, %x)
  return z=%z
}
""")
    (product,) = ops_of(f, "addmm.default")
    assert product.result.type.dtype is BF16 and product.inputs[0].type.dtype is BF16
    (total,) = ops_of(f, "add.Tensor")
    assert all(v.type.dtype is F32 for v in total.inputs)
    assert conversions(f, BF16) == ["b", "x"]
