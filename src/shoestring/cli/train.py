"""`shoestring train`: trains the default model, optionally beside plain PyTorch."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tyro.conf import OmitArgPrefixes

from shoestring.ir.errors import RuntimeFault, UsageError
from shoestring.runtime.memory import (
    MemoryUse,
    current_rss,
    measure_peak,
    peak_rss,
    release,
    return_freed_memory,
)
from shoestring.runtime.progress import StepRecord, make_progress
from shoestring.runtime.trace import TracedStep
from shoestring.runtime.trainer import Trainer, TrainOptions, TrainResult

from .compare import Side, print_comparison, write_json
from .compile_child import measure_compile
from .peer import Peer, weights_hash
from .workload import (
    DataOptions,
    ModelOptions,
    OptimizerOptions,
    Workload,
    WorkloadOptions,
    build,
    import_transformers,
    positive,
)

_BLOCK = 5  # steps of a turn where two processes alternate
_TRACED = 4  # the step that is traced: the first ones also load libraries and fault pages in


@dataclass(frozen=True)
class RunOptions:
    """The run.

    Attributes:
        steps: in total, those before a resume included.
        out: folder of checkpoints; without it nothing is saved.
        resume: continue from the newest checkpoint in --out.
        checkpoint_every: steps between checkpoints; one is always saved at the end.
        keep: how many of the newest checkpoints stay.
        validate_every: steps between validations; 0 validates at the end.
        metrics: a file of JSON lines, one a step.
        trace: a file for a trace of one step; opens in Perfetto and chrome://tracing.
        compare: also train with plain PyTorch, in a process of its own, and compare.
        json: a file for the comparison, or for the run's own numbers.
        backend: what runs the compiled step.
    """

    steps: int = 200
    out: Path | None = None
    resume: bool = False
    checkpoint_every: int = 100
    keep: int = 3
    validate_every: int = 0
    metrics: Path | None = None
    trace: Path | None = None
    compare: Literal["none", "eager"] = "none"
    json: Path | None = None
    backend: str = "c"

    def __post_init__(self) -> None:
        positive("steps", self.steps)
        positive("keep", self.keep)
        if self.resume and self.out is None:
            raise UsageError("SS7008", "--resume needs the folder to resume from", hint="add --out")
        if self.resume and self.compare != "none":
            raise UsageError(
                "SS7008", "--compare starts both sides from the same weights; it cannot --resume"
            )


@dataclass(frozen=True)
class Train:
    """Trains a small GPT-2 on text with a compiled step."""

    run_: OmitArgPrefixes[RunOptions] = field(default_factory=RunOptions)
    model: OmitArgPrefixes[ModelOptions] = field(default_factory=ModelOptions)
    data: OmitArgPrefixes[DataOptions] = field(default_factory=DataOptions)
    optimizer: OmitArgPrefixes[OptimizerOptions] = field(default_factory=OptimizerOptions)

    @property
    def workload(self) -> WorkloadOptions:
        return WorkloadOptions(self.model, self.data, self.optimizer, self.run_.steps)

    def run(self) -> int:
        """Trains; the exit code."""
        return _Session(self).run()


@dataclass
class _Session:
    """One run of the command."""

    command: Train
    side: Side = field(default_factory=lambda: Side("shoestring"))

    def run(self) -> int:
        options = self.command.run_
        with ExitStack() as stack:
            peer = None
            return_freed_memory()
            if options.compare == "eager":
                print("starting plain PyTorch in a process of its own")
                peer = stack.enter_context(Peer(self.command.workload))
            import_transformers()
            release()
            self.side.baseline = current_rss()
            work = build(self.command.workload)
            stack.enter_context(work.loader)
            if peer is not None:
                _check_weights(peer, work)
            step = self._compile(work)
            result = self._train(work, step, peer)
            return self._finish(result, peer)

    def _compile(self, work: Workload) -> Any:
        import shoestring

        count = sum(p.numel() for p in work.model.parameters())
        print(f"compiling a step of {count / 1e6:.1f} M parameters")
        begin = time.perf_counter()
        step = shoestring.compile(
            work.model,
            work.loss_fn,
            work.optimizer,
            work.example_batch,
            backend=self.command.run_.backend,
            precision=self.command.model.precision,
            seed=self.command.data.seed,
        )
        self.side.compile_seconds = time.perf_counter() - begin
        self.side.compile_peak = peak_rss()
        to_come = step.bytes_to_come(work.example_batch)
        if to_come is not None:
            release()
            self.side.predicted_peak = current_rss() + to_come
        print(f"compiled in {self.side.compile_seconds:.1f} s; {_prediction(self.side)}")
        return step

    def _train(self, work: Workload, step: Any, peer: Peer | None) -> TrainResult:
        options = self.command.run_
        if options.trace is not None:
            step = TracedStep(step, options.trace, min(_TRACED, options.steps))
        release()

        def turn(record: StepRecord) -> None:
            if peer is not None and (record.step % _BLOCK == 0 or record.step == options.steps):
                peer.run_until(record.step)

        trainer = Trainer(
            step,
            work.optimizer,
            work.loader,
            TrainOptions(
                options.steps,
                options.out,
                options.checkpoint_every,
                options.keep,
                options.resume,
                options.validate_every,
                options.metrics,
            ),
            work.scheduler,
            # Beside a peer both validate at the end: it is no part of a step's memory.
            work.validation_loss if work.validation and peer is None else None,
            make_progress(),
            turn,
        )
        with measure_peak() as use:
            result = trainer.run()
        self._record(result, use)
        if peer is not None and work.validation:
            self.side.validation = work.validation_loss()
        return result

    def _record(self, result: TrainResult, use: MemoryUse) -> None:
        self.side.losses = [r.loss for r in result.records]
        self.side.seconds = [r.seconds for r in result.records]
        self.side.peak = use.peak
        if result.records:
            self.side.validation = result.records[-1].metrics.get("validation_loss")

    def _finish(self, result: TrainResult, peer: Peer | None) -> int:
        saved = f"; checkpoint {result.checkpoint}" if result.checkpoint else ""
        if result.interrupted:
            saved_some = result.checkpoint is not None
            again = "continue with --resume" if saved_some else "nothing was saved (no --out)"
            print(f"stopped after step {result.step}{saved}; {again}", file=sys.stderr)
            return 130
        print(f"trained {result.step} steps{saved}")
        other = None
        if peer is not None:
            other = Side.of_peer(peer.finish(), self.command.model.precision)
            peer.close()
            times = measure_compile(self.command.workload, self.command.run_.backend)
            self.side.compile_seconds, self.side.compile_warm_seconds = times
            print_comparison(self.side, other)
        if self.command.run_.json is not None:
            write_json(self.command.run_.json, self.command.workload, self.side, other)
        return 0


def _prediction(side: Side) -> str:
    """What the compiler says about memory."""
    if side.predicted_peak is None:
        return "this backend does not predict memory"
    return f"training will need {side.predicted_peak / 2**20:,.0f} MiB, libraries included"


def _check_weights(peer: Peer, work: Workload) -> None:
    if peer.weights != weights_hash(work.model):
        raise RuntimeFault(
            "SS5104", "comparing: both sides must start from equal weights, found different ones"
        )
