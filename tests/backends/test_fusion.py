"""Kernels that cover many ops: reductions, stages, levels, state, random numbers."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from shoestring.backends.c import CBackend
from shoestring.ir import Builder, Role, TensorType, Value, parse, parse_type

from .helpers import compare, traced

aten = torch.ops.aten

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
REDUCTIONS: dict[str, dict[str, Any]] = {
    "aten.sum.dim_IntList": {"dtype": None}, "aten.mean.dim": {"dtype": None},
    "aten.amax.default": {}, "aten.amin.default": {},
}  # fmt: skip


def subsets(rank: int) -> list[tuple[int, ...]]:
    return [c for n in range(1, rank + 1) for c in itertools.combinations(range(rank), n)]


def batch(b: Builder, text: str, name: str = "x") -> Value:
    return b.param(parse_type(text), Role.BATCH, name)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_reductions_over_every_subset_of_dimensions(dtype: torch.dtype) -> None:
    b = Builder("reductions")
    shapes = [(5, 7, 3), (1, 130, 2)]
    for s in shapes:
        x = b.param(TensorType(dtype, s), Role.BATCH, f"x{s}")
        for dims, (name, attrs), keep in itertools.product(subsets(3), REDUCTIONS.items(), (0, 1)):
            y = b.emit(name, x, dim=dims, keepdim=bool(keep), **attrs)
            b.output(f"{name}.{s}.{dims}.{keep}", y)
    arguments = [torch.randn(s, dtype=torch.float64).to(dtype) for s in shapes]
    arguments[0][1, 2, 1] = torch.nan
    compare(b.build(), arguments)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool], ids=str)
def test_integer_reductions(dtype: torch.dtype) -> None:
    b = Builder("integers")
    x = b.param(TensorType(dtype, (6, 9)), Role.BATCH, "x")
    for dims in subsets(2):
        b.output(
            f"sum{dims}", b.emit("aten.sum.dim_IntList", x, dim=dims, keepdim=False, dtype=None)
        )
        b.output(f"max{dims}", b.emit("aten.amax.default", x, dim=dims, keepdim=True))
    for d in (0, 1):
        b.output(f"any{d}", b.emit("aten.any.dim", x, dim=d, keepdim=False))
        b.output(f"all{d}", b.emit("aten.all.dim", x, dim=d, keepdim=False))
        b.output(f"prod{d}", b.emit("aten.prod.dim_int", x, dim=d, keepdim=False, dtype=None))
    b.output("any", b.emit("aten.any.default", x))
    compare(b.build(), [torch.randint(0, 3, (6, 9)).to(dtype)])


def test_long_sums_are_accurate() -> None:
    b = Builder("long")
    x = batch(b, "f32[3,1000003]")
    b.output("rows", b.emit("aten.sum.dim_IntList", x, dim=(1,), keepdim=False, dtype=None))
    b.output("all", b.emit("aten.sum.default", x, dtype=None))
    b.output("columns", b.emit("aten.sum.dim_IntList", x, dim=(0,), keepdim=False, dtype=None))
    x0 = torch.rand(3, 1000003)
    exact = x0.double().sum()
    (_, total, _) = CBackend().compile(b.build()).run([x0])
    assert abs(total.double() - exact) / exact < 1e-6
    compare(b.build(), [x0], rtol=2e-6)


def layer_norm(b: Builder, x: Value, width: int) -> Value:
    mean = b.emit("aten.mean.dim", x, dim=(-1,), keepdim=True, dtype=None)
    centered = b.emit("aten.sub.Tensor", x, mean)
    square = b.emit("aten.mul.Tensor", centered, centered)
    var = b.emit("aten.mean.dim", square, dim=(-1,), keepdim=True, dtype=None)
    return b.emit(
        "aten.mul.Tensor",
        centered,
        b.emit("aten.rsqrt.default", b.emit("aten.add.Tensor", var, 1e-5)),
    )


def softmax(b: Builder, x: Value) -> Value:
    top = b.emit("aten.amax.default", x, dim=(-1,), keepdim=True)
    e = b.emit("aten.exp.default", b.emit("aten.sub.Tensor", x, top))
    return b.emit(
        "aten.div.Tensor", e, b.emit("aten.sum.dim_IntList", e, dim=(-1,), keepdim=True, dtype=None)
    )


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
def test_norm_and_softmax_are_one_kernel_each(dtype: str) -> None:
    for name, make in (("norm", lambda b, x: layer_norm(b, x, 65)), ("softmax", softmax)):
        b = Builder(name)
        x = batch(b, f"{dtype}[4,33,65]")
        b.output("y", make(b, x))
        executable = compare(
            b.build(),
            [torch.randn(4, 33, 65).to(x.type.dtype)],
            rtol=2e-2 if dtype == "bf16" else 1e-5,
        )
        assert len(executable.instructions) == 1, str(executable.program)


def test_permutations_inside_a_kernel() -> None:
    b = Builder("permuted")
    x, y = batch(b, "f32[6,4,10]"), batch(b, "f32[4,60]", "y")
    e = b.emit("aten.exp.default", x)
    p = b.emit("aten.permute.default", e, dims=(1, 0, 2))
    flat = b.emit("aten.view.default", p, size=(4, 60))
    s = b.emit("aten.add.Tensor", flat, y)
    b.output("s", s)
    b.output("e", e)
    b.output("t", b.emit("aten.t.default", b.emit("aten.mul.Tensor", s, s)))
    square = b.emit("aten.view.default", s, size=(15, 16))
    b.output("r", b.emit("aten.sum.dim_IntList", square, dim=(1,), keepdim=False, dtype=None))
    compare(b.build(), [torch.randn(6, 4, 10), torch.randn(4, 60)])


def test_a_value_and_its_transpose_do_not_share_loops() -> None:
    b = Builder("transpose")
    x = batch(b, "f32[9,9]")
    e = b.emit("aten.exp.default", x)
    b.output("y", b.emit("aten.add.Tensor", e, b.emit("aten.t.default", e)))
    d = b.emit("aten.diagonal.default", b.emit("aten.sin.default", x))
    b.output("d", b.emit("aten.mul.Tensor", d, d))
    compare(b.build(), [torch.randn(9, 9)])


def test_slices_of_a_value_of_the_same_kernel() -> None:
    b = Builder("halves")
    x = batch(b, "f32[5,8]")
    e = b.emit("aten.sin.default", x)
    low = b.emit("aten.slice.Tensor", e, dim=1, start=0, end=4)
    high = b.emit("aten.slice.Tensor", e, dim=1, start=4, end=8)
    b.output("y", b.emit("aten.mul.Tensor", low, high))
    compare(b.build(), [torch.randn(5, 8)])


def test_every_view() -> None:
    b = Builder("views")
    x = batch(b, "f32[2,6,4]")
    views: list[tuple[str, dict[str, Any]]] = [
        ("aten.view.default", {"size": (12, 4)}), ("aten.permute.default", {"dims": (2, 0, 1)}),
        ("aten.transpose.int", {"dim0": 0, "dim1": -1}), ("aten.unsqueeze.default", {"dim": -1}),
        ("aten.slice.Tensor", {"dim": 1, "start": 1, "end": 5, "step": 2}),
        ("aten.slice.Tensor", {"dim": -1, "start": -3, "end": None}),
        ("aten.select.int", {"dim": 1, "index": -2}), ("aten.diagonal.default", {"offset": 1}),
        ("aten.diagonal.default", {"offset": -1, "dim1": 1, "dim2": 2}),
        ("aten.expand.default", {"size": (3, 2, -1, 4)}), ("aten.squeeze.default", {}),
        ("aten.unfold.default", {"dimension": 1, "size": 3, "step": 2}),
        ("aten.as_strided.default", {"size": (3, 4), "stride": (5, 1), "storage_offset": 2}),
        ("aten.view.dtype", {"dtype": torch.int32}), ("aten.alias.default", {}),
        ("aten.flip.default", {"dims": (1,)}),
    ]  # fmt: skip
    for i, (name, attrs) in enumerate(views):
        y = b.emit(name, x, **attrs)
        b.output(f"{i}", y)
        b.output(f"{i}.twice", b.emit("aten.add.Tensor", y, y))
        t = b.emit("aten.transpose.int", y, dim0=0, dim1=-1)
        again = b.emit("aten.view.default", t, size=(-1,))
        b.output(f"{i}.flat", again)
    for i, part in enumerate(b.emit_all("aten.split.Tensor", x, split_size=4, dim=1)):
        b.output(f"split{i}", b.emit("aten.neg.default", part))
    for i, part in enumerate(b.emit_all("aten.unbind.int", x, dim=2)):
        b.output(f"unbind{i}", part)
    compare(b.build(), [torch.randn(2, 6, 4)])


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (13,), (1, 1)], ids=str)
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    b = Builder("odd")
    x = b.param(TensorType(torch.float32, shape), Role.BATCH, "x")
    y = b.emit("aten.mul.Tensor", b.emit("aten.exp.default", x), 2.0)
    b.output("y", y)
    b.output("sum", b.emit("aten.sum.default", y, dtype=None))
    b.output("none", x)
    b.output("again", y)
    compare(b.build(), [torch.randn(shape)])


def test_broadcasts_and_promotion() -> None:
    b = Builder("mixed")
    x, row = batch(b, "bf16[5,1,7]"), batch(b, "f32[3,1]", "row")
    scalar, number = batch(b, "f64[]", "lr"), batch(b, "i64[7]", "n")
    y = b.emit("aten.add.Tensor", x, row)
    b.output("a", y)
    b.output("b", b.emit("aten.mul.Tensor", y, scalar))
    b.output("c", b.emit("aten.mul.Tensor", x, scalar))
    b.output("d", b.emit("aten.mul.Tensor", number, scalar))
    b.output("e", b.emit("aten.div.Tensor", number, 2))
    b.output("f", b.emit("aten.add.Tensor", number, 1.5))
    b.output("g", b.emit("aten.gt.Scalar", number, other=1.5))
    b.output("h", b.emit("aten.eq.Tensor", x, scalar))
    b.output("i", b.emit("aten.mul.Tensor", x, 0.1))
    b.output("j", b.emit("aten.where.self", b.emit("aten.gt.Scalar", x, other=0), x, row))
    arguments = [
        torch.randn(5, 1, 7).bfloat16(),
        torch.randn(3, 1),
        torch.tensor(0.3, dtype=torch.float64),
        torch.arange(7),
    ]
    compare(b.build(), arguments)


def test_random_bits_are_those_of_the_reference() -> None:
    b = Builder("random")
    key = b.param(parse_type("i64[2]"), Role.RNG, "key")
    x = batch(b, "f32[33,65]")
    u = b.emit("rng.uniform.default", key, site=3, shape=(33, 65), dtype=torch.float32)
    mask = b.emit("aten.gt.Scalar", u, other=0.1)
    b.output("dropped", b.emit("aten.mul.Tensor", x, mask))
    b.output("t", b.emit("aten.mul.Tensor", b.emit("aten.t.default", u), 2.0))
    b.output("bits", b.emit("rng.bits.default", key, site=70000000001, shape=(5,)))
    b.output("half", b.emit("rng.uniform.default", key, site=4, shape=(7,), dtype=torch.bfloat16))
    new = b.emit("rng.advance.default", key)
    b.output("next", b.emit("rng.uniform.default", new, site=3, shape=(3,), dtype=torch.float64))
    b.replace_state(key, new)
    compare(
        b.build(),
        [torch.tensor([(1 << 40) + 12345, (1 << 33) + 7]), torch.randn(33, 65)],
        rtol=0,
        atol=0,
        runs=3,
    )


def test_constants_and_aranges() -> None:
    b = Builder("constants")
    x = batch(b, "f32[5,5]")
    steps = b.emit("aten.arange.start_step", start=0, end=5, step=1, dtype=torch.int64)
    rows = b.emit("aten.unsqueeze.default", steps, dim=1)
    causal = b.emit("aten.le.Tensor", steps, rows)
    low = b.emit("aten.full.default", size=(), fill_value=-torch.inf, dtype=torch.float32)
    b.output("masked", b.emit("aten.where.self", causal, x, low))
    b.output("full", b.emit("aten.full.default", size=(3, 2), fill_value=1.5, dtype=torch.bfloat16))
    b.output("data", b.emit("ir.constant.default", data=(1, 2, 3), shape=(3,), dtype=torch.int64))
    compare(b.build(), [torch.randn(5, 5)])


def test_threads_do_not_change_results() -> None:
    b = Builder("threads")
    x = batch(b, "f32[700,300]")
    b.output("rows", b.emit("aten.sum.dim_IntList", x, dim=(1,), keepdim=False, dtype=None))
    b.output("columns", b.emit("aten.sum.dim_IntList", x, dim=(0,), keepdim=False, dtype=None))
    b.output("all", b.emit("aten.mean.default", b.emit("aten.exp.default", x), dtype=None))
    executable = CBackend().compile(b.build())
    arguments, before = [torch.randn(700, 300)], torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = executable.run(arguments)
        torch.set_num_threads(2)
        two = executable.run(arguments)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(p, q) for p, q in zip(one, two, strict=True))


def test_equal_layers_share_kernels() -> None:
    b = Builder("layers")
    x = batch(b, "f32[16,16]")
    for i in range(4):
        w = b.param(parse_type("f32[16,16]"), Role.PARAMETER, f"w{i}")
        x = b.emit("aten.tanh.default", b.emit("aten.mm.default", x, w))
    b.output("y", x)
    executable = compare(b.build(), [torch.randn(16, 16) for _ in range(5)], rtol=1e-5, atol=2e-5)
    assert [k.calls for k in executable.kernels] == [4]


def test_a_small_early_value_pulls_no_kernel_across_a_product() -> None:
    """`v` is read before and after the product: with both readers its kernel would be a cycle."""
    function = parse("""
