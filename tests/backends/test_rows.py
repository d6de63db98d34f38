"""Rows by their positions: gathered, added up, and the gradient of an embedding table."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from shoestring.backends.c import CBackend
from shoestring.backends.instructions import CallKernel

from .helpers import Call, compare, together, traced

aten = torch.ops.aten


def by_kernel(f: Callable[..., Any], arguments: Sequence[Tensor], tolerance: float = 0.0) -> bool:
    """Compares with PyTorch's; whether a generated kernel did it."""
    executable = compare(traced(f, arguments), arguments, rtol=tolerance, atol=tolerance)
    return isinstance(executable.instructions[-1], CallKernel)


def all_by_kernels(calls: Sequence[Call], tolerance: float = 0.0) -> bool:
    """Compares with PyTorch's; whether generated kernels did all of it."""
    executable = compare(*together(calls), rtol=tolerance, atol=tolerance)
    return all(isinstance(i, CallKernel) for i in executable.instructions)


def run(grad: Tensor, rows: Tensor, count: int, padding: int = -1, scale: bool = False) -> bool:
    """Compares with PyTorch's; whether a generated kernel did it."""
    return by_kernel(
        partial(gradient, count=count, padding=padding, scale=scale), (grad, rows), 1e-5
    )


def gradient(grad: Tensor, rows: Tensor, count: int, padding: int, scale: bool) -> Tensor:
    table: Tensor = aten.embedding_dense_backward(grad, rows, count, padding, scale)
    return table


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
def test_gradient(dtype: torch.dtype, index: torch.dtype) -> None:
    torch.manual_seed(0)
    calls: list[Call] = []
    for shape, width in itertools.product([(1,), (7, 11), (3, 1, 5)], [1, 63, 64, 129]):
        rows = torch.randint(0, 13, shape).to(index)
        for padding in (-1, int(rows.flatten()[0])):
            grad = torch.randn(*shape, width, dtype=dtype)
            f = partial(gradient, count=13, padding=padding, scale=False)
            calls.append((f, (grad, rows)))
    assert all_by_kernels(calls, 1e-5)


def test_positions_in_any_order() -> None:
    """Such as those of a buffer that every row of a batch shares."""
    torch.manual_seed(0)
    one, table = torch.randint(0, 9, (1, 6)), torch.randn(9, 5)
    for rows in (one.expand(4, 6), torch.randint(0, 9, (6, 4)).t(), torch.randint(0, 9, (8,))[::2]):
        assert by_kernel(lambda r, t: aten.embedding(t, r), (rows, table))
        assert by_kernel(lambda r, t: t[r], (rows - 4, table))
        assert run(torch.randn(*rows.shape, 5), rows, 9)


def test_what_is_left_to_pytorch() -> None:
    rows = torch.tensor([1, 1, 2])
    assert not run(torch.randn(3, 5), rows, 4, scale=True)
    assert not run(torch.randn(3, 5).bfloat16(), rows, 4)
    run(torch.randn(0, 5), torch.zeros(0, dtype=torch.int64), 4)


def test_threads_do_not_change_the_gradient() -> None:
    torch.manual_seed(0)
    grad, rows = torch.randn(5000, 130), torch.randint(0, 600, (5000,))
    f = traced(lambda g, r: aten.embedding_dense_backward(g, r, 600, -1, False), (grad, rows))
    executable = CBackend().compile(f)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = executable.run([grad, rows])
        torch.set_num_threads(2)
        two = executable.run([grad, rows])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one[0], two[0])


TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool)


