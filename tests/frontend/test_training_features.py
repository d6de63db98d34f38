"""What surrounds the update: schedulers, clipping, accumulation, frozen and shared parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

import shoestring
from shoestring.ir import Role

from .optimizers.eager import Pair, regression_batch, regression_loss, small_model

Scheduler = Callable[[torch.optim.Optimizer], Any]


def adam(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.05)


def momentum(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def pair_of(
    make: Callable[[torch.nn.Module], torch.optim.Optimizer] = adam,
    model: torch.nn.Module | None = None,
    loss_fn: Callable[..., torch.Tensor] = regression_loss,
    **options: Any,
) -> Pair:
    chosen = small_model() if model is None else model
    return Pair(chosen, loss_fn, make, regression_batch(0), {"passes": [], **options})


def train(pair: Pair, steps: int = 4, start: int = 0) -> None:
    for i in range(start, start + steps):
        pair.both(*regression_batch(i))


# -- schedulers ----------------------------------------------------------------------------------


def _sequential(optimizer: torch.optim.Optimizer) -> lr_scheduler.SequentialLR:
    first = lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3)
    second = lr_scheduler.ExponentialLR(optimizer, 0.8)
    return lr_scheduler.SequentialLR(optimizer, [first, second], milestones=[3])


def _halved(epoch: int) -> float:
    return 0.5**epoch


SCHEDULERS: dict[str, Scheduler] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, gamma=0.3),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, _halved),
    "SequentialLR": _sequential,
}


@pytest.mark.parametrize("make", [adam, momentum], ids=["Adam", "SGD"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_need_one_program(
    name: str, make: Callable[[torch.nn.Module], torch.optim.Optimizer]
) -> None:
    pair = pair_of(make)
    mine = SCHEDULERS[name](pair.optimizer)
    theirs = SCHEDULERS[name](pair.twin_optimizer)
    rates: set[Any] = set()
    for i in range(7):
        pair.both(*regression_batch(i))
        mine.step()
        theirs.step()
        group = pair.optimizer.param_groups[0]
        rates.add((group["lr"], group.get("momentum"), group.get("betas")))
    assert len(rates) > 2
    assert len(pair.step.programs) == 1


def test_reduce_on_plateau_needs_one_program() -> None:
    pair = pair_of(momentum)
    mine = lr_scheduler.ReduceLROnPlateau(pair.optimizer, patience=0)
    theirs = lr_scheduler.ReduceLROnPlateau(pair.twin_optimizer, patience=0)
    for i in range(5):
        pair.both(*regression_batch(i))
        mine.step(1.0 + i)
        theirs.step(1.0 + i)
    assert pair.optimizer.param_groups[0]["lr"] < 0.01
    assert len(pair.step.programs) == 1


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_learning_rate_may_be_a_tensor_and_be_written_in_place(shape: tuple[int, ...]) -> None:
    pair = pair_of(lambda m: torch.optim.Adam(m.parameters(), lr=torch.full(shape, 0.05).double()))
    train(pair, 2)
    for optimizer in (pair.optimizer, pair.twin_optimizer):
        optimizer.param_groups[0]["lr"].fill_(0.01)
    train(pair, 2, start=2)
    assert len(pair.step.programs) == 1


# -- hyper-parameters that the program depends on ------------------------------------------------


def _set(pair: Pair, **values: Any) -> None:
    for optimizer in (pair.optimizer, pair.twin_optimizer):
        optimizer.param_groups[0].update(values)


def test_a_weight_decay_that_is_switched_on_recompiles() -> None:
    pair = pair_of(momentum)
    train(pair, 2)
    _set(pair, weight_decay=0.1)
    train(pair, 2, start=2)
    _set(pair, weight_decay=0.3)  # another number is no other program
    before = list(pair.step.programs.values())
    train(pair, 2, start=4)
    assert list(pair.step.programs.values()) == before
    _set(pair, weight_decay=0.0)
    train(pair, 2, start=6)
    assert list(pair.step.programs.values()) != before


def test_a_momentum_that_is_switched_on_begins_with_the_gradient() -> None:
    pair = pair_of(lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
    train(pair, 2)
    _set(pair, momentum=0.9, dampening=0.5)
    train(pair, 3, start=2)
    _set(pair, maximize=True, nesterov=False)
    train(pair, 2, start=5)


def test_dampening_after_a_loaded_state_is_not_a_first_step() -> None:
    make: Callable[[torch.nn.Module], torch.optim.Optimizer] = lambda m: torch.optim.SGD(  # noqa: E731
        m.parameters(), lr=0.1, momentum=0.9, dampening=0.5
    )
    trained, fresh = pair_of(make), pair_of(make)
    train(trained, 3)
    fresh.step.state_tensors()  # makes the state, as a checkpoint that is loaded into it does
    for model in (fresh.model, fresh.twin):
        model.load_state_dict(trained.model.state_dict())
    for optimizer in (fresh.optimizer, fresh.twin_optimizer):
        optimizer.load_state_dict(copy.deepcopy(trained.optimizer.state_dict()))
    train(fresh, 3, start=3)


# -- clipping ------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0.05, 1e6], ids=["clips", "leaves"])
def test_clipping_by_norm(limit: float) -> None:
    pair = pair_of(momentum, clip_grad_norm=limit)
    for i in range(4):
        pair.both(
            *regression_batch(i),
            before_update=lambda: torch.nn.utils.clip_grad_norm_(pair.twin.parameters(), limit),
        )


@pytest.mark.parametrize("limit", [0.01, 1e6], ids=["clips", "leaves"])
def test_clipping_by_value(limit: float) -> None:
    pair = pair_of(momentum, clip_grad_value=limit)
    for i in range(4):
        pair.both(
            *regression_batch(i),
            before_update=lambda: torch.nn.utils.clip_grad_value_(pair.twin.parameters(), limit),
        )


def test_clipping_by_value_comes_before_clipping_by_norm() -> None:
    pair = pair_of(momentum, clip_grad_value=0.02, clip_grad_norm=0.03)

    def clip() -> None:
        torch.nn.utils.clip_grad_value_(pair.twin.parameters(), 0.02)
        torch.nn.utils.clip_grad_norm_(pair.twin.parameters(), 0.03)

    for i in range(3):
        pair.both(*regression_batch(i), before_update=clip)


# -- accumulation --------------------------------------------------------------------------------


def _eager_accumulation(pair: Pair, micro: int, index: int, clip: float | None) -> torch.Tensor:
    """One micro-batch of the twin; the last one of a group updates."""
    if index % micro == 0:
        pair.twin_optimizer.zero_grad()
    loss = pair.loss_fn(pair.twin, *regression_batch(index))
    (loss / micro).backward()
    if index % micro == micro - 1:
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(pair.twin.parameters(), clip)
        pair.twin_optimizer.step()
    return loss.detach()


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("micro", [2, 3])
def test_accumulation_averages(micro: int, clip: float | None) -> None:
    pair = pair_of(accumulate=micro, clip_grad_norm=clip)
    for i in range(4 * micro):
        pair.close(pair.step(*regression_batch(i)), _eager_accumulation(pair, micro, i, clip))
        pair.compare()
    assert len(pair.step.programs) == 2  # with and without the update


def test_accumulation_with_a_dampened_first_step() -> None:
    pair = pair_of(
        lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, dampening=0.5), accumulate=2
    )
    for i in range(6):
        pair.close(pair.step(*regression_batch(i)), _eager_accumulation(pair, 2, i, None))
        pair.compare()


# -- which parameters are trained ----------------------------------------------------------------


def test_frozen_parameters_stay_and_may_thaw() -> None:
    pair = pair_of()
    for model in (pair.model, pair.twin):
        model.get_parameter("0.weight").requires_grad_(False)
    frozen = pair.model.get_parameter("0.weight").clone()
    train(pair, 3)
    assert torch.equal(pair.model.get_parameter("0.weight"), frozen)
    for model in (pair.model, pair.twin):
        model.get_parameter("0.weight").requires_grad_(True)
    train(pair, 3, start=3)
    assert not torch.equal(pair.model.get_parameter("0.weight"), frozen)


def test_parameters_that_the_optimizer_lacks_stay() -> None:
    pair = pair_of(lambda m: torch.optim.Adam(m.get_submodule("2").parameters(), lr=0.05))
    first = pair.model.get_parameter("0.weight").detach().clone()
    train(pair)
    assert torch.equal(pair.model.get_parameter("0.weight").detach(), first)


class Tied(torch.nn.Module):
    """One matrix twice, under two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(4, 4, dtype=torch.float64)
        self.second = torch.nn.Linear(4, 4, dtype=torch.float64)
        self.second.weight = self.first.weight
        self.last = torch.nn.Linear(4, 3, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.second(self.first(x).tanh()))


