"""Where traced ops come from: each its own line, though one call is looked up once."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

import shoestring as ss
from shoestring.frontend import library
from shoestring.ir import Function, Phase, TensorType, trace


def lines(f: Function, name: str) -> list[int]:
    """The lines of the ops of a name, from that of the function on."""
    return [op.loc.line for op in f.ops if op.name.startswith(f"aten.{name}.")]


def program(x: Tensor) -> Tensor:
    for _ in range(2):
        x = torch.sin(x) + torch.sin(x)
        x = torch.cos(
            torch.exp(x)
        )  # fmt: skip
        x = inner(x)
    return x


def inner(x: Tensor) -> Tensor:
    x = torch.tanh(x)
    return torch.tanh(x)


def test_each_op_has_its_line() -> None:
    f = trace(program, [TensorType(torch.float32, (3,))], "f")
    first = program.__code__.co_firstlineno
    assert lines(f, "sin") == [first + 2] * 4
    assert lines(f, "exp") == [first + 4] * 2 and lines(f, "cos") == [first + 3] * 2
    begin = inner.__code__.co_firstlineno
    assert lines(f, "tanh") == [begin + 1, begin + 2] * 2


@pytest.mark.parametrize("ops_of", ["recurrence.", "tanh"])
def test_ops_of_one_call_are_of_its_line(ops_of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recurrent layer, as an op and as PyTorch runs it; backward ops belong to the same line."""
    if ops_of == "tanh":
        monkeypatch.setattr(library, "layers_as_ops", nullcontext)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = model(x)[0]
        return y.square().sum()

    model, x = nn.LSTM(3, 3), torch.randn(5, 2, 3)
    step = ss.compile(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), (x,))
    ops = step.program((x,)).captured.function.ops
    of_steps = {op.loc for op in ops if ops_of in op.name}
    begin = loss.__code__.co_firstlineno
    assert {(loc.line, loc.phase) for loc in of_steps} == {
        (begin + 1, Phase.FORWARD), (begin + 1, Phase.BACKWARD)
    }  # fmt: skip


def test_no_frame_is_kept() -> None:
    class Held:
        pass

    seen: list[weakref.ref[Held]] = []

    def f(x: Tensor) -> Tensor:
        held = Held()
        seen.append(weakref.ref(held))
        return torch.sin(x)

    gc.disable()
    try:
        trace(f, [TensorType(torch.float32, (3,))], "f")
        assert seen[0]() is None
    finally:
        gc.enable()
