"""What a backend is: `compile` turns a function into an executable, `run` executes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from shoestring.ir import Function


@runtime_checkable
class Executable(Protocol):
    """A compiled function."""

    def run(self, arguments: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The outputs, in order, in storage that the next call does not overwrite.

        Args:
            arguments: one tensor a parameter, in order. A parameter with a `next` value is
                overwritten in place; all others are left as they are.
        """
        ...


@runtime_checkable
class Backend(Protocol):
    """Compiles functions for one target.

    It may also have `prepare()`, called before the program is captured, to begin with what does not
    depend on the program.
    """

    @property
    def name(self) -> str:
        """What `compile(backend=...)` calls it."""
        ...

    def compile(self, function: Function) -> Executable:
        """The function, ready to run.

        Raises:
            BackendError: SS4xxx, where the backend refuses the function.
        """
        ...


@runtime_checkable
class KeepingBackend(Backend, Protocol):
    """A backend whose work can be kept: the next process that has the same program loads it.

    Its `compile(function)` is `load(lower(function))`.
    """

    def identity(self) -> str:
        """Everything that `lower` depends on beside its argument and the code of shoestring: the
        backend's settings, the machine, other tools.

        Raises:
            BackendError: SS4xxx, where it cannot be known.
        """
        ...

    def lower(self, function: Function) -> Any:
        """All that is decided before the program is loaded, as `shoestring.ir.serialize` takes it.

        Raises:
            BackendError: SS4xxx, where the backend refuses the function.
        """
        ...

    def load(self, lowered: Any) -> Executable:
        """What `lower` gave, here or in another process, ready to run.

        Raises:
            BackendError: SS4xxx, where its code does not build.
        """
        ...
