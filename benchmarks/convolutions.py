"""The products of ResNet-18's convolutions: kernels of ours beside PyTorch's, in turns.

    python benchmarks/convolutions.py [--images 32] [--rounds 8] [--dtype bfloat16]

Results are compared first. Prints the best time of each, and GFLOP/s as if padding were multiplied.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import torch  # noqa: E402
import tyro  # noqa: E402

from benchmarks.steps.tables import markdown  # noqa: E402
from shoestring.backends.c.tuning import both_ways, measure  # noqa: E402
from shoestring.cli.compare import machine  # noqa: E402
from shoestring.ir import Op, TensorType, trace  # noqa: E402

aten = torch.ops.aten
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of the largest element


@dataclass(frozen=True)
class Case:
    """Channels in and out, size of the image, taps and stride of one dimension."""

    channels: int
    out: int
    size: int
    taps: int
    stride: int = 1

    @property
    def places(self) -> int:
        return (self.size - 1) // self.stride + 1

    def __str__(self) -> str:
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        kernel = f"{self.taps} x {self.taps}{stride}"
        return f"{self.channels} -> {self.out}, {self.size} x {self.size}, {kernel}"


CASES = (
    Case(3, 64, 64, 7, 2), Case(64, 64, 16, 3), Case(64, 128, 16, 3, 2), Case(128, 128, 8, 3),
    Case(64, 128, 16, 1, 2), Case(128, 256, 8, 3, 2), Case(256, 256, 4, 3),
    Case(256, 512, 4, 3, 2), Case(512, 512, 2, 3),
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What to run.

    Attributes:
        images: of a batch.
        rounds: turns of each side.
        dtype: of all operands.
    """

    images: int = 32
    rounds: int = 8
    dtype: Literal["float32", "bfloat16"] = "float32"


def ops(case: Case, images: int, dtype: torch.dtype) -> Iterator[tuple[str, Op]]:
    """The three products, as a compiled step has them."""
    pad = case.taps // 2
    rest = [[case.stride] * 2, [pad] * 2, [1, 1], False, [0, 0], 1]

    def all_three(x: torch.Tensor, w: torch.Tensor, g: torch.Tensor) -> Any:
        dx, _, _ = aten.convolution_backward(g, x, w, None, *rest, [True, False, False])
        _, dw, _ = aten.convolution_backward(g, x, w, None, *rest, [False, True, False])
        return dx, dw, aten.convolution(x, w, None, *rest)

    shapes = [
        (images, case.channels, case.size, case.size),
        (case.out, case.channels, case.taps, case.taps),
        (images, case.out, case.places, case.places),
    ]
    function = trace(all_three, [TensorType(dtype, shape) for shape in shapes], "all_three")
    found = [op for op in function.ops if "convolution" in op.name]
    names = ("gradient of the input", "gradient of the weight", "result")
    return zip(names, found, strict=True)


def main(options: Options) -> None:
    dtype: torch.dtype = getattr(torch, options.dtype)
    facts = machine()
    print(
        f"{facts['processor']}, {facts['cores']} cores, torch {facts['torch']}, {options.dtype}\n"
    )
    rows: list[list[str]] = []
    own = library = 0.0
    for case in CASES:
        for name, op in ops(case, options.images, dtype):
            ways = both_ways(op)
            if ways is None:
                rows.append([str(case), name, "-", "-", "-", "-"])
                continue
            compare(op, *ways)
            times = measure(*ways, options.rounds)
            rate = op.opdef.cost(op).flops / times.own / 1e9
            ratio = f"{times.library / times.own:.2f}x"
            ms = [f"{1e3 * t:.2f}" for t in (times.own, times.library)]
            rows.append([str(case), name, *ms, ratio, f"{rate:.0f}"])
            own, library = own + times.own, library + times.library
    rows.append(
        ["all", "", f"{1e3 * own:.2f}", f"{1e3 * library:.2f}", f"{library / own:.2f}x", ""]
    )
    head = ("convolution", "product", "ours, ms", "PyTorch's, ms", "ours is", "GFLOP/s")
    print(markdown(head, rows))


def compare(op: Op, own: Any, library: Any) -> None:
    """Exits where the two results differ."""
    found = []
    for way in (own, library):
        way.call()
        found.append(way.out.double())
    difference = float((found[0] - found[1]).abs().max() / found[1].abs().max())
    if not difference <= LIMIT[op.results[0].type.dtype]:
        sys.exit(f"{op}: results differ by {difference:.1e}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