@pytest.mark.parametrize("make", [adam, momentum], ids=["Adam", "SGD"])
def test_tied_weights_are_updated_once(
    make: Callable[[torch.nn.Module], torch.optim.Optimizer],
) -> None:
    pair = pair_of(make, Tied())
    train(pair)
    first, second = (pair.model.get_parameter(f"{n}.weight") for n in ("first", "second"))
    assert first is second


class Scaled(torch.nn.Module):
    """The loss uses a parameter that is no part of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = small_model()
        self.outside = [torch.nn.Parameter(torch.ones(3, dtype=torch.float64))]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.outside[0]


def test_a_parameter_outside_the_model_is_trained() -> None:
    def make(model: torch.nn.Module) -> torch.optim.Optimizer:
        assert isinstance(model, Scaled)
        return torch.optim.Adam([*model.parameters(), *model.outside], lr=0.05)

    pair = pair_of(make, Scaled())
    train(pair)
    mine, theirs = pair.model, pair.twin
    assert isinstance(mine, Scaled)
    assert isinstance(theirs, Scaled)
    pair.close(mine.outside[0].detach(), theirs.outside[0].detach())
    assert not torch.equal(mine.outside[0].detach(), torch.ones(3, dtype=torch.float64))
    assert mine.outside[0].grad is None


# -- parameter groups ----------------------------------------------------------------------------


def _groups(model: torch.nn.Module) -> torch.optim.Optimizer:
    first, last = model.get_submodule("0"), model.get_submodule("2")
    return torch.optim.AdamW(
        [
            {"params": list(first.parameters()), "lr": 0.1, "weight_decay": 0.0},
            {"params": [last.get_parameter("weight")], "betas": (0.5, 0.6), "amsgrad": True},
            {"params": [last.get_parameter("bias")], "maximize": True},
        ],
        lr=0.01,
    )


def test_groups_have_their_own_options() -> None:
    pair = pair_of(_groups)
    train(pair)
    rates = [p.path for p in _function(pair).params if p.role is Role.HYPER and ".lr" in p.path]
    assert rates == ["#group0.lr", "#group1.lr", "#group2.lr"]
    for optimizer in (pair.optimizer, pair.twin_optimizer):
        optimizer.param_groups[2]["lr"] = 0.5
    train(pair, 2, start=4)
    assert len(pair.step.programs) == 1


def _function(pair: Pair) -> Any:
    return next(iter(pair.step.programs.values())).captured.function


def test_a_group_that_is_added_later_is_trained() -> None:
    pair = pair_of(lambda m: torch.optim.Adam(m.get_submodule("2").parameters(), lr=0.05))
    train(pair, 2)
    for model, optimizer in ((pair.model, pair.optimizer), (pair.twin, pair.twin_optimizer)):
        optimizer.add_param_group({"params": list(model.get_submodule("0").parameters())})
    train(pair, 2, start=2)


# -- other code between two steps ----------------------------------------------------------------


def test_eager_steps_in_between() -> None:
    pair = pair_of()
    train(pair, 2)
    for i in range(2, 4):
        pair.optimizer.zero_grad()
        pair.loss_fn(pair.model, *regression_batch(i)).backward()
        pair.optimizer.step()
        pair.eager(*regression_batch(i))
        pair.compare()
    train(pair, 2, start=4)
    assert len(pair.step.programs) == 1


def test_loaded_states_are_used() -> None:
    pair = pair_of()
    train(pair, 2)
    saved = copy.deepcopy((pair.model.state_dict(), pair.optimizer.state_dict()))
    train(pair, 2, start=2)
    for model, optimizer in ((pair.model, pair.optimizer), (pair.twin, pair.twin_optimizer)):
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(copy.deepcopy(saved[1]))
    train(pair, 2, start=2)
    assert len(pair.step.programs) == 1


def test_an_emptied_state_begins_anew() -> None:
    pair = pair_of()
    fresh = copy.deepcopy(adam(small_model()).state_dict())
    train(pair, 2)
    for optimizer in (pair.optimizer, pair.twin_optimizer):
        optimizer.load_state_dict(copy.deepcopy(fresh))
    train(pair, 2, start=2)


def test_compiling_leaves_everything_as_it_was() -> None:
    model = small_model()
    optimizer = adam(model)
    regression_loss(model, *regression_batch(0)).backward()
    grads = [p.grad for p in model.parameters()]
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    shoestring.compile(
        model, regression_loss, optimizer, regression_batch(0), backend="reference", passes=[]
    )
    torch.testing.assert_close(model.state_dict(), before[0], rtol=0, atol=0)
    assert optimizer.state_dict() == before[1]
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))


@pytest.mark.parametrize("backend", ["reference", "c"])
def test_all_together(backend: str) -> None:
    """Groups, clipping and a schedule, through every pass of the default pipeline."""
    pair = pair_of(_groups, backend=backend, passes=None, clip_grad_norm=0.5)
    mine = SCHEDULERS["CosineAnnealingLR"](pair.optimizer)
    theirs = SCHEDULERS["CosineAnnealingLR"](pair.twin_optimizer)
    for i in range(4):
        pair.both(
            *regression_batch(i),
            before_update=lambda: torch.nn.utils.clip_grad_norm_(pair.twin.parameters(), 0.5),
        )
        mine.step()
        theirs.step()
