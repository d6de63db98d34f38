"""What an instruction has to do: operations, and bytes that it cannot avoid to read or write."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from shoestring.ir import Kind, Op

from ..instructions import Region, Work
from .groups import Unit
from .nodes import Base, Node, Ref
from .nodes import Work as NodeWork


def work_of_unit(unit: Unit, stored: set[Base]) -> Work:
    """Of a kernel: every op once, every view read from outside once, every stored result once."""
    nodes = [p.node for p in unit.nodes]
    own = {b for n in nodes for b in n.outs}
    read = {(r.base, r.layout): r for n in nodes for r in n.refs if r.base not in own}
    moved = sum(map(_bytes_read, read.values())) + sum(b.nbytes for b in own & stored)
    ops = dict.fromkeys(n.op for n in nodes)
    return Work(_flops(ops), moved, _factor_type(nodes))


def _bytes_read(ref: Ref) -> int:
    """An expanded view is read once."""
    return min(ref.layout.numel * ref.dtype.itemsize, ref.base.nbytes)


def work_of_op(op: Op, regions: Iterable[Region]) -> Work:
    """Of one op, between these regions."""
    regions = list(regions)
    moved = sum(r.nbytes for r in regions)
    half = any(r.dtype is torch.bfloat16 for r in regions)
    return Work(_flops([op]), moved, torch.bfloat16 if half else torch.float32)


def _flops(ops: Iterable[Op]) -> int:
    """Operations of the products among them, or of all where there is none.

    What surrounds a product runs beside it; what has no product is bound by memory.
    """
    ops = [op for op in ops if op.results]
    products = [op for op in ops if op.opdef.kind is Kind.CONTRACTION]
    return sum(op.opdef.cost(op).flops for op in products or ops)


def _factor_type(nodes: list[Node]) -> torch.dtype:
    products = [n for n in nodes if n.work is NodeWork.PRODUCT]
    return products[0].refs[0].dtype if products else torch.float32
