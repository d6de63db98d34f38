"""Tensors without data, in PyTorch's fake tensor mode."""

from __future__ import annotations

from typing import Any

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
        return with_data(mode, data, _CPU)


def with_data(mode: FakeTensorMode, data: torch.Tensor, device: torch.device) -> FakeTensor:
    """A fake tensor on a device, of the layout of a meta tensor.

    But for the mode, PyTorch's constructor writes the same into all of a device; so it runs once.
    It takes twice as long as everything else here.
    """
    state = _STATES.get(device)
    if state is None or mode._allow_unsafe_data_ptr_access or data.requires_grad:  # pyright: ignore[reportPrivateUsage]
        made = FakeTensor(mode, data, device)
        if type(made) is FakeTensor and made.constant is None and made.real_tensor is None:
            # The mode of a capture ends with it.
            _STATES[device] = {k: v for k, v in vars(made).items() if v is not mode}
        return made
    made = torch.Tensor._make_subclass(  # pyright: ignore[reportPrivateUsage]
        FakeTensor, data, False, dispatch_device=True, device_for_backend_keys=device
    )
    torch._C._set_throw_on_mutable_data_ptr(made)  # pyright: ignore[reportPrivateUsage]
    vars(made).update(state)
    made.fake_mode = mode
    return made


_STATES: dict[torch.device, dict[str, Any]] = {}
