"""Whether two runs agree, within what rounding explains.

First each tensor is held to the tolerance of its own element type. Where that fails, the program
itself is asked how far rounding carries: it is run with every floating-point result disturbed by
about one unit in the last place, and every element that is summed up too, and the spread of those
runs widens the tolerance. So a program
that is tame stays tightly checked, and one that amplifies rounding (a comparison of nearly equal
numbers, half precision) does not raise false alarms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from shoestring.ir import Function, Value, run_op
from shoestring.passes.disturbance import Disturbance

RELATIVE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
ABSOLUTE = {torch.float64: 1e-9, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SPREADS = 12.0  # how many times the observed spread is allowed
NOISY_RUNS = 4

Outcome = dict[str, torch.Tensor]


def mismatch(
    expected: Outcome, found: Outcome, spread: Callable[[], Outcome] | None = None
) -> str | None:
    """What differs first, in words; None where the runs agree.

    Args:
        expected: name -> tensor.
        found: the same names.
        spread: how far rounding carries each tensor; asked for only where a comparison fails.
    """
    for what, x in expected.items():
        if what not in found:
            return f"{what} is missing"
        y = found[what]
        if x.dtype != y.dtype or x.shape != y.shape:
            return f"{what}: {x.dtype}{list(x.shape)} became {y.dtype}{list(y.shape)}"
        detail = _differs(x, y, None)
        if detail and spread is not None:
            detail = _differs(x, y, spread().get(what))
        if detail:
            return f"{what}: {detail}"
    extra = sorted(set(found) - set(expected))
    return f"{extra[0]} should not exist" if extra else None


def _differs(x: torch.Tensor, y: torch.Tensor, slack: torch.Tensor | None) -> str:
    if not x.numel():
        return ""
    a, b = x.detach().double(), y.detach().double()
    finite = a.isfinite()
    scale = torch.where(finite, a, 0.0).abs().max()
    allowed = torch.full_like(a, RELATIVE.get(x.dtype, 0.0)) * scale + ABSOLUTE.get(x.dtype, 0.0)
    if slack is not None:
        allowed = allowed + SPREADS * slack
    same = (a == b) | (a.isnan() & b.isnan()) | ((a - b).abs() <= allowed)
    if bool(same.all()):
        return ""
    at = int((~same).reshape(-1).to(torch.uint8).argmax())
    count = int((~same).sum())
    pair = f"{a.reshape(-1)[at].item()!r} became {b.reshape(-1)[at].item()!r}"
    return f"{count} of {x.numel()} elements differ, element {at}: {pair}"


def disturbed(
    function: Function, arguments: Sequence[torch.Tensor], seed: int | None
) -> dict[Value, torch.Tensor]:
    """Runs a function with each computed number multiplied by 1 +- one unit in the last place.

    Returns the values that outputs and next values name. Without a seed nothing is disturbed.
    """
    run = run_op if seed is None else Disturbance(seed).run_op
    env = {p.value: t.detach() for p, t in zip(function.params, arguments, strict=True)}
    with torch.no_grad():
        for op in function.ops:
            env.update(zip(op.results, run(op, env), strict=True))
    return {v: env[v] for v in function.results}
