"""Training a compiled step and PyTorch's own side by side."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from shoestring.runtime.step import Step

Loss = Callable[..., Tensor]


def train_both(
    model: nn.Module,
    compiled: Callable[[nn.Module], Step],
    loss: Loss,
    batch: Sequence[Tensor],
    *,
    lr: float,
    tolerance: float,
    equal_nan: bool = False,
) -> Step:
    """Two steps of SGD of each, with equal losses and parameters; the compiled step.

    Args:
        model: is copied for either side.
        compiled: makes the step of one copy, with the same `lr`.
    """

    def assert_near(found: Tensor, wanted: Tensor) -> None:
        torch.testing.assert_close(
            found, wanted, rtol=tolerance, atol=tolerance, equal_nan=equal_nan
        )

    mine, theirs = copy.deepcopy(model), copy.deepcopy(model)
    step = compiled(mine)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=lr)
    for _ in range(2):
        optimizer.zero_grad()
        wanted = loss(theirs, *batch)
        wanted.backward()
        optimizer.step()
        assert_near(step(*batch), wanted.detach())
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        assert_near(a, b)
    return step
