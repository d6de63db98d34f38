"""The loss of rows by their classes: reductions, weights, classes that are ignored or are not."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from shoestring.backends.c import CBackend
from shoestring.backends.instructions import CallKernel

from .helpers import Call, compare, together, traced

aten = torch.ops.aten


def both(
    reduction: int, ignored: int, g: Tensor, x: Tensor, target: Tensor, *weight: Tensor
) -> Any:
    w = weight[0] if weight else None
    loss, total = aten.nll_loss_forward(x, target, w, reduction, ignored)
    return loss, total, aten.nll_loss_backward(g, x, target, w, reduction, ignored, total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 10), (300, 3), (2000, 131)], ids=str)
def test_against_pytorch(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows, classes = shape
    x, turned = torch.randn(shape, dtype=dtype), torch.randn(shape[::-1], dtype=dtype).t()
    weight = torch.rand(classes, dtype=dtype)
    target = torch.randint(classes, (rows,))
    target[::3] = -100
    calls: list[Call] = []
    for reduction, ignored in itertools.product((0, 1, 2), (-100, 1)):
        named = target.where(target >= 0, torch.tensor(ignored)) if ignored == 1 else target
        named = named.clamp(max=classes - 1) if ignored == 1 and classes == 1 else named
        g = torch.randn(rows if reduction == 0 else (), dtype=dtype)
        for given in ((x, named), (turned, named), (x, named, weight)):
            calls.append((partial(both, reduction, ignored), (g, *given)))
    executable = compare(*together(calls), rtol=1e-5, atol=1e-6)
    assert all(isinstance(i, CallKernel) for i in executable.instructions)


def test_everything_is_ignored() -> None:
    """A mean of nothing is NaN, a sum of nothing zero, as in PyTorch."""
    x, target, g = torch.randn(4, 3), torch.full((4,), -100), torch.ones(())
    for reduction in (1, 2):
        compare(traced(partial(both, reduction, -100), (g, x, target)), (g, x, target))


@pytest.mark.parametrize("wrong", [3, -1, 1 << 40])
def test_a_class_that_there_is_not(wrong: int) -> None:
    x, target, g = torch.randn(4, 3), torch.tensor([0, 2, wrong, 1]), torch.ones(())
    executable = CBackend().compile(traced(partial(both, 1, -100), (g, x, target)))
    with pytest.raises(IndexError, match="out of bounds"):
        executable.run([g, x, target])


def test_what_is_left_to_pytorch() -> None:
    x, target, g = torch.randn(4, 3), torch.tensor([0, 2, 1, 1]), torch.ones(())
    for given in (
        (g.bfloat16(), x.bfloat16(), target),
        (g, x[0], target[0]),
        (g, x[:0], target[:0]),
    ):
        compare(traced(partial(both, 2, -100), given), given, rtol=1e-2, atol=1e-2)
