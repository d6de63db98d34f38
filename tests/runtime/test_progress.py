"""Plain progress, metrics files that resume, measured memory."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from shoestring.ir.errors import UsageError
from shoestring.runtime import progress as module
from shoestring.runtime.memory import current_rss, measure_peak, peak_rss
from shoestring.runtime.progress import (
    LiveProgress,
    MetricsFile,
    PlainProgress,
    StepRecord,
    duration,
    is_live,
    make_progress,
)


def record(step: int, **metrics: float) -> StepRecord:
    return StepRecord(step, 2.5, 0.01, 512, 1e-3, dict(metrics))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines() -> None:
    out = io.StringIO()
    progress = PlainProgress(out, every=3600)
    progress.start(0, 4)
    for step in range(1, 5):
        progress.step(record(step, **({"validation_loss": 2.0} if step == 3 else {})))
    progress.note("done")
    progress.stop()
    lines = out.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/4", "step 3/4", "step 4/4", "done"]
    assert "loss 2.5000  51,200 tokens/s  10.0 ms/step  ETA 1s  memory" in lines[0]
    assert "validation_loss 2" in lines[1]
    assert "\x1b" not in out.getvalue()


@pytest.mark.parametrize("name", ["NO_COLOR", "CI"])
def test_live_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert is_live(Terminal()) and not is_live(io.StringIO())
    monkeypatch.setenv(name, "1")
    assert not is_live(Terminal())


def test_a_pipe_gets_plain_lines() -> None:
    assert isinstance(make_progress(), PlainProgress)


def test_live_progress_runs(capsys: pytest.CaptureFixture[str]) -> None:
    progress = LiveProgress()
    progress.start(0, 2)
    progress.step(record(1))
    progress.note("[not markup]")
    progress.step(record(2))
    progress.stop()
    out = capsys.readouterr().out
    assert "[not markup]" in out and "step 2/2" in out


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.2, "1m00s"), (185, "3m05s"), (7620, "2h07m")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_metrics_resume(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "m.jsonl"
    metrics = MetricsFile(path)
    for step in range(1, 6):
        metrics.write(record(step))
    metrics.close()
    with path.open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    metrics = MetricsFile(path, step=3)
    metrics.write(record(4, accuracy=0.5))
    metrics.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    expected = {"step": 4, "loss": 2.5, "lr": 0.001, "seconds": 0.01, "tokens": 512}
    assert lines[3] == {**expected, "accuracy": 0.5}
    MetricsFile(path).close()
    assert path.read_text() == ""


def test_metrics_to_nowhere(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="SS7002"):
        MetricsFile(tmp_path)


# --- memory -------------------------------------------------------------------------------------

_SIZE = 64 << 20


@pytest.mark.parametrize("exact", [True, False])
def test_peaks_are_measured(monkeypatch: pytest.MonkeyPatch, exact: bool) -> None:
    from shoestring.runtime import memory

    if not exact:
        monkeypatch.setattr(memory, "_CLEAR", Path("/nowhere/clear_refs"))
    with measure_peak() as use:
        block = bytearray(_SIZE)
        held = current_rss()
        if not exact:
            import time

            time.sleep(0.1)
        del block
    assert use.sampled is not exact
    assert held - use.before > 0.9 * _SIZE
    assert 0.9 * _SIZE < use.growth < 3 * _SIZE
    assert peak_rss() >= current_rss() > 0


def test_exports() -> None:
    assert module.SilentProgress().note("x") is None  # type: ignore[func-returns-value]
