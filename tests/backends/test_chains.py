"""Loops that are cut, and stores past the caches: to the last bit what one plain loop gives.

But for sums, which a loop over strips adds up in another order.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shoestring.backends.c import CBackend, CExecutable, chains, distance
from shoestring.ir import Builder, Function, Role, parse_type

from .helpers import compare, copies, together, traced

aten = torch.ops.aten
SIZES = [(1, 1), (3, 511), (5, 512), (2, 513), (7, 1025), (33, 48), (4, 1543)]
Outputs = tuple[Tensor, ...]


def activation(x: Tensor, w: Tensor, b: Tensor) -> Outputs:
    """The epilogue of a product: what is rounded is kept, and its tanh is far from it."""
    h = torch.addmm(b, x, w)
    wide = h.float()
    inner = (wide + 0.044715 * wide**3) * 0.7978846
    return h, (0.5 * wide * (1 + torch.tanh(inner))).to(h.dtype), aten.gelu(h)


def gates(x: Tensor, w: Tensor, b: Tensor) -> Outputs:
    """Expensive ops that depend on others."""
    a, c = x @ w, (x * 0.5) @ w + b
    state = torch.sigmoid(a) * torch.tanh(c) + torch.exp(-a * a)
    return state, torch.sigmoid(c) * torch.tanh(state), torch.log(1 + torch.exp(state))


def backward(x: Tensor, w: Tensor, b: Tensor) -> Outputs:
    """Gradients, whose first operand enters late."""
    y, h = x @ w, torch.tanh(x) @ w
    return aten.gelu_backward(y, h), aten.silu_backward(y + b, h), aten.silu(y)


def flat(x: Tensor, w: Tensor, b: Tensor) -> Outputs:
    """No product: one loop over all, shared by threads where it is long."""
    y = torch.tanh(torch.exp(x * 0.1) * 0.3 + 0.1) * torch.sigmoid(x)
    return y, torch.exp(y.neg()), torch.log(y * y + 1)


def rows(x: Tensor, w: Tensor, b: Tensor) -> Outputs:
    """Exponentials that wait for a sum (the order of which differs); what follows it is stored."""
    p = torch.softmax(torch.tanh(x) * 3 + b.mean(), 1)
    return p, torch.sigmoid(torch.exp(p) * 2 - 1) * x, p.sum(1)


def twice(x: Tensor, w: Tensor, b: Tensor) -> Outputs:
    """Two passes over a row, both with long chains from what the first one keeps; sums again."""
    kept = torch.tanh(torch.exp(x * 0.1) * 0.3 + b)
    mean = (kept * torch.sigmoid(kept * 2 + x)).mean(1, keepdim=True)
    y = torch.tanh(torch.exp(kept - mean) * 0.3 + torch.sigmoid(kept * mean))
    return y, y * x


def turned(x: Tensor, w: Tensor, b: Tensor) -> Outputs:
    """Stores that walk memory another way than the loops."""
    y = torch.tanh(torch.sigmoid(x @ w) * 2 + b)
    return y, torch.exp(y).t().contiguous(), y[:, ::2].exp()


CASES = [activation, gates, backward, flat, rows, twice, turned]


def arguments(size: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    m, n = size
    x, w, b = torch.randn(m, n), torch.randn(n, n) / n**0.5, torch.randn(n)
    x.view(-1)[:: 7 * n + 3] = torch.tensor(torch.nan)
    return [t.to(dtype) for t in (x, w, b)]


def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither cuts nor far stores."""
    monkeypatch.setattr(chains, "LONGEST", 1 << 30)
    monkeypatch.setattr(distance, "FAR", 1 << 60)


