"""Batches in an order that is a function of (seed, epoch), resumable at any position.

`position` counts the batches that were handed out. A loader at position p of a seed yields what
every other loader of that seed yields from its batch p on, whatever was prefetched or killed
meanwhile. The items themselves must be a function of their index; augmentation that draws from a
global generator is not made reproducible here.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, cast

import torch
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data import default_collate as _torch_collate  # pyright: ignore

from shoestring.ir.errors import CheckpointError, RuntimeFault, ShoestringError, UsageError

Batch = tuple[Any, ...]
Collate = Callable[[list[Any]], Any]
default_collate: Collate = cast(Any, _torch_collate)


class MapDataset(Protocol):
    """Items by index, as of `torch.utils.data.Dataset`."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


# --- text ---------------------------------------------------------------------------------------


class TokenDataset:
    """Windows of `length` tokens; item i starts at token `i * stride`."""

    def __init__(self, tokens: torch.Tensor, length: int, stride: int | None = None) -> None:
        """Raises UsageError SS7003 where the text is shorter than one window."""
        if tokens.numel() < length:
            raise UsageError(
                "SS7003",
                f"a window of {length} tokens is required, the text has {tokens.numel()}",
                hint="give a longer text or a smaller --seq",
            )
        self.tokens = tokens
        self.length = length
        self.stride = stride or length

    def __len__(self) -> int:
        return (self.tokens.numel() - self.length) // self.stride + 1

    def __getitem__(self, index: int) -> torch.Tensor:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = index * self.stride
        return self.tokens[start : start + self.length].long()


def read_text(path: Path | None = None) -> torch.Tensor:
    """The bytes of a file as u8 tokens; without a path, the manual pages that come with Python.

    Raises:
        UsageError: SS7002 where the file cannot be read.
    """
    if path is None:
        return torch.frombuffer(bytearray(_manual()), dtype=torch.uint8)
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(
            "SS7002", f"reading the text: a readable file is required: {error.strerror}", str(path)
        ) from None
    return torch.frombuffer(bytearray(raw or b"\0"), dtype=torch.uint8)[: len(raw)]


def _manual() -> bytes:
    from pydoc_data.topics import topics  # half a megabyte: only where it is wanted

    return "\n".join(topics[name] for name in sorted(topics)).encode()


