"""Running a compiled step by its instructions: timing, and checking against the reference."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from shoestring.backends.c import CExecutable
from shoestring.backends.instructions import Instruction
from shoestring.ir import Function, Loc, Op, Value, interpret
from shoestring.ir.errors import RuntimeFault
from shoestring.passes.disturbance import Disturbance
from shoestring.passes.numerics import unexplained, wrong_elements

# Largest relative difference by element type: ten roundings.
HALVES = {torch.bfloat16: 4e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Timing:
    """One execution of one instruction."""

    name: str
    seconds: float
    loc: Loc


@dataclass(frozen=True)
class Mismatch:
    """An instruction that gave something else than the reference.

    Attributes:
        instruction: as printed.
        value: the value's name.
        error: largest difference, relative to the largest element of the reference.
        loc: where the value comes from.
    """

    instruction: str
    value: str
    error: float
    loc: Loc


Hook = Callable[[Timing], None]


@dataclass
class Executor:
    """Runs an executable in the order of its instructions.

    Attributes:
        executable: what to run.
        on_instruction: called after each instruction; None runs without looking.

    Example:
        >>> timings = []
        >>> outputs = Executor(executable, timings.append).run(arguments)
    """

    executable: CExecutable
    on_instruction: Hook | None = None

    def run(self, arguments: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """As the executable's own `run`."""
        if self.on_instruction is None:
            return self.executable.run(arguments)
        return _run(self.executable, arguments, self._timed)

    def _timed(self, index: int, instruction: Instruction) -> None:
        start = time.perf_counter()
        self.executable.call(index)
        seconds = time.perf_counter() - start
        assert self.on_instruction is not None
        self.on_instruction(Timing(instruction.name, seconds, instruction.loc))


def _run(
    executable: CExecutable,
    arguments: Sequence[torch.Tensor],
    step: Callable[[int, Instruction], None],
) -> list[torch.Tensor]:
    executable.prepare(arguments)
    last = len(executable.program.instructions)
    outputs: list[torch.Tensor] = []
    with torch.no_grad():
        for index, instruction in enumerate(executable.instructions):
            if index == last:
                outputs = executable.collect()
            step(index, instruction)
        if last == len(executable.instructions):
            outputs = executable.collect()
    executable.finish(arguments)
    return outputs


def find_mismatches(
    executable: CExecutable, arguments: Sequence[torch.Tensor], tolerance: float | None = None
) -> list[Mismatch]:
    """Runs the step once and compares every value in memory with the interpreter's.

    Each is then replaced by the interpreter's: what is off at an instruction is its own doing.
    Where rounding within the instruction moves an element as far, it is not off: Adam makes a
    whole step of a gradient that is nothing but rounding.

    Args:
        executable: what to check.
        arguments: parameters with a next value are overwritten, as by `run`.
        tolerance: largest difference, relative to the reference's largest element; by default
            that of `tolerance_of`.

    Returns:
        Everything that is off, in order of execution.
    """
    allowed = tolerance_of(executable.function) if tolerance is None else tolerance
    wanted = _reference_values(executable, arguments)
    found: list[Mismatch] = []

    def step(index: int, instruction: Instruction) -> None:
        executable.call(index)
        for value, region in instruction.results.items():
            found_here = executable.tensor(region)
            right = wanted[value]
            error = relative_error(found_here, right)
            if not error <= allowed and not _is_rounding(
                found_here, value, allowed, wanted, _ops_of(executable, instruction, value)
            ):
                found.append(Mismatch(str(instruction), value.name, error, instruction.loc))
            found_here.copy_(right)

    _run(executable, arguments, step)
    return found


def _ops_of(executable: CExecutable, instruction: Instruction, value: Value) -> list[Op]:
    """What an instruction does for one of its results, from what was in memory before."""
    function = executable.function
    stored = {p.value for p in function.params}
    stored.update(v for i in executable.instructions if i is not instruction for v in i.results)
    needed, ops = {value}, list[Op]()
    for op in reversed(function.ops):
        if not needed.isdisjoint(op.results):
            ops.insert(0, op)
            needed.update(v for v in op.inputs if v not in stored)
    return ops


def _is_rounding(
    found: torch.Tensor,
    value: Value,
    allowed: float,
    known: dict[Value, torch.Tensor],
    ops: Sequence[Op],
) -> bool:
    """Whether elements that are off by more than is allowed are so in some disturbed run too."""
    right = known[value]
    if not right.dtype.is_floating_point:
        return False
    off = wrong_elements(right, found, allowed)

    def disturbed(seed: int) -> dict[str, torch.Tensor]:
        disturbance, env = Disturbance(seed), dict(known)
        for op in ops:
            env.update(zip(op.results, disturbance.run_op(op, env), strict=True))
        return {value.name: env[value]}

    return not unexplained({value.name: right}, {value.name: found}, {value.name: off}, disturbed)


def tolerance_of(function: Function) -> float:
    """1e-3; or what roundings to halves cost, where the function has any.

    A sum in another order may fall on the other side of a rounding.
    """
    coarse = [e for t, e in HALVES.items() if any(v.type.dtype is t for v in function.values)]
    return max(coarse, default=1e-3)


def check(
    executable: CExecutable, arguments: Sequence[torch.Tensor], tolerance: float | None = None
) -> None:
    """Raises where any instruction's result is off, as `find_mismatches` finds it.

    Raises:
        RuntimeFault: SS5003 with the first instruction that gave something else.
    """
    found = find_mismatches(executable, arguments, tolerance)
    if found:
        allowed = tolerance_of(executable.function) if tolerance is None else tolerance
        first = found[0]
        what = (
            f"%{first.value} differs from the reference by {first.error:.3g} of its largest"
            f" element; {allowed:g} is allowed. {len(found)} values differ; this one is first"
        )
        hint = "report this as a bug; the backend 'reference' gives right results meanwhile"
        raise RuntimeFault("SS5003", what, f"{first.loc}\n  {first.instruction}", hint)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference over the reference's largest element; NaN and infinities must agree."""
    x, y = found.double(), wanted.double()
    same = (x == y) | (x.isnan() & y.isnan())
    if bool(same.all()):
        return 0.0
    if not bool((x.isfinite() == y.isfinite()).all()):
        return float("inf")
    finite = y[y.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    return float((x - y)[~same].abs().max()) / max(scale, 1e-30)


def _reference_values(
    executable: CExecutable, arguments: Sequence[torch.Tensor]
) -> dict[Value, torch.Tensor]:
    """Of all values, parameters before they are updated."""
    kept = {
        p.value: t.detach().clone()
        for p, t in zip(executable.function.params, arguments, strict=True)
    }

    def observe(op: Op, results: tuple[torch.Tensor, ...]) -> None:
        kept.update((v, t.detach().clone()) for v, t in zip(op.results, results, strict=True))

    interpret(executable.function, [t.detach().clone() for t in arguments], observe)
    return kept
