"""Values that are released slice by slice, and what takes the places of slices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shoestring.backends.c import CExecutable
from shoestring.backends.instructions import Buffer, Space

from .helpers import compare, traced

aten = torch.ops.aten
STEPS, ROWS, WIDTH = 12, 256, 64
W, X = torch.randn(WIDTH, WIDTH) / 8, torch.randn(STEPS * ROWS, WIDTH)


def run(f: Callable[..., Any], *tensors: Tensor) -> CExecutable:
    """Checks two runs, the second in the memory that the first has left behind."""
    return compare(traced(f, tensors), tensors, rtol=1e-5, atol=1e-5)


def guests(executable: CExecutable) -> int:
    """How many buffers are written within the largest product while some of it is still read."""
    plan = executable.program.plan
    places: dict[Buffer, list[int]] = {}
    for i, instruction in enumerate(executable.instructions):
        for region in instruction.regions:
            if region.buffer.space is Space.ARENA:
                places.setdefault(region.buffer, []).append(i)
    host = next(b for b in places if "(mm" in b.label and b.nbytes == X.numel() * 4)
    start, last = plan.offsets[host.index], places[host][-1]
    inside = (b for b in places if start <= plan.offsets[b.index] < start + host.nbytes)
    return sum(places[host][0] < places[b][0] < last for b in inside)


def recurrence(inputs: list[Tensor], w: Tensor) -> list[Tensor]:
    """All states of a recurrence, each of which a kernel of its own makes."""
    found = [torch.tanh(inputs[0])]
    for x in inputs[1:]:
        found.append(torch.tanh(found[-1] @ w + x))
    return found


def test_states_take_the_places_of_inputs() -> None:
    def f(w: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        inputs = (x @ w).reshape(STEPS, ROWS, WIDTH)
        states = recurrence(list(inputs.unbind()), w)
        return tuple(torch.exp(s).sum() for s in states)

    assert guests(run(f, W, X)) > STEPS


def test_slices_in_any_order_twice_and_not_at_all() -> None:
    def f(w: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        inputs = list((x @ w).reshape(STEPS, ROWS, WIDTH).unbind())
        order = [3, 0, 7, 3, 11, 1, 5, 0]  # not 2
        states = recurrence([inputs[i] for i in order], w)
        return tuple(torch.exp(s) @ w for s in states)

    assert guests(run(f, W, X)) > 0


def test_slices_that_meet_and_what_is_read_whole_later() -> None:
    def f(w: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        y = x @ w
        wide = [y[64 * i : 64 * i + 128] for i in range(5)]  # each half of the next
        late = (x + 1) @ w
        states = recurrence(list(late.reshape(STEPS, ROWS, WIDTH).unbind()), w)
        return (*(torch.exp(t) @ w for t in wide), states[-1], torch.cumsum(late, 0))

    run(f, W, X)


def test_slices_of_columns_and_of_odd_sizes() -> None:
    def f(w: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        y = x @ w
        columns = [torch.exp(c) @ w[:16] for c in y.split(16, dim=1)]
        odd = [torch.exp(r.contiguous()) @ w for r in ((x + 1) @ w).split([5, 820, 7, 2240])]
        return (*columns, *odd)

    run(f, W, X)


def test_results_are_no_slices_to_release() -> None:
    def f(w: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        y = x @ w
        states = recurrence(list(y.reshape(STEPS, ROWS, WIDTH).unbind()), w)
        return y, y[:8], torch.stack(states)

    assert guests(run(f, W, X)) == 0
