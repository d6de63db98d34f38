"""Programs as bytes, for a cache: the objects of the IR and those that refer to them.

What may be written is what programs are made of: dataclasses and enumerations of shoestring, plain
values, element types, tensors. Nothing else is read either, whatever the bytes say. Definitions of
ops go by name. The form is Python's pickle, for its speed, and good for one version of the code:
what is meant to last, or to be read, is the text form (`text.py`).
"""

from __future__ import annotations

import dataclasses
import io
import operator
import pickle
from collections.abc import Callable
from enum import Enum
from functools import cache
from typing import Any

import torch

from .errors import IRError
from .opdef import OpDef
from .ops import lookup
from .types import DTYPE_NAMES, DTYPES

_PACKAGE = __name__.partition(".")[0]


def dumps(value: Any) -> bytes:
    """A value made of what programs are made of, as bytes.

    Raises:
        IRError: SS2007 where it holds anything else.
    """
    file = io.BytesIO()
    try:
        _Writer(file, pickle.HIGHEST_PROTOCOL).dump(value)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise IRError("SS2007", f"writing a program: {error}") from error
    return file.getvalue()


def loads(data: bytes) -> Any:
    """What `dumps` was given. Values that were one object are one object again.

    Raises:
        IRError: SS2007 where the bytes are not those of a program of this version.
    """
    try:
        return _Reader(io.BytesIO(data)).load()
    except Exception as error:  # bytes can be wrong in any way
        raise IRError("SS2007", f"reading a program: {type(error).__name__}: {error}") from error


class _Writer(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        """How to make an object again: a function of `_Reader` and its arguments."""
        if isinstance(obj, OpDef):
            if lookup(obj.name) is not obj:
                raise pickle.PicklingError(f"{obj.name} is not the op that is known by this name")
            return lookup, (obj.name,)
        if isinstance(obj, torch.dtype):
            return _dtype, (DTYPE_NAMES[obj],)
        if isinstance(obj, torch.Tensor):
            return _tensor, _contents(obj)
        if isinstance(obj, Enum) or not dataclasses.is_dataclass(obj) or isinstance(obj, type):
            return NotImplemented  # `find_class` has the last word
        return type(obj), _fields(type(obj))(obj)


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        """Dataclasses and enumerations of ours, and what `_Writer` calls."""
        if (module, name) in _CALLED:
            return _CALLED[module, name]
        if module.partition(".")[0] == _PACKAGE:
            found = super().find_class(module, name)
            is_ours = isinstance(found, type) and found.__module__ == module
            if is_ours and (dataclasses.is_dataclass(found) or issubclass(found, Enum)):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} is no part of a program")


@cache
def _fields(cls: type) -> Callable[[Any], tuple[Any, ...]]:
    """What the constructor of a dataclass takes, of an object."""
    names = [f.name for f in dataclasses.fields(cls) if f.init]
    if len(names) < 2:
        return lambda value: tuple(getattr(value, name) for name in names)
    return operator.attrgetter(*names)


def _dtype(name: str) -> torch.dtype:
    return DTYPES[name]


def _contents(t: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    if type(t) is not torch.Tensor or t.requires_grad or t.device.type != "cpu":
        raise pickle.PicklingError(f"a constant is a plain tensor of the CPU, found {type(t)}")
    elements = t.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return t.dtype, tuple(t.shape), elements.view(torch.uint8).numpy().tobytes()


def _tensor(dtype: torch.dtype, shape: tuple[int, ...], data: bytes) -> torch.Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).reshape(shape)


_CALLED: dict[tuple[str, str], Any] = {
    **{(f.__module__, f.__qualname__): f for f in (lookup, _dtype, _tensor)},
    ("builtins", "complex"): complex,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
}
