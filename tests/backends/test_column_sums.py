"""Sums over rows in the pass of the work within rows, and where pointwise work is placed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shoestring.backends.c import CBackend
from shoestring.backends.c.levels import block_rows
from shoestring.backends.c.lower import lower
from shoestring.ir import parse

from .helpers import Call, compare, copies, traced
from .test_decompositions import check, check_all, randn

aten = torch.ops.aten
ROWS = [32, 33, 127, 1024, 1031, 20000]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def gradient_of_norm(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, w: Tensor) -> Any:
    width = [x.shape[-1]]
    return aten.native_layer_norm_backward(g, x, width, mean, rstd, w, w, [True, True, True])


@pytest.mark.parametrize("rows", ROWS)
def test_gradient_of_layer_norm_is_one_kernel(rows: int) -> None:
    calls: list[Call] = []
    for width in (16, 17, 64, 131):
        x = randn((rows, width))
        _, mean, rstd = aten.native_layer_norm(x, [width], None, None, 1e-5)
        calls.append((gradient_of_norm, [randn((rows, width)), x, mean, rstd, randn((width,))]))
        alone = lower(traced(*calls[-1])).program
        assert len(alone.instructions) == 1, str(alone)
    check_all(calls, loose=20)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_types(dtype: torch.dtype) -> None:
    x = randn((70, 40), dtype)
    _, mean, rstd = aten.native_layer_norm(x, [40], None, None, 1e-5)
    check(gradient_of_norm, randn((70, 40), dtype), x, mean, rstd, randn((40,), dtype), loose=40)


def test_sum_and_mean_beside_pointwise_work() -> None:
    """The gradient of a bias beside that of an activation; rows of two dimensions, one permuted."""

    def f(g: Tensor, x: Tensor) -> Any:
        d = aten.gelu_backward(g, x, approximate="tanh")
        turned = (x * 3).permute(1, 0, 2)
        return d, d.sum((0, 1)), d.mean((0, 1)), turned, (turned + 1).sum((0, 1))

    check(f, randn((9, 30, 77)), randn((9, 30, 77)), loose=20)


def test_many_numbers_of_each_row() -> None:
    """What is loaded ahead of a loop over columns has names of its own, beside the sums'."""

    def f(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Any:
        y = x * a
        z = y * b
        return y.sum(0), z, z.sum(0), (z * c).exp().sum(0)

    rows = [randn((100, 1)) for _ in range(3)]
    check(f, randn((100, 66)), *rows, loose=20)


def test_columns_of_two_dimensions() -> None:
    def f(x: Tensor, w: Tensor) -> Any:
        y = torch.exp(x) * w
        return y, y.sum(0), (y * 2).sum(0) + 1

    check(f, randn((100, 5, 66)), randn((5, 1)), loose=20)


def test_nan_and_infinity_stay_in_their_columns() -> None:
    x = randn((200, 48))
    x[150, 3], x[7, 5], x[9, 5] = torch.nan, torch.inf, -torch.inf
    check(lambda x: ((x * 2), (x * 2).sum(0)), x)


def test_columns_read_within_rows_are_not_summed_beside_them() -> None:
    check(lambda x: (x * 2 - (x * 2).mean(0), (x * 2).sum(1)), randn((300, 40)))


def test_update_of_what_the_rows_read() -> None:
    """The rows read the old weight; the columns overwrite it behind them."""
    function = parse("""
func @f {
  parameter %w: f32[40] "w" -> %w.new
  batch %x: f32[100,40] "#batch.0"
  %y: f32[100,40] = aten.mul.Tensor(%x, %w)
  %z: f32[100,40] = aten.tanh.default(%y)
  %s: f32[100] = aten.sum.dim_IntList(%z) {dim=[1], keepdim=false}
  %g: f32[40] = aten.sum.dim_IntList(%z) {dim=[0], keepdim=false}
  %h: f32[40] = aten.mul.Tensor(%g, 0.01)
  %w.new: f32[40] = aten.sub.Tensor(%w, %h)
  return y=%y, s=%s
}
""")
    executable = compare(function, [randn((40,)), randn((100, 40))], rtol=1e-5, runs=3)
    assert len(executable.instructions) == 1, str(executable.program)


def test_every_number_of_threads_gives_the_same_sums() -> None:
    x = randn((3001, 200))
    _, mean, rstd = aten.native_layer_norm(x, [200], None, None, 1e-5)
    arguments = [randn((3001, 200)), x, mean, rstd, randn((200,))]
    executable = CBackend().compile(traced(gradient_of_norm, arguments))
    before = torch.get_num_threads()
    results: list[list[Tensor]] = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(executable.run(copies(arguments)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(p, q) for p, q in zip(results[0], other, strict=True))


def test_long_columns_are_accurate() -> None:
    x = torch.rand(100003, 24)
    executable = CBackend().compile(traced(lambda x: (x + 1, (x + 1).sum(0)), [x]))
    _, found = executable.run([x])
    exact = (x + 1).double().sum(0)
    assert float(((found.double() - exact) / exact).abs().max()) < 5e-7


@pytest.mark.parametrize("rows", [1, 16, 63, 64, 1024, 16384, 100000])
def test_blocks_are_neither_tiny_nor_long(rows: int) -> None:
    assert 16 <= block_rows(rows) <= 256


# -- placement -----------------------------------------------------------------------------------


def test_what_is_needed_late_is_not_stored_early() -> None:
    """The gradient's part of the norm reads the forward pass, but runs in the backward pass."""
    function = parse("""
func @f {
  parameter %w: f32[64,64] "w"
  batch %x: f32[128,64] "#batch.0"
  %m: f32[128,1] = aten.mean.dim(%x) {dim=[1], keepdim=true}
  %c: f32[128,64] = aten.sub.Tensor(%x, %m)
  %y: f32[128,64] = aten.exp.default(%c)
  %z: f32[128,64] = aten.mm.default(%y, %w)
  %d: f32[128,64] = aten.sub.Tensor(%x, %m)
  %e: f32[128,64] = aten.mul.Tensor(%d, 3.0)
  %r: f32[128,64] = aten.mul.Tensor(%z, %e)
  %s: f32[128,1] = aten.sum.dim_IntList(%z) {dim=[1], keepdim=true}
  %t: f32[128,64] = aten.mul.Tensor(%r, %s)
  return t=%t
}
""")
    executable = compare(function, [randn((64, 64)), randn((128, 64))], rtol=1e-4, atol=1e-4)
    first = executable.program.instructions[0]
    assert len(first.regions) == 3, str(executable.program)  # x, m and y


def test_a_product_does_not_pass_on_more_than_its_result() -> None:
    """Two values that rows are reduced from: the product stores itself, and they follow."""
    function = parse("""
func @f {
  batch %a: f32[128,64] "#batch.0"
  batch %w: f32[64,64] "#batch.1"
  batch %u: f32[128,64] "#batch.2"
  %g: f32[128,64] = aten.mm.default(%a, %w)
  %p: f32[128,64] = aten.mul.Tensor(%g, %u)
  %q: f32[128,64] = aten.mul.Tensor(%g, 2.0)
  %s: f32[128,1] = aten.sum.dim_IntList(%p) {dim=[1], keepdim=true}
  %t: f32[128,1] = aten.sum.dim_IntList(%q) {dim=[1], keepdim=true}
  %x: f32[128,64] = aten.mul.Tensor(%p, %s)
  %y: f32[128,64] = aten.mul.Tensor(%q, %t)
  %z: f32[128,64] = aten.add.Tensor(%x, %y)
  return z=%z
}
""")
    arguments = [randn((128, 64)), randn((64, 64)), randn((128, 64))]
    executable = compare(function, arguments, rtol=1e-4, atol=1e-3)
    assert [len(i.results) for i in executable.program.instructions] == [1, 1]
