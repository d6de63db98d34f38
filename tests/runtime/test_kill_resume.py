"""A run that is killed at random instants and resumed ends with the bits of one that was not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SWEEP = Path(__file__).parents[1] / "sweeps" / "kill_resume.py"


def test_kill_and_resume() -> None:
    done = subprocess.run(
        [sys.executable, str(SWEEP), "--kills", "6"], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 kills" in done.stdout and "all equal to the last bit" in done.stdout