def split(tokens: torch.Tensor, validation: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    """The first part for training, the last `validation` of it for validation."""
    cut = tokens.numel() - int(tokens.numel() * validation)
    return tokens[:cut], tokens[cut:]


# --- order --------------------------------------------------------------------------------------


def derive_seed(seed: int, *parts: int) -> int:
    """A 63-bit seed from a seed and numbers, well mixed."""
    text = "/".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def permutation(seed: int, epoch: int, length: int) -> list[int]:
    """The order of items in an epoch."""
    generator = torch.Generator().manual_seed(derive_seed(seed, epoch))
    order: list[int] = cast(Any, torch.randperm(length, generator=generator)).tolist()
    return order


class Plan(Protocol):
    """What to load: the batches of an epoch, as something `fetch` turns into a batch."""

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on, loaded as they are asked for."""
        ...

    def describe(self) -> dict[str, int]:
        """What must be equal for a position to mean the same batch."""
        ...


@dataclass(frozen=True)
class _DatasetPlan:
    dataset: MapDataset
    batch_size: int
    seed: int
    shuffle: bool
    drop_last: bool
    collate: Collate

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        n, size = len(self.dataset), self.batch_size
        order = permutation(self.seed, epoch, n) if self.shuffle else list(range(n))
        for at in range(start * size, n - size + 1 if self.drop_last else n, size):
            yield as_batch(self.collate([self.dataset[i] for i in order[at : at + size]]))

    def describe(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "items": len(self.dataset),
            "batch_size": self.batch_size,
            "shuffle": int(self.shuffle),
            "drop_last": int(self.drop_last),
        }


@dataclass(frozen=True)
class _LoaderPlan:
    """A user's `DataLoader`: its own sampler, seeded; its own workers and collate function."""

    loader: DataLoader[Any]
    seed: int

    def batches(self, epoch: int, start: int) -> Iterator[Batch]:
        if isinstance(self.loader.dataset, IterableDataset):
            for index, batch in enumerate(self.loader):  # a stream can only be read up to `start`
                if index >= start:
                    yield as_batch(batch)
            return
        rest = self._indices(epoch)[start:]
        source: DataLoader[Any] = DataLoader(
            self.loader.dataset,
            batch_sampler=cast(Any, rest),
            num_workers=self.loader.num_workers,
            collate_fn=cast(Any, self.loader).collate_fn,
            worker_init_fn=self.loader.worker_init_fn,
            generator=torch.Generator().manual_seed(derive_seed(self.seed, epoch, start)),
        )
        yield from map(as_batch, source)

    def _indices(self, epoch: int) -> list[list[int]]:
        """The whole epoch's indices; the sampler sees generators seeded with (seed, epoch)."""
        batches: Any = cast(Any, self.loader).batch_sampler
        if batches is None:
            raise UsageError(
                "SS7009", "a DataLoader with batches is required, found batch_size=None"
            )
        sampler: Any = getattr(batches, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        own = getattr(sampler, "generator", None)
        seed = derive_seed(self.seed, epoch)
        with torch.random.fork_rng(devices=[]):  # pyright: ignore[reportUnknownMemberType]
            torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]
            if isinstance(own, torch.Generator):
                own.manual_seed(seed)
            return [list(batch) for batch in batches]

    def describe(self) -> dict[str, int]:
        size = self.loader.batch_size
        return {"seed": self.seed, "batch_size": size if size is not None else -1}


def as_batch(value: Any) -> Batch:
    """A collated batch as the tuple of arguments of a step."""
    return tuple(cast(Sequence[Any], value)) if isinstance(value, (tuple, list)) else (value,)


# --- loader -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Failure:
    error: BaseException


class ResumableLoader:
    """An endless iterator of batches that can be stopped and resumed at any position.

    Args:
        source: a map-style dataset, or a `DataLoader` (then the next four arguments are its own).
        batch_size: items in a batch.
        seed: of the order.
        shuffle: a new order each epoch.
        drop_last: leave out the last, smaller batch of an epoch.
        collate: list of items -> batch.
        prefetch: batches loaded ahead by a thread; 0 loads in the caller's thread.

    Example:
        >>> loader = ResumableLoader(TokenDataset(torch.arange(8), 2), batch_size=2, shuffle=False)
        >>> with loader:
        ...     next(loader)
        (tensor([[0, 1],
                [2, 3]]),)
    """

    def __init__(
        self,
        source: MapDataset | DataLoader[Any],
        batch_size: int = 1,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        collate: Collate = default_collate,
        prefetch: int = 2,
    ) -> None:
        """Raises UsageError SS7009 where an epoch would have no batch."""
        if isinstance(source, DataLoader):
            self.plan: Plan = _LoaderPlan(source, seed)
        else:
            if batch_size < 1 or len(source) < (batch_size if drop_last else 1):
                raise UsageError(
                    "SS7009",
                    f"a batch of {batch_size} items is required, the data has {len(source)}",
                    hint="give more data or a smaller batch",
                )
            self.plan = _DatasetPlan(source, batch_size, seed, shuffle, drop_last, collate)
        self.position = 0
        self.prefetch = prefetch
        self._epoch: int = 0  # where `position` lies, as epoch and batch in it
        self._start: int = 0
        self._feed: _Feed | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        """The next batch; never ends.

        Raises:
            RuntimeFault: SS5101 where loading failed; the cause is the worker's own exception.
        """
        if self._feed is None:
            items = _endless(self.plan, self._epoch, self._start)
            self._feed = _Feed(items, self.prefetch)
        try:
            epoch, number, batch = self._feed.get()
        except ShoestringError:
            self.close()
            raise
        except Exception as error:
            self.close()
            raise _loading_failed(self.position, error) from error
        self._epoch, self._start = epoch, number + 1
        self.position += 1
        return batch

    def state(self) -> dict[str, int]:
        """Where the next batch lies; plain numbers."""
        place = {"position": self.position, "epoch": self._epoch, "batch": self._start}
        return {**place, **self.plan.describe()}

    def check_state(self, state: dict[str, int]) -> None:
        """Raises CheckpointError SS6013 where `state` is of other data or another order."""
        for key, value in self.plan.describe().items():
            if state.get(key) != value:
                raise CheckpointError(
                    "SS6013",
                    f"resuming the data: {key}={state.get(key)} when saved, {value} now",
                    hint="resume with the same data, batch size and seed",
                )

    def load_state(self, state: dict[str, int]) -> None:
        """Goes to where `state` was taken.

        Raises:
            CheckpointError: SS6013 where it was taken of other data or another order.
        """
        self.check_state(state)
        self.close()
        self.position = state["position"]
        self._epoch, self._start = state["epoch"], state["batch"]

    def close(self) -> None:
        """Stops the thread; the loader can be used again and continues at its position."""
        if self._feed is not None:
            self._feed.close()
            self._feed = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()


def _loading_failed(position: int, error: BaseException) -> RuntimeFault:
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    where = f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}" if frame else ""
    what = f"loading batch {position} failed: {type(error).__name__}: {error}"
    return RuntimeFault("SS5101", what, where)


Numbered = tuple[int, int, Batch]


def _endless(plan: Plan, epoch: int, start: int) -> Iterator[Numbered]:
    """(epoch, number, batch) from a place on."""
    while True:
        number = start - 1
        for number, batch in enumerate(plan.batches(epoch, start), start):
            yield epoch, number, batch
        if number < 0:
            raise UsageError("SS7009", f"epoch {epoch} of the data has no batch")
        epoch, start = epoch + 1, 0


class _Feed:
    """Items of an iterator, taken ahead by a thread through a bounded queue."""

    def __init__(self, items: Iterator[Numbered], ahead: int) -> None:
        self._items = items
        self._stop = threading.Event()
        self._queue: queue.Queue[Numbered | _Failure] = queue.Queue(max(1, ahead))
        self._thread = threading.Thread(target=self._work, name="shoestring-data", daemon=True)
        self._threaded = ahead > 0
        if self._threaded:
            self._thread.start()

    def get(self) -> Numbered:
        if not self._threaded:
            return next(self._items)
        item = self._take()
        if isinstance(item, _Failure):
            raise item.error
        return item

    def _take(self) -> Numbered | _Failure:
        while True:
            try:
                return self._queue.get(timeout=1.0)
            except queue.Empty:
                if not self._thread.is_alive() and self._queue.empty():
                    return _Failure(RuntimeError("the loading thread ended"))

    def _work(self) -> None:
        try:
            for item in self._items:
                if not self._put(item):
                    return
        except BaseException as error:  # handed to the consumer, which raises it
            self._put(_Failure(error))

    def _put(self, item: Numbered | _Failure) -> bool:
        """Waits for room; False where the consumer has left."""
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.05)
                return True
            except queue.Full:
                continue
        return False

    def close(self) -> None:
        self._stop.set()
        if self._threaded:
            self._thread.join(timeout=5.0)  # a dataset that hangs must not hang the run's end
        close = getattr(self._items, "close", None)
        if close is not None and not self._thread.is_alive():
            close()  # ends worker processes of a DataLoader now, not at collection
