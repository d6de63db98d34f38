"""The packaging contract: src/shoestring mirrors the root folders; nothing imports around it."""

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"backends", "frontend", "ir", "passes", "runtime"}


def test_every_folder_is_linked() -> None:
    links = {p.name: p.resolve() for p in (ROOT / "src/shoestring").iterdir() if p.is_symlink()}
    assert links == {name: ROOT / name for name in FOLDERS}


def test_every_folder_with_modules_is_a_package() -> None:
    modules = [p for name in FOLDERS for p in (ROOT / name).rglob("*.py")]
    bare = {
        str(p.parent.relative_to(ROOT)) for p in modules if not (p.parent / "__init__.py").exists()
    }
    assert not bare, f"add __init__.py, or the wheel will miss: {sorted(bare)}"


def test_folders_are_not_imported_by_their_bare_names() -> None:
    for name in FOLDERS:
        importlib.import_module(f"shoestring.{name}")
    ours = FOLDERS & set(sys.modules)
    assert not ours, f"imported around the package: {sorted(ours)}"


def test_public_names() -> None:
    import shoestring

    assert shoestring.__all__ == [
        "Inference",
        "ShoestringError",
        "Step",
        "capture_forward",
        "capture_step",
        "compile",
    ]
    assert all(hasattr(shoestring, name) for name in shoestring.__all__)
