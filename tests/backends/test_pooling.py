"""Maxima of windows: sizes, paddings, gaps, types, NaN."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoestring.backends.c import CBackend
from shoestring.backends.instructions import CallKernel
from shoestring.ir import Function

from .helpers import compare, traced

aten = torch.ops.aten


def run(x: Tensor, kernel: list[int], *options: object) -> None:
    function = traced(lambda x: aten.max_pool2d_with_indices(x, kernel, *options), [x])
    executable = compare(function, [x], rtol=0, atol=0)
    assert all(isinstance(i, CallKernel) for i in executable.instructions)
    run_backward(x, kernel, *options)


def run_backward(x: Tensor, kernel: list[int], *options: object) -> None:
    """The gradient, of which `x` gives nothing but its sizes."""
    values, indices = aten.max_pool2d_with_indices(x, kernel, *options)
    if not (0 <= indices.min() and indices.max() < x.shape[-2] * x.shape[-1]):
        return  # of a window without elements: PyTorch's gradient writes outside of its memory
    given = [*options, *([], [0, 0], [1, 1], False)[len(options) :]]
    arguments = [torch.randn_like(values), x, indices]
    executable = compare(gradient(arguments, kernel, *given), arguments, rtol=0, atol=0)
    (call,) = executable.instructions
    assert isinstance(call, CallKernel) and len(call.pointers) == 3


def gradient(arguments: list[Tensor], *options: object) -> Function:
    def f(grad: Tensor, x: Tensor, indices: Tensor) -> Tensor:
        found: Tensor = aten.max_pool2d_with_indices_backward(grad, x, *options, indices)
        return found

    return traced(f, arguments)


def test_gradients_of_windows_without_elements_go_nowhere() -> None:
    """Their place is outside of the image."""
    x = torch.randn(3, 1, 2, 2)
    options = ([2, 2], [2, 3], [1, 1], [3, 1], True)
    values, indices = aten.max_pool2d_with_indices(x, *options)
    assert indices.max() == 4 and values.isinf().all()
    arguments = [torch.ones_like(values), x, indices]
    (found,) = CBackend().compile(gradient(arguments, *options)).run(arguments)
    assert found.eq(0).all()


PAIR = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 11), st.integers(1, 11)),
    st.tuples(st.integers(1, 4), st.integers(1, 4)), PAIR,
    st.tuples(st.integers(0, 2), st.integers(0, 2)), PAIR, st.booleans(),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), st.booleans(),
)  # fmt: skip
def test_windows(
    shape: tuple[int, ...], kernel: tuple[int, int], stride: tuple[int, int],
    padding: tuple[int, int], gap: tuple[int, int], ceil: bool, dtype: torch.dtype, odd: bool,
) -> None:  # fmt: skip
    assume(all(2 * p <= k for p, k in zip(padding, kernel, strict=True)))
    x = torch.randn(shape)
    if odd:
        x = torch.where(x > 1, torch.nan, torch.where(x < -1, -torch.inf, x))
    options = [list(o) for o in (stride, padding, gap)]
    try:
        aten.max_pool2d_with_indices(x, list(kernel), *options, ceil)
    except RuntimeError:
        assume(False)
    run(x.to(dtype), list(kernel), *options, ceil)


@pytest.mark.parametrize("shape", [(64, 20, 20), (2, 32, 17, 23)])
def test_defaults_and_threads(shape: tuple[int, ...]) -> None:
    run(torch.randn(shape), [3])
    run(torch.randn(shape), [3, 3], [2, 2], [1, 1])
