"""What a run tells: a live line on a terminal, plain lines elsewhere, JSON lines to a file."""

from __future__ import annotations

import contextlib
import json
import math
import os
import statistics
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from shoestring.ir.errors import UsageError

from .memory import current_rss

_WINDOW = 20
_PLAIN_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One finished step.

    Attributes:
        step: counted from 1.
        loss: of this step.
        seconds: of the step itself, without loading, saving and printing.
        tokens: elements of the first batch leaf; samples times length for text.
        lr: of the first parameter group.
        metrics: what the loss function returned beside the loss, validation loss.
    """

    step: int
    loss: float
    seconds: float
    tokens: int
    lr: float
    metrics: dict[str, float] = field(default_factory=dict[str, float])


class Progress(Protocol):
    """Receives what happens in a run."""

    def start(self, step: int, total: int) -> None: ...
    def step(self, record: StepRecord) -> None: ...
    def note(self, text: str) -> None: ...
    def stop(self) -> None: ...


class SilentProgress:
    """Says nothing."""

    def start(self, step: int, total: int) -> None:
        del step, total

    def step(self, record: StepRecord) -> None:
        del record

    def note(self, text: str) -> None:
        del text

    def stop(self) -> None:
        pass


class _Rates:
    """Medians over the last steps."""

    def __init__(self) -> None:
        self._recent: deque[StepRecord] = deque(maxlen=_WINDOW)

    def add(self, record: StepRecord) -> None:
        self._recent.append(record)

    @property
    def seconds(self) -> float:
        return statistics.median(r.seconds for r in self._recent)

    @property
    def tokens(self) -> float:
        return statistics.median(r.tokens / max(r.seconds, 1e-9) for r in self._recent)


def step_line(record: StepRecord, total: int, rates: _Rates) -> str:
    """The facts of a step as one line of text."""
    left = (total - record.step) * rates.seconds
    extra = "".join(f"  {name} {value:.4g}" for name, value in record.metrics.items())
    return (
        f"step {record.step}/{total}  loss {record.loss:.4f}{extra}  {rates.tokens:,.0f} tokens/s"
        f"  {rates.seconds * 1e3:.1f} ms/step  ETA {duration(left)}"
        f"  memory {current_rss() / 2**20:,.0f} MiB"
    )


def duration(seconds: float) -> str:
    """`42s`, `3m05s` or `2h07m`."""
    whole = math.ceil(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole // 60 % 60:02d}m"


class PlainProgress:
    """Lines of text: the first step, then one every few seconds, and the last."""

    def __init__(self, stream: IO[str] | None = None, every: float = _PLAIN_SECONDS) -> None:
        self._stream = stream if stream is not None else sys.stdout
        self._every = every
        self._total = 0
        self._printed = -math.inf
        self._rates = _Rates()

    def start(self, step: int, total: int) -> None:
        del step
        self._total = total

    def step(self, record: StepRecord) -> None:
        self._rates.add(record)
        now = time.monotonic()
        last = record.step == self._total
        if last or record.metrics or now - self._printed >= self._every:
            self._printed = now
            self.note(step_line(record, self._total, self._rates))

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def stop(self) -> None:
        pass


class LiveProgress:
    """A bar that is redrawn in place; needs a terminal."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._console = Console()
        self._bar = Progress(
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            console=self._console,
            transient=False,
        )
        self._task = self._bar.add_task("starting", total=None)
        self._total = 0
        self._rates = _Rates()

    def start(self, step: int, total: int) -> None:
        self._total = total
        self._bar.update(self._task, total=total, completed=step)
        self._bar.start()

    def step(self, record: StepRecord) -> None:
        self._rates.add(record)
        text = step_line(record, self._total, self._rates)
        self._bar.update(self._task, completed=record.step, description=text)

    def note(self, text: str) -> None:
        self._bar.console.print(text, highlight=False, markup=False)

    def stop(self) -> None:
        self._bar.stop()


def is_live(stream: IO[str]) -> bool:
    """Whether lines may be redrawn: a terminal, not CI, and colour not refused (no-color.org)."""
    plain = any(os.environ.get(name) for name in ("NO_COLOR", "CI"))
    return stream.isatty() and not plain and os.environ.get("TERM") != "dumb"


def make_progress() -> Progress:
    """Live on a terminal, plain lines elsewhere."""
    return LiveProgress() if is_live(sys.stdout) else PlainProgress()


# --- metrics ------------------------------------------------------------------------------------


class MetricsFile:
    """One JSON object a line and step, flushed, so that a killed run loses none.

    On resume, lines beyond the resumed step are removed: the file reads as of an uninterrupted run.

    Args:
        path: the file; made where absent.
        step: steps that were done before; later lines are dropped.

    Raises:
        UsageError: SS7002 where the file cannot be written.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = _lines_up_to(path, step)
            temporary = path.with_name(f".{path.name}.tmp")
            temporary.write_bytes(kept)
            os.replace(temporary, path)
            self._file = open(path, "a", encoding="utf-8")
        except OSError as error:
            raise UsageError(
                "SS7002",
                f"writing metrics: a writable file is required: {error.strerror}",
                str(path),
            ) from None

    def write(self, record: StepRecord) -> None:
        line: dict[str, Any] = {
            "step": record.step,
            "loss": record.loss,
            "lr": record.lr,
            "seconds": round(record.seconds, 6),
            "tokens": record.tokens,
            **record.metrics,
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _lines_up_to(path: Path, step: int) -> bytes:
    """The leading whole lines whose step is not beyond `step`."""
    if step == 0 or not path.exists():
        return b""
    kept: list[bytes] = []
    for line in path.read_bytes().splitlines(keepends=True):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                kept.append(line)
                continue
        break
    return b"".join(kept)
