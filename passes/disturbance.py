"""How far rounding carries a program: runs of it in which every rounding falls otherwise."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from shoestring.ir import Kind, Op, Value, run_op

UNIT = {
    torch.float64: 2.0**-50,
    torch.float32: 2.0**-22,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}
QUIET = frozenset({Kind.VIEW, Kind.CREATION, Kind.RANDOM})
SUMS = frozenset({Kind.REDUCTION, Kind.CONTRACTION})
# These round as IEEE 754 says or not at all: nothing can differ that did not differ before. What
# selects an element of its operand must give this very element: gradients look for it.
EXACT = frozenset(
    f"aten.{name}"
    for name in """_to_copy.default clone.default neg.default abs.default where.self cat.default
    stack.default maximum.default minimum.default relu.default index.Tensor index_select.default
    gather.default slice_scatter.default select_scatter.default copy.default flip.default
    roll.default constant_pad_nd.default embedding.default amax.default amin.default max.default
    min.default max.dim min.dim aminmax.default median.default median.dim kthvalue.default
    sort.default sort.stable topk.default cummax.default cummin.default
    max_pool2d_with_indices.default""".split()
)


class Disturbance:
    """Runs ops with each computed number, and each that is summed up, about a unit in the last
    place away, up, down or not at all."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def run_op(self, op: Op, env: Mapping[Value, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """As `shoestring.ir.run_op`, disturbed where the op rounds."""
        if op.opdef.kind in QUIET or op.name in EXACT:
            return run_op(op, env)
        if op.opdef.kind in SUMS:
            env = {v: self._shaken(env[v]) for v in op.inputs}
        return tuple(map(self._shaken, run_op(op, env)))

    def _shaken(self, t: torch.Tensor) -> torch.Tensor:
        if t.dtype not in UNIT or not t.numel():
            return t
        noise = torch.randint(-1, 2, t.shape, generator=self._generator, dtype=torch.int8).double()
        return (t.double() * (1 + UNIT[t.dtype] * noise)).to(t.dtype)