func @f {
  batch %x: f32[8,4] "#batch.0"
  batch %m: f32[4,4] "#batch.1"
  batch %w: f32[4] "#batch.2"
  %a: f32[8,4] = aten.mul.Tensor(%x, 2.0)
  %s: f32[8,1] = aten.mean.dim(%a) {dim=[-1], keepdim=true}
  %g: f32[8,4] = aten.mul.Tensor(%a, %s)
  %b: f32[8,4] = aten.mm.default(%g, %m)
  %c: f32[8,4] = aten.mul.Tensor(%a, %s)
  %v: f32[4] = aten.add.Tensor(%w, 1.0)
  %d: f32[8,4] = aten.mul.Tensor(%c, %v)
  %e: f32[8,4] = aten.mul.Tensor(%b, %v)
  return d=%d, e=%e
}
""")
    compare(function, [torch.randn(8, 4), torch.randn(4, 4), torch.randn(4)])


def test_sums_of_sums_do_not_wait_for_each_other() -> None:
    """Else all of what is summed would be alive at one time."""
    function = parse("""
func @f {
  batch %x: f32[512,1024] "#batch.0"
  batch %m: f32[1024,1024] "#batch.1"
  %a: f32[512,1024] = aten.mm.default(%x, %m)
  %p: f32[1024] = aten.sum.dim_IntList(%a) {dim=[0]}
  %b: f32[512,1024] = aten.mm.default(%a, %m)
  %q: f32[1024] = aten.sum.dim_IntList(%b) {dim=[0]}
  %s: f32[1024] = aten.add.Tensor(%p, %q)
  return s=%s
}
""")
    given = [torch.randn(512, 1024), torch.eye(1024)]
    executable = compare(function, given, rtol=1e-4, atol=1e-4)
    first, *rest = [k.ops for k in executable.kernels if "aten.sum.dim_IntList" in k.ops]
    assert first == ("aten.sum.dim_IntList",)
    assert rest == [("aten.sum.dim_IntList", "aten.add.Tensor")]


def test_each_of_many_products_is_added_to_their_sum_at_once() -> None:
    """In one kernel with the last of them, the others would wait in memory.

    The first is widened as it is made: the sum can be where it is.
    """
    function = parse("""