def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts wherever there is something to cut, and every store that may be is far."""
    monkeypatch.setattr(chains, "LONGEST", 4)
    monkeypatch.setattr(distance, "FAR", -1)
    monkeypatch.setattr(distance, "LEAST", 0)


def both_ways(
    monkeypatch: pytest.MonkeyPatch,
    function: Function,
    given: list[Tensor],
    *,
    sums: bool = False,
) -> tuple[CExecutable, CExecutable]:
    found: list[CExecutable] = []
    for how in (plain, eager):
        with monkeypatch.context() as patch:
            how(patch)
            executable = CBackend().compile(function)
        assert isinstance(executable, CExecutable)
        found.append(executable)
    runs = [e.run(copies(given)) for e in found for _ in range(2)]
    for other in runs[1:]:
        for x, y in zip(runs[0], other, strict=True):
            limit = None if sums else 0
            torch.testing.assert_close(x, y, rtol=limit, atol=limit, equal_nan=True)
    return found[0], found[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("f", CASES, ids=lambda f: f.__name__)
def test_equal_to_the_last_bit(
    f: Callable[..., Outputs], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, given = together([(f, arguments(size, dtype)) for size in SIZES])
    both_ways(monkeypatch, function, given, sums=f in (rows, twice))


@pytest.mark.parametrize("isa", ["avx512", "avx2", "generic"], indirect=True)
def test_other_instruction_sets(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for f in (activation, flat):
        given = arguments((5, 513), torch.bfloat16)
        both_ways(monkeypatch, traced(f, given), given)


@pytest.mark.parametrize("f", CASES, ids=lambda f: f.__name__)
def test_as_the_reference_says(f: Callable[..., Outputs], monkeypatch: pytest.MonkeyPatch) -> None:
    eager(monkeypatch)
    given = arguments((7, 1025), torch.float32)
    compare(traced(f, given), given, rtol=2e-5, atol=2e-5)


def test_state_is_read_before_it_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """An update in place, whose chain is cut: the last loop reads the old value again."""
    eager(monkeypatch)
    for size in (5, 513, 70_001):
        b = Builder("update")
        w = b.param(parse_type(f"f32[{size}]"), Role.PARAMETER, "w")
        x = b.param(parse_type(f"f32[{size}]"), Role.BATCH, "x")
        y = b.emit("aten.tanh.default", b.emit("aten.mul.Tensor", w, x))
        z = b.emit("aten.exp.default", b.emit("aten.sub.Tensor", y, w))
        b.replace_state(w, b.emit("aten.sub.Tensor", w, b.emit("aten.mul.Tensor", z, 0.1)))
        b.output("z", z)
        compare(b.build(), [torch.randn(size), torch.randn(size)], rtol=1e-5, atol=1e-6)


def test_what_the_loops_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """GELU written out is three loops, the middle one its tanh; what is cheap is computed again."""
    given = arguments((5, 96), torch.bfloat16)

    def f(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        h = torch.addmm(b, x, w).float()
        return (0.5 * h * (1 + torch.tanh((h + 0.044715 * h**3) * 0.7978846))).bfloat16()

    cut, _ = both_ways(monkeypatch, traced(f, given), given)
    executable = CBackend().compile(traced(f, given))
    assert isinstance(executable, CExecutable)
    (source,) = executable.sources
    loops = source.split("#pragma omp simd")[1:]
    assert len(loops) == 3
    assert ["tanhf" in loop for loop in loops] == [False, True, False]
    assert cut.sources[0].count("#pragma omp simd") == 1


def test_far_is_what_is_read_after_much_else() -> None:
    """The activation that the backward pass reads, not what the next product reads."""
    n = 2048

    def f(x: Tensor, w: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        h = x @ w
        a = torch.relu(h)
        y = a
        for _ in range(4):
            y = torch.relu(y @ u)
        return y, h + y

    types = [(n, n)] * 3
    function = traced(f, [torch.empty(size) for size in types])
    executable = CBackend().compile(function)
    assert isinstance(executable, CExecutable)
    assert sum(s.count("ss_store_far(&") for s in executable.sources) == 1
