"""Recurrent layers are one op for all steps, and train like eager's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shoestring.frontend.library import plain_recurrence
from shoestring.ir import Function

from .test_capture import function_of, trains_like_eager

STEPS, BATCH, SIZE, WIDTH = 5, 3, 4, 6
CELLS: dict[str, Callable[..., nn.RNNBase]] = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn": nn.RNN,
    "rnn of relu": lambda *a, **k: nn.RNN(*a, nonlinearity="relu", **k),
}
SHAPES: dict[str, dict[str, Any]] = {
    "one layer": {},
    "two layers, batch first": {"num_layers": 2, "batch_first": True},
    "both ways, two layers": {"num_layers": 2, "bidirectional": True},
    "both ways without bias": {"bias": False, "bidirectional": True, "batch_first": True},
}
X = torch.randn(STEPS, BATCH, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Network(nn.Module):
    """What comes of a batch is what `read` makes of the results; states begin where they learn."""

    def __init__(self, layers: nn.RNNBase, read: Callable[..., Tensor], learns: bool = False):
        super().__init__()
        self.layers, self.read = layers, read
        first = torch.full((rows_of(layers), 1, WIDTH), 0.25)
        self.first = nn.Parameter(first) if learns else None

    def forward(self, x: Tensor) -> Tensor:
        if self.first is None:
            return self.read(*self.layers(x))
        batch = x.shape[0 if self.layers.batch_first else 1]
        h = self.first.expand(-1, batch, -1)
        return self.read(*self.layers(x, (h, h * 2) if isinstance(self.layers, nn.LSTM) else h))


def ops_in(function: Function) -> Counter[str]:
    names = (op.name.split(".") for op in function.ops)
    return Counter(name[1] for name in names if name[0] == "recurrence")


def assert_layers_are_ops(step: Any, model: Network) -> None:
    """One for each layer and direction, and one for its gradient; no step is an op by itself."""
    function = function_of(step)
    assert not any("sigmoid" in op.name for op in function.ops)
    found = ops_in(function)
    assert len(found) == 2 and set(found.values()) == {rows_of(model.layers)}


def rows_of(layers: nn.RNNBase) -> int:
    """Layers, in every direction."""
    return layers.num_layers * (2 if layers.bidirectional else 1)


def network(cell: str, shape: str, read: Callable[..., Tensor], learns: bool = False) -> Network:
    torch.manual_seed(1)
    return Network(CELLS[cell](SIZE, WIDTH, **SHAPES[shape]), read, learns).double()


def every(out: Tensor, last: Any) -> Tensor:
    return torch.cat([t.flatten() for t in (out, *(last if isinstance(last, tuple) else (last,)))])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("shape", SHAPES)
def test_all_steps_and_the_last_states(cell: str, shape: str) -> None:
    model = network(cell, shape, every, learns=True)
    assert_layers_are_ops(trains_like_eager(model, (X,)), model)


@pytest.mark.parametrize("cell", CELLS)
def test_all_steps_alone(cell: str) -> None:
    model = network(cell, "one layer", lambda out, last: out)
    assert_layers_are_ops(trains_like_eager(model, (X,)), model)


@pytest.mark.parametrize("cell", CELLS)
def test_the_last_state_alone(cell: str) -> None:
    model = network(cell, "both ways, two layers", lambda out, last: last[-1])
    trains_like_eager(model, (X,))
    if cell == "lstm":
        model = network(cell, "one layer", lambda out, last: last[1])
        assert_layers_are_ops(trains_like_eager(model, (X,)), model)


def overwritten(out: Tensor, last: Any) -> Tensor:
    out[1:] *= 2
    for state in last if isinstance(last, tuple) else (last,):
        state.add_(1)
        out = out + state.sum()
    return out.relu_()


@pytest.mark.parametrize("cell", CELLS)
def test_results_that_are_overwritten(cell: str) -> None:
    trains_like_eager(network(cell, "one layer", overwritten), (X,))


@pytest.mark.parametrize("cell", CELLS)
def test_one_step(cell: str) -> None:
    trains_like_eager(network(cell, "both ways, two layers", every), (X[:1],))


@pytest.mark.parametrize("cell", CELLS)
def test_gradients_of_gradients(cell: str) -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_(True)
        out = model(x)
        (slope,) = torch.autograd.grad(out.sin().sum(), x, create_graph=True)
        return slope.square().mean() + out.mean()

    trains_like_eager(network(cell, "both ways, two layers", every, learns=True), (X,), loss)


@pytest.mark.parametrize("cell", CELLS)
def test_frozen_weights(cell: str) -> None:
    model = network(cell, "two layers, batch first", every)
    for name, p in model.layers.named_parameters():
        p.requires_grad_("weight_hh" not in name and "bias_ih_l0" not in name)
    trains_like_eager(model, (X,))


class Checkpointed(nn.Module):
    def __init__(self, inner: Network, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = checkpoint(self.inner, x, use_reentrant=self.reentrant)
        return out


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_computed_again(cell: str, reentrant: bool) -> None:
    model = Checkpointed(network(cell, "two layers, batch first", every, True), reentrant)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x.detach().requires_grad_(True)).square().mean()

    found = ops_in(function_of(trains_like_eager(model, (X,), loss)))
    assert sorted(found.values()) == [2, 4]


def test_without_a_batch() -> None:
    trains_like_eager(network("gru", "one layer", every), (X[:, 0],))


@pytest.mark.parametrize("train", [False, True])
def test_dropout_between_layers(train: bool) -> None:
    """What is dropped is drawn by a rule of shoestring's: all of it, so that eager can follow."""
    model = network("lstm", "two layers, batch first", every).train(train)
    model.layers.dropout = 1.0
    assert_layers_are_ops(trains_like_eager(model, (X,)), model)


class Projecting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.LSTM(SIZE, WIDTH, proj_size=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)[0]
        return out


def test_projections_stay_as_they_are() -> None:
    torch.manual_seed(0)
    assert not ops_in(function_of(trains_like_eager(Projecting().double(), (X,))))


class UnderAutocast(Projecting):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.LSTM(SIZE, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x).float()


def test_autocast_rounds_every_op_of_a_step() -> None:
    torch.manual_seed(0)
    with plain_recurrence():
        step = trains_like_eager(UnderAutocast(), (X.float(),))
    assert not ops_in(function_of(step))


def test_transforms_of_functions() -> None:
    """`torch.func.grad` has no rule for the op: PyTorch's ops stay."""
    model = network("lstm", "one layer", lambda out, last: out)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        parameters: dict[str, Tensor] = dict(model.named_parameters())

        def one(parameters: dict[str, Tensor]) -> Tensor:
            out: Tensor = torch.func.functional_call(model, parameters, (x,))
            return out.square().mean()

        slopes = torch.func.grad(one)(parameters)
        return sum(((g * g).sum() for g in slopes.values()), torch.zeros(()))

    assert not ops_in(function_of(trains_like_eager(model, (X,), loss)))
