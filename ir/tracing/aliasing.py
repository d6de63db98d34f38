"""Views and mutation while tracing: from aliased tensors to values that are never written.

A `Storage` holds the value of its root tensor. A tensor is the root seen through a chain of view
steps. Writing to a view computes the root anew by inverting the chain; other views of the storage
notice a newer version and are computed again when they are next read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import CaptureError
from ..function import Value
from ..types import TensorType

Emit = Callable[..., Value]


@dataclass(frozen=True, slots=True)
class Step:
    """One view op: `name(x, **attrs)` with the type of `x`."""

    name: str
    attrs: dict[str, Any]
    source: TensorType


@dataclass(eq=False)
class Storage:
    """The current value of a root tensor.

    Attributes:
        root: a tensor without data that has the root's sizes, strides and offset.
        base: the root's current value.
        version: how often it was written.
    """

    root: torch.Tensor
    base: Value
    version: int = 0


@dataclass(eq=False)
class Record:
    """What the tracer knows about one tensor."""

    tensor: torch.Tensor
    storage: Storage
    chain: tuple[Step, ...]
    value: Value
    version: int = 0
    keep: list[Any] = field(default_factory=list[Any])


def read(record: Record, emit: Emit) -> Value:
    """The tensor's value now."""
    if record.version != record.storage.version:
        value = record.storage.base
        for step in record.chain:
            value = emit(step.name, value, **step.attrs)
        record.value, record.version = value, record.storage.version
    return record.value


def write(record: Record, value: Value, emit: Emit) -> None:
    """Makes `value` the tensor's contents, and those of everything that shares its storage."""
    storage = record.storage
    sources = [storage.base]
    for step in record.chain[:-1]:
        sources.append(emit(step.name, sources[-1], **step.attrs))
    new = value
    for step, source in zip(reversed(record.chain), reversed(sources), strict=False):
        new = invert(step, source, new, emit)
    storage.base = new
    storage.version += 1
    record.value, record.version = value, storage.version


def invert(step: Step, source: Value, new: Value, emit: Emit) -> Value:
    """`source` with the elements that `step` shows replaced by `new`."""
    name, attrs = step.name, step.attrs
    if name in _SCATTERS:
        return emit(_SCATTERS[name], source, new, **attrs)
    if name in _RESHAPES:
        return emit("aten.view.default", new, size=source.type.shape)
    if name in _SELF_INVERSE:
        return emit(name, new, **attrs)
    if name == "aten.permute.default":
        dims = [d % len(attrs["dims"]) for d in attrs["dims"]]
        back = tuple(dims.index(i) for i in range(len(dims)))
        return emit(name, new, dims=back)
    if name == "aten.expand.default" and source.type.shape == new.type.shape:
        return new
    if name == "aten.view.dtype":
        return emit(name, new, dtype=source.type.dtype)
    if name == "aten.view_as_real.default":
        return emit("aten.view_as_complex.default", new)
    if name == "aten.view_as_complex.default":
        return emit("aten.view_as_real.default", new)
    raise CaptureError(
        "SS1014",
        f"writing in place through the view {name.removeprefix('aten.')} is not supported",
        hint="write to a copy (`x.clone()`) or use the out-of-place operation",
    )


_SCATTERS = {
    "aten.slice.Tensor": "aten.slice_scatter.default",
    "aten.select.int": "aten.select_scatter.default",
    "aten.diagonal.default": "aten.diagonal_scatter.default",
    "aten.as_strided.default": "aten.as_strided_scatter.default",
}
_RESHAPES = frozenset(
    f"aten.{n}"
    for n in (
        "view.default",
        "_unsafe_view.default",
        "_reshape_alias.default",
        "unsqueeze.default",
        "squeeze.default",
        "squeeze.dim",
        "squeeze.dims",
    )
)
_SELF_INVERSE = frozenset({"aten.t.default", "aten.transpose.int"})
