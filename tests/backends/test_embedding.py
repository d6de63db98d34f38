"""The gradient of an embedding table."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shoestring.backends.c import CBackend
from shoestring.backends.instructions import CallKernel
from shoestring.ir import Role

from .helpers import compare, traced

aten = torch.ops.aten


def run(grad: Tensor, rows: Tensor, count: int, padding: int = -1, scale: bool = False) -> bool:
    """Compares with PyTorch's; whether a generated kernel did it."""
    function = traced(
        lambda g, r: aten.embedding_dense_backward(g, r, count, padding, scale), (grad, rows)
    )
    assert all(p.role is Role.BATCH for p in function.params)
    executable = compare(function, [grad, rows], rtol=1e-5, atol=1e-5)
    return isinstance(executable.instructions[-1], CallKernel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("shape", [(1,), (7, 11), (3, 1, 5)])
@pytest.mark.parametrize("width", [1, 63, 64, 129])
def test_gradient(
    shape: tuple[int, ...], width: int, dtype: torch.dtype, index: torch.dtype
) -> None:
    torch.manual_seed(0)
    rows = torch.randint(0, 13, shape).to(index)
    assert run(torch.randn(*shape, width, dtype=dtype), rows, 13)
    assert run(torch.randn(*shape, width, dtype=dtype), rows, 13, padding=int(rows.flatten()[0]))


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
