"""Trains the same model twice, compiled and in eager mode, and compares everything after each step.

Eager PyTorch is the oracle: parameters and the whole of `optimizer.state_dict()` must agree.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import shoestring
from shoestring.runtime.step import Step

LossFn = Callable[..., torch.Tensor]
MakeOptimizer = Callable[[torch.nn.Module], torch.optim.Optimizer]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-6, torch.bfloat16: 2e-2}


class Shapes(torch.nn.Module):
    """One parameter of each kind of shape, and one that the loss does not reach."""

    def __init__(self, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.values = torch.nn.ParameterList(
            torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype))
            for shape in shapes
        )
        self.unused = torch.nn.Parameter(torch.ones(2, 2, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A loss whose gradient changes sign and size with the batch."""
        terms = [((p - x[i]) * (p * x[i + 1] + 0.5)).sin().sum() for i, p in enumerate(self.values)]
        return torch.stack(terms).sum() / len(terms)


def shapes_loss(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x)


def regression_loss(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return ((model(x) - y) ** 2).mean()


def small_model(dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = (torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    return torch.nn.Sequential(*layers).to(dtype)


def regression_batch(seed: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 4, generator=generator, dtype=dtype)
    return x, torch.randn(6, 3, generator=generator, dtype=dtype)


@dataclass
class Pair:
    """A model trained by a compiled step, and its twin trained in eager mode.

    Attributes:
        model: the compiled one; a copy of it is the twin.
        loss_fn: of both.
        make: builds an optimizer for a model.
        batch: an example.
        options: of `shoestring.compile`.
        rtol: relative tolerance of all comparisons; by default that of the model's type.
    """

    model: torch.nn.Module
    loss_fn: LossFn
    make: MakeOptimizer
    batch: tuple[torch.Tensor, ...]
    options: dict[str, Any] = field(default_factory=dict[str, Any])
    rtol: float | None = None

    def __post_init__(self) -> None:
        self.twin = copy.deepcopy(self.model)
        self.optimizer, self.twin_optimizer = self.make(self.model), self.make(self.twin)
        options = {"backend": "reference", **self.options}
        self.step: Step = shoestring.compile(
            self.model, self.loss_fn, self.optimizer, self.batch, **options
        )
        if self.rtol is None:
            self.rtol = TOLERANCE[next(self.model.parameters()).dtype]

    def eager(
        self, *batch: torch.Tensor, before_update: Callable[[], Any] | None = None
    ) -> torch.Tensor:
        """One step of the twin."""
        self.twin_optimizer.zero_grad()
        loss = self.loss_fn(self.twin, *batch)
        loss.backward()
        if before_update is not None:
            before_update()
        self.twin_optimizer.step()
        return loss.detach()

    def both(
        self, *batch: torch.Tensor, before_update: Callable[[], Any] | None = None
    ) -> torch.Tensor:
        """One step of each, compared."""
        loss = self.step(*batch)
        self.close(loss, self.eager(*batch, before_update=before_update))
        self.compare()
        return loss

    def compare(self) -> None:
        """Parameters and the whole state of the optimizer."""
        for (name, p), q in zip(self.model.named_parameters(), self.twin.parameters(), strict=True):
            self.close(p.detach(), q.detach(), name)
        mine, theirs = self.optimizer.state_dict(), self.twin_optimizer.state_dict()
        assert mine["param_groups"] == theirs["param_groups"]
        assert mine["state"].keys() == theirs["state"].keys()
        for key, state in theirs["state"].items():
            assert list(mine["state"][key]) == list(state)
            for name, value in state.items():
                self.close(mine["state"][key][name], value, f"{key}.{name}")

    def close(self, mine: Any, theirs: Any, what: str = "loss") -> None:
        assert type(mine) is type(theirs)
        assert self.rtol is not None
        torch.testing.assert_close(
            mine, theirs, rtol=self.rtol, atol=self.rtol, msg=lambda m: f"{what}: {m}"
        )
