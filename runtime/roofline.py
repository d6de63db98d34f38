"""How long each instruction of a step takes, and how long it would take at the machine's peak.

The roofline of an instruction is the longer of two times: its operations at the best rate of a
product, its bytes at the best rate of a copy. Both rates are measured in the same process.
Source: Williams, Waterman and Patterson, "Roofline", CACM 52(4), 2009.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from shoestring.backends.c import CExecutable
from shoestring.backends.c.accounting import work_of_op
from shoestring.backends.instructions import CallKernel, CallTorch, Instruction, Work

from .executor import Executor

REPEATS = 5
SIDES = (256, 1024)  # of the matrices whose product gives the peak, a trial first
COPIED = 1 << 26  # bytes, far beyond the caches


@dataclass(frozen=True)
class Peaks:
    """Best rates of this machine, with PyTorch's number of threads.

    Attributes:
        flops: element type of the factors -> FLOP/s of a matrix product; at least those of f32, to
            which factors can be widened.
        bandwidth: byte/s of a copy, read and written bytes together.
    """

    flops: dict[torch.dtype, float]
    bandwidth: float

    def seconds(self, work: Work) -> float:
        """The least time for some work."""
        return max(self._seconds_of(work))

    def bound(self, work: Work) -> str:
        """What the least time is for: `products` or `memory`."""
        products, memory = self._seconds_of(work)
        return "products" if products > memory else "memory"

    def _seconds_of(self, work: Work) -> tuple[float, float]:
        """Of its products, and of its way through memory."""
        rate = self.flops.get(work.dtype, self.flops[torch.float32])
        return work.flops / rate, work.bytes / self.bandwidth


def measure_peaks() -> Peaks:
    """The rates of PyTorch's products (f32, bf16, int8) and copies, each the best of a few."""
    single = _rate_of_products(torch.float32)
    flops = {torch.float32: single}
    for dtype in (torch.bfloat16, torch.int8):
        flops[dtype] = max(single, _rate_of_products(dtype, single / 10))
    source, target = torch.ones(COPIED, dtype=torch.uint8), torch.zeros(COPIED, dtype=torch.uint8)
    return Peaks(flops, 2 * COPIED / _best(lambda: target.copy_(source)))


def _rate_of_products(dtype: torch.dtype, least: float = 0.0) -> float:
    """FLOP/s; where a trial shows less than `least`, that of the trial.

    PyTorch's products of types that a machine does not multiply take a hundred times as long.
    """
    whole = dtype == torch.int8
    product, sums = (torch._int_mm, torch.int32) if whole else (torch.mm, dtype)
    rate = 0.0
    for side in SIDES:
        a, out = torch.ones(side, side, dtype=dtype), torch.empty(side, side, dtype=sums)
        rate = 2 * side**3 / _best(partial(product, a, a, out=out))
        if rate < least:
            break
    return rate


def _best(call: Callable[[], object]) -> float:
    seconds: list[float] = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


@dataclass
class Measured:
    """One kernel, or one library op, over all its calls in a step.

    Attributes:
        name: of the kernel or op.
        ops: what it carries out, in order.
        why: what kind of kernel it is, or why it is a library call.
        calls: in a step.
        seconds: of all calls of a step, the median over steps.
        least: seconds of all calls at the roofline.
        bound: what the roofline is for.
    """

    name: str
    ops: tuple[str, ...]
    why: str
    bound: str
    calls: int = 0
    seconds: float = 0.0
    least: float = 0.0

    @property
    def share_of_peak(self) -> float:
        """1 at the roofline. Above it where data comes from the caches."""
        return self.least / self.seconds if self.seconds else 0.0


def measure_kernels(
    executable: CExecutable, arguments: Sequence[torch.Tensor], peaks: Peaks, steps: int
) -> list[Measured]:
    """Times of everything in a step, the longest first.

    Args:
        executable: what to measure.
        arguments: parameters with a next value are overwritten, as by `run`.
        peaks: what the machine can do.
        steps: how many steps are timed, after one that is not.
    """
    times: list[list[float]] = []
    for _ in range(steps + 1):
        own: list[float] = []
        Executor(executable, lambda t, own=own: own.append(t.seconds)).run(arguments)  # type: ignore[misc]
        times.append(own)
    rows: dict[str, Measured] = {}
    for instruction, *seconds in zip(executable.instructions, *times[1:], strict=True):
        work = work_of(instruction)
        ops = instruction.ops if isinstance(instruction, CallKernel) else (instruction.name,)
        row = rows.setdefault(
            instruction.name,
            Measured(instruction.name, ops, _why(instruction), peaks.bound(work)),
        )
        row.calls += 1
        row.seconds += median(seconds)
        row.least += peaks.seconds(work)
    return sorted(rows.values(), key=lambda r: -r.seconds)


def work_of(instruction: Instruction) -> Work:
    """What an instruction has to do at least."""
    if isinstance(instruction, CallKernel):
        return instruction.work
    if isinstance(instruction, CallTorch):
        return work_of_op(instruction.op, instruction.regions)
    return Work(bytes=sum(r.nbytes for r in instruction.regions))


def _why(instruction: Instruction) -> str:
    if isinstance(instruction, CallTorch):
        return f"PyTorch: {instruction.why or 'no generated code for this op'}"
    return instruction.why
