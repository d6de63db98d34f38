"""Tensors without data, in PyTorch's fake tensor mode."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes as no_modes

_CPU = torch.device("cpu")


def fake_mode() -> FakeTensorMode:
    """A mode that remembers no results: PyTorch's memory of them stays for good."""
    mode = FakeTensorMode()
    mode.cache_enabled = False
    return mode


def empty(
    mode: FakeTensorMode, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...] | None
) -> FakeTensor:
    """A tensor on the CPU; row-major where no strides are given."""
    with no_modes():
        if stride is None:
            data = torch.empty(shape, dtype=dtype, device="meta")
        else:
            data = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        return FakeTensor(mode, data, _CPU)
