"""`shoestring verify`: the compiled step against eager PyTorch, and each pass on its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tyro.conf import OmitArgPrefixes

from shoestring.backends.c import CExecutable
from shoestring.ir.errors import PassError
from shoestring.runtime.executor import find_mismatches
from shoestring.runtime.plain import is_tuple
from shoestring.runtime.step import batch_tensors

from .compare import relative_difference
from .program import Source
from .workload import DataOptions, ModelOptions, OptimizerOptions, Program, positive

FAILED = 1
TOLERANCE = {"fp32": 2e-4, "bf16": 2e-2}
ROUNDING = {"fp32": None, "bf16": torch.bfloat16}  # None: of the weights' own type
SENSITIVITY = 10  # how much more than PyTorch's own rounding differences state may differ

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class VerifyOptions:
    """What to verify.

    Attributes:
        model: `module:factory`; factory() gives (model, loss_fn, optimizer, example_batch) and
            must give equal weights each time. By default the model of `shoestring train`.
        backend: what runs the compiled step.
        steps: how many steps are compared.
        tolerance: largest relative difference of losses and of state, by tensor. State may differ
            more where PyTorch's own does when the initial weights move by one rounding: Adam
            makes full steps of gradients that are mere noise, such as those of key biases. By
            default 2e-4, and 2e-2 for bf16, where PyTorch runs under autocast.
        passes: also check each pass with the reference interpreter, and find the first wrong one.
    """

    model: str | None = None
    backend: str = "c"
    steps: int = 3
    tolerance: float | None = None
    passes: bool = True

    def __post_init__(self) -> None:
        positive("steps", self.steps)


@dataclass(frozen=True)
class Verify:
    """Compares a compiled step with plain PyTorch, and each pass with the program before it."""

    what: OmitArgPrefixes[VerifyOptions] = field(default_factory=VerifyOptions)
    shape: OmitArgPrefixes[ModelOptions] = field(default_factory=lambda: ModelOptions(layers=2))
    data: OmitArgPrefixes[DataOptions] = field(default_factory=lambda: DataOptions(batch=2, seq=64))
    optimizer: OmitArgPrefixes[OptimizerOptions] = field(default_factory=OptimizerOptions)

    def run(self) -> int:
        """Verifies; exit code 1 where something differs by more than the tolerance."""
        source = Source(self.what.model, self.shape, self.data, self.optimizer)
        passes_agree = self._check_passes(source) if self.what.passes else True
        return 0 if self._check_steps(source) and passes_agree else FAILED

    @property
    def _tolerance(self) -> float:
        own = self.what.tolerance
        return TOLERANCE[self.shape.precision] if own is None else own

    def _compile(self, program: Program) -> Any:
        return _compile(program, self.what.backend, self.data.seed, self.shape.precision)

    def _check_passes(self, source: Source) -> bool:
        from shoestring.passes.pipeline import check
        from shoestring.passes.registry import default_pipeline

        function, arguments = captured(source)
        try:
            passes = default_pipeline(precision=self.shape.precision)
            result = check(function, arguments, passes, every=True)
        except PassError as error:
            print(f"passes: FAILED\n{error}")
            return False
        for record in result.records:
            compared = record.name in result.compared
            state = "compared, agrees" if compared else "not compared, changes the numbers"
            print(f"pass {record.name} ({record.numerics.value}): {state}")
        return True

    def _check_steps(self, source: Source) -> bool:
        ours, next_ours = source.make()
        theirs, next_theirs = source.make()
        moved, next_moved = source.make()
        move_by_one_rounding(moved[0], ROUNDING[self.shape.precision])
        step = self._compile(ours)
        good = True
        for number in range(1, self.what.steps + 1):
            a, b = _loss(step(*next_ours())), _eager_step(theirs, next_theirs, self.shape)
            _eager_step(moved, next_moved, self.shape)
            text = f"step {number}: loss {a:.6f}, eager {b:.6f}"
            good &= self._tell(text, _loss_error(a, b), self._tolerance)
        good &= self._compare_state(*(p[0].state_dict() for p in (ours, theirs, moved)))
        print("the compiled step agrees with PyTorch" if good else "the compiled step DIFFERS")
        if not good:
            self._locate(source)
        return good

    def _locate(self, source: Source) -> None:
        """Tells the first instructions whose results are not those of the reference."""
        program, next_batch = source.make()
        batch = next_batch()
        step = self._compile(program)
        built = step.program(batch)
        if not isinstance(built.executable, CExecutable):
            return
        arguments = step.bind(built.captured, batch_tensors(batch))
        found = find_mismatches(built.executable, arguments)
        if not found:
            print("every instruction of the first step agrees with the reference interpreter")
        for m in found[:3]:
            print(f"%{m.value} is off by {m.error:.1e} at {m.loc}\n  {m.instruction}")

    def _compare_state(self, ours: State, theirs: State, moved: State) -> bool:
        """Tells of the tensor that is worst in relation to what it may differ."""
        errors, own = differences(ours, theirs), differences(moved, theirs)
        allowed = {n: max(self._tolerance, SENSITIVITY * own[n]) for n in errors}
        worst = max(errors, key=lambda n: errors[n] / (allowed[n] or 1.0), default="")
        if not worst:
            return True
        text = f"state after {self.what.steps} steps, worst {worst}"
        good = self._tell(text, errors[worst], allowed[worst])
        print(f"  PyTorch's own, from weights moved by one rounding: {own[worst]:.1e}")
        return good

    def _tell(self, text: str, error: float, allowed: float) -> bool:
        good = error <= allowed
        mark = "" if good else f"  ABOVE the tolerance of {allowed:.1e}"
        print(f"{text}: relative difference {error:.1e}{mark}")
        return good


def captured(source: Source) -> tuple[Any, list[torch.Tensor]]:
    """The function before any pass, and one argument a parameter."""
    program, next_batch = source.make()
    step = _compile(program, "reference", source.data.seed)
    batch = next_batch()
    built = step.program(batch)
    arguments = step.bind(built.captured, batch_tensors(batch))
    return built.captured.function, [t.detach() for t in arguments]


def _compile(program: Program, backend: str, seed: int, precision: str = "fp32") -> Any:
    import shoestring

    model, loss_fn, optimizer, batch = program
    return shoestring.compile(
        model, loss_fn, optimizer, batch, backend=backend, precision=precision, seed=seed
    )


def _eager_step(
    program: Program, next_batch: Callable[[], tuple[Any, ...]], shape: ModelOptions
) -> float:
    model, loss_fn, optimizer, _ = program
    optimizer.zero_grad(set_to_none=True)
    with shape.autocast():
        outcome: Any = loss_fn(model, *next_batch())
    loss: Any = outcome[0] if is_tuple(outcome) else outcome
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def _loss(outcome: Any) -> float:
    return float(outcome[0] if is_tuple(outcome) else outcome)


def _loss_error(a: float, b: float) -> float:
    return relative_difference(a, b) if math.isfinite(a) and math.isfinite(b) else math.inf


def move_by_one_rounding(model: torch.nn.Module, dtype: torch.dtype | None = None) -> None:
    """Multiplies each weight by 1 + eps or 1 - eps, at random; eps is of `dtype` or its own."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                signs = torch.randint(0, 2, p.shape, generator=generator) * 2 - 1
                p.mul_(1 + signs.to(p.dtype) * torch.finfo(dtype or p.dtype).eps)


def differences(ours: State, theirs: State) -> dict[str, float]:
    """By tensor, the largest difference relative to the largest element."""
    return {name: _difference(ours[name], expected) for name, expected in theirs.items()}


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    if not expected.numel():
        return 0.0
    a, b = found.detach().double(), expected.detach().double()
    scale, gap = float(b.abs().max()), float((a - b).abs().max())
    error = gap / scale if scale else gap
    return math.inf if math.isnan(error) else error
