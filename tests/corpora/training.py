"""Eager against compiled, step by step."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from benchmarks.workloads import shake
from torch.overrides import TorchFunctionMode

import shoestring
from shoestring.backends.c import CBackend
from shoestring.ir import Function, parse, print_function, same_structure, verify
from shoestring.ir.errors import ShoestringError
from shoestring.ir.serialize import dumps, loads

from .families import Batch, Family, Unbuildable, build, loss_fn

STEPS = 10
SHAKES = 3
LossFn = Callable[[torch.nn.Module, Batch], torch.Tensor]
LIMIT = {torch.float32: 1e-4, torch.float64: 1e-9}


@dataclass(frozen=True)
class Outcome:
    """How a family fared.

    Attributes:
        kind: `equal`, `refused`, `MISMATCH`, `crash` (an exception without a code), `unbuildable`
            (eager PyTorch cannot run it either) or `rounding`: equal in fp64, or in fp64 no further
            from eager than eager is from itself with weights one unit in the last place away (the
            farthest of `SHAKES`); in fp32 rounding grows beyond the limit, through a top-k or batch
            norms of few numbers.
        detail: numbers, or the error.
        worst: the largest relative difference of a loss.
    """

    kind: str
    detail: str
    worst: float = 0.0


class Wide(TorchFunctionMode):
    """Single precision becomes double where a model asks for it by name, as most norms do."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        def widen(given: Any) -> Any:
            return torch.float64 if given is torch.float32 else given

        if func is torch.Tensor.float:
            func = torch.Tensor.double
        named = {name: widen(value) for name, value in (kwargs or {}).items()}
        return func(*map(widen, args), **named)


def wide_loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """The loss in double precision throughout."""
    with Wide():
        return loss_fn(model, batch)


def train(family: Family, *, double: bool = False, backend: str = "c") -> Outcome:
    """Ten steps of AdamW, eager and compiled."""
    try:
        model, batch = build(family)
        if double:
            model = model.double()
            batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        loss = wide_loss if double else loss_fn
        wanted = eager_losses(copy.deepcopy(model), batch, loss)
    except Unbuildable as error:
        return Outcome("unbuildable", _line(error))
    except Exception as error:
        return Outcome("unbuildable", f"eager: {_line(error)}")
    if not all(map(math.isfinite, wanted)):
        return Outcome("unbuildable", "eager: the loss is not finite")
    shaken = [_shaken(model, seed) for seed in range(SHAKES)] if double else []
    outcome = compare(model, batch, wanted, loss, backend)
    if outcome.kind != "MISMATCH":
        return outcome
    if double:
        own = max(_worst(eager_losses(m, batch, loss), wanted) for m in shaken)
        kind = "rounding" if outcome.worst <= own else "MISMATCH"
        return Outcome(kind, f"{outcome.detail}, eager's own {own:.1e}")
    again = train(family, double=True, backend=backend)
    kind = "rounding" if again.kind in ("equal", "rounding") else "MISMATCH"
    return Outcome(kind, f"{outcome.detail}; f64: {again.detail}")


def _shaken(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """A copy with each weight at most one unit in the last place away."""
    model = copy.deepcopy(model)
    shake(model, seed)
    return model


def _worst(got: list[float], wanted: list[float]) -> float:
    return max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(got, wanted, strict=True))


def compare(
    model: torch.nn.Module,
    batch: Batch,
    wanted: list[float],
    loss_fn: LossFn = loss_fn,
    backend: str = "c",
) -> Outcome:
    """The compiled losses, after the default passes, against those of eager PyTorch."""
    start = time.perf_counter()
    try:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        with programs_from_bytes():
            step = shoestring.compile(model, loss_fn, optimizer, (batch,), backend=backend)
        function = next(iter(step.programs.values())).captured.function
        seconds = time.perf_counter() - start
        check_text(function)
        got = [float(step(batch)) for _ in wanted]
    except ShoestringError as error:
        return Outcome("refused", str(error).replace("\n", " |"))
    except Exception as error:
        return Outcome("crash", f"{type(error).__name__}: {_line(error)}")
    limit = LIMIT[next(p.dtype for p in model.parameters() if p.dtype in LIMIT)]
    worst = _worst(got, wanted)
    ok = worst <= limit
    losses = f"loss {got[0]:.4f} -> {got[-1]:.4f}"
    numbers = f"{len(function.ops)} ops, {seconds:.1f} s, worst {worst:.1e}, {losses}"
    return Outcome("equal" if ok else "MISMATCH", numbers, worst)


@contextmanager
def programs_from_bytes() -> Iterator[None]:
    """What is compiled runs as a program does that an earlier process has kept."""
    lower = CBackend.lower
    with patch.object(CBackend, "lower", lambda self, f: loads(dumps(lower(self, f)))):
        yield


def refused_list() -> dict[str, str]:
    """Name -> code of what is known to be refused. The list only shrinks."""
    text = (Path(__file__).parent / "refused.txt").read_text()
    return {line.split("\t")[0]: line.split("\t")[1] for line in text.splitlines()}


def eager_losses(
    model: torch.nn.Module, batch: Batch, loss_fn: LossFn = loss_fn, steps: int = STEPS
) -> list[float]:
    """The losses of some steps without shoestring."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses: list[float] = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def check_text(function: Function) -> None:
    """The function is sound, and its text is the function."""
    verify(function)
    if not same_structure(parse(print_function(function)), function):
        raise AssertionError("the text form is another program")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
