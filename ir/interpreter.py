"""The reference interpreter: runs a function op by op through the definitions' references."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .function import Function, Op, Operand, Value
from .opdef import Kind, results_of

# A value has no strides. Other kernels may refuse gaps in memory, or sum in the order of memory.
# These take any strides, but may round an element in a vector otherwise than one of an expanded
# operand (gelu does).
TAKES_STRIDES = frozenset({Kind.VIEW, Kind.POINTWISE, Kind.CREATION})

Observer = Callable[[Op, tuple[torch.Tensor, ...]], None]


def run_op(op: Op, env: Mapping[Value, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The op's results, given the tensors that it reads."""
    kind = op.opdef.kind
    outcome = op.opdef.reference(*(_bind(o, env, kind) for o in op.operands), **op.attrs)
    return results_of(outcome, op.attrs)


def interpret(
    function: Function, arguments: Sequence[torch.Tensor], observer: Observer | None = None
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Runs the function.

    Args:
        function: what to run.
        arguments: one tensor a parameter, in order; none is written to.
        observer: called after each op with its results.

    Returns:
        The outputs in order, and path -> next value for each parameter that has one.
    """
    env: dict[Value, torch.Tensor] = {
        p.value: t.detach() for p, t in zip(function.params, arguments, strict=True)
    }
    last_use = _last_uses(function)
    with torch.no_grad():
        for index, op in enumerate(function.ops):
            results = run_op(op, env)
            env.update(zip(op.results, results, strict=True))
            if observer is not None:
                observer(op, results)
            for v in last_use.get(index, ()):
                env.pop(v, None)
    outputs = [env[o.value] for o in function.outputs]
    nexts = {p.path: env[p.next] for p in function.params if p.next is not None}
    return outputs, nexts


def _last_uses(function: Function) -> dict[int, list[Value]]:
    """Index of an op -> the values that nobody reads after it."""
    last: dict[Value, int] = {}
    for index, op in enumerate(function.ops):
        last.update(dict.fromkeys((*op.inputs, *op.results), index))
    keep = set(function.results)
    table: dict[int, list[Value]] = {}
    for v, index in last.items():
        if v not in keep:
            table.setdefault(index, []).append(v)
    return table


def _bind(operand: Operand, env: Mapping[Value, torch.Tensor], kind: Kind) -> Any:
    if isinstance(operand, Value):
        tensor = env[operand]
        expanded = kind is Kind.POINTWISE and 0 in tensor.stride()
        settle = expanded or kind not in TAKES_STRIDES
        return in_row_major_order(tensor) if settle else tensor
    if isinstance(operand, tuple):
        return [None if v is None else _bind(v, env, kind) for v in operand]
    return operand


def in_row_major_order(tensor: torch.Tensor) -> torch.Tensor:
    """The same elements with the strides of a fresh tensor.

    `contiguous` leaves the stride of a dimension of size one as it is, by which matrix products
    choose their kernel, and so the order of their sums.
    """
    tensor = tensor.contiguous()
    if 1 not in tensor.shape:
        return tensor
    strides = [1]
    for size in reversed(tensor.shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tensor.as_strided(tensor.shape, strides[::-1])
