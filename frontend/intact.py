"""What a capture must leave as it was, and what the user's code must not do while it runs.

The user's code runs once, without data. What it does beside computing on tensors would happen once
instead of at every step: attributes that it sets become writes to state or are put back, and the
random numbers of Python and NumPy are refused.
"""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from shoestring.ir import Function, Tracer, same_structure, type_of
from shoestring.ir.errors import CaptureError

log = logging.getLogger("shoestring")

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
_STATE = ("_parameters", "_buffers", "_modules")
_TABLES = (*_STATE, *_HOOKS)


@dataclass(frozen=True)
class Carried:
    """Attributes that the user's code leaves changed, and that are no state of the program.

    Whether the next step would see them is found out by a second capture, in which they have the
    values that the first one left; a tensor is stood in for by one that nobody may read.
    """

    values: list[tuple[torch.nn.Module, str, str, Any]]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The modules as the next step would find them."""
        tables = [_table(module, value) for module, _, _, value in self.values]
        before = [dict(table) for table in tables]
        for table, (_, name, _, value) in zip(tables, self.values, strict=True):
            table[name] = value
        try:
            yield
        finally:
            for table, entries in zip(reversed(tables), reversed(before), strict=True):
                _refill(table, entries)

    def refuse_other(self, first: Function, second: Function) -> None:
        """Complains where the next step would be another program.

        Raises:
            CaptureError: SS1019.
        """
        if not same_structure(first, second, locations=False):
            raise self.refusal()

    def refusal(self) -> CaptureError:
        names = ", ".join(dict.fromkeys(full for _, _, full, _ in self.values))
        what = f"a step depends on what the step before it left in {names}"
        return CaptureError("SS1019", what, hint="keep it in a buffer, or pass it in the batch")


class Attributes:
    """The attributes of every module, as they were before the user's code ran.

    Attributes:
        earlier: what an earlier capture left, where this is the second.
        carried: what this capture leaves.
        with_history: tensors that were replaced by one through which a gradient flows.
    """

    def __init__(self, model: torch.nn.Module, carried: Carried | None = None) -> None:
        self.earlier = carried
        self.carried = Carried([])
        self.with_history: list[torch.Tensor] = []
        self._before = [
            (path, module, dict(vars(module)), {name: dict(vars(module)[name]) for name in _TABLES})
            for path, module in model.named_modules()
        ]

    def settle(self, tracer: Tracer) -> None:
        """Tensors that the user's code put in the place of others become their next values.

        Raises:
            CaptureError: SS1017 where the new tensor has another size or type.
        """
        for path, module, plain, tables in self._before:
            for name, old, new in _changed(module, plain, tables):
                full = f"{path}.{name}" if path else name
                if self._stands_in(old):
                    self._refuse_known(tracer, old)
                    continue
                if not isinstance(new, FakeTensor) or not isinstance(old, torch.Tensor):
                    self._carry(tracer, module, name, full, new)
                    continue
                if type_of(old) != type_of(new):
                    what = f"{full} is {type_of(old)} before the step and {type_of(new)} after it"
                    hint = "keep its size and type, or write into it in place"
                    raise CaptureError("SS1017", what, hint=hint)
                if new.requires_grad:
                    self.with_history.append(old)
                with torch.no_grad():
                    old.copy_(new.detach())

        for *_, value in self.earlier.values if self.earlier else ():
            self._refuse_known(tracer, value)

    def _stands_in(self, value: Any) -> bool:
        earlier = self.earlier.values if self.earlier else []
        return isinstance(value, torch.Tensor) and any(value is v for *_, v in earlier)

    def _refuse_known(self, tracer: Tracer, value: Any) -> None:
        if isinstance(value, torch.Tensor) and tracer.knows(value):
            assert self.earlier is not None
            raise self.earlier.refusal()

    def _carry(
        self, tracer: Tracer, module: torch.nn.Module, name: str, full: str, new: Any
    ) -> None:
        """Notes a tensor in the place of nothing, or a number, a text or a module that changes."""
        if isinstance(new, FakeTensor):
            log.warning("%s holds a tensor of the traced step; it is not kept up", full)
            with tracer.untraced():
                new = torch.zeros(new.shape, dtype=new.dtype)
        if isinstance(new, (bool, int, float, str, torch.Tensor)) or _is_lasting(new):
            self.carried.values.append((module, name, full, new))

    def restore(self) -> None:
        """Puts every attribute back. Hooks that the user's code has made are carried."""
        for path, module, plain, tables in self._before:
            for name, table in tables.items():
                if name in _HOOKS and list(vars(module)[name]) != list(table):
                    hooks = vars(module)[name].copy()
                    self.carried.values.append((module, name, f"{path}.{name}", hooks))
                _refill(vars(module)[name], table)
            _refill(vars(module), plain)


def _changed(
    module: torch.nn.Module, plain: dict[str, Any], tables: dict[str, dict[str, Any]]
) -> Iterator[tuple[str, Any, Any]]:
    pairs = [(plain, vars(module)), *((tables[t], vars(module)[t]) for t in _STATE)]
    for before, after in pairs:
        for name, new in after.items():
            if new is not before.get(name):
                yield name, before.get(name), new


def _table(module: torch.nn.Module, value: Any) -> dict[str, Any]:
    """Where a module keeps an attribute of that value."""
    return vars(module)["_modules"] if isinstance(value, torch.nn.Module) else vars(module)


def _is_lasting(value: Any) -> bool:
    """Whether it is a module, and none of its tensors was made by the traced step."""
    if not isinstance(value, torch.nn.Module):
        return False
    return not any(isinstance(t, FakeTensor) for t in (*value.parameters(), *value.buffers()))


def _refill(table: dict[str, Any], before: dict[str, Any]) -> None:
    if len(table) == len(before) and all(table.get(k, table) is v for k, v in before.items()):
        return
    table.clear()
    table.update(before)


@contextmanager
def no_hidden_randomness() -> Iterator[None]:
    """Refuses a program that draws from Python's or NumPy's generators, whose state it restores.

    Raises:
        CaptureError: SS1016.
    """
    numpy = sys.modules.get("numpy")
    states = random.getstate(), numpy.random.get_state(legacy=False) if numpy else None
    try:
        yield
        now = numpy.random.get_state(legacy=False) if numpy else None
        drawn = random.getstate() != states[0] or repr(now) != repr(states[1])
    finally:
        random.setstate(states[0])
        if numpy:
            numpy.random.set_state(states[1])
    if drawn:
        raise CaptureError(
            "SS1016",
            "the program draws random numbers from Python or NumPy, which a capture would freeze",
            hint="draw with torch.rand, or outside of the step and pass the numbers in the batch",
        )


class NoPeeking(TorchFunctionMode):
    """Refuses to hand a tensor's data to Python where the tracer would not see it."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _READS and not (func is torch.Tensor.tolist and isinstance(args[0], FakeTensor)):
            name = getattr(func, "__name__", "numpy")
            what = f"Python reads a tensor's values here, by .{name}()"
            hint = "compute with torch operations, or outside of the step"
            raise self.tracer.refusal("SS1001", what, hint)
        return func(*args, **(kwargs or {}))


_READS = frozenset({torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__})
