"""Sparse gradients while tracing: dense ones, and which rows they have.

An embedding with `sparse=True` makes a gradient of the rows that it read. In the IR this is a dense
gradient; the mask of its rows is kept beside it for the optimizers that update no other rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..function import Phase, Value

if TYPE_CHECKING:
    from .tracer import Tracer


def coo_tensor(
    tracer: Tracer,
    sparse_dim: int,
    dense_dim: int,
    size: Sequence[int],
    indices: torch.Tensor,
    values: torch.Tensor,
    **options: Any,
) -> torch.Tensor:
    """What autograd calls for the gradient of an embedding, as a dense tensor."""
    if tracer.locator.phase is not Phase.BACKWARD or sparse_dim != 1:
        raise tracer.refusal("SS1012", "a sparse COO tensor is not supported")
    return row_gradient(tracer, size, indices[0], values)


def row_gradient(
    tracer: Tracer,
    size: Sequence[int],
    rows: torch.Tensor,
    values: torch.Tensor,
    kept: torch.Tensor | None = None,
) -> torch.Tensor:
    """The sum of `values[i]` in row `rows[i]`, remembered as sparse.

    Args:
        tracer: the active one.
        size: of the parameter.
        rows: i64[n].
        values: [n, ...].
        kept: bool[n], the positions that count; None for all.
    """
    marks = torch.ones(rows.shape, dtype=torch.float32)
    if kept is not None:
        marks = kept.to(torch.float32)
        values = torch.where(kept.reshape(-1, *(1 for _ in size[1:])), values, 0.0)
    dense = torch.zeros(size, dtype=values.dtype).index_add(0, rows, values)
    touched = torch.zeros(size[0], dtype=torch.float32).index_add(0, rows, marks) > 0
    tracer.touched[tracer.read(dense)] = touched
    return dense


def embedding_bag_backward(
    tracer: Tracer,
    grad: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor,
    offset2bag: torch.Tensor,
    bag_size: torch.Tensor,
    maximum_indices: torch.Tensor,
    num_weights: int,
    scale_grad_by_freq: bool,
    mode: int,
    sparse: bool,
    per_sample_weights: torch.Tensor | None,
    padding_idx: int = -1,
) -> Any:
    """The gradient of bags of embeddings, where it is sparse.

    `offset2bag` and `bag_size` are computed again: whether the forward pass fills them depends on
    the kernel that it picks.
    """
    if not sparse:
        return NotImplemented
    kept = indices != padding_idx
    bags = _bag_of_position(offsets, int(indices.shape[0]))
    values = grad.index_select(0, bags)
    if mode == MEAN:
        sizes = torch.zeros(grad.shape[0], dtype=grad.dtype)
        sizes = sizes.index_add(0, bags, kept.to(grad.dtype)).clamp(min=1.0)
        values = values / sizes.index_select(0, bags).unsqueeze(1)
    if per_sample_weights is not None:
        values = values * per_sample_weights.unsqueeze(1)
    return row_gradient(tracer, (num_weights, *grad.shape[1:]), indices, values, kept)


MEAN = 1  # what PyTorch calls the modes: sum, mean, max


def _bag_of_position(offsets: torch.Tensor, count: int) -> torch.Tensor:
    """i64[count]: how many bags begin at or before each position, less one."""
    begins = torch.zeros(count + 1, dtype=torch.int64)
    begins = begins.index_add(0, offsets, torch.ones(offsets.shape, dtype=torch.int64))
    return begins[:count].cumsum(0) - 1


def touched_rows(tracer: Tracer, gradient: torch.Tensor) -> torch.Tensor | None:
    """The rows of a sparse gradient as bool[rows]; None where the gradient is dense."""
    return _touched(tracer, tracer.read(gradient))


def _touched(tracer: Tracer, value: Value) -> torch.Tensor | None:
    """Follows what autograd does to a gradient on its way: copies, and sums of several uses."""
    if value in tracer.touched:
        return tracer.touched[value]
    op = tracer.producer(value)
    if op is None or op.name not in ("aten.clone.default", "aten.add.Tensor"):
        return None
    found: torch.Tensor | None = None
    for operand in op.inputs:
        mask = _touched(tracer, operand)
        if mask is None:  # sparse + dense is dense
            return None
        found = mask if found is None else torch.logical_or(found, mask)
    return found
