"""The planner, and the checker that must find every kind of wrong plan."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from shoestring.backends.memory import Lifetime, Plan, check_plan, plan_memory
from shoestring.ir.errors import BackendError


def random_lifetimes(count: int, seed: int) -> list[Lifetime]:
    r = random.Random(seed)
    found: list[Lifetime] = []
    for i in range(count):
        first = r.randrange(count)
        found.append(
            Lifetime(
                i, r.choice([0, 4, 64, 100, 4096, 70000]), first, first + r.randrange(30), f"%{i}"
            )
        )
    return found


@pytest.mark.parametrize("seed", range(20))
def test_random_plans_are_valid_and_bounded(seed: int) -> None:
    lifetimes = random_lifetimes(300, seed)
    plan = plan_memory(lifetimes)
    assert plan.peak_bytes <= plan.arena_bytes <= 2 * plan.peak_bytes
    assert sum(-(-h.nbytes // 64) * 64 for h in plan.holders) == plan.peak_bytes


def test_a_chain_takes_two_buffers() -> None:
    plan = plan_memory([Lifetime(i, 1024, i, i + 1) for i in range(50)])
    assert plan.arena_bytes == plan.peak_bytes == 2048


def test_fifteen_thousand_values_take_seconds() -> None:
    start = time.process_time()
    plan_memory(random_lifetimes(15000, 0))
    assert time.process_time() - start < 5


PAIR = [Lifetime(0, 100, 0, 2, "a"), Lifetime(1, 100, 2, 3, "b")]
GOOD = Plan({0: 0, 1: 128}, 256, 256, 2, ())


def test_a_good_plan_passes() -> None:
    check_plan(PAIR, GOOD)


@pytest.mark.parametrize(
    ("offsets", "arena", "message"),
    [
        ({0: 0, 1: 64}, 256, "both alive at instruction 2"),
        ({0: 0, 1: 0}, 256, "both alive at instruction 2"),
        ({0: 0, 1: 100}, 256, "not aligned"),
        ({0: 0, 1: 192}, 256, "out of bounds"),
        ({0: -64, 1: 64}, 256, "out of bounds"),
        ({0: 0}, 256, "has no offset"),
    ],
)
def test_wrong_plans_are_found(offsets: dict[int, int], arena: int, message: str) -> None:
    with pytest.raises(BackendError, match=message) as error:
        check_plan(PAIR, replace(GOOD, offsets=offsets, arena_bytes=arena))
    assert error.value.code == "SS4301"


def test_an_enclosed_buffer_is_found() -> None:
    lifetimes = [
        Lifetime(0, 1000, 0, 9, "big"),
        Lifetime(1, 64, 0, 9, "far"),
        Lifetime(2, 64, 3, 4, "in"),
    ]
    with pytest.raises(BackendError, match="both alive"):
        check_plan(lifetimes, Plan({0: 0, 1: 1024, 2: 512}, 2048, 0, 0, ()))


def with_parts(count: int, seed: int) -> list[Lifetime]:
    """Random buffers, some of which are made of parts that are there before the whole is."""
    r = random.Random(seed)
    found = random_lifetimes(count, seed)
    for t in found[::10]:
        parts = r.randrange(2, 6)
        first = t.first + 10
        whole = Lifetime(t.index, 128 * parts, first, first + r.randrange(20), t.label)
        found[t.index] = whole
        for p in range(parts):
            begin = r.randrange(first)
            size, label = r.randrange(1, 129), f"{p} of {t.label}"
            found.append(Lifetime(len(found), size, begin, first - 1, label, t.index, 128 * p))
    return found


def with_stretches(count: int, seed: int) -> list[Lifetime]:
    """Random buffers, some of which end part by part."""
    r = random.Random(seed)
    found = random_lifetimes(count, seed)
    for t in found[::10]:
        parts = r.randrange(2, 6)
        found[t.index] = replace(t, nbytes=128 * parts, last=t.first)
        for p in range(parts):
            size, begin = r.randrange(1, 129), t.first + 1
            last, label = begin + r.randrange(20), f"{p} of {t.label}"
            found.append(Lifetime(len(found), size, begin, last, label, t.index, 128 * p))
    return found


@pytest.mark.parametrize("make", [with_parts, with_stretches])
@pytest.mark.parametrize("seed", range(20))
def test_plans_with_parts_are_valid(make: Callable[[int, int], list[Lifetime]], seed: int) -> None:
    lifetimes = make(200, seed)
    plan = plan_memory(lifetimes)
    assert plan.peak_bytes <= plan.arena_bytes <= 2 * plan.peak_bytes
    for t in lifetimes:
        if t.whole is not None:
            assert plan.offsets[t.index] == plan.offsets[t.whole] + t.at


def test_a_place_is_free_until_its_part_begins() -> None:
    parts = [Lifetime(i + 1, 1024, [0, 8, 8, 8][i], 9, f"part {i}", 0, 1024 * i) for i in range(4)]
    others = [Lifetime(i + 5, 1024, 1, 7, f"other {i}") for i in range(3)]
    plan = plan_memory([Lifetime(0, 4096, 10, 12, "whole"), *parts, *others])
    assert plan.arena_bytes == plan.peak_bytes == 4096


def test_a_place_is_free_when_its_part_has_ended() -> None:
    parts = [Lifetime(i + 1, 1024, 1, 2 + i, f"part {i}", 0, 1024 * i) for i in range(4)]
    others = [Lifetime(i + 5, 1024, 3 + i, 9, f"other {i}") for i in range(4)]
    plan = plan_memory([Lifetime(0, 4096, 0, 0, "whole"), *parts, *others])
    assert plan.arena_bytes == plan.peak_bytes == 4096


def test_a_part_that_is_elsewhere_is_found() -> None:
    lifetimes = [Lifetime(0, 256, 5, 6, "whole"), Lifetime(1, 128, 0, 4, "part", 0, 128)]
    plan = plan_memory(lifetimes)
    with pytest.raises(BackendError, match="is not where its whole"):
        check_plan(lifetimes, replace(plan, offsets={0: 0, 1: 0}))
