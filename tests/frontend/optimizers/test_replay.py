"""An update that is done again to the next parameter is the one that would have been traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import shoestring
from shoestring.ir import Recording, Tracer, print_function

from .eager import Pair, regression_batch

Replay = Callable[[Tracer, Recording, list[torch.Tensor]], None]


class Layers(torch.nn.Module):
    """Many parameters of few sizes: tied, of two types, with gradients in several layouts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(4, 4)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
        self.layers[1].weight = self.first.weight
        self.sums = torch.nn.ParameterList(torch.nn.Parameter(torch.zeros(6, 4)) for _ in range(3))
        self.halves = torch.nn.ParameterList(
            torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(2)
        )
        self.turned = torch.nn.ParameterList(
            torch.nn.Parameter(torch.randn(4, 4).t()) for _ in range(2)
        )
        self.last = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        x = x + self.sums[0] + self.sums[1] + self.sums[2]  # one gradient for all of them
        x = x * self.halves[0] * self.halves[1] @ self.turned[0] @ self.turned[1]
        return self.last(x)


def loss_fn(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return ((model(x) - y) ** 2).mean()


def groups(cls: type[torch.optim.Optimizer]) -> Callable[[torch.nn.Module], torch.optim.Optimizer]:
    """An optimizer whose second half of the parameters has other hyper-parameters."""

    def make(model: torch.nn.Module) -> torch.optim.Optimizer:
        every = list(model.parameters())
        rest: dict[str, Any] = {"params": every[len(every) // 2 :], "weight_decay": 0.1, "lr": 0.02}
        build: Any = cls
        return build([{"params": every[: len(every) // 2]}, rest], lr=0.01, weight_decay=0.0)

    return make


def captured(cls: type[torch.optim.Optimizer]) -> str:
    model = Layers()
    batch = regression_batch(0, torch.float32)
    step = shoestring.compile(model, loss_fn, groups(cls)(model), batch, backend="reference")
    return print_function(step.program(batch).captured.function)


OPTIMIZERS = [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adafactor]


@pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda c: c.__name__)
def test_the_program_is_the_same(
    cls: type[torch.optim.Optimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    replay: Replay = Tracer.replay

    def counted(tracer: Tracer, recording: Recording, tensors: list[torch.Tensor]) -> None:
        calls.append(len(recording.ops))
        replay(tracer, recording, tensors)

    monkeypatch.setattr(Tracer, "replay", counted)
    short = captured(cls)
    assert calls
    monkeypatch.setattr(Tracer, "layouts", lambda *_: None)
    assert captured(cls) == short


@pytest.mark.parametrize("backend", ["reference", "c"])
def test_it_trains_as_eager_does(backend: str) -> None:
    batch = regression_batch(0, torch.float32)
    options = {"backend": backend}
    pair = Pair(Layers(), loss_fn, groups(torch.optim.AdamW), batch, options, rtol=1e-2)
    for seed in range(4):
        pair.both(*regression_batch(seed, torch.float32))


def _tracer() -> tuple[Tracer, list[torch.Tensor]]:
    tracer = Tracer("f")
    types = [torch.randn(4), torch.randn(4), torch.randn(2, 4)]
    return tracer, [tracer.input(shoestring.ir.type_of(t), shoestring.ir.Role.BATCH, f"x{i}")
                    for i, t in enumerate(types)]  # fmt: skip


def test_what_is_written_to_a_part_is_not_repeated() -> None:
    tracer, (a, b, whole) = _tracer()
    with tracer:
        row = whole[0]
        assert tracer.record([a, b], lambda: a.add_(b)) is not None
        assert tracer.record([row, b], lambda: row.add_(b)) is None
        assert tracer.record([a, row], lambda: a.add_(row)) is not None


def test_views_that_are_read_anew_are_not_part_of_a_recording() -> None:
    """Else the next tensor would be given what the first one held."""
    tracer, (a, b, whole) = _tracer()
    with tracer:
        rows = [whole[0], whole[1]]
        whole.mul_(2)
        made = tracer.record([a, rows[0]], lambda: a.add_(rows[0]))
        assert made is not None and [op.name for op in made.ops] == ["aten.add.Tensor"]
        tracer.replay(made, [b, rows[1]])
        last = tracer.ops[-1]
        assert last.result is tracer.read(b) and tracer.read(rows[1]) in last.inputs


def test_what_comes_from_elsewhere_stays() -> None:
    tracer, (a, b, whole) = _tracer()
    with tracer:
        row = whole[0]
        made = tracer.record([a], lambda: a.copy_(row))
        assert made is not None
        tracer.replay(made, [b])
        assert tracer.read(b) is tracer.read(a) is tracer.read(row)


def test_random_numbers_are_not_repeated() -> None:
    tracer, (a, *_) = _tracer()
    with tracer:
        assert tracer.record([a], lambda: a.add_(torch.rand_like(a))) is None


def test_tensors_that_share_memory_have_no_layouts_in_common() -> None:
    tracer, (a, b, whole) = _tracer()
    with tracer:
        assert tracer.layouts([whole[0], whole[1]]) is None
        assert tracer.layouts([a, whole[0]]) != tracer.layouts([a, b])
        assert tracer.layouts([a, b]) == tracer.layouts([b, a])
