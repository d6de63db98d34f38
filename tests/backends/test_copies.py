"""Ops that move elements: concatenations, gradients of slices, sums of rows by position."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoestring.backends.c import CBackend
from shoestring.backends.instructions import CallKernel
from shoestring.ir import TensorType, trace

from .helpers import compare, together, traced

aten = torch.ops.aten
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int8,
          torch.bool]  # fmt: skip


def run(f: Callable[..., Tensor], *tensors: Tensor) -> bool:
    """Compares with PyTorch's, to the bit; whether generated kernels did all of it."""
    executable = compare(traced(f, tensors), tensors, rtol=0, atol=0)
    return all(isinstance(i, CallKernel) for i in executable.instructions)


def numbers(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape) * 9).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding(dtype: torch.dtype) -> None:
    """One and several dimensions, a view, a value that is rounded, and nothing to pad."""
    x = numbers((3, 5, 4), dtype)
    fill = {torch.bool: True, torch.int8: -100, torch.int64: -(1 << 40)}.get(dtype, 1 / 3)
    assert run(lambda x: aten.constant_pad_nd(x, [0, 1], fill), x)
    assert run(lambda x: aten.constant_pad_nd(x, [2, 0, 0, 3], 0), x)
    assert run(lambda x: aten.constant_pad_nd(x.transpose(0, 2), [1, 2, 3, 4, 5, 6], fill), x)
    assert run(lambda x: aten.constant_pad_nd(x[:, 1:3], [0, 0, 1, 1], fill), x)
    assert run(lambda x: aten.constant_pad_nd(x + x, [0, 0, 0, 0], fill), x)
    run(lambda x: aten.constant_pad_nd(x, [-1, 2, 0, -2], fill), x)
    run(lambda x: aten.constant_pad_nd(x[:0], [1, 1, 0, 0, 1, 0], fill), x)


@pytest.mark.parametrize("fill", [math.inf, -math.inf, math.nan, -0.0])
def test_padding_with_special_numbers(fill: float) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        x = numbers((2, 3), dtype)
        assert run(lambda x: aten.constant_pad_nd(x, [1, 1], fill), x)
        assert run(lambda x: aten.constant_pad_nd(x, [1, 1], fill).signbit(), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_concatenation(dtype: torch.dtype) -> None:
    a, b, c = (numbers((3, n, 5), dtype) for n in (2, 1, 7))
    assert run(lambda a, b, c: aten.cat([a, b, c], 1), a, b, c)
    assert run(lambda a, b: aten.cat([a.transpose(1, 2), b.transpose(1, 2)], -1), a, b)
    run(lambda a: aten.cat([a, a[:, :1], a.new_empty(0)], 1), a)
    assert run(lambda a: aten.stack([a, a.transpose(0, 1).transpose(0, 1), a], -2), a)
    assert run(lambda a: aten.stack([a[0, 0, 0], a[1, 0, 0]], 0), a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool], ids=str)
def test_many_pieces(dtype: torch.dtype) -> None:
    """Alike and in a row, with others between them, turned, twice, and of a stack of stacks."""
    x, y, z = numbers((24, 3, 5), dtype), numbers((24, 5, 3), dtype), numbers((3, 9), dtype)

    def f(x: Tensor, y: Tensor, z: Tensor) -> list[Tensor]:
        rows = list(x.unbind(0))
        turned = [t.t() for t in y.unbind(0)]
        return [
            aten.stack(rows, 1),
            aten.stack(rows[::-1], -1),
            aten.stack([*rows[:9], *turned[:9], *rows[9:18]], 0),
            aten.cat([*rows[:10], z, *rows[10:20], z[:, 1:6], *rows[20:]], 1),
            aten.cat([*turned[::2], rows[0], rows[0], *rows[:8]], 0),
            aten.stack([rows[1]] * 11, 1),
            aten.cat([x.new_empty(0), *(t.reshape(-1) for t in turned)], 0),
            aten.stack([aten.stack(rows[i : i + 8], 1) for i in range(16)], 2),
        ]

    compare(traced(f, (x, y, z)), (x, y, z), rtol=0, atol=0)


