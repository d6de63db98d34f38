"""What this machine can do, measured, and how long a step takes at least on such a machine.

`python -m benchmarks.steps.roofline` measures and prints JSON; `measure` does so in a process of
its own, which ends before anything else is timed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

from shoestring.backends.c.build import find_compiler
from shoestring.ir import Function, Kind, Role
from shoestring.ir.errors import BackendError

SOURCE = Path(__file__).with_name("peaks.c")
SIZES = (256, 1024, 2048)
REPEATS = 12
MM_SECONDS = 4.0
KEPT_ROLES = (Role.PARAMETER, Role.BUFFER, Role.MOMENT)


@dataclass(frozen=True)
class Peaks:
    """Best rates of all threads together.

    Attributes:
        fp32: FLOP/s, of a loop of fused multiply-adds or of `torch.mm`, whichever is faster.
        bf16: FLOP/s with bf16 factors, of dot products, tiles or `torch.mm`; at least `fp32`.
        bandwidth: byte/s between memory far beyond the caches and the cores.
        mm_fp32: FLOP/s of `torch.mm` alone.
        mm_bf16: FLOP/s of `torch.mm` alone.
    """

    fp32: float = 0.0
    bf16: float = 0.0
    bandwidth: float = 0.0
    mm_fp32: float = 0.0
    mm_bf16: float = 0.0

    def best(self, other: Peaks) -> Peaks:
        """The better of two measurements, rate by rate."""
        names = [f.name for f in fields(self)]
        return Peaks(**{n: max(getattr(self, n), getattr(other, n)) for n in names})


@dataclass(frozen=True)
class Work:
    """What a step does as it is written; passes may find that some of it is not needed.

    Attributes:
        product_flops: of matrix products, convolutions and attention.
        state_bytes: parameters, buffers and moments: those written count twice.
    """

    product_flops: int
    state_bytes: int

    @staticmethod
    def of(function: Function) -> Work:
        """The work of a captured step."""
        products = [op for op in function.ops if op.opdef.kind is Kind.CONTRACTION]
        kept = [p for p in function.params if p.role in KEPT_ROLES]
        moved = sum(p.value.type.nbytes * (1 if p.next is None else 2) for p in kept)
        return Work(sum(op.opdef.cost(op).flops for op in products), moved)

    def seconds(self, peaks: Peaks, precision: str) -> tuple[float, float]:
        """Seconds of the products at the peak, and of the state at the full bandwidth."""
        rate = peaks.bf16 if precision == "bf16" else peaks.fp32
        return (
            self.product_flops / rate if rate else 0.0,
            self.state_bytes / peaks.bandwidth if peaks.bandwidth else 0.0,
        )

    def floor(self, peaks: Peaks, precision: str) -> float:
        """Seconds of a step at the roofline: products, then the state's way through memory."""
        return sum(self.seconds(peaks, precision))


def measure(environment: dict[str, str]) -> Peaks:
    """The peaks, measured in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", __name__], env=environment, stdout=subprocess.PIPE, text=True
    )
    return Peaks(**json.loads(done.stdout)) if done.returncode == 0 else Peaks()


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Where the C loops are compiled, until this process ends."""
    return tempfile.TemporaryDirectory()


@cache
def _native() -> str | None:
    """The compiled C loops; None without a C compiler."""
    binary = str(Path(_folder().name) / "peaks")
    try:
        command = [find_compiler(), "-O3", "-march=native", "-fopenmp", "-ffp-contract=fast"]
        subprocess.run([*command, str(SOURCE), "-o", binary], check=True, capture_output=True)
    except (BackendError, subprocess.CalledProcessError):
        return None
    return binary


def _native_rates(*words: str) -> dict[str, float]:
    """What the C loops print; empty without a C compiler."""
    binary = _native()
    if binary is None:
        return {}
    lines = subprocess.run([binary, *words], stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return {name: float(rate) for name, rate in map(str.split, lines)}


def travel() -> float:
    """Seconds that a cache line takes from one core to another; 0 where that is unknown.

    About 40 ns between cores that share a cache, several times as long between others; the host of
    a virtual machine may move its cores from one to the other.
    """
    return _native_rates("travel").get("travel", 0.0)


def _mm_rate(dtype: torch.dtype) -> float:
    """The best of some sizes; where a type has no fast product, of those that are done in time."""
    best, stop = 0.0, time.perf_counter() + MM_SECONDS
    for n in SIZES:
        a, b = torch.ones(n, n, dtype=dtype), torch.ones(n, n, dtype=dtype)
        for _ in range(REPEATS):
            start = time.perf_counter()
            if start + (2 * n**3 / best if best else 0.0) > stop:
                return best
            torch.mm(a, b)
            best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def _copy_rate() -> float:
    """A fallback for the bandwidth without a C compiler."""
    a, b = torch.ones(1 << 26), torch.zeros(1 << 26)
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        b.copy_(a)
        best = max(best, 2 * a.nbytes / (time.perf_counter() - start))
    return best


def _peaks() -> Peaks:
    native: dict[str, Any] = _native_rates()
    mm_fp32, mm_bf16 = _mm_rate(torch.float32), _mm_rate(torch.bfloat16)
    fp32 = max(mm_fp32, native.get("fma_fp32", 0.0))
    bf16 = max(fp32, mm_bf16, native.get("dot_bf16", 0.0), native.get("tile_bf16", 0.0))
    bandwidth = max(native.get("read_bytes", 0.0), native.get("update_bytes", 0.0))
    return Peaks(fp32, bf16, bandwidth or _copy_rate(), mm_fp32, mm_bf16)


if __name__ == "__main__":
    print(json.dumps(asdict(_peaks())))
