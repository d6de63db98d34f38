"""What a step will need is said before it runs."""

from __future__ import annotations

import gc
import linecache
import subprocess
import sys
import weakref

import torch

import shoestring
from shoestring.backends.c import CExecutable
from shoestring.runtime.memory import collecting_by_phase, forget_sources


def loss(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def test_bytes_to_come() -> None:
    model = torch.nn.Linear(64, 32)
    optimizer = torch.optim.AdamW(model.parameters())
    batch = (torch.randn(8, 64),)
    step = shoestring.compile(model, loss, optimizer, batch)
    executable = step.program(batch).executable
    assert isinstance(executable, CExecutable)
    arena = executable.unbound_bytes
    moments = 2 * 4 * (64 * 32 + 32)
    counts = 2 * 4
    assert step.bytes_to_come(batch) == arena + moments + counts
    assert not optimizer.state
    step(*batch)
    assert step.bytes_to_come(batch) == arena


def test_the_reference_says_nothing() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters())
    batch = (torch.randn(1, 2),)
    step = shoestring.compile(model, loss, optimizer, batch, backend="reference")
    assert step.bytes_to_come(batch) is None


def test_freed_memory_is_returned() -> None:
    """In a process of its own: it is a setting of the whole process."""
    script = """
import torch
from shoestring.runtime.memory import current_rss, return_freed_memory
return_freed_memory()
kept = []
before = current_rss()
for _ in range(40):
    block = torch.ones(2 << 20)
    kept.append(torch.ones(64))
    del block
assert current_rss() - before < 8 << 20
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_the_collector_pauses_only_if_it_ran() -> None:
    with collecting_by_phase():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with collecting_by_phase():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


class _Knot:
    def __init__(self) -> None:
        self.itself = self


def _dead(knot: weakref.ref[_Knot]) -> bool:
    return knot() is None


def test_a_phase_frees_its_own_cycles_and_leaves_those_of_before() -> None:
    gc.disable()
    try:
        before = weakref.ref(_Knot())
        with collecting_by_phase() as end_phase:
            inside = weakref.ref(_Knot())
            end_phase()
            assert _dead(inside) and not _dead(before)
    finally:
        gc.enable()
    gc.collect()
    assert _dead(before)


def test_what_somebody_froze_stays_frozen() -> None:
    kept: list[object] = [[]]
    gc.freeze()
    try:
        with collecting_by_phase() as end_phase:
            end_phase()
        assert all(o is not kept for o in gc.get_objects())
    finally:
        gc.unfreeze()


def test_sources_in_files_are_read_again_and_others_kept() -> None:
    typed = (4, None, ["x=1\n"], "<typed>")
    linecache.cache["<typed>"] = typed
    first = linecache.getline(__file__, 1)
    assert first and __file__ in linecache.cache
    forget_sources()
    assert __file__ not in linecache.cache and linecache.cache["<typed>"] is typed
    assert linecache.getline(__file__, 1) == first
    del linecache.cache["<typed>"]
