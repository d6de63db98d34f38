"""The training loop: resume is bitwise, signals end it between steps, refusals change nothing."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shoestring.ir.errors import CheckpointError, RuntimeFault, ShoestringError
from shoestring.runtime.data import ResumableLoader, TokenDataset
from shoestring.runtime.progress import StepRecord
from shoestring.runtime.store import Store
from shoestring.runtime.trainer import Trainer, TrainOptions, TrainResult


class PlainStep:
    """Stands for a compiled step: the same interface over eager PyTorch, with a random key."""

    def __init__(self, seed: int = 0, width: int = 4) -> None:
        torch.manual_seed(seed)
        self.model = torch.nn.Linear(width, 1)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        for p in self.model.parameters():  # moments exist from the start, as in a compiled step
            p.grad = torch.zeros_like(p)
        self.optimizer.step()
        self.key = torch.zeros(2, dtype=torch.int64)
        self.calls = 0

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.key[1] += 1
        generator = torch.Generator().manual_seed(int(self.key[1]))
        noise = torch.rand(x.shape, generator=generator)
        loss = (self.model(x.float() * noise) ** 2).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.calls += 1
        return loss.detach(), {"noise": noise.mean()}

    def state_tensors(self) -> dict[str, torch.Tensor]:
        state = {f"parameter/{n}": p.detach() for n, p in self.model.named_parameters()}
        for name, p in self.model.named_parameters():
            moments = self.optimizer.state[p].items()
            state |= {f"moment/{name}#{key}": value for key, value in moments}
        return {**state, "rng/#rng": self.key}

    def extra_state(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]


def trainer(options: TrainOptions, *, seed: int = 0, width: int = 4, data_seed: int = 0) -> Trainer:
    step = PlainStep(seed, width)
    loader = ResumableLoader(TokenDataset(torch.arange(80), width), 2, seed=data_seed)
    scheduler = torch.optim.lr_scheduler.LambdaLR(step.optimizer, lambda n: 1 / (1 + n))
    return Trainer(step, step.optimizer, loader, options, scheduler)


def final(t: Trainer) -> dict[str, torch.Tensor]:
    return {n: v.clone() for n, v in t.step.state_tensors().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].equal(t) for n, t in b.items())


def run(options: TrainOptions, **how: int) -> tuple[Trainer, TrainResult]:
    t = trainer(options, **how)
    return t, t.run()


@pytest.mark.parametrize("cut", [1, 4, 9])
def test_resume_is_bitwise(tmp_path: Path, cut: int) -> None:
    whole, _ = run(TrainOptions(20))
    options = TrainOptions(cut, tmp_path, metrics=tmp_path / "m.jsonl")
    run(options)
    resumed, result = run(replace(options, steps=20, resume=True), seed=99)
    assert equal(final(resumed), final(whole))
    assert resumed.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]
    assert [r.step for r in result.records] == list(range(cut + 1, 21))
    lines = (tmp_path / "m.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 21))
    assert json.loads(lines[0])["noise"] > 0


def test_checkpoints_on_the_way(tmp_path: Path) -> None:
    _, result = run(TrainOptions(10, tmp_path, checkpoint_every=3, keep=2))
    assert Store(tmp_path).steps() == [9, 10]
    assert result.checkpoint == Store(tmp_path).path(10)


def test_a_finished_run_resumes_to_nothing(tmp_path: Path) -> None:
    run(TrainOptions(3, tmp_path))
    _, result = run(TrainOptions(3, tmp_path, resume=True))
    assert result.step == 3 and not result.records and not result.interrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_between_steps_and_save(tmp_path: Path, number: int) -> None:
    before = signal.getsignal(number)

    def interrupt(record: StepRecord) -> None:
        if record.step == 4:
            os.kill(os.getpid(), number)

    first = trainer(TrainOptions(10, tmp_path))
    first.between = interrupt
    result = first.run()
    assert (result.step, result.interrupted) == (4, True)
    assert Store(tmp_path).steps() == [4]
    assert signal.getsignal(number) is before
    resumed, _ = run(TrainOptions(10, tmp_path, resume=True))
    whole, _ = run(TrainOptions(10))
    assert equal(final(resumed), final(whole))


def test_validation(tmp_path: Path) -> None:
    t = trainer(TrainOptions(5, validate_every=2))
    t.validate = lambda: 1.5
    result = t.run()
    assert [r.step for r in result.records if "validation_loss" in r.metrics] == [2, 4, 5]


def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    t = trainer(TrainOptions(5, tmp_path))
    with torch.no_grad():
        next(iter(t.step.state_tensors().values())).fill_(float("nan"))
    with pytest.raises(RuntimeFault) as caught:
        t.run()
    assert str(caught.value) == (
        "[SS5102] training: a finite loss is required, found nan in step 1\n"
        "  help: lower the learning rate, clip gradients, or look at the batch"
    )
    assert Store(tmp_path).steps() == []


def _no_scheduler(t: Trainer) -> None:
    t.scheduler = None


def _two_groups(t: Trainer) -> None:
    t.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})


REFUSED: dict[str, tuple[str, dict[str, int], Callable[[Trainer], None]]] = {
    "other data order": ("SS6013", {"data_seed": 1}, lambda t: None),
    "no scheduler": ("SS6013", {}, _no_scheduler),
    "other groups": ("SS6013", {}, _two_groups),
    "other model": ("SS6008", {"width": 5}, lambda t: None),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_checkpoints_change_nothing(tmp_path: Path, name: str) -> None:
    code, how, change = REFUSED[name]
    run(TrainOptions(3, tmp_path))
    t = trainer(TrainOptions(5, tmp_path, resume=True), **how)
    if name == "other model":
        t.loader = ResumableLoader(TokenDataset(torch.arange(80), 4), 2)
    change(t)
    before = final(t)
    with pytest.raises(CheckpointError) as caught:
        t.run()
    assert caught.value.code == code
    assert equal(final(t), before)


def test_a_damaged_newest_checkpoint_is_an_error(tmp_path: Path) -> None:
    _, result = run(TrainOptions(3, tmp_path))
    assert result.checkpoint is not None
    file = result.checkpoint / "tensors-00000.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    t = trainer(TrainOptions(5, tmp_path, resume=True))
    before = final(t)
    with pytest.raises(ShoestringError, match="SS6004"):
        t.run()
    assert equal(final(t), before)


def test_learning_rates_in_tensors(tmp_path: Path) -> None:
    def make(options: TrainOptions) -> Trainer:
        t = trainer(options)
        t.scheduler = None
        t.optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
        return t

    make(TrainOptions(2, tmp_path)).run()
    resumed = make(TrainOptions(2, tmp_path, resume=True))
    lr = resumed.optimizer.param_groups[0]["lr"]
    lr.fill_(7.0)
    resumed.run()
    assert resumed.optimizer.param_groups[0]["lr"] is lr and float(lr) == 0.25
