"""A folder of checkpoints of one run: `step-0000000100/` and so on; the newest, the last N."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from shoestring.ir.errors import CheckpointError

from .checkpoint import Checkpoint, Savable, save

_NAME = re.compile(r"step-(\d{10,})")
_LEFTOVER = re.compile(r"\.(tmp|old|trash)-(step-\d{10,})(?:-\d+)?")


class Store:
    """The checkpoints of one run. As a context manager it holds the folder for writing.

    Args:
        root: the folder; made at the first save.
        keep: how many of the newest checkpoints stay.
    """

    def __init__(self, root: Path, keep: int = 3) -> None:
        self.root = Path(root)
        self.keep = max(1, keep)
        self._lock: IO[str] | None = None

    def __enter__(self) -> Store:
        """Locks the folder and clears what killed runs left.

        Raises:
            CheckpointError: SS6010 where another process holds it, SS6009 where it is not writable.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.root / ".lock", "w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._release()
            raise CheckpointError(
                "SS6010",
                "opening a checkpoint folder: it is in use by another run",
                str(self.root),
                "choose another folder or end that run",
            ) from None
        except OSError as error:
            self._release()
            raise CheckpointError(
                "SS6009", f"opening a checkpoint folder: {error.strerror}", str(self.root)
            ) from None
        self._clean()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()  # closing drops the lock, as does the death of the process
            self._lock = None

    def _clean(self) -> None:
        """Removes unfinished work. Only under the lock: then nobody is writing."""
        for path in self.root.iterdir():
            m = _LEFTOVER.fullmatch(path.name)
            if m is None or path.is_symlink() or not path.is_dir():
                continue
            if m[1] == "old" and not (self.root / m[2]).exists():
                os.rename(path, self.root / m[2])  # killed between the two renames of a replacement
            else:
                shutil.rmtree(path, ignore_errors=True)

    def steps(self) -> list[int]:
        """The steps of complete checkpoints, oldest first."""
        if not self.root.is_dir():
            return []
        found = (_NAME.fullmatch(p.name) for p in self.root.iterdir() if p.is_dir())
        return sorted(int(m[1]) for m in found if m is not None)

    def path(self, step: int) -> Path:
        return self.root / f"step-{step:010d}"

    def latest(self) -> Checkpoint:
        """The newest complete checkpoint, its manifest checked.

        Raises:
            CheckpointError: SS6001 where there is none; SS6002... where it is damaged.
        """
        steps = self.steps()
        if not steps:
            raise CheckpointError(
                "SS6001", "resuming: a checkpoint is required, found none", str(self.root)
            )
        return Checkpoint.open(self.path(steps[-1]))

    def save(self, step: int, tensors: Mapping[str, Savable], extra: Any) -> Path:
        """Saves the state after `step` steps and removes the oldest beyond `keep`.

        Raises:
            CheckpointError: see `checkpoint.save`.
        """
        path = save(self.path(step), tensors, extra)
        for old in self.steps()[: -self.keep]:
            self._remove(old)
        return path

    def _remove(self, step: int) -> None:
        # Renamed first: a half-deleted folder must not look complete.
        trash = self.root / f".trash-step-{step:010d}"
        shutil.rmtree(trash, ignore_errors=True)
        os.rename(self.path(step), trash)
        shutil.rmtree(trash, ignore_errors=True)
