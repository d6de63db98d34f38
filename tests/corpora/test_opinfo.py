"""The first samples of every OpInfo op, forward and backward; `tests/sweeps/opinfo.py` runs all.

Every op runs through the text form, the verifier and the reference interpreter; every third one
through C as well. Ops that are refused are listed, with the reason, in `opinfo_refused.txt`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from shoestring.backends.registry import get_backend
from shoestring.ir import Function

from .opinfo import (
    EXACT,
    REASSOCIATED,
    Captured,
    Verdict,
    capture_op,
    check_op,
    compare,
    first_refusal,
    kept,
    ops,
)

SAMPLES = 2
LIST = Path(__file__).with_name("opinfo_refused.txt")
REFUSED = {
    line.split("\t")[0]: line.split("\t")[1]
    for line in LIST.read_text().splitlines()
    if line and not line.startswith("#")
}
OPS = ops()
# Groups of ops that are compiled together, together a third of all.
GROUPS = [OPS[i::90] for i in range(30)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Workers share the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)


def reference(function: Function, arguments: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return get_backend("reference").compile(function).run(arguments)


def c(function: Function, arguments: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return get_backend("c").compile(function).run(arguments)


@pytest.mark.parametrize("info", OPS, ids=lambda info: info.formatted_name)
def test_op(info: Any) -> None:
    verdict = check_op(info, reference, SAMPLES, tolerance=EXACT)
    assert not verdict.mismatches
    if info.formatted_name not in REFUSED:
        assert not verdict.refused


@pytest.mark.parametrize("index", range(len(GROUPS)))
def test_ops_in_c(index: int) -> None:
    verdict = Verdict(f"group {index}")
    ready: list[Captured] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of deprecated operators, which are samples all the same
        for info in GROUPS[index]:
            ready += capture_op(info, verdict, SAMPLES, text=False)
        compare(ready, c, REASSOCIATED, verdict)
    assert not verdict.mismatches


@pytest.mark.parametrize("name", REFUSED)
def test_refused_ops_are_still_refused(name: str) -> None:
    """The list only shrinks: an op that is captured now must be taken off it."""
    (info,) = (o for o in OPS if o.formatted_name == name)
    assert REFUSED[name] in first_refusal(info)


def test_few_ops_are_refused() -> None:
    assert len(REFUSED) <= kept(len(OPS), 5)
