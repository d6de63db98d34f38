"""Attention forward and backward: generated kernels beside PyTorch's flash kernels, in turns.

    python benchmarks/attention.py [--seconds 3]

Queries, keys and values are views of one product, as in a model. Prints the best time of each and
GFLOP/s, in which a causal mask halves the work.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import torch  # noqa: E402
import tyro  # noqa: E402
from torch import Tensor  # noqa: E402

from shoestring.backends.c import CBackend, CExecutable  # noqa: E402
from shoestring.ir import Builder, Function, Role, TensorType, Value  # noqa: E402

FORWARD = "aten._scaled_dot_product_flash_attention_for_cpu"
Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """B, H, T, D, and what a query may see."""

    batch: int
    heads: int
    tokens: int
    size: int
    causal: bool
    padded: bool

    def __str__(self) -> str:
        mask = " causal" if self.causal else ""
        sizes = f"({self.batch}, {self.heads}, {self.tokens}, {self.size})"
        return sizes + mask + (" padded" if self.padded else "")

    @property
    def flops(self) -> float:
        """Of the forward pass: two products."""
        pairs = self.tokens * (self.tokens + 1) / 2 if self.causal else self.tokens**2
        return 4 * self.batch * self.heads * pairs * self.size


CASES = (
    Case(8, 6, 256, 64, True, False),
    Case(1, 12, 1024, 64, True, False),
    Case(32, 12, 128, 32, False, True),
)


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        seconds: time for one case in one precision.
        threads: threads of both sides.
    """

    seconds: float = 3.0
    threads: int = 2


def function(case: Case, dtype: torch.dtype) -> Function:
    """Forward and backward of one attention, as they stand in a training step."""
    f = Builder("attention")
    rows = (case.batch, case.tokens, case.heads, case.size)
    qkv = f.param(TensorType(dtype, (*rows[:2], 3, *rows[2:])), Role.BATCH, "#qkv")
    grad = f.param(TensorType(dtype, rows), Role.BATCH, "#grad")
    mask = None
    if case.padded:
        mask = f.param(TensorType(dtype, (case.batch, 1, 1, case.tokens)), Role.BATCH, "#mask")

    def heads(x: Value) -> Value:
        return f.emit("aten.permute.default", x, dims=(0, 2, 1, 3))

    q, k, v = (heads(f.emit("aten.select.int", qkv, dim=2, index=i)) for i in range(3))
    attrs = {"dropout_p": 0.0, "is_causal": case.causal, "scale": None}
    out, lse = f.emit_all(f"{FORWARD}.default", q, k, v, mask, **attrs)
    back = f.emit_all(f"{FORWARD}_backward.default", heads(grad), q, k, v, out, lse, mask, **attrs)
    for i, x in enumerate((out, *back)):
        f.output(f"{i}", x)
    return f.build()


def inputs(case: Case, dtype: torch.dtype) -> list[Tensor]:
    shape = (case.batch, case.tokens, 3, case.heads, case.size)
    tensors = [torch.randn(shape).to(dtype), torch.randn(shape).select(2, 0).contiguous().to(dtype)]
    if not case.padded:
        return tensors
    length = torch.randint(case.tokens // 2, case.tokens + 1, (case.batch, 1))
    seen = torch.arange(case.tokens) < length
    mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    return [*tensors, mask[:, None, None, :].to(dtype)]


def ours(executable: CExecutable, arguments: Sequence[Tensor]) -> list[Call]:
    """The two kernels."""
    executable.prepare(arguments)
    names = [i.name for i in executable.instructions]
    calls = [
        i for i, name in enumerate(names) if "attention" in name and not name.startswith("aten")
    ]
    assert len(calls) == 2, names
    return [partial(executable.call, i) for i in calls]


def theirs(case: Case, arguments: Sequence[Tensor]) -> list[Call]:
    q, k, v = (arguments[0].select(2, i).transpose(1, 2) for i in range(3))
    grad = arguments[1].transpose(1, 2)
    mask = arguments[2] if case.padded else None
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    out, lse = forward(q, k, v, 0.0, case.causal, attn_mask=mask)
    return [
        lambda: forward(q, k, v, 0.0, case.causal, attn_mask=mask),
        lambda: backward(grad, q, k, v, out, lse, 0.0, case.causal, attn_mask=mask),
    ]


def best_times(calls: Sequence[Call], seconds: float) -> list[float]:
    """The shortest run of each; all take turns."""
    best = [float("inf")] * len(calls)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def run(case: Case, dtype: torch.dtype, seconds: float) -> None:
    arguments = inputs(case, dtype)
    executable = CBackend().compile(function(case, dtype))
    mine = ours(executable, arguments)
    for call in mine:
        call()
    times = best_times([*mine, *theirs(case, arguments)], seconds)
    for name, one, two, factor in (
        ("forward", times[0], times[2], 1.0),
        ("backward", times[1], times[3], 2.5),
    ):
        rates = [case.flops * factor / t / 1e9 for t in (one, two)]
        print(
            f"| {case} | {str(dtype)[6:]} | {name} | {one * 1e3:.2f} ms, {rates[0]:.0f} GFLOP/s"
            f" | {two * 1e3:.2f} ms, {rates[1]:.0f} GFLOP/s | {two / one:.1f} |",
            flush=True,
        )


def main(options: Options) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    print("| B, H, T, D | type | | shoestring | PyTorch | ratio |")
    print("|---|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        for case in CASES:
            run(case, dtype, options.seconds)


if __name__ == "__main__":
    main(tyro.cli(Options))