func @f {
  batch %x: bf16[2048,512] "#batch.0"
  batch %m: bf16[512,1024] "#batch.1"
  batch %w: f32[1024,8] "#batch.2"
  %a: bf16[2048,1024] = aten.mm.default(%x, %m)
  %b: bf16[2048,1024] = aten.mm.default(%x, %m)
  %af: f32[2048,1024] = aten._to_copy.default(%a) {dtype=f32}
  %bf: f32[2048,1024] = aten._to_copy.default(%b) {dtype=f32}
  %s: f32[2048,1024] = aten.add.Tensor(%af, %bf)
  %c: bf16[2048,1024] = aten.mm.default(%x, %m)
  %cf: f32[2048,1024] = aten._to_copy.default(%c) {dtype=f32}
  %t: f32[2048,1024] = aten.add.Tensor(%s, %cf)
  %d: bf16[2048,1024] = aten.mm.default(%x, %m)
  %df: f32[2048,1024] = aten._to_copy.default(%d) {dtype=f32}
  %u: f32[2048,1024] = aten.add.Tensor(%t, %df)
  %o: f32[2048,8] = aten.mm.default(%u, %w)
  return o=%o
}
""")
    given = [torch.randn(2048, 512).bfloat16(), torch.randn(512, 1024).bfloat16() / 16]
    given.append(torch.randn(1024, 8))
    executable = compare(function, given, rtol=2e-2, atol=2)
    ops = [ops for k in executable.kernels for ops in [k.ops] * k.calls]
    added = ("aten.mm.default", "aten.add.Tensor")
    first = ("aten.mm.default", "aten._to_copy.default")
    assert ops == [first, added, added, added, ("aten.mm.default",)]
    half = 2048 * 1024 * 2
    assert executable.program.plan.peak_bytes < 3 * half, "the sum and scratch"


def test_an_update_is_in_the_kernel_of_the_product_that_makes_its_gradient() -> None:
    """What decays a weight stands behind the weight's last reader, but could be computed before."""
    function = parse("""
func @f {
  batch %a: f32[4096,16] "#batch.0"
  batch %b: f32[16,128] "#batch.1"
  parameter %w: f32[64,128] "w"
  %x: f32[4096,128] = aten.mm.default(%a, %b)
  %turned: f32[128,64] = aten.permute.default(%w) {dims=[1,0]}
  %g: f32[4096,64] = aten.mm.default(%x, %turned)
  %t: f32[64,4096] = aten.permute.default(%g) {dims=[1,0]}
  %grad: f32[64,128] = aten.mm.default(%t, %x)
  %back: f32[4096,128] = aten.mm.default(%g, %w)
  %decayed: f32[64,128] = aten.mul.Tensor(%w, 0.9)
  %new: f32[64,128] = aten.sub.Tensor(%decayed, %grad)
  return new=%new, back=%back
}
""")
    given = [torch.randn(4096, 16) / 64, torch.randn(16, 128) / 4, torch.randn(64, 128) / 8]
    executable = compare(function, given, rtol=1e-4, atol=1e-4)
    *products, updating = sorted(
        (ops for k in executable.kernels for ops in [k.ops] * k.calls), key=len
    )
    assert products == [("aten.mm.default",)] * 3
    assert updating == ("aten.mm.default", "aten.mul.Tensor", "aten.sub.Tensor")


