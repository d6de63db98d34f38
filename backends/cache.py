"""The folder of what is kept between processes: whole files in it, and its size.

Entries are folders `ab/abcd...` of built kernels and files `programs/*.bin`; each was last used
when its newest file was written or marked by `mark_used`. The rest (measured times) is small.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

LIMIT = 2 << 30  # bytes, unless $SHOESTRING_CACHE_BYTES says otherwise
DAY = 24 * 3600.0  # seconds between two looks at the size; what was used since then stays
_LOOKED_AT = "trimmed"


def cache_folder() -> Path:
    """`$SHOESTRING_CACHE`, or a folder of the user's."""
    given = os.environ.get("SHOESTRING_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "shoestring"


def keep(path: Path, data: bytes) -> None:
    """Writes a file at once: who reads meanwhile sees what was there before, or all of it.

    Raises:
        OSError: where it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def mark_used(file: Path) -> None:
    """Notes that an entry, one of whose files this is, was used now."""
    with contextlib.suppress(OSError):  # a cache that others filled may not be ours to write
        os.utime(file)


def trim_meanwhile() -> None:
    """`trim` beside whatever follows. If the process ends first, the next day goes on."""
    threading.Thread(target=trim, name="shoestring-cache", daemon=True).start()


def trim() -> None:
    """Removes entries, those first that were not used for longest, until the rest is small enough.

    Once a day at most, and nothing that was used within a day: another process may be loading it.
    """
    given = os.environ.get("SHOESTRING_CACHE_BYTES", "")
    most = int(given) if given.isdecimal() else LIMIT
    now, root = time.time(), cache_folder()
    with contextlib.suppress(OSError):
        looked_at = root / _LOOKED_AT
        if looked_at.exists() and now - looked_at.stat().st_mtime < DAY:
            return
        looked_at.touch()
        entries = sorted((*_measured(p), p) for p in _entries(root))
        total = sum(size for _, size, _ in entries)
        for used, size, path in entries:
            if total <= most or now - used < DAY:
                break
            _remove(path)
            total -= size


def _entries(root: Path) -> Iterator[Path]:
    yield from root.glob("programs/*.bin")
    yield from root.glob("??/*")  # also what a killed process left half made


def _measured(entry: Path) -> tuple[float, int]:
    """When an entry was last used, and its bytes on the disk."""
    found = [f.stat() for f in os.scandir(entry)] if entry.is_dir() else []
    found = found or [entry.stat()]
    return max(s.st_mtime for s in found), sum(512 * s.st_blocks for s in found)


def _remove(entry: Path) -> None:
    """A folder is moved away first: half removed it must not look whole."""
    if not entry.is_dir():
        entry.unlink(missing_ok=True)
        return
    trash = Path(tempfile.mkdtemp(dir=entry.parent))
    os.replace(entry, trash)
    shutil.rmtree(trash, ignore_errors=True)
