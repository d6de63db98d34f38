"""The benchmark of convolutions, at a size of no interest."""

from __future__ import annotations

import pytest
from benchmarks.convolutions import CASES, Options, main


def test_it_compares_and_prints_every_product(capsys: pytest.CaptureFixture[str]) -> None:
    main(Options(images=1, rounds=1))
    lines = capsys.readouterr().out.splitlines()
    assert sum("gradient" in line or "result" in line for line in lines) == 3 * len(CASES)
