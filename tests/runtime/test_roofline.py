"""Times of kernels beside the least that their work takes."""

from __future__ import annotations

import torch

from shoestring.backends.c import CBackend
from shoestring.backends.instructions import Work
from shoestring.ir import parse
from shoestring.runtime.roofline import Peaks, measure_kernels, measure_peaks, work_of

PEAKS = Peaks({torch.float32: 100.0, torch.bfloat16: 200.0}, 10.0)
FUNCTION = """
func @f {
  batch %x: f32[8,16] "x"
  batch %y: f32[16,32] "y"
  %p: f32[8,32] = aten.mm.default(%x, %y)
  %e: f32[8,32] = aten.exp.default(%p)
  %s: f32[8,32] = aten.cumsum.default(%e) {dim=1, dtype=none}
  return s=%s
}
"""


def test_the_roofline_is_the_longer_of_two_times() -> None:
    assert PEAKS.seconds(Work(1000, 10)) == 10.0
    assert PEAKS.seconds(Work(1000, 10, torch.bfloat16)) == 5.0
    assert PEAKS.seconds(Work(10, 1000)) == 100.0
    assert PEAKS.bound(Work(1000, 10)) == "products" and PEAKS.bound(Work(10, 1000)) == "memory"


def test_work_of_a_product_and_its_epilogue() -> None:
    executable = CBackend().compile(parse(FUNCTION))
    product, cumsum = executable.instructions
    elements = 8 * 16 + 16 * 32 + 8 * 32
    assert work_of(product) == Work(2 * 8 * 16 * 32, 4 * elements)
    assert work_of(cumsum).bytes == 4 * 2 * 8 * 32


def test_every_instruction_is_measured_and_says_why() -> None:
    executable = CBackend().compile(parse(FUNCTION))
    rows = measure_kernels(executable, [torch.randn(8, 16), torch.randn(16, 32)], PEAKS, 2)
    assert sum(r.calls for r in rows) == len(executable.instructions)
    assert all(r.seconds > 0 and r.why for r in rows)
    assert any(r.why == "product, 1 ops on each block of it" for r in rows)
    assert any(r.why.startswith("PyTorch: ") for r in rows)


def test_peaks_are_rates() -> None:
    """Factors of fewer bits are never slower: where a machine does not multiply them they widen."""
    peaks = measure_peaks()
    single = peaks.flops[torch.float32]
    assert single > 1e8 and peaks.bandwidth > 1e7
    assert all(rate >= single for rate in peaks.flops.values())
    assert peaks.flops.keys() == {torch.float32, torch.bfloat16, torch.int8}