def table(rows: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (4 * torch.randn(rows, *shape)).to(dtype)


WIDTHS: list[tuple[int, ...]] = [(), (1,), (63,), (2, 65)]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (7, 11), (3, 1, 5)])
def test_gathers(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Positions may count from the end."""
    torch.manual_seed(0)
    calls: list[Call] = []
    for width in WIDTHS:
        rows, x = torch.randint(-13, 13, shape), table(13, *width, dtype=dtype)
        calls.append((lambda x, r: aten.index(x, [r]), (x, rows)))
        if len(width) == 1:
            calls.append((aten.embedding, (x, rows % 13)))
    assert all_by_kernels(calls)


def test_gathers_of_views() -> None:
    """Rows apart from each other, one row many times, and what is no table of rows."""
    torch.manual_seed(0)
    rows, x = torch.randint(0, 7, (9,)), table(14, 10)
    assert by_kernel(lambda x, r: aten.index(x[::2, 3:], [r]), (x, rows))
    assert by_kernel(lambda x, r: aten.index(x[:1].expand(7, 10), [r]), (x, rows))
    assert not by_kernel(lambda x, r: aten.index(x.t(), [r]), (x, rows))
    assert not by_kernel(lambda x, r: aten.index(x, [None, r]), (x, rows))
    assert not by_kernel(lambda x, r: aten.index(x, [r, r]), (x, rows))
    by_kernel(lambda x, r: aten.index(x, [r]), (x, rows[:0]))
    by_kernel(lambda x, r: aten.index(x[:, :0], [r]), (x, rows))


SUMS = ((torch.float32, 1e-6), (torch.float64, 1e-12), (torch.bfloat16, 0.0))


@pytest.mark.parametrize(("dtype", "tolerance"), SUMS, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (70, 11), (3, 1, 5)])
def test_sums(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float) -> None:
    """In 16 bits each addition is rounded, in the order of the positions: equal to the last bit."""
    torch.manual_seed(0)
    calls: list[Call] = []
    for width in WIDTHS:
        rows, x = torch.randint(-13, 13, shape), table(13, *width, dtype=dtype)
        values = torch.randn((*shape, *width)).to(dtype)
        calls.append((lambda x, r, v: aten.index_put(x, [r], v, True), (x, rows, values)))
    assert all_by_kernels(calls, tolerance)


def test_sums_of_views_and_what_is_left_to_pytorch() -> None:
    torch.manual_seed(0)
    rows, x, v = torch.randint(0, 7, (9,)), table(7, 10), table(18, 10)

    def sums(x: Tensor, v: Tensor, rows: Tensor = rows, add: bool = True) -> bool:
        return by_kernel(lambda x, r, v: aten.index_put(x, [r], v[::2], add), (x, rows, v), 1e-6)

    assert sums(x, v)
    assert not sums(x, v[:, :1])  # one value for a row
    assert not sums(x.half(), v.half())
    assert sums(torch.zeros(1, 1).expand(7, 10), v) and sums(x[:1].expand(7, 10), v)
    assert sums(x, torch.zeros(18, 1).expand(18, 10))
    assert sums(x, v[:14], rows=torch.randperm(7), add=False)
    assert sums(x.half(), v[:14].half(), rows=torch.randperm(7), add=False)
    assert not sums(x, v[:2], rows=torch.arange(7) > 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_along_the_first_dimension(dtype: torch.dtype) -> None:
    """`index_select` and `index_add`; along another one they are PyTorch's."""
    torch.manual_seed(0)
    rows, x, v = torch.randint(0, 7, (90,)), table(7, 10, dtype=dtype), table(90, 10, dtype=dtype)

    def add(dim: int, alpha: int = 1) -> Callable[..., Any]:
        return lambda x, r, v: aten.index_add(x, dim, r, v, alpha=alpha)

    assert by_kernel(lambda x, r: aten.index_select(x, 0, r), (x, rows))
    assert by_kernel(lambda x, r: aten.index_select(x, -2, r), (x, rows))
    assert not by_kernel(lambda x, r: aten.index_select(x, 1, r), (x, rows))
    assert by_kernel(add(0), (x, rows, v), 1e-5) is (dtype is torch.float32)
    assert not by_kernel(add(0, 3), (x, rows, v), 1e-1)
    assert not by_kernel(add(1), (table(90, 7, dtype=dtype), rows[:10], v), 1e-1)


@pytest.mark.parametrize("position", [5, -6, 2**40])
def test_a_position_outside_is_an_error(position: int) -> None:
    """PyTorch's own, at the first run and at the next; state that comes later is not touched."""
    x, good, v = table(5, 3), torch.tensor([0, 4, -5, 2]), table(4, 3)
    bad = torch.tensor([0, position, 1, 2])
    ops: tuple[Callable[..., Any], ...] = (
        lambda x, r, v: aten.index(x + 1, [r]) + v,
        lambda x, r, v: aten.index_put(x + 1, [r], v, True) * 2,
        lambda x, r, v: aten.embedding(x + 1, r) + v,
        lambda x, r, v: aten.index_select(x + 1, 0, r) + v,
        lambda x, r, v: aten.index_add(x + 1, 0, r, v) * 2,
    )
    for f in ops:
        executable = CBackend().compile(traced(f, (x, good, v)))
        for _ in range(2):
            with pytest.raises((IndexError, RuntimeError), match="out of|range"):
                executable.run([x, bad, v])
        inside = good % 5
        (found,) = executable.run([x, inside, v])
        assert torch.allclose(found, f(x, inside, v))


def test_a_kernel_that_declines_leaves_the_rest_to_be_run() -> None:
    """A position from the end is an error of an embedding: PyTorch's, between two kernels."""
    x, rows = table(5, 3), torch.tensor([1, 3])
    executable = CBackend().compile(traced(lambda x, r: aten.embedding(x * 2, r) + 1, (x, rows)))
    kernels = [i for i in executable.instructions if isinstance(i, CallKernel)]
    assert [k.otherwise is not None for k in kernels].count(True) == 1
    with pytest.raises(IndexError):
        executable.run([x, torch.tensor([1, -1])])
