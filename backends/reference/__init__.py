"""The reference backend: the interpreter behind the contract of a backend; the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shoestring.ir import Function, interpret


@dataclass(frozen=True)
class ReferenceExecutable:
    """Runs a function op by op."""

    function: Function

    def run(self, arguments: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The outputs; parameters with a next value are overwritten in place."""
        outputs, nexts = interpret(self.function, arguments)
        # Everything is copied before anything is written: a next value or an output may be
        # another parameter itself, or share its storage.
        held = [t.detach().clone() for t in outputs]
        written = {path: t.detach().clone() for path, t in nexts.items()}
        with torch.no_grad():
            for p, argument in zip(self.function.params, arguments, strict=True):
                if p.next is not None:
                    argument.copy_(written[p.path])
        return held


@dataclass(frozen=True)
class ReferenceBackend:
    """Compiles to the interpreter."""

    name: str = "reference"

    def compile(self, function: Function) -> ReferenceExecutable:
        """The function itself, behind `run`."""
        return ReferenceExecutable(function)


__all__ = ["ReferenceBackend", "ReferenceExecutable"]
