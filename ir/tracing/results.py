"""Results without data, remembered: the same op on the same sizes is run under fake tensors once.

`FakeTensorMode` has such a memory too, but looks at twenty facts of every tensor before it answers;
most of the time of a capture would go there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)

from ..fake import with_data

Key = tuple[Any, ...]
_SELECT: OpOverload = torch.ops.aten.select.int


@dataclass(frozen=True, slots=True)
class _Layout:
    """A result; of one that is no view, in memory of its own."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Results:
    """The memory of one fake tensor mode."""

    def __init__(self, fake: FakeTensorMode) -> None:
        self.fake = fake
        self._known: dict[Key, tuple[type | None, tuple[_Layout | None, ...]]] = {}
        self._views: dict[Key, tuple[tuple[int, ...], tuple[int, ...], int]] = {}

    def of(self, func: OpOverload, args: Any, kwargs: Any, run: Callable[[], Any]) -> Any:
        """What `run()` gives, which calls an op that neither writes nor makes views."""
        key = self._key(func, args, kwargs)
        if key is None:
            return run()
        found = self._known.get(key)
        if found is not None:
            return self._make(*found)
        outcome = run()
        described = _describe(outcome)
        if described is not None:
            self._known[key] = described
        return outcome

    def of_view(self, func: OpOverload, args: Any, kwargs: Any, run: Callable[[], Any]) -> Any:
        """What `run()` gives, which calls an op whose result is a view of its first argument."""
        if func is _SELECT and not kwargs and self._remembers and type(args[0]) is FakeTensor:
            place = _selected(*args)  # steps of a recurrence take another element each
            if place is not None:
                return self._view(args[0], *place)
        plain = self._key(func, args, kwargs)
        key = None if plain is None else (plain, args[0].storage_offset())
        found = self._views.get(key) if key is not None else None
        if found is not None:
            return self._view(args[0], *found)
        outcome = run()
        if key is not None and type(outcome) is FakeTensor and type(args[0]) is FakeTensor:
            layout = _layout(outcome)
            if layout is not None and layout.dtype == args[0].dtype:
                self._views[key] = (layout.shape, layout.stride, int(outcome.storage_offset()))
        return outcome

    def _view(
        self, base: FakeTensor, shape: tuple[int, ...], stride: tuple[int, ...], offset: int
    ) -> torch.Tensor:
        data = torch.empty((0,), dtype=base.dtype, device="meta")
        with in_kernel_invocation_manager(self.fake):
            data.set_(base.untyped_storage(), offset, shape, stride)  # pyright: ignore
        return with_data(self.fake, data, base.fake_device)

    @property
    def _remembers(self) -> bool:
        """Whether sizes are numbers, and no other mode would see the call."""
        return self.fake.shape_env is None and not torch._C._len_torch_dispatch_stack()  # pyright: ignore[reportPrivateUsage]

    def _key(self, func: OpOverload, args: Any, kwargs: Any) -> Key | None:
        if not self._remembers:
            return None
        key = (func, torch.get_default_dtype(), facts(args), facts(tuple(kwargs.items())))
        try:
            hash(key)
        except TypeError:
            return None
        return key

    def _make(self, kind: type | None, layouts: tuple[_Layout | None, ...]) -> Any:
        made = [None if one is None else self._tensor(one) for one in layouts]
        return made[0] if kind is None else kind(made)

    def _tensor(self, one: _Layout) -> torch.Tensor:
        data = torch.empty_strided(one.shape, one.stride, dtype=one.dtype, device="meta")
        return with_data(self.fake, data, one.device)


def _selected(
    base: torch.Tensor, dim: Any, index: Any
) -> tuple[tuple[int, ...], tuple[int, ...], int] | None:
    """Shape, strides and offset of `base.select(dim, index)`; None where PyTorch should decide."""
    shape, strides = tuple(base.shape), base.stride()
    if type(dim) is not int or type(index) is not int or not -len(shape) <= dim < len(shape):
        return None
    dim %= len(shape)
    if not -shape[dim] <= index < shape[dim] or base.is_conj() or base.is_neg():
        return None
    offset = int(base.storage_offset()) + index % shape[dim] * strides[dim]
    return (*shape[:dim], *shape[dim + 1 :]), (*strides[:dim], *strides[dim + 1 :]), offset


def facts(given: Any) -> Any:
    """Numbers with their types, for 1 == 1.0 == True; tensors by their layout without offset."""
    if isinstance(given, torch.Tensor):
        layout = (given.dtype, tuple(given.shape), given.stride())
        # Of a fake tensor `device` is a call through the dispatcher.
        device = given.fake_device if isinstance(given, FakeTensor) else given.device
        return (*layout, device, given.is_conj(), given.is_neg())
    if isinstance(given, (list, tuple)):
        return tuple([facts(g) for g in given])  # pyright: ignore[reportUnknownVariableType]
    return (type(given), given)  # pyright: ignore[reportUnknownVariableType]


def _describe(outcome: Any) -> tuple[type | None, tuple[_Layout | None, ...]] | None:
    """How to make such results again; None where that is not known."""
    if isinstance(outcome, torch.Tensor):
        one = _layout(outcome)
        return None if one is None else (None, (one,))
    if type(outcome) not in (tuple, list):
        return None
    layouts = [None if t is None else _layout(t) for t in outcome]
    known = all((a is None) == (b is None) for a, b in zip(layouts, outcome, strict=True))
    return (type(outcome), tuple(layouts)) if known else None


def _layout(t: Any) -> _Layout | None:
    if type(t) is not FakeTensor or t.layout is not torch.strided or t.is_conj() or t.is_neg():
        return None
    if t.constant is not None:
        return None
    return _Layout(tuple(t.shape), t.stride(), t.dtype, t.fake_device)
