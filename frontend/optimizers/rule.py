"""What the frontend needs to know about one class of optimizer.

A rule is written with torch operations on one parameter, in place or not: the tracer turns it into
values. Hyper-parameters arrive as f64[] tensors, so a learning-rate schedule never recompiles;
which of them are zero, and every flag, is part of the program and is checked at each call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

State = dict[str, torch.Tensor]
# A number is a count that PyTorch keeps as a Python int: the rule reads it as f64[], and whoever
# runs the step adds one after each update.
InitialState = dict[str, "torch.Tensor | int"]


class Rule:
    """The update of one parameter.

    Attributes:
        needs_sparse: dense gradients are refused, as the optimizer itself does.
    """

    needs_sparse: ClassVar[bool] = False

    def init(self, p: torch.Tensor, group: Mapping[str, Any]) -> InitialState:
        """The optimizer state before the first step: PyTorch's names, sizes and types."""
        raise NotImplementedError

    def update(self, p: torch.Tensor, grad: torch.Tensor, state: State, h: Hyper) -> None:
        """Writes the parameter and its state in place."""
        raise NotImplementedError

    def refuses_sparse(self, group: Mapping[str, Any]) -> str:
        """Why sparse gradients are not taken with these options; empty where they are."""
        return "it takes dense gradients only"


def _no_first(key: str) -> torch.Tensor:
    raise NotImplementedError


@dataclass(frozen=True)
class Hyper:
    """The hyper-parameters of one parameter group while an update is traced.

    Attributes:
        group: the group as the user made it.
        tensor: gives the f64[] program input of a numeric hyper-parameter; a name may carry an
            index, as in `betas.0`.
        static: what the traced program depends on: name -> value; checked at each call.
        first: gives an f64[] program input: 1 where the state entry of that name has only just
            been made, else 0.
        touched: bool[rows], the rows of a sparse gradient; None where the gradient is dense.
    """

    group: Mapping[str, Any]
    tensor: Callable[[str], torch.Tensor]
    static: dict[str, Any] = field(default_factory=dict[str, Any])
    first: Callable[[str], torch.Tensor] = _no_first
    touched: torch.Tensor | None = None

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensor(name)

    def flag(self, name: str) -> Any:
        """A hyper-parameter as a fixed Python value."""
        return self._fact(name)

    def nonzero(self, name: str) -> bool:
        """Whether a number is other than zero; PyTorch skips its branch where it is not."""
        return bool(self._fact(f"{name} != 0"))

    def positive(self, name: str) -> bool:
        """Whether a number is greater than zero."""
        return bool(self._fact(f"{name} > 0"))

    def absent(self, name: str) -> bool:
        """Whether a hyper-parameter is None."""
        return bool(self._fact(f"{name} is None"))

    def _fact(self, key: str) -> Any:
        value = static_value(self.group, key)
        self.static[key] = value
        return value


def lookup(group: Mapping[str, Any], name: str) -> Any:
    """A hyper-parameter by name, or by name and index: `betas.1`."""
    head, _, index = name.partition(".")
    value = group[head]
    return value[int(index)] if index else value


def static_value(group: Mapping[str, Any], key: str) -> Any:
    """What a recorded static fact is now."""
    for ending, test in _TESTS.items():
        if key.endswith(ending):
            return test(lookup(group, key.removesuffix(ending)))
    return group.get(key)


_TESTS: dict[str, Callable[[Any], bool]] = {
    " != 0": lambda value: bool(value != 0),
    " > 0": lambda value: bool(value > 0),
    " is None": lambda value: value is None,
}


# -- pieces that many rules share ----------------------------------------------------------------


def scalar(value: float, group: Mapping[str, Any]) -> torch.Tensor:
    """A 0-d state entry in the type that PyTorch gives it: fused kernels want f32."""
    wide = torch.get_default_dtype() == torch.float64 and not group.get("fused")
    return torch.tensor(value, dtype=torch.float64 if wide else torch.float32)


def initial_lr(group: Mapping[str, Any]) -> float:
    """The learning rate as a number, be it one or a tensor of one element."""
    lr = group["lr"]
    return float(lr.item()) if isinstance(lr, torch.Tensor) else float(lr)


def advance(state: State) -> torch.Tensor:
    """Adds one to `step`; the new count as f64[], as exact as the Python float in eager mode."""
    return state["step"].add_(1).double()


def descent(grad: torch.Tensor, h: Hyper) -> torch.Tensor:
    """The gradient of what is minimized."""
    return -grad if h.flag("maximize") else grad


def decay(p: torch.Tensor, grad: torch.Tensor, h: Hyper) -> torch.Tensor:
    """The gradient with L2 regularization: g + weight_decay p."""
    return grad + p * h["weight_decay"] if h.nonzero("weight_decay") else grad


def decay_as(p: torch.Tensor, grad: torch.Tensor, h: Hyper, *, decoupled: bool) -> torch.Tensor:
    """Weight decay: decoupled from the gradient (p shrinks in place), or as L2 regularization."""
    if not decoupled:
        return decay(p, grad, h)
    if h.nonzero("weight_decay"):
        p.mul_(1 - h["lr"] * h["weight_decay"])
    return grad


def average(mean: torch.Tensor, value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Moves a running mean towards a value, in place: mean + weight (value - mean)."""
    return mean.add_((value - mean) * weight)


def average_square(mean: torch.Tensor, grad: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """The running mean of squares, in place: beta mean + (1 - beta) g^2."""
    return mean.mul_(beta).add_(grad * grad * (1 - beta))
