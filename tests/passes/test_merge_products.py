"""Sums of products whose rows lie together: one product, equal numbers."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import shoestring as ss
from shoestring.frontend import library
from shoestring.ir import Function, parse, verify
from shoestring.passes import Pass, check
from shoestring.passes.dead_code import DeadCode
from shoestring.passes.merge_products import MergeProducts
from shoestring.runtime.step import Step

from ..backends.helpers import compare
from .training import train_both

STEPS = 5


def merged(lines: str, returned: str, least: int = 2) -> Function:
    """The function after the pass, with numbers checked; nothing dead."""
    selects = "".join(
        f"""
  %x{i}: f32[8,6] = aten.select.int(%x) {{dim=0, index={i}}}
  %y{i}: f32[8,3] = aten.select.int(%y) {{dim=0, index={i - STEPS if i == 4 else i}}}
  %t{i}: f32[6,8] = aten.permute.default(%x{i}) {{dims=[1, 0]}}"""
        for i in range(STEPS)
    )
    f = parse(f"""
func @f {{
  batch %x: f32[5,8,6] "x"
  batch %y: f32[5,8,3] "y"
  batch %z: f32[6,3] "z"{selects}{lines}
  return {returned}
}}""")
    verify(f)
    arguments = [torch.randn(p.value.type.static_shape) for p in f.params]
    passes: list[Pass] = [MergeProducts(least), DeadCode()]
    after = check(f, arguments, passes).records[-1].after
    compare(after, arguments, rtol=1e-4, atol=1e-4)
    return after


def products(pairs: list[tuple[int, int]]) -> str:
    """One product a pair: of this step of x and that of y."""
    return "".join(
        f"\n  %p{n}: f32[6,3] = aten.mm.default(%t{i}, %y{j})" for n, (i, j) in enumerate(pairs)
    )


def total(terms: list[str]) -> str:
    """Their sum, from left to right."""
    lines, so_far = "", terms[0]
    for n, term in enumerate(terms[1:]):
        lines += f"\n  %s{n}: f32[6,3] = aten.add.Tensor(%{so_far}, %{term})"
        so_far = f"s{n}"
    return lines


def rows_of(f: Function) -> list[int]:
    """How many rows each product sums up."""
    return [op.inputs[1].type.static_shape[0] for op in f.ops if op.name == "aten.mm.default"]


ORDERS = {
    "forwards": ([(i, i) for i in range(5)], [40]),
    "backwards": ([(i, i) for i in reversed(range(5))], [40]),
    "shifted": ([(i + 1, i) for i in range(4)], [32]),
    "with a gap": ([(0, 0), (1, 1), (3, 3), (4, 4)], [16, 16]),
    "one by itself": ([(0, 0), (1, 1), (4, 4)], [8, 16]),
    "in no order": ([(0, 3), (1, 1), (2, 4)], [8, 8, 8]),
    "one of them twice": ([(0, 0), (1, 1), (1, 1)], [8, 16]),
}


@pytest.mark.parametrize("order", ORDERS)
def test_steps(order: str) -> None:
    pairs, wanted = ORDERS[order]
    f = merged(
        products(pairs) + total([f"p{n}" for n in range(len(pairs))]), f"o=%s{len(pairs) - 2}"
    )
    assert sorted(rows_of(f)) == wanted


def test_other_summands_stay() -> None:
    pairs = [(i, i) for i in range(5)]
    f = merged(products(pairs) + total(["p0", "z", "p1", "p2", "p3", "p4"]), "o=%s4")
    assert rows_of(f) == [40]
    assert [op.name for op in f.ops].count("aten.add.Tensor") == 1


def test_what_others_read_stays() -> None:
    """A partial sum and a product that are results; a product that is added to itself."""
    pairs = [(i, i) for i in range(5)]
    f = merged(products(pairs) + total([f"p{n}" for n in range(5)]), "o=%s3, a=%s1, p=%p4")
    assert sorted(rows_of(f)) == [8, 8, 24]
    f = merged(products(pairs[:2]) + total(["p0", "p0", "p1", "p1"]), "o=%s2")
    assert rows_of(f) == [8, 8]


def test_fewest_is_an_option() -> None:
    lines = products([(0, 0), (1, 1)]) + total(["p0", "p1"])
    assert rows_of(merged(lines, "o=%s0")) == [16]
    assert rows_of(merged(lines, "o=%s0", least=3)) == [8, 8]


def test_stacks_that_come_too_late() -> None:
    """The stack is made after the sum is read."""
    stack = "\n  %g: f32[2,8,6] = aten.stack.default([%e0, %e1]) {dim=0}"
    lines = """
  %e0: f32[8,6] = aten.exp.default(%x0)
  %e1: f32[8,6] = aten.exp.default(%x1)
  %u0: f32[6,8] = aten.permute.default(%e0) {dims=[1, 0]}
  %u1: f32[6,8] = aten.permute.default(%e1) {dims=[1, 0]}
  %p0: f32[6,3] = aten.mm.default(%u0, %y0)
  %p1: f32[6,3] = aten.mm.default(%u1, %y1)
  %s: f32[6,3] = aten.add.Tensor(%p0, %p1)"""
    late = "\n  %r: f32[6,3] = aten.neg.default(%s)"
    assert rows_of(merged(lines + late + stack, "r=%r, g=%g")) == [8, 8]
    assert rows_of(merged(lines + stack + late, "r=%r, g=%g")) == [16]


KINDS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "lstm": (lambda: nn.LSTM(4, 6, num_layers=2), 2 * 13),
    "lstm both ways": (lambda: nn.LSTM(4, 6, bidirectional=True), 2 * 13),
    "lstm of 3 steps": (lambda: nn.LSTM(4, 6, bias=False, batch_first=True), 2),
    "rnn": (lambda: nn.RNN(4, 6, num_layers=2), 2 * 13),
    "gru, whose gradients are not stacked": (lambda: nn.GRU(4, 6), 0),
}


class Recurrent(nn.Module):
    """The outputs of all steps."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.rnn = make()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.rnn(x)[0]
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_recurrent_networks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two steps in f64; the pass finds products of 6 steps and sums of 7 a layer or direction.

    With PyTorch's ops for every step, as they are under autocast.
    """
    monkeypatch.setattr(library, "layers_as_ops", nullcontext)
    torch.manual_seed(0)
    make, wanted_merged = KINDS[kind]
    x = torch.randn(7, 3, 4, dtype=torch.float64)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x) ** 2).mean()

    def compiled(mine: nn.Module) -> Step:
        return ss.compile(mine, loss, torch.optim.SGD(mine.parameters(), lr=0.1), (x,))

    model = Recurrent(make).double()
    step = train_both(model, compiled, loss, (x,), lr=0.1, tolerance=1e-9)
    records = step.program((x,)).records
    merged = next(r.report.changed for r in records if r.name == "merge_products")
    assert merged == wanted_merged
