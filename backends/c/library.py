"""Ops that run as PyTorch kernels: the out variant of an op, or a way around its absence."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload

from shoestring.ir import Op
from shoestring.ir.errors import IRError
from shoestring.ir.ops import find_overload
from shoestring.ir.ops.aten import PLACEMENT_ARGS, is_tensor_arg

from ..instructions import Way
from .direct import DIRECT

Call = Callable[[], None]


@cache
def find_out_variant(name: str) -> OpOverload | None:
    """The overload of `name` that takes its results as arguments; None where there is none.

    One that PyTorch generates from `name` is none: it computes results of its own and copies them.
    """
    try:
        overload = find_overload(name)
    except IRError:
        return None
    wanted = _plain_arguments(overload)
    packet = overload.overloadpacket
    for candidate_name in packet.overloads():
        candidate: OpOverload[..., Any] = getattr(packet, candidate_name)
        has_out = any(a.is_out for a in candidate._schema.arguments)
        if torch.Tag.generated in candidate.tags:
            continue
        if has_out and _plain_arguments(candidate) == wanted:
            return candidate
    return None


def _plain_arguments(overload: OpOverload) -> list[tuple[str, str]]:
    """Names and types: `mul.Scalar` and `mul.Tensor` differ in the types alone."""
    arguments = overload._schema.arguments  # pyright: ignore[reportPrivateUsage]
    return [
        (a.name, str(a.type)) for a in arguments if not a.is_out and a.name not in PLACEMENT_ARGS
    ]


# Ops whose definition in the IR differs from PyTorch's own, or whose out variant misbehaves.
WITHOUT_OUT = frozenset(
    {
        "aten.as_strided.default",
        "aten.view.dtype",
        # These compute all elements in the result, or resize it, before they take the mean.
        "aten.binary_cross_entropy.default",
        "aten.huber_loss.default",
        "aten.mse_loss.default",
        "aten.smooth_l1_loss.default",
        "aten.soft_margin_loss.default",
    }
)


def way_of(op: Op) -> Way:
    """How a PyTorch kernel's results can reach memory of ours."""
    if op.name in DIRECT:
        return Way.DIRECT
    if op.name in WITHOUT_OUT or not op.name.startswith("aten."):
        return Way.COPIED
    out = find_out_variant(op.name)
    targets = [] if out is None else [str(a.type) for a in out._schema.arguments if a.is_out]  # pyright: ignore[reportPrivateUsage]
    return Way.OUT if targets == ["Tensor"] * len(op.results) and targets else Way.COPIED


def bind_call(op: Op, way: Way, operands: list[Any], outs: list[torch.Tensor]) -> Call:
    """The op as a call without arguments that fills `outs`."""
    if way is Way.DIRECT:
        direct = DIRECT[op.name]
        return lambda: direct(op, operands, outs)
    if way is Way.OUT:
        return _bind_out(op, operands, outs)
    reference, attrs = op.opdef.reference, dict(op.attrs)

    def copied() -> None:
        outcome = reference(*operands, **attrs)
        results = (outcome,) if isinstance(outcome, torch.Tensor) else outcome
        for result, out in zip((r for r in results if r is not None), outs, strict=True):
            out.copy_(result)

    return copied


def _bind_out(op: Op, operands: list[Any], outs: list[torch.Tensor]) -> Call:
    variant = find_out_variant(op.name)
    assert variant is not None
    rest, targets = iter(operands), iter(outs)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for a in variant._schema.arguments:  # pyright: ignore[reportPrivateUsage]
        if a.name in PLACEMENT_ARGS:
            continue
        if a.is_out:
            kwargs[a.name] = next(targets)
            continue
        value = next(rest) if is_tensor_arg(a) else op.attrs.get(a.name, a.default_value)
        if a.kwarg_only:
            kwargs[a.name] = value
        else:
            args.append(value)
    return lambda: variant(*args, **kwargs)
