"""Computes a linear layer, cross-entropy and their gradients in chunks of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from shoestring.ir import Function, Kind, Op, Value

from .base import Numerics, Pass, PassReport
from .liveness import measure
from .row_splitting import (
    NotSplittableError,
    Region,
    enclose,
    follow_rows,
    leaving,
    run_in_chunks,
)
from .rules.cross_entropy import EXPANDED, LOG_SOFTMAX, CrossEntropy

PRODUCTS = frozenset({"aten.mm.default", "aten.addmm.default"})
F32 = 4  # bytes


@dataclass(frozen=True)
class ChunkLoss(Pass):
    """Never holds all logits: a chunk of rows goes through product, loss and gradient by itself.

    The loss is written as pointwise ops and reductions of rows. Gradients of rows are joined,
    those of the weight and the bias are added up in the order of the rows. Whatever else is done
    to logits row by row (softcapping, z-loss, label smoothing, argmax) goes along. Where a reader
    needs the logits of all rows, nothing is changed. A target that is no class is an error before any
    parameter is updated, as in PyTorch.

    Attributes:
        chunk_bytes: bytes of one chunk's logits, as f32, where the other limits allow it.
        min_rows: every chunk but the last has at least so many rows.
        min_chunks: there are at least so many chunks, where each has enough rows.
        max_chunks: there are at most so many chunks.
        min_bytes: logits of fewer bytes, as f32, stay whole.

    Before:

        func @f {
          parameter %w: f32[64,4096] "w"
          batch %x: f32[256,64] "x"
          batch %t: i64[256] "t"
          %logits: f32[256,4096] = aten.mm.default(%x, %w)
          %p: f32[256,4096] = aten._log_softmax.default(%logits) {dim=1, half_to_float=false}
          %l: f32[], %n: f32[] = aten.nll_loss_forward.default(%p, %t, _) {reduction=2, ignore_index=-1}
          return l=%l
        }

    After (128 rows at a time, the targets' part once for all):

        func @f {
          parameter %w: f32[64,4096] "w"
          batch %x: f32[256,64] "x"
          batch %t: i64[256] "t"
          %l.8: i32[4096] = aten.arange.start_step() {start=0, end=4096, dtype=i32}
          %l.9: i32[256] = aten._to_copy.default(%t) {dtype=i32}
          %l.10: i32[256,1] = aten.view.default(%l.9) {size=[256, 1]}
          %x.1: f32[128,64] = aten.slice.Tensor(%x) {start=0, end=128}
          %logits.1: f32[128,4096] = aten.mm.default(%x.1, %w)
          %p.1.1: f32[128,1] = aten.amax.default(%logits.1) {dim=[1], keepdim=true}
          %p.2.1: f32[128,4096] = aten.sub.Tensor(%logits.1, %p.1.1)
          %p.3.1: f32[128,4096] = aten.exp.default(%p.2.1)
          %p.4.1: f32[128,1] = aten.sum.dim_IntList(%p.3.1) {dim=[1], keepdim=true}
          %l.10.1: i32[128,1] = aten.slice.Tensor(%l.10) {start=0, end=128}
          %l.11.1: bool[128,4096] = aten.ne.Tensor(%l.8, %l.10.1)
          %l.12.1: f32[128,4096] = aten.masked_fill.Scalar(%p.2.1, %l.11.1) {value=0.0}
          %l.13.1: f32[128,1] = aten.sum.dim_IntList(%l.12.1) {dim=[1], keepdim=true}
          %x.2: f32[128,64] = aten.slice.Tensor(%x) {start=128, end=256}
          %logits.2: f32[128,4096] = aten.mm.default(%x.2, %w)
          %p.1.2: f32[128,1] = aten.amax.default(%logits.2) {dim=[1], keepdim=true}
          %p.2.2: f32[128,4096] = aten.sub.Tensor(%logits.2, %p.1.2)
          %p.3.2: f32[128,4096] = aten.exp.default(%p.2.2)
          %p.4.2: f32[128,1] = aten.sum.dim_IntList(%p.3.2) {dim=[1], keepdim=true}
          %l.10.2: i32[128,1] = aten.slice.Tensor(%l.10) {start=128, end=256}
          %l.11.2: bool[128,4096] = aten.ne.Tensor(%l.8, %l.10.2)
          %l.12.2: f32[128,4096] = aten.masked_fill.Scalar(%p.2.2, %l.11.2) {value=0.0}
          %l.13.2: f32[128,1] = aten.sum.dim_IntList(%l.12.2) {dim=[1], keepdim=true}
          %p.4: f32[256,1] = aten.cat.default([%p.4.1, %p.4.2])
          %l.13: f32[256,1] = aten.cat.default([%l.13.1, %l.13.2])
          %l.1: bool[256] = aten.eq.Scalar(%t) {other=-1}
          %l.2: f32[4096] = aten.full.default() {size=[4096], fill_value=1.0, dtype=f32}
          %l.3: i64[256] = aten.masked_fill.Scalar(%t, %l.1) {value=0}
          %l.4: i64[256] = aten.view.default(%l.3) {size=[256]}
          %l.5: f32[256] = aten.index_select.default(%l.2, %l.4) {dim=0}
          %l.6: f32[256] = aten.view.default(%l.5) {size=[256]}
          %l.7: f32[256] = aten.masked_fill.Scalar(%l.6, %l.1) {value=0.0}
          %l.14: f32[256,1] = aten.log.default(%p.4)
          %l.15: f32[256,1] = aten.sub.Tensor(%l.13, %l.14)
          %l.16: f32[256] = aten.view.default(%l.15) {size=[256]}
          %l.17: f32[256] = aten.neg.default(%l.16)
          %l.18: f32[256] = aten.mul.Tensor(%l.17, %l.7)
          %l.19: f32[256] = aten.masked_fill.Scalar(%l.18, %l.1) {value=0.0}
          %l: f32[] = aten.sum.default(%l.19)
          return l=%l
        }
    """  # noqa: E501  (IR text)

    chunk_bytes: int = 8 << 20
    min_rows: int = 128
    min_chunks: int = 4
    max_chunks: int = 32
    min_bytes: int = 2 << 20

    numerics: ClassVar[Numerics] = Numerics.REASSOCIATING

    def run(self, function: Function) -> tuple[Function, PassReport]:
        report = PassReport()
        for op in function.ops:
            if op.name != LOG_SOFTMAX:
                continue
            report.matched += 1
            try:
                function = self._rewrite(function, op, report)
                report.changed += 1
            except NotSplittableError as reason:
                report.skip(str(reason), op.loc)
        return function, report

    def _rewrite(self, function: Function, anchor: Op, report: PassReport) -> Function:
        """The function with one loss in chunks.

        Raises:
            NotSplittableError: with the reason why not.
        """
        if anchor not in function.ops:
            raise NotSplittableError("another loss of the same logits took it along")
        logits = anchor.inputs[0].type
        if not logits.is_static or logits.rank < 2:
            raise NotSplittableError("logits of a static shape [rows, classes] are required")
        if logits.numel * F32 < self.min_bytes:
            raise NotSplittableError(f"the logits take less than {self.min_bytes} B")
        seeds = _products(function, anchor)
        chosen = [op for op in _touching(function, seeds) if op.name in EXPANDED]
        region = _region(CrossEntropy(function, chosen).run(), seeds)
        units = self._units(region, seeds[0])
        result = run_in_chunks(region, units)
        report.note(_summary(function, result, region, units, seeds[0].result.type.static_shape))
        return result

    def _units(self, region: Region, product: Op) -> int:
        """How many units of rows one chunk has; all chunks are of about one size."""
        rows, classes = product.result.type.static_shape
        most = max(1, self.chunk_bytes // (F32 * classes))
        wanted = max(-(-rows // most), self.min_chunks)
        chunks = min(wanted, self.max_chunks, rows // self.min_rows, region.units)
        return -(-region.units // max(1, chunks))


def _summary(
    before: Function, after: Function, region: Region, units: int, logits: tuple[int, ...]
) -> str:
    rows = logits[0] // region.units * units
    chunks = -(-region.units // units)
    peaks = measure(before).peak, measure(after).peak
    return (
        f"{logits[0]} rows of {logits[1]} logits in {chunks} chunks of {rows}, "
        f"peak of live values {peaks[0]} B -> {peaks[1]} B"
    )


def _products(function: Function, anchor: Op) -> list[Op]:
    """The matrix products that logits are made of, by pointwise ops and reshapes.

    Raises:
        NotSplittableError: where they are made of anything else.
    """
    numel = anchor.inputs[0].type.numel
    found: dict[Op, None] = {}
    seen: set[Value] = set()
    stack = [anchor.inputs[0]]
    while stack:
        v = stack.pop()
        if v in seen or 2 * v.type.numel <= numel:
            continue
        seen.add(v)
        op = function.producer(v)
        if op is not None and op.name in PRODUCTS:
            found[op] = None
        elif op is None or op.opdef.kind not in (Kind.POINTWISE, Kind.VIEW):
            raise NotSplittableError("the logits are not the product of rows and a weight")
        else:
            stack += op.inputs
    if not found:
        raise NotSplittableError("the logits are not made of a product, but of smaller values")
    return [op for op in function.ops if op in found]


def _large(function: Function, seeds: list[Op]) -> set[Value]:
    """Everything of the size of logits that is made of them."""
    large = {op.result for op in seeds}
    for op in function.ops:
        if op.opdef.kind is Kind.CONTRACTION:
            continue
        most = max((v.type.numel for v in op.inputs if v in large), default=0)
        large.update(r for r in op.results if most and 2 * r.type.numel > most)
    return large


def _touching(function: Function, seeds: list[Op]) -> list[Op]:
    large = _large(function, seeds)
    return [op for op in function.ops if not large.isdisjoint((*op.inputs, *op.results))]


def _region(function: Function, seeds: list[Op]) -> Region:
    """What has to run in chunks so that no value is as large as all logits.

    Raises:
        NotSplittableError: where that is not possible.
    """
    ops = enclose(function, _touching(function, seeds))
    half = seeds[0].result.type.numel // 2
    region = follow_rows(function, ops, dict.fromkeys(seeds, 0), half)
    large = _large(function, seeds)
    for v, reader in leaving(region).items():
        if v in large and region.rows[v] is not None:
            raise NotSplittableError(f"the logits, or what is as large, are kept for {reader}")
    if region.units < 2 and seeds[0].result.type.static_shape[0] > 1:
        raise NotSplittableError("a reshape or slice leaves no rows to cut between")
    return region
