"""Running a function on a backend and on the reference, and comparing everything."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from shoestring.backends import Backend, get_backend
from shoestring.backends.c import CBackend, CExecutable
from shoestring.ir import Function, TensorType, trace, verify


def tolerance(dtype: torch.dtype) -> tuple[float, float]:
    """Relative and absolute: a few units in the last place."""
    table = {
        torch.float64: (1e-12, 1e-12), torch.float32: (2e-6, 1e-6),
        torch.float16: (2e-3, 1e-3), torch.bfloat16: (1e-2, 1e-2),
    }  # fmt: skip
    return table.get(dtype, (0.0, 0.0))


def copies(arguments: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Fresh tensors with the same strides."""
    out: list[torch.Tensor] = []
    for t in arguments:
        if 0 in t.stride() and t.numel() > 1:
            out.append(t)  # expanded: nobody can write to it
            continue
        new = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
        out.append(new.copy_(t))
    return out


def difference(
    found: torch.Tensor, wanted: torch.Tensor, rtol: float | None = None, atol: float | None = None
) -> str:
    """What is wrong with `found`; empty where nothing is."""
    own = tolerance(wanted.dtype)
    rtol, atol = own[0] if rtol is None else rtol, own[1] if atol is None else atol
    try:
        torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol, equal_nan=True)
    except AssertionError as error:
        bad = ~torch.isclose(found.double(), wanted.double(), rtol=rtol, atol=atol, equal_nan=True)
        pairs = list(zip(found[bad].tolist(), wanted[bad].tolist(), strict=True))[:4]
        return f"{str(error).splitlines()[0]} (found, wanted): {pairs}"
    return ""


def traced(f: Callable[..., Any], arguments: Sequence[torch.Tensor]) -> Function:
    """What `f` does to tensors of these types."""
    return trace(f, [TensorType(t.dtype, tuple(t.shape)) for t in arguments], "f")


Call = tuple[Callable[..., Any], Sequence[torch.Tensor]]


def together(calls: Sequence[Call]) -> tuple[Function, list[torch.Tensor]]:
    """Functions of tensors, and what each is called with, as one: to build once is faster."""
    given = [t for _, tensors in calls for t in tensors]

    def f(*tensors: torch.Tensor) -> list[Any]:
        left = iter(tensors)
        return [g(*itertools.islice(left, len(own))) for g, own in calls]

    return traced(f, given), given


def compare(
    function: Function,
    arguments: Sequence[torch.Tensor],
    *,
    rtol: float | None = None,
    atol: float | None = None,
    runs: int = 2,
    backend: Backend | None = None,
) -> CExecutable:
    """Compiles, runs several times in a row, compares outputs and state with the reference's."""
    verify(function)
    executable = (backend or CBackend()).compile(function)
    reference = get_backend("reference").compile(function)
    mine, theirs = copies(arguments), copies(arguments)
    wrong: list[str] = []
    for run in range(runs):
        outputs, wanted = executable.run(mine), reference.run(theirs)
        for o, x, y in zip(function.outputs, outputs, wanted, strict=True):
            found = difference(x, y, rtol, atol)
            wrong += [f"output {o.name}, run {run}: {found}"] if found else []
        for p, x, y in zip(function.params, mine, theirs, strict=True):
            found = difference(x, y, rtol, atol)
            wrong += [f"{p.path} after run {run}: {found}"] if found else []
    assert not wrong, f"@{function.name}\n" + "\n".join(wrong)
    assert isinstance(executable, CExecutable)
    return executable