def test_a_stack_of_many_is_one_loop() -> None:
    """GCC takes 15 s for the loops of 64 pieces one after the other."""
    x = torch.randn(200, 4, 16)
    function = traced(lambda x: aten.stack([t.exp() for t in x.unbind(0)], 1), (x,))
    executable = compare(function, (x,), rtol=1e-6, atol=1e-6)
    text = "".join(executable.sources)
    assert text[text.index("_stack(") :].split("\n}\n")[0].count("for (") <= 4


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(-7, 7), st.integers(-7, 9),
    st.integers(1, 3), st.integers(-4, 3), st.booleans(),
)  # fmt: skip
def test_gradient_of_a_slice(
    shape: list[int], start: int, end: int, step: int, dim: int, turned: bool
) -> None:
    dim = dim % len(shape)
    grad = aten.slice(torch.zeros(shape), dim, start, end, step)
    grad = torch.randn(grad.shape[::-1] if turned else grad.shape)

    def f(g: Tensor) -> Tensor:
        g = g.permute(*reversed(range(g.dim()))) if turned else g
        found: Tensor = aten.slice_backward(g, shape, dim, start, end, step)
        return found

    run(f, grad)


def test_large_copies_on_several_threads() -> None:
    a, b = torch.randn(40, 33, 70), torch.randn(40, 33, 50)
    assert run(lambda a, b: aten.cat([a, b], 2), a, b)
    assert run(lambda a: aten.stack([*a.unbind(0), *(-a).unbind(0)], 1), a)
    assert run(lambda a: aten.stack([a, -a] * 4, 2), a)
    assert run(lambda a: aten.slice_backward(a, [40, 33, 99], 2, 9, 79, 1), a)


def test_several_types_are_left_to_pytorch() -> None:
    assert not run(lambda a, b: aten.cat([a, b]), torch.randn(3), torch.randn(3).double())


@pytest.mark.parametrize("rows", [[0, 3, 3, 1], [-1, 2, -4, 2]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_sum_of_rows_by_position(rows: list[int], dtype: torch.dtype) -> None:
    base, values = torch.randn(4, 6).to(dtype), torch.randn(4, 6).to(dtype)
    at = torch.tensor(rows)
    run(lambda x, v, i: aten.index_put(x, [i], v, True), base, values, at)
    if len({r % 4 for r in rows}) == 4:
        run(lambda x, v, i: aten.index_put(x, [i], v, False), base, values, at)
    run(lambda x, v, i: aten.index_put(x, [i], v[:, :1], True), base, values, at)
    run(lambda x, v, i: aten.index_put(x, [None, i], v[:, :4], True), base, values, at)


def test_a_position_outside_is_an_error() -> None:
    types = [TensorType(torch.float32, (4, 6)), TensorType(torch.int64, (4,))]
    function = trace(lambda x, i: aten.index_put(x, [i], x, True), types, "f")
    with pytest.raises(IndexError):
        CBackend().compile(function).run([torch.randn(4, 6), torch.tensor([0, 1, 4, 2])])


def test_along_the_dimension_that_a_number_does_not_have() -> None:
    """PyTorch takes 0 and -1 there."""
    along: list[Callable[[Tensor], Tensor]] = [
        lambda x: x.flip(0) * 0.9,
        lambda x: (x + 1).flip(-1),
        lambda x: x.unfold(0, 1, 1) * 2,
        lambda x: x.transpose(0, -1) * 2,
        lambda x: x.index_select(0, torch.zeros(1, dtype=torch.int64)) + x.roll(1),
        lambda x: x.softmax(0) + x.log_softmax(-1) + x.cumsum(0) + x.amax(0) + x.sum(-1),
    ]
    compare(*together([(f, [torch.randn(())]) for f in along]))
