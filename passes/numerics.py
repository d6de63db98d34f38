"""Compares what two functions compute, with the reference interpreter as the judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from shoestring.ir import Function, Op, Value, in_row_major_order, run_op

# Relative to the largest element of the expected tensor; sums in another order stay well within.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 4e-2}

RUNS_IN_VAIN = 8  # disturbed runs in a row that explain nothing
RunOp = Callable[[Op, Mapping[Value, torch.Tensor]], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Difference:
    """The first output or state in which two functions differ."""

    what: str
    detail: str

    def __str__(self) -> str:
        return f"{self.what}: {self.detail}"


def evaluate(
    function: Function, arguments: Sequence[torch.Tensor], run: RunOp = run_op
) -> dict[str, torch.Tensor]:
    """`output loss`, `state layer.weight`, ... -> its tensor.

    Elements lie in row-major order, from a fresh start, after each op: torch sums strided
    operands in another order, and in the IR a value has no strides.

    Args:
        function: what to run.
        arguments: one tensor a parameter.
        run: how to run one op.
    """
    pairs = zip(function.params, arguments, strict=True)
    env: dict[Value, torch.Tensor] = {p.value: _settle(t.detach()) for p, t in pairs}
    last = {v: i for i, op in enumerate(function.ops) for v in (*op.inputs, *op.results)}
    keep = set(function.results)
    with torch.no_grad():
        for index, op in enumerate(function.ops):
            results = (_settle(t) for t in run(op, env))
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
    expected: dict[str, torch.Tensor],
    found: dict[str, torch.Tensor],
    *,
    exact: bool,
    disturbed: Callable[[int], dict[str, torch.Tensor]] | None = None,
) -> Difference | None:
    """The first output or state that differs; None where all agree.

    Some numbers are rounding and nothing else: the gradient of a bias of keys is zero, and Adam
    makes a whole step of what is left of it. Elements that are off are therefore looked up in
    disturbed runs of what gave `expected`, until one of them is as far from it, or `RUNS_IN_VAIN`
    in a row have found none.

    Args:
        expected: name -> tensor.
        found: the same names.
        exact: whether bits have to be equal.
        disturbed: the outcome, by a seed; None where rounding is no excuse.
    """
    wrong: dict[str, torch.Tensor] = {}
    for what, a in expected.items():
        if what not in found:
            return Difference(what, "is missing")
        b = found[what]
        if a.dtype != b.dtype or a.shape != b.shape:
            return Difference(what, f"{a.dtype}{list(a.shape)} became {b.dtype}{list(b.shape)}")
        wrong[what] = wrong_elements(a, b, None if exact else TOLERANCE.get(a.dtype, 0.3))
    wrong = _only_marked(wrong)
    if disturbed is not None and not exact:
        wrong = unexplained(expected, found, wrong, disturbed)
    for what, elements in wrong.items():
        return Difference(what, _describe(expected[what], found[what], elements))
    return None


def unexplained(
    expected: dict[str, torch.Tensor],
    found: dict[str, torch.Tensor],
    wrong: dict[str, torch.Tensor],
    disturbed: Callable[[int], dict[str, torch.Tensor]],
) -> dict[str, torch.Tensor]:
    """Those of the wrong elements that no disturbed run takes as far."""
    off = {what: _distance(expected[what], found[what]) for what in wrong}
    seed = vain = 0
    while wrong and vain < RUNS_IN_VAIN:
        seed += 1
        other = disturbed(seed)
        reach = {what: _distance(expected[what], other[what]) for what in wrong}
        left = {what: w & ~(off[what] <= reach[what]) for what, w in wrong.items()}
        vain = 0 if any(not torch.equal(left[what], wrong[what]) for what in wrong) else vain + 1
        wrong = _only_marked(left)
    return wrong


def _only_marked(marks: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {what: m for what, m in marks.items() if bool(m.any())}


def _distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    wide = torch.complex128 if a.dtype.is_complex else torch.float64
    return (a.to(wide) - b.to(wide)).abs()


def wrong_elements(a: torch.Tensor, b: torch.Tensor, tolerance: float | None) -> torch.Tensor:
    """Those that differ: by more than a part of the largest element or, with None, by a bit."""
    if tolerance is None or not a.dtype.is_floating_point or not a.numel():
        return ~_equal_bits(a, b)
    x, y = a.double(), b.double()
    finite = x.isfinite() & y.isfinite()
    scale = float(torch.where(finite, x, 0).abs().max())
    wrong = (x - y).abs() > tolerance * scale
    return torch.where(finite, wrong, ~_equal_bits(x, y))


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
