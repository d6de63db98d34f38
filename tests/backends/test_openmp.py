"""PyTorch's threads around our own: small calls take none, large ones let them go."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from shoestring.backends.c import CBackend
from shoestring.backends.c.openmp import considerate, is_small, let_go
from shoestring.backends.instructions import CallTorch
from shoestring.ir import parse

TASKS = Path("/proc/self/task")
pytestmark = pytest.mark.skipif(not TASKS.exists(), reason="counts threads")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def threads_after(call: Callable[[], object]) -> set[str]:
    """The threads that a call leaves behind."""
    let_go()
    before = set(os.listdir(TASKS))
    call()
    return set(os.listdir(TASKS)) - before


def work() -> torch.Tensor:
    return torch.exp(torch.ones(1 << 20))


def test_a_large_call_lets_its_threads_go() -> None:
    if not threads_after(work):
        pytest.skip("another OpenMP, or its threads were there before")
    assert not threads_after(considerate(work, small=False))
    assert threads_after(work), "the next call has threads again"


def test_a_small_call_takes_none_and_the_number_is_as_before() -> None:
    before = torch.get_num_threads()
    assert not threads_after(considerate(work, small=True))
    assert torch.get_num_threads() == before

    def fails() -> None:
        raise ValueError

    with pytest.raises(ValueError):
        considerate(fails, small=True)()
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(("groups", "small"), [(64, True), (2, False)])
def test_size_of_a_convolution_is_its_work(groups: int, small: bool) -> None:
    executable = CBackend().compile(
        parse(f"""
func @conv {{
  batch %x: f32[1,64,16,16] "x"
  batch %w: f32[64,{64 // groups},3,3] "w"
  %y: f32[1,64,16,16] = aten.convolution.default(%x, %w, _) {{stride=[1, 1], \
padding=[1, 1], dilation=[1, 1], transposed=false, output_padding=[0, 0], groups={groups}}}
  return y=%y
}}
""")
    )
    (call,) = executable.instructions
    assert isinstance(call, CallTorch)
    assert is_small(call) == small
