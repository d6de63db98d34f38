"""The threads of generated code: every part once, whoever runs it and whenever it wakes."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from shoestring.backends.c import CBackend, CExecutable
from shoestring.backends.c.build import build
from shoestring.backends.c.calls import Pool
from shoestring.ir import parse

SOURCE = """
#include "pool.h"
static void count(void *context, int64_t part, int64_t worker) {
    int64_t *seen = context;
    __atomic_fetch_add(&seen[part], 1, __ATOMIC_RELAXED);
}
void count_parts(int64_t *seen, int64_t parts) { ss_parallel(count, seen, parts); }
static void nest(void *context, int64_t part, int64_t worker) {
    ss_parallel(count, (int64_t *)context + 8 * part, 8);
}
static void note(void *context, int64_t part, int64_t worker) {
    int64_t *most = context; /* one a part; each takes a while, so that every thread takes some */
    for (volatile int64_t i = 0; i < 20000; i++) {}
    most[part] = worker + 1;
}
void count_workers(int64_t *seen, int64_t parts) { ss_parallel(note, seen, parts); }
void count_nested(int64_t *seen) { ss_parallel(nest, seen, 8); }
void loop(int64_t *seen, int64_t size) {
#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < size; i++) seen[i] += 1;
}
"""
FUNCTION = """
func @f {
  batch %x: f32[512,600] "x"
  %e: f32[512,600] = aten.exp.default(%x)
  %s: f32[512] = aten.sum.dim_IntList(%e) {dim=[1]}
  return s=%s
}
"""


@pytest.fixture
def library() -> Iterator[ctypes.CDLL]:
    loaded = ctypes.CDLL(str(build([SOURCE]).path))
    Pool.join(loaded)
    Pool.resize(3)
    yield loaded
    Pool.resize(torch.get_num_threads())


def counted(call: object, size: int, *more: int) -> list[int]:
    seen = (ctypes.c_int64 * size)()
    call(seen, *map(ctypes.c_int64, more))  # type: ignore[operator]
    return list(seen)


@pytest.mark.parametrize("parts", [0, 1, 2, 3, 7, 1000])
def test_every_part_once(library: ctypes.CDLL, parts: int) -> None:
    for _ in range(200):
        assert counted(library.count_parts, parts + 1, parts) == [1] * parts + [0]


def test_workers_that_sleep_wake(library: ctypes.CDLL) -> None:
    for _ in range(20):
        assert counted(library.count_parts, 64, 64) == [1] * 64
        time.sleep(0.002)


def test_workers_rest_when_told_to(library: ctypes.CDLL) -> None:
    """And take part in the next piece of work, however soon it comes."""
    for i in range(200):
        assert counted(library.count_parts, 64, 64) == [1] * 64
        Pool.rest()
        time.sleep(0.001 * (i % 3))
    if sys.platform == "linux":
        tasks = Path("/proc/self/task")
        time.sleep(0.05)
        awake = [t for t in tasks.iterdir() if " R " in (t / "stat").read_text().rsplit(")", 1)[1]]
        assert len(awake) == 1, "the test itself"


def test_fewer_threads_than_before(library: ctypes.CDLL) -> None:
    """Threads that are no longer wanted take no part: the others' scratch is all there is."""
    Pool.resize(6)
    assert max(counted(library.count_workers, 400, 400)) <= 6
    Pool.resize(2)
    for _ in range(50):
        assert max(counted(library.count_workers, 100, 100)) <= 2


@pytest.mark.parametrize("parts", [3, 8, 100, 1001])
def test_threads_take_their_own_stretch_first(library: ctypes.CDLL, parts: int) -> None:
    """From its front; others take what is left from its back."""
    for _ in range(20):
        workers = counted(library.count_workers, parts, parts)
        for w in range(3):
            own = [x == w + 1 for x in workers[w * parts // 3 : (w + 1) * parts // 3]]
            assert own == sorted(own, reverse=True)


def test_work_within_a_part(library: ctypes.CDLL) -> None:
    for _ in range(100):
        assert counted(library.count_nested, 64) == [1] * 64


@pytest.mark.parametrize("size", [0, 1, 5, 12, 1001])
def test_parallel_loops(library: ctypes.CDLL, size: int) -> None:
    for _ in range(50):
        assert counted(library.loop, size + 1, size) == [1] * size + [0]


def test_callers_at_one_time(library: ctypes.CDLL) -> None:
    wrong: list[list[int]] = []

    def call() -> None:
        for _ in range(300):
            seen = counted(library.count_parts, 50, 50)
            if seen != [1] * 50:
                wrong.append(seen)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own(library: ctypes.CDLL) -> None:
    counted(library.count_parts, 64, 64)
    child = os.fork()
    if child == 0:
        good = all(counted(library.count_parts, 64, 64) == [1] * 64 for _ in range(20))
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_every_number_of_threads_gives_the_same_bits() -> None:
    executable: CExecutable = CBackend().compile(parse(FUNCTION))
    given, before = torch.randn(512, 600), torch.get_num_threads()
    found: list[torch.Tensor] = []
    try:
        for threads in (1, 2, 5, 1, 3):
            torch.set_num_threads(threads)
            found += executable.run([given])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], f) for f in found)
