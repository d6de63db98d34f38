"""A run's folder: newest first, old ones removed, leftovers of killed runs cleaned up."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch

from shoestring.ir.errors import CheckpointError
from shoestring.runtime.store import Store


def fill(root: Path, steps: list[int], keep: int = 3) -> None:
    with Store(root, keep) as store:
        for step in steps:
            store.save(step, {"a": torch.tensor(float(step))}, {"step": step})


def names(root: Path) -> set[str]:
    return {p.name for p in root.iterdir()} - {".lock"}


def test_latest_and_keep(tmp_path: Path) -> None:
    fill(tmp_path, [1, 2, 10, 9], keep=2)
    store = Store(tmp_path)
    assert store.steps() == [9, 10]
    assert store.latest().extra == {"step": 10}


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        Store(tmp_path / "no").latest()
    assert str(caught.value) == (
        f"[SS6001] resuming: a checkpoint is required, found none\n  at {tmp_path / 'no'}"
    )


def test_leftovers_are_ignored_and_cleaned(tmp_path: Path) -> None:
    fill(tmp_path, [1])
    for name in (".tmp-step-0000000002-77", ".trash-step-0000000000", ".old-step-0000000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".tmp-mine").mkdir()
    assert Store(tmp_path).steps() == [1]
    with Store(tmp_path):
        assert names(tmp_path) == {"step-0000000001", "notes.txt", ".tmp-mine"}


def test_a_replacement_that_was_cut_is_undone(tmp_path: Path) -> None:
    fill(tmp_path, [4])
    (tmp_path / "step-0000000004").rename(tmp_path / ".old-step-0000000004")
    with Store(tmp_path) as store:
        assert store.latest().extra == {"step": 4}


def test_links_are_not_cleaned_through(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("")
    (tmp_path / "root" / ".tmp-step-0000000002-77").symlink_to(tmp_path / "elsewhere")
    with Store(tmp_path / "root"):
        assert (tmp_path / "elsewhere" / "precious").exists()


def _hold(root: Path, held: object, leave: object) -> None:
    with Store(root):
        held.set()  # type: ignore[attr-defined]
        leave.wait()  # type: ignore[attr-defined]


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held, leave = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path, held, leave))
    process.start()
    try:
        assert held.wait(60)
        with pytest.raises(CheckpointError, match="SS6010"), Store(tmp_path):
            pass
    finally:
        leave.set()
        process.join()
    with Store(tmp_path):
        pass
