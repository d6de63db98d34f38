"""Results without data that are made from memory have the layouts that PyTorch gives."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from shoestring.ir.fake import fake_mode, with_data
from shoestring.ir.tracing.results import Results

aten = torch.ops.aten


def layout(t: torch.Tensor) -> tuple[Any, ...]:
    return (*t.shape, t.stride(), t.storage_offset(), t.dtype, t.is_conj(), t.is_neg())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.booleans(), st.data())
def test_one_of_a_dimension(shape: list[int], conj: bool, data: st.DataObject) -> None:
    dtype = torch.complex64 if conj else torch.float32
    real = torch.zeros([2, *shape], dtype=dtype)[1].permute(*reversed(range(len(shape))))
    fake = fake_mode()
    results = Results(fake)
    with fake:
        given = aten.zeros([2, *shape], dtype=dtype)[1].permute(*reversed(range(len(shape))))
        given = given.conj() if conj else given
    real = real.conj() if conj else real
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    index = data.draw(st.integers(-5, 5))

    def select() -> torch.Tensor:
        def run() -> torch.Tensor:
            with fake:
                return given.select(dim, index)

        found: torch.Tensor = results.of_view(aten.select.int, (given, dim, index), {}, run)
        return found

    try:
        wanted = real.select(dim, index)
    except IndexError:
        with pytest.raises(IndexError):
            select()
        return
    assert layout(select()) == layout(wanted)
    assert select().untyped_storage()._cdata == given.untyped_storage()._cdata


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_fake_tensors_are_as_pytorch_makes_them(device: str) -> None:
    """The first is made by PyTorch's constructor, later ones after its example."""
    first, mode, where = fake_mode(), fake_mode(), torch.device(device)
    with_data(first, torch.empty(1, device="meta"), where)

    def data(*shape: int) -> torch.Tensor:
        return torch.empty_strided(shape, (1,) * len(shape), dtype=torch.bfloat16, device="meta")

    for shape in [(2, 3), (4,), (), (0, 5)]:
        mine, theirs = with_data(mode, data(*shape), where), FakeTensor(mode, data(*shape), where)
        assert type(mine) is FakeTensor and vars(mine) == vars(theirs)
        assert vars(mine) is not vars(with_data(mode, data(*shape), where))
        same = [torch._C._dispatch_keys(t) for t in (mine, theirs)]
        assert same[0] == same[1] and mine.device == theirs.device == where
        assert mine.shape == theirs.shape and mine.stride() == theirs.stride()
        assert not mine.requires_grad and mine.requires_grad_().requires_grad


def test_a_mode_ends_with_its_tensors() -> None:
    def used() -> weakref.ref[FakeTensorMode]:
        mode = fake_mode()
        for _ in range(2):
            with_data(mode, torch.empty(3, device="meta"), torch.device("cpu"))
        return weakref.ref(mode)

    mode = used()
    gc.collect()
    assert mode() is None
