"""Stacks and concatenations whose parts are written where they belong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from shoestring.backends.c import CExecutable
from shoestring.ir import Builder, Role, parse_type

from .helpers import compare, traced

aten = torch.ops.aten


def run(f: Callable[..., Any], *tensors: Tensor) -> CExecutable:
    return compare(traced(f, tensors), tensors, rtol=1e-5, atol=1e-5)


def copies(executable: CExecutable) -> int:
    """Kernels that join."""
    ops = [getattr(i, "ops", ()) for i in executable.instructions]
    return sum("aten.stack.default" in o or "aten.cat.default" in o for o in ops)


def steps(w: Tensor, x: Tensor, count: int) -> list[Tensor]:
    """A recurrence of products, each a kernel of its own."""
    found: list[Tensor] = []
    for _ in range(count):
        x = torch.tanh(x @ w)
        found.append(x)
    return found


W, X = torch.randn(16, 16) / 4, torch.randn(8, 16)


def test_a_stack_of_steps() -> None:
    executable = run(lambda w, x: aten.stack(steps(w, x, 5)) @ w, W, X)
    assert copies(executable) == 0


def test_a_concatenation_of_rows() -> None:
    executable = run(lambda w, x: aten.cat(steps(w, x, 5)) @ w, W, X)
    assert copies(executable) == 0


def test_parts_and_the_whole_are_read_in_any_order() -> None:
    def f(w: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        a, b, c = steps(w, x, 3)
        whole = aten.stack([c, a, b])
        late = torch.exp(a) @ w
        return whole @ w, late + b, whole.sum(0) @ w, c @ w

    assert copies(run(f, W, X)) == 0


@pytest.mark.parametrize(
    "join",
    [
        lambda a, b, c: aten.stack([a, b, a]),  # one part twice
        lambda a, b, c: aten.cat([a, b[:3], c]),  # parts of parts
        lambda a, b, c: aten.stack([a, b, c], 1),  # not in order
        lambda a, b, c: aten.cat([a, b, c], -1),
        lambda a, b, c: aten.cat([aten.cat([a, b]), c]),  # of what is joined
        lambda a, b, c: aten.cat([a.new_ones(8, 16), b]),
    ],
)
def test_what_cannot_be_written_in_place_is_copied(join: Callable[..., Tensor]) -> None:
    assert copies(run(lambda w, x: join(*steps(w, x, 3)) * 2.0, W, X)) >= 1


def test_two_joins_of_the_same_parts() -> None:
    def f(w: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        parts = steps(w, x, 4)
        return aten.stack(parts).exp() @ w, aten.stack(parts[::-1]).exp() @ w

    assert copies(run(f, W, X)) == 1


def test_parts_that_do_not_begin_at_a_cache_line() -> None:
    assert copies(run(lambda w, x: aten.stack(steps(w, x[:, :5], 3)).exp(), W[:5, :5], X)) == 1


def test_results_and_state() -> None:
    """Joined results, joined parts that are results, a next value that is joined, and one that is
    a part."""
    b = Builder("f")
    w = b.param(parse_type("f32[16,16]"), Role.PARAMETER, "w")
    h = b.param(parse_type("f32[8,16]"), Role.BUFFER, "h")
    all_ = b.param(parse_type("f32[3,8,16]"), Role.BUFFER, "all")
    parts, x = [], h
    for _ in range(6):
        x = b.emit("aten.tanh.default", b.emit("aten.mm.default", x, w))
        parts.append(x)
    b.replace_state(h, parts[-1])
    b.replace_state(all_, b.emit("aten.stack.default", tuple(parts[:3])))
    b.output("last", b.emit("aten.stack.default", tuple(parts[3:])))
    b.output("one", parts[4])
    b.output("old", b.emit("aten.sum.default", all_))
    function = b.build()
    given = [torch.randn(p.value.type.static_shape) / 4 for p in function.params]
    compare(function, given, rtol=1e-5, atol=1e-5, runs=3)
    b.output("joined", b.emit("aten.cat.default", tuple(parts[1:3])))
    compare(b.build(), given, rtol=1e-5, atol=1e-5, runs=3)


def test_a_stack_that_nobody_reads() -> None:
    b = Builder("f")
    x = b.param(parse_type("f32[16,16]"), Role.BATCH, "x")
    parts = [b.emit("aten.mm.default", x, x), b.emit("aten.exp.default", x)]
    b.emit("aten.stack.default", tuple(parts))
    b.output("one", b.emit("aten.mm.default", parts[0], parts[1]))
    compare(b.build(), [torch.randn(16, 16)], rtol=1e-5, atol=1e-5)
