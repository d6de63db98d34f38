"""The program that `explain` and `verify` look at: the default workload or one of the user's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .workload import (
    DataOptions,
    ModelOptions,
    OptimizerOptions,
    Program,
    WorkloadOptions,
    build,
    load_program,
)


@dataclass(frozen=True)
class Source:
    """How to make a fresh (model, loss_fn, optimizer, batches), equal at every call.

    Attributes:
        spec: `module:factory` of the user's, or None for the default workload.
        model: of the default workload.
        data: of the default workload; the seed is set before the user's factory is called too.
        optimizer: of the default workload.
    """

    spec: str | None
    model: ModelOptions
    data: DataOptions
    optimizer: OptimizerOptions

    def make(self) -> tuple[Program, Callable[[], tuple[Any, ...]]]:
        """A program, and what gives its next batch: for a user's program its example batch."""
        if self.spec is not None:
            torch.manual_seed(self.data.seed)  # pyright: ignore[reportUnknownMemberType]
            program = load_program(self.spec)
            return program, lambda: program[3]
        work = build(WorkloadOptions(self.model, self.data, self.optimizer))
        work.loader.prefetch = 0
        return (
            (work.model, work.loss_fn, work.optimizer, work.example_batch),
            lambda: next(work.loader),
        )