@pytest.mark.parametrize(
    ("reads", "writes", "order"), [(2, 1, ["37", "5", "48"]), (1, 2, ["5", "37", "48"])]
)
def test_loops_follow_what_most_accesses_walk(reads: int, writes: int, order: list[str]) -> None:
    """Reads in one order beside writes in another; rows of 48 are neighbours in both."""
    b = Builder("turned")
    x, *others = [batch(b, "f32[37,5,48]", f"x{i}") for i in range(reads)]
    for other in others:
        x = b.emit("aten.add.Tensor", x, other)
    x = b.emit("aten.permute.default", x, dims=(1, 0, 2))
    for i in range(writes):
        x = b.emit("aten.mul.Tensor", x, 2.0)
        b.output(f"y{i}", x)
    executable = compare(b.build(), [torch.randn(37, 5, 48) for _ in range(reads)])
    assert len(executable.kernels) == 1
    assert re.findall(r"for \(.*? < (\d+);", executable.source) == order


def test_a_cast_to_a_half_is_rounded_once() -> None:
    f = parse("""
func @f {
  batch %x: f32[64] "#batch.0"
  %e: f32[64] = aten.exp.default(%x)
  %h: bf16[64] = aten._to_copy.default(%e) {dtype=bf16}
  return h=%h
}
""")
    assert compare(f, [torch.randn(64)]).source.count("ss_round_bf16(") == 1


