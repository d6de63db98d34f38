"""What is known when a program is compiled: kept once, and without repetition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shoestring.backends.c import CExecutable
from shoestring.backends.instructions import CallKernel

from .helpers import compare, traced

aten = torch.ops.aten


def sizes(executable: CExecutable) -> list[tuple[int, ...]]:
    """The shapes of constants that are more than a number."""
    return sorted(tuple(t.shape) for t in executable.program.constants if t.numel() > 1)


def run(f: Callable[..., Any], *tensors: Tensor) -> CExecutable:
    return compare(traced(f, tensors), tensors, rtol=0, atol=0)


def mask(n: int) -> Tensor:
    """[2, 1, n, n], equal for both of the batch."""
    rows = torch.arange(n).view(1, 1, n, 1).expand(2, 1, n, 1) + 0
    return torch.where(torch.arange(n) <= rows, 0.0, -torch.inf)


def test_equal_constants_are_kept_once_and_repeated_dimensions_not_at_all() -> None:
    executable = run(lambda x: (x + mask(40)) * (x - mask(40)), torch.randn(2, 3, 40, 40))
    assert sizes(executable) == [(1, 1, 40, 40)]


def test_bits_decide_what_is_equal() -> None:
    """Zeros of both signs, each repeated, and a sum of them in which one sign differs."""

    def f(x: Tensor) -> tuple[Tensor, ...]:
        plus, minus = torch.arange(2000) * 0.0, torch.arange(2000) * -0.0
        mixed = torch.where(torch.arange(2000) == 7, minus, plus)
        return x.copysign(plus), x.copysign(minus), x.copysign(mixed)

    assert sizes(run(f, torch.rand(2000))) == [(2000,)]


def test_libraries_read_repeated_constants() -> None:
    """A copy in the order that a library wants is made once, not by each step."""

    def f(x: Tensor) -> Tensor:
        grid = (torch.arange(64).view(1, 1, 64, 1).expand(2, 3, 64, 16) + 0.5).sin()
        return aten.upsample_bicubic2d(grid, [9, 9], True) * x

    run(f, torch.randn(2, 3, 9, 9))

    def g(x: Tensor) -> Tensor:
        grid = (torch.arange(64).view(1, 1, 64, 1).expand(2, 3, 64, 16) + 0.5).sin()
        return aten.grid_sampler_2d(grid, x, 0, 0, False)

    run(g, torch.rand(2, 5, 5, 2))


def test_a_constant_is_a_result_and_a_next_value() -> None:
    executable = run(lambda x: (mask(40), mask(40)[0], x * 2), torch.randn(3))
    assert sizes(executable) == [(1, 1, 40, 40)]


def test_a_number_that_a_library_reads_takes_memory_during_the_step_only() -> None:
    executable = run(lambda x: aten.grid_sampler_2d(x, aten.zeros([2, 50, 50, 2]), 0, 0, False),
                     torch.randn(2, 3, 9, 9))  # fmt: skip
    assert sizes(executable) == []


def index(x: Tensor, *places: Tensor) -> Tensor:
    found: Tensor = aten.index(x, list(places))
    return found


def test_known_positions_in_even_steps_are_a_view() -> None:
    """As the masks of BERT: by the numbers of rows and columns; also strided, turned, diagonal."""
    n = torch.arange
    cases: list[Callable[[Tensor], Tensor]] = [
        lambda x: index(x, n(6).view(6, 1, 1), n(5)),
        lambda x: index(x, n(1, 6, 2).view(3, 1), n(0, 5, 4)),
        lambda x: index(x, n(6), n(5).view(5, 1)),
        lambda x: index(x, n(5), n(5)),
        lambda x: index(x, n(5).view(5, 1) + n(2), n(5).view(5, 1)),
        lambda x: index(x[..., 0].t(), n(3, 5)),
        lambda x: index(x[1:], n(2).view(2, 1), torch.full((1,), 4)),
        lambda x: index(x, torch.zeros(2, 3, dtype=torch.int64), n(3, dtype=torch.int32)),
    ]
    for f in cases:
        for x in (torch.randn(6, 5, 3), torch.randn(6, 5, 3).bfloat16(), torch.randn(6, 5, 3) > 0):
            executable = run(lambda x, f=f: f(x).clone(), x)
            (kernel,) = executable.instructions
            assert isinstance(kernel, CallKernel) and kernel.ops == ("aten.clone.default",)


def test_known_positions_in_no_even_steps_are_gathered() -> None:
    n = torch.arange
    odd: list[Callable[[], Tensor]] = [
        lambda: n(3) * n(3),
        lambda: n(-1, 1),
        lambda: 3 - n(3),
        lambda: n(2).view(2, 1) * n(1, 3),
        lambda: n(0),
    ]
    for places in odd:
        run(lambda x, places=places: index(x, places()) * 2, torch.randn(6, 5))
