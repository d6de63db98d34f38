"""Sparse gradients: only the rows that a batch touches are updated, as in eager mode."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import shoestring
from shoestring.ir.errors import CaptureError

from .eager import Pair

ROWS = 9
OPTIMIZERS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.SparseAdam, {}),
    (torch.optim.SparseAdam, {"lr": 0.1, "maximize": True, "betas": (0.5, 0.7)}),
    (torch.optim.SparseAdam, {"lr": torch.tensor(0.001)}),
    (torch.optim.SGD, {"lr": 0.1}),
    (torch.optim.SGD, {"lr": 0.1, "maximize": True}),
    (torch.optim.Adagrad, {}),
    (torch.optim.Adagrad, {"eps": 0.0, "lr_decay": 0.1}),
]


class Lookups(torch.nn.Module):
    """One table, read twice."""

    def __init__(self, padding: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.Embedding(
            ROWS, 3, padding_idx=padding, sparse=True, dtype=torch.float64
        )

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.table(rows).sum(1).sin() + self.table(rows[:, 0])


class Bags(torch.nn.Module):
    """Bags of 0, 2, 3 and the remaining rows."""

    def __init__(self, mode: str, padding: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = torch.nn.EmbeddingBag(
            ROWS, 3, mode=mode, padding_idx=padding, sparse=True, dtype=torch.float64
        )
        self.register_buffer("offsets", torch.tensor([0, 0, 2, 5]))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.table(rows.flatten(), self.offsets).sin()


def loss_fn(model: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    return model(rows).square().sum()


def _rows(seed: int) -> torch.Tensor:
    """Never the last row: its state must stay as it is."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, ROWS - 1, (4, 3), generator=generator)


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "lookups": Lookups,
    "padding": lambda: Lookups(padding=2),
    "negative padding": lambda: Lookups(padding=-7),
    "sum": lambda: Bags("sum"),
    "mean": lambda: Bags("mean"),
    "mean with padding": lambda: Bags("mean", padding=3),
}


@pytest.fixture(autouse=True)
def quiet_eager() -> Iterator[None]:
    """PyTorch warns that it does not check the sparse tensors that it makes itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse invariant checks")
        yield


@pytest.mark.parametrize(("cls", "kwargs"), OPTIMIZERS)
@pytest.mark.parametrize("model", MODELS)
def test_follows_eager(
    model: str, cls: type[torch.optim.Optimizer], kwargs: dict[str, Any]
) -> None:
    pair = _pair(model, cls, kwargs, "reference")
    last = pair.model.get_parameter("table.weight").detach()[-1].clone()
    for i in range(5):
        pair.both(_rows(i))
    assert torch.equal(pair.model.get_parameter("table.weight").detach()[-1], last)
    assert len(pair.step.programs) == 1


@pytest.mark.parametrize("model", MODELS)
def test_c_backend_follows_eager(model: str) -> None:
    pair = _pair(model, torch.optim.SparseAdam, {}, "c")
    for i in range(3):
        pair.both(_rows(i))


def _pair(
    model: str, cls: type[torch.optim.Optimizer], kwargs: dict[str, Any], backend: str
) -> Pair:
    rtol = 1e-6 if isinstance(kwargs.get("lr"), torch.Tensor) else None
    options: dict[str, Any] = {"backend": backend, "passes": None if backend == "c" else []}
    return Pair(
        MODELS[model](),
        loss_fn,
        lambda m: cls(m.parameters(), **kwargs),
        (_rows(0),),
        options,
        rtol,
    )


def test_counts_of_sparse_adam_survive_a_resume() -> None:
    """Its `step` is a Python int and no tensor, so it travels with the plain values."""
    trained, fresh = (_pair("lookups", torch.optim.SparseAdam, {}, "reference") for _ in range(2))
    for i in range(3):
        trained.both(_rows(i))
        fresh.eager(_rows(i))
    saved = {k: t.clone() for k, t in trained.step.state_tensors().items()}
    for name, tensor in fresh.step.state_tensors().items():
        tensor.copy_(saved[name])
    fresh.step.load_extra_state(trained.step.extra_state())
    for i in range(3, 5):
        fresh.both(_rows(i))


def _refused(
    code: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer, **options: Any
) -> str:
    with pytest.raises(CaptureError) as caught:
        shoestring.compile(model, loss_fn, optimizer, (_rows(0),), backend="reference", **options)
    assert caught.value.code == code
    return str(caught.value)


@pytest.mark.parametrize(
    ("cls", "kwargs", "reason"),
    [
        (torch.optim.Adam, {}, "Adam cannot take the sparse gradient of 'table.weight': it takes"),
        (torch.optim.SGD, {"momentum": 0.9}, "with momentum it would keep sparse state"),
        (torch.optim.SGD, {"weight_decay": 0.1}, "weight_decay needs dense gradients"),
        (torch.optim.Adagrad, {"weight_decay": 0.1}, "weight_decay needs dense gradients"),
    ],
)
def test_refuses_sparse_gradients(
    cls: type[torch.optim.Optimizer], kwargs: dict[str, Any], reason: str
) -> None:
    model = Lookups()
    assert reason in _refused("SS1204", model, cls(model.parameters(), **kwargs))


def test_sparse_adam_refuses_dense_gradients() -> None:
    model = Lookups()
    model.table.sparse = False
    message = _refused("SS1205", model, torch.optim.SparseAdam(model.parameters()))
    assert "that of 'table.weight' is dense" in message


def test_sparse_plus_dense_is_dense() -> None:
    model = Lookups()

    def mixed(m: Lookups, rows: torch.Tensor) -> torch.Tensor:
        return m(rows).sum() + m.table.weight.square().sum()

    with pytest.raises(CaptureError, match="SS1205"):
        optimizer = torch.optim.SparseAdam(model.parameters())
        shoestring.compile(model, mixed, optimizer, (_rows(0),), backend="reference")
    pair = Pair(Lookups(), mixed, lambda m: torch.optim.Adam(m.parameters()), (_rows(0),))
    for i in range(3):
        pair.both(_rows(i))


def test_accumulation_of_sparse_gradients_is_refused() -> None:
    model = Lookups()
    optimizer = torch.optim.SparseAdam(model.parameters())
    assert "'table.weight' is sparse" in _refused("SS1206", model, optimizer, accumulate=2)
