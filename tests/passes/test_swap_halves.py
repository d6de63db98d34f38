"""Swapped halves of a value: read in reverse order, equal to the last bit."""

import pytest
import torch
from torch import Tensor, nn

import shoestring as ss
from shoestring.backends.c import CBackend, CExecutable
from shoestring.ir import Function, TensorType, parse, trace
from shoestring.passes import check
from shoestring.passes.dead_code import DeadCode
from shoestring.passes.swap_halves import FLIP, SwapHalves

from ..backends.helpers import compare
from .training import train_both

aten = torch.ops.aten
SHAPES = [((2, 3, 8), 2), ((2, 3, 8), -1), ((4, 5), 0), ((2, 6, 5), 1), ((2,), 0), ((7, 34), 1)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def halves(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    h = x.shape[dim] // 2
    low: Tensor = aten.slice.Tensor(x, dim, 0, h)
    high: Tensor = aten.slice.Tensor(x, dim, h, 2**63 - 1)
    return low, high


def rotated(x: Tensor, dim: int, signs: str) -> Tensor:
    low, high = halves(x, dim)
    parts = [aten.neg(high) if signs[0] == "-" else high, aten.neg(low) if signs[1] == "-" else low]
    joined: Tensor = aten.cat(parts, dim)
    return joined


def gradient(g: Tensor, dim: int) -> Tensor:
    """What the backward pass of `cat(-x[half:], x[:half])` is."""
    low, high = halves(g, dim)
    size = g.shape[dim]
    to_high = aten.slice_backward(aten.neg(low), g.shape, dim, size // 2, 2**63 - 1, 1)
    to_low = aten.slice_backward(high, g.shape, dim, 0, size // 2, 1)
    added: Tensor = aten.add(to_high, to_low)
    return added


def numbers(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Among them zeros of both signs, infinities and NaN."""
    torch.manual_seed(0)
    x = torch.randn(shape)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan])
    chosen = torch.randint(0, 12, shape)
    return torch.where(chosen < 5, special[chosen.clamp(max=4)], x).to(dtype)


def both_ways(f: Function, *given: Tensor, changed: int = 1) -> Function:
    """The function with its halves reversed, after the numbers of both have been compared."""
    *_, record, last = check(f, list(given), [SwapHalves(), DeadCode()]).records
    assert record.report.changed == changed
    assert any(op.name == FLIP for op in last.after.ops) == bool(changed)
    compare(last.after, list(given))  # in generated code
    return last.after


@pytest.mark.parametrize("signs", ["-+", "+-", "--"])
@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_joined(shape: tuple[int, ...], dim: int, dtype: torch.dtype, signs: str) -> None:
    f = trace(lambda x: rotated(x, dim, signs), [TensorType(dtype, shape)], "f")
    g = both_ways(f, numbers(shape, dtype))
    assert not any(op.name == "aten.cat.default" for op in g.ops)


@pytest.mark.parametrize(("shape", "dim"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> None:
    f = trace(lambda x: gradient(x, dim), [TensorType(dtype, shape)], "f")
    g = both_ways(f, numbers(shape, dtype))
    assert not any("slice_backward" in op.name for op in g.ops)


@pytest.mark.parametrize("order", ["(a + low) + high", "(a + high) + low", "low + (high + a)"])
def test_gradients_that_are_added_one_after_the_other(order: str) -> None:
    def f(a: Tensor, g: Tensor) -> Tensor:
        first, second = halves(g, 1)
        high = aten.slice_backward(aten.neg(first), g.shape, 1, 3, 6, 1)
        low = aten.slice_backward(second, g.shape, 1, 0, 3, 1)
        total: Tensor = eval(order, {}, {"a": a, "low": low, "high": high})
        return total

    g = trace(f, [TensorType(torch.float32, (50, 6))] * 2, "f")
    result = both_ways(g, numbers((50, 6)).roll(1, 0), numbers((50, 6)))
    assert not any("slice_backward" in op.name for op in result.ops)


ROPE = (2, 3, 5, 8)


@pytest.mark.parametrize("table", [(1, 1, 5, 8), (5, 8), (8,), (5, 1), (), (2, 3, 5, 8)], ids=str)
def test_products_are_made_of_reversed_factors(table: tuple[int, ...]) -> None:
    def f(g: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        total: Tensor = aten.add(gradient(aten.mul(g, sin), 3), aten.mul(g, cos))
        return total

    types = [TensorType(torch.float32, s) for s in (ROPE, table, table)]
    given = [numbers(ROPE), torch.randn(table), torch.randn(table)]
    g = both_ways(trace(f, types, "f"), *given)
    executable = CBackend().compile(g)
    assert len(executable.instructions) == 1, [i.name for i in executable.instructions]


def test_a_parameter_is_not_overwritten_while_its_other_half_is_read() -> None:
    f = parse("""
func @f {
  parameter %p: f32[3,8] "p" -> %new
  %low: f32[3,4] = aten.slice.Tensor(%p) {dim=1, start=0, end=4}
  %high: f32[3,4] = aten.slice.Tensor(%p) {dim=1, start=4, end=8}
  %n: f32[3,4] = aten.neg.default(%high)
  %r: f32[3,8] = aten.cat.default([%n, %low]) {dim=1}
  %new: f32[3,8] = aten.add.Tensor(%p, %r)
  return
}
""")
    both_ways(f, torch.randn(3, 8))


def test_products_that_others_read_stay_whole() -> None:
    def f(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        product = aten.mul(x, y)
        return rotated(product, 1, "-+"), aten.exp(product)

    f2 = trace(f, [TensorType(torch.float32, (3, 4))] * 2, "f")
    g = both_ways(f2, numbers((3, 4)), torch.randn(3, 4))
    assert sum(op.name == "aten.mul.Tensor" for op in g.ops) == 2  # it, and that of the signs


def unlike(x: Tensor, how: str) -> Tensor:
    low, high = halves(x, 1)
    found: Tensor
    if how == "in order":
        found = aten.cat([aten.neg(low), high], 1)
    elif how == "no sign":
        found = aten.cat([high, low], 1)
    elif how == "of two values":
        found = aten.cat([aten.neg(high), halves(aten.exp(x), 1)[0]], 1)
    elif how == "other dimension":
        found = aten.cat([aten.neg(high), low], 0)
    elif how == "not halves":
        found = aten.cat(
            [aten.neg(aten.slice.Tensor(x, 1, 3, 6)), aten.slice.Tensor(x, 1, 1, 4)], 1
        )
    elif how == "three":
        found = aten.cat([aten.neg(high), low, low], 1)
    elif how == "every other":
        second, first = aten.slice.Tensor(x, 1, 1, 6, 2), aten.slice.Tensor(x, 1, 0, 6, 2)
        found = aten.cat([aten.neg(second), first], 1)
    else:
        to_low = aten.slice_backward(high, x.shape, 1, 0, 3, 1)
        found = aten.add(aten.slice_backward(aten.neg(low), x.shape, 1, 0, 3, 1), to_low)
    return found


OTHERS = (
    "in order", "no sign", "of two values", "other dimension", "not halves", "three",
    "every other", "one upon the other",
)  # fmt: skip


@pytest.mark.parametrize("how", OTHERS)
def test_others_stay(how: str) -> None:
    f = trace(lambda x: unlike(x, how), [TensorType(torch.float32, (4, 6))], "f")
    both_ways(f, numbers((4, 6)), changed=0)


def test_integers_stay() -> None:
    f = trace(lambda x: rotated(x, 1, "-+"), [TensorType(torch.int64, (2, 4))], "f")
    _, report = SwapHalves().run(f)
    assert report.changed == 0


class Rotary(nn.Module):
    """Queries and keys turned by their positions, as in Llama."""

    angles: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(24, 24), nn.Linear(24, 24)
        angles = torch.arange(7)[:, None] / 10 ** torch.arange(4)
        self.register_buffer("angles", torch.cat([angles, angles], 1))

    def turn(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (3, 8)).transpose(1, 2)
        swapped = torch.cat([-x[..., 4:], x[..., :4]], -1)
        return x * self.angles.cos() + swapped * self.angles.sin()

    def forward(self, x: Tensor) -> Tensor:
        scores = self.turn(self.q(x)) @ self.turn(self.k(x)).transpose(-1, -2)
        return scores.softmax(-1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training(precision: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 7, 24)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = model(x).square().sum()
        return out

    def compiled(model: nn.Module) -> ss.Step:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return ss.compile(model, loss, optimizer, [x], precision=precision)

    tolerance = 1e-5 if precision == "fp32" else 2e-2
    step = train_both(Rotary(), compiled, loss, [x], lr=0.1, tolerance=tolerance)
    (program,) = step.programs.values()
    executable = program.executable
    assert isinstance(executable, CExecutable)
    names = " ".join(i.name for i in executable.instructions)
    assert "flip" not in names and "slice_backward" not in names
