"""Attention on heads of keys and values that a model repeats."""

import pytest
import torch

from shoestring.ir import Function, parse, verify
from shoestring.passes.base import PassReport
from shoestring.passes.dead_code import DeadCode
from shoestring.passes.group_heads import BACKWARD, FORWARD, GroupHeads

from ..backends.helpers import compare


def repeat(name: str, shape: str = "2,3,7,8") -> str:
    batch, heads, length, size = shape.split(",")
    flat = f"{batch},{int(heads) * 2},{length},{size}"
    return f"""
  %{name}.1: f32[{batch},{heads},1,{length},{size}] = aten.view.default(%{name}) {{size=[{batch}, {heads}, 1, {length}, {size}]}}
  %{name}.2: f32[{batch},{heads},2,{length},{size}] = aten.expand.default(%{name}.1) {{size=[{batch}, {heads}, 2, {length}, {size}]}}
  %{name}.3: f32[{flat}] = aten.view.default(%{name}.2) {{size=[{flat}]}}"""  # noqa: E501


def summed(name: str, keep: bool) -> str:
    shape = "2,3,1,7,8" if keep else "2,3,7,8"
    return f"""
  %{name}.1: f32[2,3,2,7,8] = aten.view.default(%{name}) {{size=[2, 3, 2, 7, 8]}}
  %{name}.2: f32[{shape}] = aten.sum.dim_IntList(%{name}.1) {{dim=[2], keepdim={str(keep).lower()}}}"""  # noqa: E501


def training(
    gradients: str, returned: str, mask: str = "_", values: str = "v.3", causal: str = "true"
) -> Function:
    flash = "aten._scaled_dot_product_flash_attention_for_cpu"
    return parse(f"""
func @f {{
  batch %q: f32[2,6,5,8] "q"
  batch %k: f32[2,3,7,8] "k"
  batch %v: f32[2,3,7,8] "v"
  batch %other: f32[2,6,7,8] "other"
  batch %mask: f32[2,6,5,7] "mask"
  batch %grad: f32[2,6,5,8] "grad"{repeat("k")}{repeat("v")}
  %out: f32[2,6,5,8], %lse: f32[2,6,5] = {flash}.default(%q, %k.3, %{values}, {mask}) {{is_causal={causal}}}
  %dq: f32[2,6,5,8], %dk: f32[2,6,7,8], %dv: f32[2,6,7,8] = {flash}_backward.default(%grad, %q, %k.3, %{values}, %out, %lse, {mask}) {{dropout_p=0.0, is_causal={causal}}}{gradients}
  return out=%out, lse=%lse, dq=%dq, {returned}
}}
""")  # noqa: E501


def grouped(f: Function) -> tuple[Function, PassReport]:
    verify(f)
    g, report = GroupHeads().run(f)
    verify(g)
    g, _ = DeadCode().run(g)
    verify(g)
    return g, report


def heads_read(g: Function, name: str) -> set[int]:
    at = 1 if name == FORWARD else 2
    (op,) = [op for op in g.ops if op.name == name]
    return {v.type.static_shape[1] for v in op.inputs[at : at + 2]}


def arguments(f: Function) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(p.value.type.static_shape) for p in f.params]


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("mask", ["_", "%mask"])
def test_both_directions(keep: bool, mask: str) -> None:
    causal = "true" if mask == "_" else "false"
    f = training(summed("dk", keep) + summed("dv", keep), "dk=%dk.2, dv=%dv.2", mask, causal=causal)
    g, report = grouped(f)
    assert report.matched == report.changed == 2
    assert heads_read(g, FORWARD) == heads_read(g, BACKWARD) == {3}
    assert not any("expand" in op.name for op in g.ops)
    for mine, other in zip(g.outputs, f.outputs, strict=True):
        assert mine.name == other.name and mine.value.type == other.value.type
    inputs = arguments(f)
    before = compare(f, inputs, rtol=1e-4, atol=1e-5).run(inputs)
    after = compare(g, inputs, rtol=1e-4, atol=1e-5).run(inputs)
    for x, y in zip(before, after, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_gradients_that_somebody_else_reads_stay() -> None:
    for gradients, returned in (
        (summed("dk", True) + summed("dv", True), "dk=%dk.2, dv=%dv.2, all=%dv"),
        (summed("dk", True), "dk=%dk.2, dv=%dv"),
        (summed("dk", True) + summed("dv", True), "dk=%dk.2, dv=%dv.2, all=%dk.1"),
    ):
        g, report = grouped(training(gradients, returned))
        assert report.changed == 1 and "only added up" in str(report)
        assert heads_read(g, FORWARD) == {3} and heads_read(g, BACKWARD) == {6}


def test_a_sum_over_another_dimension_is_another_gradient() -> None:
    other = """
  %dv.1: f32[2,3,2,7,8] = aten.view.default(%dv) {size=[2, 3, 2, 7, 8]}
  %dv.2: f32[2,3,2,8] = aten.sum.dim_IntList(%dv.1) {dim=[3]}"""
    g, _ = grouped(training(summed("dk", True) + other, "dk=%dk.2, dv=%dv.2"))
    assert heads_read(g, BACKWARD) == {6}


def test_keys_and_values_go_together() -> None:
    f = training(summed("dk", True), "dk=%dk.2, dv=%dv", values="other")
    g, report = GroupHeads().run(f)
    assert g is f and report.matched == 0


def test_other_repeats_are_left_alone() -> None:
    """All heads, then all of them again: query h reads head h modulo their number."""
    f = parse("""
func @f {
  batch %q: f32[2,4,5,8] "q"
  batch %k: f32[2,2,5,8] "k"
  %k.1: f32[2,1,2,5,8] = aten.view.default(%k) {size=[2, 1, 2, 5, 8]}
  %k.2: f32[2,2,2,5,8] = aten.expand.default(%k.1) {size=[2, 2, 2, 5, 8]}
  %k.3: f32[2,4,5,8] = aten.view.default(%k.2) {size=[2, 4, 5, 8]}
  %out: f32[2,4,5,8], %lse: f32[2,4,5] = aten._scaled_dot_product_flash_attention_for_cpu.default(%q, %k.3, %k.3, _)
  return out=%out
}
""")  # noqa: E501
    g, report = GroupHeads().run(f)
    assert g is f and report.matched == 0


def test_permuted_keys() -> None:
    """As models make them: [batch, length, heads, size] seen as [batch, heads, length, size]."""
    f = parse(f"""
func @f {{
  batch %q: f32[2,6,5,8] "q"
  batch %x: f32[2,7,3,8] "x"
  %k: f32[2,3,7,8] = aten.permute.default(%x) {{dims=[0, 2, 1, 3]}}{repeat("k")}
  %out: f32[2,6,5,8], %lse: f32[2,6,5] = aten._scaled_dot_product_flash_attention_for_cpu.default(%q, %k.3, %k.3, _)
  return out=%out
}}
""")  # noqa: E501
    g, _ = grouped(f)
    executable = compare(g, arguments(f), rtol=1e-4, atol=1e-5)
    assert len(executable.instructions) == 1
