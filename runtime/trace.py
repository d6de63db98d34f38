"""A trace of one step, instruction by instruction, for Perfetto and chrome://tracing.

The format is Chrome's: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shoestring.backends.c import CExecutable
from shoestring.ir import Loc
from shoestring.ir.errors import UsageError

from .executor import Executor, Timing
from .step import Step


@dataclass(frozen=True, slots=True)
class Event:
    """One instruction that ran; seconds since the step began."""

    name: str
    start: float
    seconds: float
    loc: Loc
    text: str


class Recorder:
    """Runs an executable and keeps when each instruction ran."""

    def __init__(self, executable: CExecutable) -> None:
        self.events: list[Event] = []
        self._executable = executable
        self._begin = 0.0

    def run(self, arguments: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """As `Executable.run`; leaves what it measured in `events`."""
        self.events = []
        self._begin = time.perf_counter()
        return Executor(self._executable, self._record).run(arguments)

    def _record(self, timing: Timing) -> None:
        start = time.perf_counter() - self._begin - timing.seconds
        text = str(self._executable.instructions[len(self.events)])
        self.events.append(Event(timing.name, start, timing.seconds, timing.loc, text))


class TracedStep:
    """A step that writes a trace of one of its calls; otherwise the step itself.

    Args:
        step: what to call.
        path: the file to write.
        call: which call is traced, counted from 1.
    """

    def __init__(self, step: Step, path: Path, call: int) -> None:
        self.step = step
        self.path = path
        self._left = call

    def __call__(self, *batch: Any) -> Any:
        self._left -= 1
        return self.step(*batch) if self._left else trace_step(self.step, batch, self.path)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        return self.step.state_tensors()

    def extra_state(self) -> dict[str, Any]:
        return self.step.extra_state()

    def load_extra_state(self, state: dict[str, Any]) -> None:
        self.step.load_extra_state(state)


def trace_step(step: Step, batch: Sequence[Any], path: Path) -> Any:
    """Runs one step, writes its trace to `path`, and returns what the step returns.

    Raises:
        UsageError: SS7012 where the backend cannot run instruction by instruction, SS7002 where
            the file cannot be written.
    """
    program = step.program(batch)
    plain = program.executable
    if not isinstance(plain, CExecutable):
        raise UsageError(
            "SS7012",
            f"tracing: an executable with instructions is required, found {type(plain).__name__}",
            hint="use --backend c",
        )
    recorder = Recorder(plain)
    program.executable = recorder
    try:
        outcome = step(*batch)
    finally:
        program.executable = plain
    write_trace(path, recorder.events, step.calls)
    return outcome


def write_trace(path: Path, events: Sequence[Event], step: int) -> None:
    """Writes events in Chrome's trace format.

    Raises:
        UsageError: SS7002 where the file cannot be written.
    """
    end = max((e.start + e.seconds for e in events), default=0.0)
    lines: list[dict[str, Any]] = [
        {"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "shoestring"}},
        {"name": "thread_name", "ph": "M", "pid": 1, "tid": 1, "args": {"name": "step"}},
        _slice(f"step {step}", "step", 0.0, end, {"instructions": len(events)}),
    ]
    for e in events:
        facts = {"module": e.loc.module, "at": str(e.loc), "instruction": e.text}
        lines.append(_slice(e.name, e.loc.phase.value, e.start, e.seconds, facts))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"traceEvents": lines, "displayTimeUnit": "ms"}))
    except OSError as error:
        raise UsageError(
            "SS7002", f"writing a trace: a writable file is required: {error.strerror}", str(path)
        ) from None


def _slice(
    name: str, category: str, start: float, seconds: float, facts: dict[str, Any]
) -> dict[str, Any]:
    """A complete event; times in microseconds."""
    times = {"ts": round(start * 1e6, 3), "dur": round(seconds * 1e6, 3)}
    return {"name": name, "cat": category, "ph": "X", "pid": 1, "tid": 1, **times, "args": facts}