def test_recomputation_does_not_come_back_to_the_forward_pass() -> None:
    function = parse("""
func @f {
  batch %x: f32[8,8] "#batch.0"
  %a: f32[8,8] = aten.mul.Tensor(%x, 2.0)
  %e: f32[8,8] = aten.exp.default(%a)
  %b: f32[8,8] = aten.mm.default(%e, %x)
  %e.1: f32[8,8] = aten.exp.default(%a) loc("m.py":1 "" recompute)
  %g: f32[8,8] = aten.mul.Tensor(%b, %e.1) loc("m.py":1 "" backward)
  return g=%g
}
""")
    executable = compare(function, [torch.randn(8, 8)], rtol=1e-4)
    ops = [k.ops for k in executable.kernels]
    assert ("aten.mul.Tensor", "aten.exp.default") in ops
    assert all(names.count("aten.exp.default") < 2 for names in ops)


AGAIN = 'loc("m.py":1 "" recompute)'
BACK = 'loc("m.py":1 "" backward)'


@pytest.mark.parametrize(
    ("lines", "joins"),
    [
        (f"""
  %a: f32[30,20] = aten.gelu.default(%h) {AGAIN}
  %at: f32[20,30] = aten.permute.default(%a) {{dims=[1, 0]}}
  %y: f32[20,9] = aten.mm.default(%at, %g) {BACK}
  %d: f32[30,20] = aten.mm.default(%g, %w) {BACK}""", True),
        # The product waits for it.
        (f"""
  %a: f32[30,20] = aten.gelu.default(%h) {AGAIN}
  %y: f32[30,9] = aten.mm.default(%a, %v) {BACK}
  %d: f32[30,20] = aten.mm.default(%y, %w) {BACK}""", False),
        # Read in another order.
        (f"""
  %ht: f32[20,30] = aten.permute.default(%h) {{dims=[1, 0]}}
  %y: f32[20,30] = aten.gelu.default(%ht) {AGAIN}
  %d: f32[30,20] = aten.mm.default(%g, %w) {BACK}""", False),
        # Not computed again: it was there before.
        (f"""
  %y: f32[30,20] = aten.gelu.default(%h)
  %d: f32[30,20] = aten.mm.default(%g, %w) {BACK}""", False),
    ],
    ids=["read-later", "waited-for", "turned", "forward"],
)  # fmt: skip
def test_what_is_computed_again_joins_an_epilogue(lines: str, joins: bool) -> None:
    """The gradient of an activation reads what the activation does: both in one pass."""
    f = parse(f"""
func @f {{
  batch %h: f32[30,20] "h"
  batch %g: f32[30,9] "g"
  batch %v: f32[20,9] "v"
  batch %w: f32[9,20] "w"{lines}
  %dh: f32[30,20] = aten.gelu_backward.default(%d, %h) {BACK}
  return dh=%dh, y=%y
}}
""")
    torch.manual_seed(0)
    arguments = [torch.randn(p.value.type.static_shape) for p in f.params]
    kernels = [set(k.ops) for k in compare(f, arguments, rtol=1e-4, atol=1e-5).kernels]
    both = {"aten.gelu.default", "aten.gelu_backward.default"}
    assert any(both <= ops for ops in kernels) == joins


def test_what_a_loop_reads_all_along_is_loaded_before_it() -> None:
    """The gradient of a norm per channel and an activation: a condition in each pass."""

    def f(g: Tensor, x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        one = [t.reshape(1, -1, 1, 1) for t in (w, b)]
        kept = aten.threshold_backward(g, torch.relu(x * one[0] + one[1]), 0)
        total = kept.sum([0, 2, 3], keepdim=True)
        return x - total * kept * one[0], torch.where(x > one[1], g, one[0] * x)

    torch.manual_seed(0)
    images = [torch.randn(3, 5, 7, 16) for _ in range(2)]
    arguments = [*images, torch.randn(5), torch.randn(5)]
    executable = compare(traced(f, arguments), arguments, rtol=1e-4, atol=1e-4)
    for loop in re.findall(r"omp simd.*?\n(.*?)\n    +}\n", executable.source, re.DOTALL):
        assert not re.search(r"p\d+\[i0\]", loop), loop
