"""Results without data that are made from memory have the layouts that PyTorch gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoestring.ir.fake import fake_mode
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
