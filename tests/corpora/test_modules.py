"""The first samples of every ModuleInfo module: a training step, in train and in eval mode.

Every module runs through the text form, the verifier and the interpreter; every third one through C
as well. Modules that are refused are listed in `modules_refused.txt`; `tests/sweeps/opinfo.py
--modules` runs all samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from shoestring.backends.registry import get_backend
from shoestring.ir import Function

from .modules import check_module, first_refusal, modules
from .opinfo import EXACT, REASSOCIATED

SAMPLES = 2
LIST = Path(__file__).with_name("modules_refused.txt")
REFUSED = {
    line.split("\t")[0]: line.split("\t")[1]
    for line in LIST.read_text().splitlines()
    if line and not line.startswith("#")
}
MODULES = modules()


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


@pytest.mark.parametrize("info", MODULES, ids=lambda info: info.formatted_name)
def test_module(info: Any) -> None:
    verdict = check_module(info, reference, SAMPLES, EXACT)
    assert not verdict.mismatches
    if info.formatted_name not in REFUSED:
        assert not verdict.refused


@pytest.mark.parametrize("info", MODULES[::3], ids=lambda info: info.formatted_name)
def test_module_in_c(info: Any) -> None:
    verdict = check_module(info, c, SAMPLES, REASSOCIATED, text=False)
    assert not verdict.mismatches


@pytest.mark.parametrize("name", REFUSED)
def test_refused_modules_are_still_refused(name: str) -> None:
    """The list only shrinks: a module that is captured now must be taken off it."""
    (info,) = (m for m in MODULES if m.formatted_name == name)
    assert REFUSED[name] in first_refusal(info)


def test_few_modules_are_refused() -> None:
    assert len(REFUSED) <= 5
