"""The training loop: batch, step, schedule, metrics, checkpoint; resumes bit for bit.

A checkpoint holds everything that the next step depends on: every state tensor of the step, the
optimizer's hyper-parameters, the scheduler, the data position and the step's own counters.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, Self, cast

import torch

from shoestring.frontend.pytree import leaves
from shoestring.ir.errors import CheckpointError, RuntimeFault

from .checkpoint import Checkpoint
from .data import Batch
from .plain import is_dict
from .progress import MetricsFile, Progress, SilentProgress, StepRecord
from .store import Store


class TrainStep(Protocol):
    """A compiled step, or anything that behaves like one."""

    def __call__(self, *batch: Any) -> Any: ...
    def state_tensors(self) -> Mapping[str, torch.Tensor]: ...
    def extra_state(self) -> dict[str, Any]: ...
    def load_extra_state(self, state: dict[str, Any], /) -> None: ...


class Scheduler(Protocol):
    """A learning-rate scheduler of `torch.optim.lr_scheduler`."""

    def step(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any], /) -> None: ...


class Loader(Protocol):
    """Endless batches with a position; see `data.ResumableLoader`."""

    def __next__(self) -> Batch: ...
    def state(self) -> dict[str, int]: ...
    def check_state(self, state: dict[str, int], /) -> None: ...
    def load_state(self, state: dict[str, int], /) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class TrainOptions:
    """How long to train and what to keep.

    Attributes:
        steps: in total, those before a resume included.
        folder: of checkpoints; None saves none.
        checkpoint_every: steps between checkpoints; 0 saves only at the end.
        keep: how many of the newest checkpoints stay.
        resume: continue from the newest checkpoint in `folder`.
        validate_every: steps between validations; 0 validates only at the end.
        metrics: a file of JSON lines, one a step.
        stop_on_nonfinite: end with SS5102 where a loss is infinite or not a number.
    """

    steps: int
    folder: Path | None = None
    checkpoint_every: int = 0
    keep: int = 3
    resume: bool = False
    validate_every: int = 0
    metrics: Path | None = None
    stop_on_nonfinite: bool = True


@dataclass
class TrainResult:
    """What a run did.

    Attributes:
        step: steps done in total.
        records: the steps of this run.
        interrupted: ended by Ctrl-C or SIGTERM before `steps`.
        checkpoint: the last one saved.
    """

    step: int = 0
    records: list[StepRecord] = field(default_factory=list[StepRecord])
    interrupted: bool = False
    checkpoint: Path | None = None


@dataclass
class Trainer:
    """Trains with a compiled step.

    Attributes:
        step: what one batch is given to.
        optimizer: whose `param_groups` are saved and restored.
        loader: endless batches.
        options: how long, and what to keep.
        scheduler: stepped once a step.
        validate: gives the validation loss; called where `options` say so.
        progress: told of each step.
        between: called after each step with its record; may raise to end the run.
    """

    step: TrainStep
    optimizer: torch.optim.Optimizer
    loader: Loader
    options: TrainOptions
    scheduler: Scheduler | None = None
    validate: Callable[[], float] | None = None
    progress: Progress = field(default_factory=SilentProgress)
    between: Callable[[StepRecord], None] | None = None

    def run(self) -> TrainResult:
        """Trains to `options.steps`.

        Raises:
            RuntimeFault: SS5101 loading failed, SS5102 the loss is not finite.
            CheckpointError: a checkpoint cannot be saved or resumed.
        """
        store = Store(self.options.folder, self.options.keep) if self.options.folder else None
        if store is None:
            return self._run(None)
        with store:
            return self._run(store)

    def _run(self, store: Store | None) -> TrainResult:
        result = TrainResult()
        if store is not None and self.options.resume:
            result.step, result.checkpoint = self._resume(store)
        metrics = MetricsFile(self.options.metrics, result.step) if self.options.metrics else None
        self.progress.start(result.step, self.options.steps)
        try:
            with StopSignal() as stop:
                self._loop(result, store, metrics, stop)
        finally:
            self.loader.close()
            self.progress.stop()
            if metrics is not None:
                metrics.close()
        return result

    def _loop(
        self,
        result: TrainResult,
        store: Store | None,
        metrics: MetricsFile | None,
        stop: StopSignal,
    ) -> None:
        options = self.options
        while result.step < options.steps and not stop.requested:
            record = self._one(result.step + 1)
            result.step = record.step
            result.records.append(record)
            if metrics is not None:
                metrics.write(record)
            self.progress.step(record)
            if store is not None and _due(record.step, options.checkpoint_every):
                self._save(store, result)
            if self.between is not None:
                self.between(record)
        result.interrupted = result.step < options.steps
        if store is not None and result.records and result.checkpoint != store.path(result.step):
            self._save(store, result)

    def _one(self, number: int) -> StepRecord:
        batch = next(self.loader)
        lr = float(self.optimizer.param_groups[0]["lr"])
        begin = time.perf_counter()
        loss, metrics = _split(self.step(*batch))
        seconds = time.perf_counter() - begin
        if self.options.stop_on_nonfinite and not math.isfinite(loss):
            raise RuntimeFault(
                "SS5102",
                f"training: a finite loss is required, found {loss} in step {number}",
                hint="lower the learning rate, clip gradients, or look at the batch",
            )
        if self.scheduler is not None:
            self.scheduler.step()
        last = number == self.options.steps
        if self.validate is not None and (last or _due(number, self.options.validate_every)):
            metrics["validation_loss"] = self.validate()
        return StepRecord(number, loss, seconds, _tokens(batch), lr, metrics)

    # --- checkpoints ----------------------------------------------------------------------------

    def extra(self, step: int) -> dict[str, Any]:
        """The plain values of a checkpoint after `step` steps."""
        return {
            "step": step,
            "data": self.loader.state(),
            "optimizer": hyper_parameters(self.optimizer),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "compiled": self.step.extra_state(),
        }

    def _save(self, store: Store, result: TrainResult) -> None:
        result.checkpoint = store.save(
            result.step, self.step.state_tensors(), self.extra(result.step)
        )

    def _resume(self, store: Store) -> tuple[int, Path]:
        checkpoint = store.latest()
        self.restore(checkpoint)
        step = int(checkpoint.extra["step"])
        self.progress.note(f"resumed from {checkpoint.folder} (step {step})")
        return step, checkpoint.folder

    def restore(self, checkpoint: Checkpoint) -> None:
        """Loads a checkpoint; everything is checked before anything is changed.

        Raises:
            CheckpointError: SS6007, SS6008, SS6013 where it is of another run; SS6004 damaged.
        """
        extra: Any = checkpoint.extra
        needed = {"step", "data", "optimizer", "scheduler", "compiled"}
        if not is_dict(extra) or not needed <= set(extra):
            raise CheckpointError(
                "SS6013",
                f"resuming: {sorted(needed)} are required in the checkpoint",
                str(checkpoint.folder),
            )
        self.loader.check_state(extra["data"])
        check_hyper_parameters(self.optimizer, extra["optimizer"])
        if (extra["scheduler"] is None) != (self.scheduler is None):
            raise CheckpointError(
                "SS6013",
                "resuming: the checkpoint and the run must both have a scheduler, or neither",
                str(checkpoint.folder),
            )
        checkpoint.load_into(self.step.state_tensors())
        self.loader.load_state(extra["data"])
        load_hyper_parameters(self.optimizer, extra["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(extra["scheduler"])
        self.step.load_extra_state(extra["compiled"])


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _split(outcome: Any) -> tuple[float, dict[str, float]]:
    """What a step returned, as numbers."""
    if isinstance(outcome, torch.Tensor):
        return float(outcome), {}
    loss, metrics = cast(tuple[torch.Tensor, Mapping[str, torch.Tensor]], outcome)
    return float(loss), {n: float(m) for n, m in metrics.items() if m.numel() == 1}


def _tokens(batch: Batch) -> int:
    found = (leaf for _, leaf in leaves(list(batch)))
    return next((t.numel() for t in found if isinstance(t, torch.Tensor)), 0)


def hyper_parameters(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The optimizer's `param_groups` without the parameters."""
    return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


def check_hyper_parameters(optimizer: torch.optim.Optimizer, saved: Any) -> None:
    """Raises CheckpointError SS6013 where the groups are others than when saved."""
    live = hyper_parameters(optimizer)
    wanted, found = [sorted(g) for g in live], [sorted(g) for g in saved]
    if wanted != found:
        raise CheckpointError(
            "SS6013",
            f"resuming: the optimizer has {len(live)} groups with {wanted[:1]}, the checkpoint has"
            f" {len(found)} with {found[:1]}",
            hint="build the optimizer as when the checkpoint was saved",
        )


def load_hyper_parameters(optimizer: torch.optim.Optimizer, saved: list[dict[str, Any]]) -> None:
    """Sets the groups' values; a tensor is written in place."""
    for group, values in zip(optimizer.param_groups, saved, strict=True):
        for key, value in values.items():
            if isinstance(group[key], torch.Tensor):
                group[key].copy_(value)
            else:
                group[key] = value


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a request, so that no step is cut in half.

    The second one acts as ever. Outside of the main thread signals are left alone.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.requested = True
        signal.signal(number, self._before[number])

    def __exit__(self, *ignored: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
