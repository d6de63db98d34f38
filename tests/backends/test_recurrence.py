"""Layers of recurrent networks as loops in C, beside the reference."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import shoestring.frontend.recurrence  # noqa: F401 # registers the ops with PyTorch
from shoestring.backends.c.recurrence import GRADIENTS, LAYERS, OVERWRITES
from shoestring.backends.instructions import CallKernel, CallTorch

from .helpers import Call, compare, together

ops = torch.ops.recurrence
GATES = {"lstm": 4, "gru": 3, "rnn": 1}
SIZES = [(1, 1, 1), (2, 3, 5), (5, 1, 17), (3, 4, 64), (4, 33, 40)]  # steps, batch, width
BF16, F32 = torch.bfloat16, torch.float32


def layer(*given: Tensor, name: str, reverse: bool = False, **attrs: Any) -> Any:
    """A layer of these operands; without a bias where one is missing."""
    count = 4 if name != "lstm" else 5
    operands = (*given, *(None for _ in range(count - len(given))))
    return getattr(ops, name)(*operands, reverse=reverse, **attrs)


def operands_of(
    name: str, sizes: tuple[int, int, int], dtype: torch.dtype = F32, bias: bool = True
) -> list[Tensor]:
    """Of a layer; what is added up over all steps is in f32."""
    steps, batch, width = sizes
    wide = GATES[name] * width
    kept = F32 if dtype is BF16 else dtype
    h = torch.randn(batch, width, dtype=kept if name == "gru" else dtype)
    states = [h, torch.randn(batch, width, dtype=kept)][: 2 if name == "lstm" else 1]
    weight = torch.randn(wide, width).div(width**0.5).to(dtype)
    biases = [torch.randn(wide, dtype=dtype)] if bias else []
    return [torch.randn(steps, batch, wide, dtype=dtype), *states, weight, *biases]


def attrs_of(name: str, activation: str) -> dict[str, Any]:
    return {"activation": activation} if name == "rnn" else {}


def gradient(*given: Tensor, name: str, without: str = "", first: bool = True, **attrs: Any) -> Any:
    """The gradients of a layer, of what it has made; without one of those that come in."""
    *grads, x, h0, c0, weight = given if name == "lstm" else (*given[:3], given[2], given[3])
    reverse, rest = attrs["reverse"], {"first": first, **attrs}
    if name == "lstm":
        _, c, gates = ops.lstm(x, h0, c0, weight, None, reverse=reverse)
        of_h, of_c = (None if n == without else g for n, g in zip("hc", grads, strict=True))
        return ops.lstm_backward(of_h, of_c, c, gates, weight, **rest)
    if name == "gru":
        h, *saved = ops.gru(x, h0, weight, None, reverse=reverse)
        return ops.gru_backward(grads[0], h, *saved, weight, **rest)
    (h,) = ops.rnn(x, h0, weight, None, **attrs)
    return ops.rnn_backward(grads[0], h, weight, **rest)


def grads_of(name: str, sizes: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    steps, batch, width = sizes
    of_c = [torch.randn(batch, width, dtype=F32 if dtype is BF16 else dtype)]
    return [torch.randn(steps, batch, width, dtype=dtype), *(of_c if name == "lstm" else [])]


CELLS = [("lstm", ""), ("gru", ""), ("rnn", "tanh"), ("rnn", "relu")]


def calls(dtype: torch.dtype, sizes: Sequence[tuple[int, int, int]]) -> list[Call]:
    """Every cell in both directions, and its gradients; by turns with a bias, and for a state."""
    found: list[Call] = []
    for (name, activation), at, reverse in itertools.product(
        CELLS, range(len(sizes)), (False, True)
    ):
        attrs = {"name": name, "reverse": reverse, **attrs_of(name, activation)}
        turn = (at + reverse) % 2 == 0
        own, size = partial(operands_of, name, sizes[at], dtype), sizes[at]
        found.append((partial(layer, **attrs), own(bias=turn)))
        given = [*grads_of(name, size, dtype), *own(bias=False)]
        found.append((partial(gradient, first=turn, **attrs), given))
    return found


def test_every_size(isa: str) -> None:
    torch.manual_seed(0)
    sizes = SIZES if isa == "native" else SIZES[2::2]
    executable = compare(*together(calls(F32, sizes)), rtol=1e-5, atol=1e-5)
    kernels = [i for i in executable.instructions if isinstance(i, CallKernel)]
    made = {op for i in kernels for op in i.ops if op in {*LAYERS, *GRADIENTS}}
    assert made == {*LAYERS, *GRADIENTS} and not executable.fallbacks


def test_bf16(isa: str) -> None:
    """Rounded where the reference rounds: what is left is one unit in the last place, sometimes."""
    torch.manual_seed(0)
    sizes = SIZES[1:] if isa == "native" else SIZES[2::2]
    executable = compare(*together(calls(BF16, sizes)), rtol=2e-2, atol=2e-2)
    assert not executable.fallbacks


def test_f64_is_written_out() -> None:
    torch.manual_seed(0)
    executable = compare(*together(calls(torch.float64, [(3, 2, 5)])))
    called = {i.op.name for i in executable.instructions if isinstance(i, CallTorch)}
    made = {op for i in executable.instructions if isinstance(i, CallKernel) for op in i.ops}
    assert not (called | made) & {*LAYERS, *GRADIENTS}


def test_no_batch_at_all() -> None:
    executable = compare(*together(calls(F32, [(3, 0, 5)])))
    assert all("no elements" in f.why for f in executable.fallbacks)


@pytest.mark.parametrize("name", GATES)
def test_operands_that_lie_otherwise(name: str) -> None:
    """Batch first, a state that is one row for all, and weights that are columns of others."""
    torch.manual_seed(0)
    steps, batch, width = 4, 6, 9
    x, *states, weight, bias = operands_of(name, (steps, batch, width))

    def f(x: Tensor, row: Tensor, weights: Tensor, biases: Tensor, grad: Tensor) -> Any:
        state = row.expand(batch, width)
        first = [state] * len(states)
        inputs, weight, bias = x.transpose(0, 1), weights[1:].t(), biases[::2]
        attrs = {"name": name, "reverse": False, **attrs_of(name, "relu")}
        made = layer(inputs, *first, weight, bias, **attrs)
        of_h = grad.transpose(0, 1)
        grads = [of_h, state] if name == "lstm" else [of_h]
        return [*made, *gradient(*grads, inputs, *first, weight, **attrs)]

    given = [
        x.transpose(0, 1).contiguous(), torch.randn(1, width), torch.randn(width + 1, len(weight)),
        torch.randn(2 * len(bias)), torch.randn(batch, steps, width),
    ]  # fmt: skip
    compare(*together([(f, given)]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("without", ["h", "c"])
def test_gradients_of_one_result(without: str) -> None:
    torch.manual_seed(0)
    size = (3, 4, 8)
    f = partial(gradient, name="lstm", without=without, reverse=False)
    given = [*grads_of("lstm", size, F32), *operands_of("lstm", size, bias=False)]
    compare(*together([(f, given)]), rtol=1e-5, atol=1e-5)


def test_what_is_not_finite_stays_so() -> None:
    torch.manual_seed(0)
    found: list[Call] = []
    for name, activation in CELLS:
        attrs = {"name": name, "reverse": False, **attrs_of(name, activation)}
        x, *rest = operands_of(name, (3, 4, 8))
        x[0, 0, 0], x[1, 1, -1], x[1, 2, 3] = torch.nan, torch.inf, -torch.inf
        found.append((partial(layer, **attrs), [x, *rest]))
        of_h, *grads = grads_of(name, (3, 4, 8), F32)
        of_h[1, 3, 2] = torch.nan
        found.append((partial(gradient, **attrs), [of_h, *grads, x, *rest[:-1]]))
    compare(*together(found), rtol=1e-5, atol=1e-5)


def test_many_threads_and_steps() -> None:
    """Enough for threads to share; the same numbers for one."""
    torch.manual_seed(0)
    size, results = (40, 32, 96), list[list[Tensor]]()
    attrs: dict[str, Any] = {"name": "lstm", "reverse": False}
    own = operands_of("lstm", size)
    given = [*grads_of("lstm", size, F32), *own[:-1]]
    function, tensors = together(
        [(partial(layer, **attrs), own), (partial(gradient, **attrs), given)]
    )
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            executable = compare(function, tensors, rtol=1e-4, atol=1e-4)
            results.append(executable.run(tensors))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("later", [False, True], ids=["read last", "read later"])
@pytest.mark.parametrize("name", GATES)
def test_gates_over_what_they_are_made_of(name: str, later: bool) -> None:
    """In the place of what the input adds, and gradients in theirs, unless someone reads that."""
    torch.manual_seed(0)
    size, attrs = (4, 6, 8), {"name": name, "reverse": True, **attrs_of(name, "tanh")}

    def f(of_h: Tensor, x: Tensor, *rest: Tensor) -> Any:
        of_h, x = of_h * 2, x * 2
        *grads, weight = rest
        found = gradient(
            of_h, *grads[: name == "lstm"], x, *grads[name == "lstm" :], weight, **attrs
        )
        found = [t * 3 for t in found]  # an output has a place of its own
        return [*found, x, of_h] if later else found

    (of_h, *of_c), (x, *rest) = grads_of(name, size, F32), operands_of(name, size, bias=False)
    executable = compare(*together([(f, [of_h, x, *of_c, *rest])]), rtol=1e-5, atol=1e-5)
    kernels = [i for i in executable.instructions if isinstance(i, CallKernel)]
    over = {i.ops[0] for i in kernels if len({r.buffer for r in i.pointers}) < len(i.pointers)}
    layer, own = f"recurrence.{name}.default", f"recurrence.{name}_backward.default"
    always = {own} if name != "rnn" else set[str]()  # over gates, which nobody else reads
    assert over & {layer, own} == (always if later else {layer, own} & {*OVERWRITES})
