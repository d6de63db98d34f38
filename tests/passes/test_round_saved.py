"""Gates are kept in bf16, and gradients stay as near to the exact ones as those of autocast."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from benchmarks.workloads import autocast
from torch import nn

import shoestring
from shoestring.backends.c import CExecutable
from shoestring.frontend import library
from shoestring.ir import Function, parse, verify
from shoestring.ir.errors import PassError
from shoestring.passes.lower_precision import CONVERT
from shoestring.passes.round_saved import RoundSaved

BF16 = torch.bfloat16


def rounded(text: str) -> tuple[Function, list[str]]:
    function, report = RoundSaved().run(parse(text))
    verify(function)
    return function, report.lines()


def converted(function: Function) -> list[str]:
    return [op.inputs[0].name for op in function.ops if op.name == CONVERT]


def test_what_the_backward_pass_reads_and_nothing_else() -> None:
    f, _ = rounded("""
func @f {
  batch %x: f32[8] "x"
  batch %z: f64[8] "z"
  %s: f32[8] = aten.sigmoid.default(%x)
  %t: f32[8] = aten.tanh.default(%x)
  %e: f32[8] = aten.exp.default(%x)
  %w: f64[8] = aten.tanh.default(%z)
  %u: f32[8] = aten.mul.Tensor(%s, %t)
  %a: f32[8] = aten.mul.Tensor(%u, %s) loc("m.py":1 "" backward)
  %b: f32[8] = aten.mul.Tensor(%e, %s) loc("m.py":1 "" recompute)
  %c: f64[8] = aten.mul.Tensor(%w, %z) loc("m.py":1 "" backward)
  return a=%a, b=%b, c=%c
}
""")
    assert converted(f) == ["s", "s.1"]
    readers = {op.result.name: [v.name for v in op.inputs] for op in f.ops}
    assert readers["u"] == ["s", "t"]
    assert readers["a"] == ["u", "s.2"] and readers["b"] == ["e", "s.2"]


def test_a_result_of_the_step_stays() -> None:
    f, lines = rounded("""
func @f {
  batch %x: f32[8] "x"
  %s: f32[8] = aten.sigmoid.default(%x)
  %g: f32[8] = aten.mul.Tensor(%s, %x) loc("m.py":1 "" backward)
  return s=%s, g=%g
}
""")
    assert not converted(f) and "result of the step" in "\n".join(lines)


def test_unknown_dtype() -> None:
    with pytest.raises(PassError, match="SS3011"):
        RoundSaved("f12")


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.net = kind(24, 40, batch_first=True)
        self.head = nn.Linear(40, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.net(x)[0])
        return out


def loss_fn(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())


def gradients(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    loss_fn(model, *batch).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def error(found: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    return max(float((f - e).norm() / e.norm()) for f, e in zip(found, exact, strict=True))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_gradients_of_recurrent_nets(kind: Callable[..., nn.Module]) -> None:
    torch.manual_seed(3)
    model = Recurrent(kind)
    x, y = torch.randn(5, 11, 24), torch.randint(7, (5, 11))
    exact = gradients(copy.deepcopy(model).double(), (x.double(), y))
    with autocast():
        eager = gradients(copy.deepcopy(model), (x, y))
    own = copy.deepcopy(model)
    before = [p.detach().clone() for p in own.parameters()]
    sgd = torch.optim.SGD(own.parameters(), lr=1.0)
    shoestring.compile(own, loss_fn, sgd, (x, y), precision="bf16")(x, y)
    mine = [b - p.detach() for b, p in zip(before, own.parameters(), strict=True)]
    assert error(mine, exact) <= 1.2 * error(eager, exact)


def arena(*left_out: str) -> int:
    torch.manual_seed(3)
    model = Recurrent(nn.LSTM)
    batch = torch.randn(64, 48, 24), torch.randint(7, (64, 48))
    adam = torch.optim.AdamW(model.parameters())
    step = shoestring.compile(
        model, loss_fn, adam, batch, precision="bf16", disable_passes=left_out
    )
    executable = step.program(batch).executable
    assert isinstance(executable, CExecutable)
    return executable.arena_bytes


def test_gates_take_less_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ops of every step by the pass; the op of a layer keeps them so by itself."""
    own = arena()
    monkeypatch.setattr(library, "layers_as_ops", nullcontext)
    by_steps = arena()
    assert own <= by_steps < 0.95 * arena("round_saved")
