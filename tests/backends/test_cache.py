"""What the cache removes when it has grown, and what it leaves."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from shoestring.backends.cache import DAY, keep, mark_used, trim

LARGE = 8 << 10


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SHOESTRING_CACHE", str(tmp_path))
    monkeypatch.delenv("SHOESTRING_CACHE_BYTES", raising=False)
    return tmp_path


def entry(path: Path, days: float) -> Path:
    """A file of `LARGE` bytes that was used so many days ago."""
    keep(path, b"x" * LARGE)
    then = time.time() - days * DAY
    os.utime(path, (then, then))
    return path


def trim_to(limit: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOESTRING_CACHE_BYTES", str(limit))
        trim()


def test_what_was_used_last_stays(root: Path) -> None:
    folders = [entry(root / "ab" / f"ab{i}" / "kernels.so", 2 + i) for i in range(3)]
    program = entry(root / "programs" / "1.bin", 6)
    times = entry(root / "times" / "1.json", 9)
    trim_to(2 * LARGE)
    assert [f.parent.exists() for f in folders] == [True, True, False]
    assert not program.exists() and times.exists()
    assert sorted(f.name for f in (root / "ab").iterdir()) == ["ab0", "ab1"]


def test_an_entry_is_as_new_as_its_newest_file(root: Path) -> None:
    old, other = entry(root / "ab" / "ab1" / "k.c", 9), entry(root / "ab" / "ab2" / "k.c", 8)
    mark_used(entry(old.with_name("kernels.so"), 9))
    mark_used(root / "ab" / "gone")
    trim_to(0)
    assert old.exists() and not other.exists()


def test_one_look_a_day(root: Path) -> None:
    trim_to(0)
    path = entry(root / "programs" / "1.bin", 5)
    trim_to(0)
    assert path.exists()
    os.utime(root / "trimmed", (0, 0))
    trim_to(LARGE)
    assert path.exists()


@pytest.mark.parametrize(("given", "stays"), [("0", False), ("1000000", True), ("much", True)])
def test_the_limit_is_a_setting(
    root: Path, given: str, stays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOESTRING_CACHE_BYTES", given)
    path = entry(root / "programs" / "1.bin", 5)
    trim()
    assert path.exists() == stays


def test_a_folder_that_cannot_be_read_is_no_error(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOESTRING_CACHE", str(root / "none"))
    trim_to(0)
    (root / "file").write_text("")
    monkeypatch.setenv("SHOESTRING_CACHE", str(root / "file"))
    trim_to(0)
