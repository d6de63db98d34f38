"""The order of data is a function of (seed, epoch); loaders resume, fail and stop cleanly."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from shoestring.ir.errors import CheckpointError, RuntimeFault, UsageError
from shoestring.runtime.data import (
    ResumableLoader,
    TokenDataset,
    permutation,
    read_text,
    split,
)


def numbers(count: int) -> TokenDataset:
    return TokenDataset(torch.arange(count), 1)


def take(loader: ResumableLoader, count: int) -> list[torch.Tensor]:
    return [next(loader)[0] for _ in range(count)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(x.equal(y) for x, y in zip(a, b, strict=True))


def test_permutations_are_functions_of_seed_and_epoch() -> None:
    assert permutation(1, 2, 50) == permutation(1, 2, 50)
    assert len({tuple(permutation(s, e, 50)) for s in range(3) for e in range(3)}) == 9
    assert sorted(permutation(1, 2, 50)) == list(range(50))


def test_an_epoch_has_each_item_once() -> None:
    with ResumableLoader(numbers(24), 4, seed=5) as loader:
        first, second = take(loader, 6), take(loader, 6)
    assert sorted(torch.cat(first).flatten().tolist()) == list(range(24))
    assert sorted(torch.cat(second).flatten().tolist()) == list(range(24))
    assert not same(first, second)


@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("drop_last", [True, False])
def test_resume_at_every_position(prefetch: int, drop_last: bool) -> None:
    def make() -> ResumableLoader:
        return ResumableLoader(numbers(11), 3, seed=2, drop_last=drop_last, prefetch=prefetch)

    with make() as loader:
        whole = take(loader, 14)
    for position in range(14):
        with make() as first:
            take(first, position)
            state = first.state()
        with make() as second:
            second.load_state(state)
            assert second.position == position
            assert same(take(second, 14 - position), whole[position:])


def test_the_same_loader_goes_back() -> None:
    with ResumableLoader(numbers(20), 2, seed=1) as loader:
        state = loader.state()
        first = take(loader, 5)
        loader.load_state(state)
        assert same(take(loader, 5), first)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("own_generator", [False, True])
def test_data_loaders_of_torch_resume(workers: int, own_generator: bool) -> None:
    def make() -> ResumableLoader:
        generator = torch.Generator() if own_generator else None
        source: DataLoader[Any] = DataLoader(
            TensorDataset(torch.arange(20), torch.arange(20) * 2),
            4,
            shuffle=True,
            num_workers=workers,
            generator=generator,
        )
        return ResumableLoader(source, seed=9)

    with make() as loader:
        whole = [next(loader) for _ in range(12)]
    with make() as loader:
        for _ in range(7):
            next(loader)
        state = loader.state()
    torch.manual_seed(123)  # the order does not depend on the global generator
    with make() as loader:
        loader.load_state(state)
        rest = [next(loader) for _ in range(5)]
    assert all(a.equal(c) and b.equal(d) for (a, b), (c, d) in zip(rest, whole[7:], strict=True))


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(10))


def test_streams_resume_by_reading_on() -> None:
    with ResumableLoader(DataLoader(Stream(), 2)) as loader:
        whole = take(loader, 12)
        state = loader.state()
        loader.load_state({**state, "position": 3, "epoch": 0, "batch": 3})
        assert same(take(loader, 9), whole[3:])


def test_other_data_is_refused() -> None:
    state = ResumableLoader(numbers(20), 2, seed=1).state()
    with pytest.raises(CheckpointError) as caught:
        ResumableLoader(numbers(20), 2, seed=2).load_state(state)
    assert str(caught.value) == (
        "[SS6013] resuming the data: seed=1 when saved, 2 now\n"
        "  help: resume with the same data, batch size and seed"
    )
    for other in (ResumableLoader(numbers(22), 2, seed=1), ResumableLoader(numbers(20), 4, seed=1)):
        with pytest.raises(CheckpointError, match="SS6013"):
            other.load_state(state)


# --- failures -----------------------------------------------------------------------------------


class Failing:
    """Fails at one item."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 5:
            raise ValueError("item 5 is broken")
        return torch.tensor(index)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_errors_surface_with_their_traceback(prefetch: int) -> None:
    with ResumableLoader(Failing(), 1, shuffle=False, prefetch=prefetch) as loader:
        take(loader, 5)
        with pytest.raises(RuntimeFault) as caught:
            next(loader)
    assert caught.value.code == "SS5101"
    assert caught.value.what == "loading batch 5 failed: ValueError: item 5 is broken"
    assert "test_data.py:" in caught.value.where
    cause = caught.value.__cause__
    assert isinstance(cause, ValueError) and cause.__traceback__ is not None


def data_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "shoestring-data"]


def test_closing_ends_the_thread_even_with_a_full_queue() -> None:
    loader = ResumableLoader(numbers(100), 1, prefetch=2)
    next(loader)
    time.sleep(0.05)
    assert data_threads()
    loader.close()
    assert not data_threads()


def test_an_exception_in_the_loop_leaves_no_thread() -> None:
    with pytest.raises(KeyboardInterrupt), ResumableLoader(numbers(100), 1) as loader:
        next(loader)
        raise KeyboardInterrupt
    assert not data_threads()


class Interrupted(Failing):
    def __getitem__(self, index: int) -> torch.Tensor:
        raise SystemExit(3)


def test_exits_in_the_thread_do_not_hang() -> None:
    with pytest.raises(SystemExit), ResumableLoader(Interrupted(), 1) as loader:
        next(loader)


def test_too_little_data() -> None:
    items: Any = numbers(3)  # DataLoader is annotated with a class of its own; items will do
    with pytest.raises(UsageError, match=r"\[SS7009\] a batch of 4 items is required"):
        ResumableLoader(numbers(3), 4)
    with pytest.raises(UsageError, match="SS7003"):
        TokenDataset(torch.arange(3), 4)
    with pytest.raises(UsageError, match="SS7009"):
        next(ResumableLoader(DataLoader(items, batch_size=None)))
    empty: DataLoader[Any] = DataLoader(items, batch_size=4, drop_last=True)
    with pytest.raises(UsageError, match="has no batch"):
        next(ResumableLoader(empty))


# --- text ---------------------------------------------------------------------------------------


def test_windows() -> None:
    data = TokenDataset(torch.arange(10, dtype=torch.uint8), 4, stride=3)
    assert [data[i].tolist() for i in range(len(data))] == [
        [0, 1, 2, 3],
        [3, 4, 5, 6],
        [6, 7, 8, 9],
    ]
    assert data[0].dtype is torch.int64
    with pytest.raises(IndexError):
        data[3]


def test_text_is_always_there() -> None:
    text = read_text()
    assert text.numel() > 300_000
    train, held_out = split(text, 0.1)
    assert torch.cat([train, held_out]).equal(text)
    assert held_out.numel() == int(text.numel() * 0.1)


def test_text_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(b"\x00\xffab")
    assert read_text(tmp_path / "t").tolist() == [0, 255, 97, 98]
    (tmp_path / "empty").write_bytes(b"")
    assert read_text(tmp_path / "empty").tolist() == []
    with pytest.raises(UsageError, match="SS7002"):
        read_text(tmp_path / "missing")
