"""Compares what two functions compute, with the reference interpreter as the judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shoestring.ir import Function, Value, in_row_major_order, run_op

# Relative to the largest element of the expected tensor; sums in another order stay well within.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class Difference:
    """The first output or state in which two functions differ."""

    what: str
    detail: str

    def __str__(self) -> str:
        return f"{self.what}: {self.detail}"


def evaluate(function: Function, arguments: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """`output loss`, `state layer.weight`, ... -> its tensor.

    Elements lie in row-major order, from a fresh start, after each op: torch sums strided
    operands in another order, and in the IR a value has no strides.
    """
    pairs = zip(function.params, arguments, strict=True)
    env: dict[Value, torch.Tensor] = {p.value: _settle(t.detach()) for p, t in pairs}
    last = {v: i for i, op in enumerate(function.ops) for v in (*op.inputs, *op.results)}
    keep = set(function.results)
    with torch.no_grad():
        for index, op in enumerate(function.ops):
            results = (_settle(t) for t in run_op(op, env))
            env.update(zip(op.results, results, strict=True))
            for v in {*op.inputs, *op.results}:
                if last[v] == index and v not in keep:
                    del env[v]
    outcome = {f"output {o.name}": env[o.value] for o in function.outputs}
    return outcome | {
        f"{p.role.value} {p.path}": env[p.next] for p in function.params if p.next is not None
    }


def _settle(tensor: torch.Tensor) -> torch.Tensor:
    tensor = in_row_major_order(tensor)
    return tensor.clone() if tensor.storage_offset() else tensor


def difference(
    expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], *, exact: bool
) -> Difference | None:
    """The first output or state that differs; None where all agree."""
    for what, a in expected.items():
        detail = "is missing" if what not in found else _compare(a, found[what], exact)
        if detail:
            return Difference(what, detail)
    return None


def _compare(a: torch.Tensor, b: torch.Tensor, exact: bool) -> str:
    if a.dtype != b.dtype or a.shape != b.shape:
        return f"{a.dtype}{list(a.shape)} became {b.dtype}{list(b.shape)}"
    if exact or not a.dtype.is_floating_point:
        wrong = ~_equal_bits(a, b)
        return _describe(a, b, wrong) if bool(wrong.any()) else ""
    if not a.numel():
        return ""
    x, y = a.double(), b.double()
    finite = x.isfinite() & y.isfinite()
    scale = float(torch.where(finite, x, 0).abs().max())
    wrong = (x - y).abs() > TOLERANCE.get(a.dtype, 0.3) * scale
    wrong = torch.where(finite, wrong, ~_equal_bits(x, y))
    return _describe(a, b, wrong) if bool(wrong.any()) else ""


def _equal_bits(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Per element: equal with the sign of zeros, or both NaN."""
    if a.dtype.is_complex:
        parts = _equal_bits(torch.view_as_real(a), torch.view_as_real(b))
        return parts.all(dim=-1)
    if not a.dtype.is_floating_point:
        return a == b
    x, y = a.double(), b.double()
    return ((x == y) & (x.signbit() == y.signbit())) | (x.isnan() & y.isnan())


def _describe(a: torch.Tensor, b: torch.Tensor, wrong: torch.Tensor) -> str:
    """How many elements differ, and the first of them."""
    flat = wrong.reshape(-1)
    first = int(flat.to(torch.uint8).argmax())
    x, y = a.reshape(-1)[first].item(), b.reshape(-1)[first].item()
    return (
        f"{int(flat.sum())} of {flat.numel()} elements differ, element {first} was {x!r}, is {y!r}"
    )
