"""Passes by name, built-in and from installed packages."""

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from shoestring.ir.errors import PassError
from shoestring.passes import (
    Numerics,
    available,
    default_pipeline,
    find_pass,
    make_pass,
    make_passes,
    registry,
)

EXAMPLE = Path(__file__).parents[2] / "examples/third_party"
DEAD_CODE = "shoestring.passes.dead_code:DeadCode"


def offer(monkeypatch: pytest.MonkeyPatch, name: str, target: str) -> None:
    """Makes the environment offer one entry point."""
    entry = EntryPoint(name, target, registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])


def test_builtin_names() -> None:
    assert {"canonicalize", "dead_code", "decompose", "rematerialize"} <= set(available())


def test_default_pipeline_loses_nothing() -> None:
    for passes in (default_pipeline(), default_pipeline(keep=frozenset())):
        names = [p.name for p in passes]
        assert all(p.numerics is not Numerics.LOSSY for p in passes)
        assert names.index("common_subexpressions") < names.index("rematerialize")
    assert "decompose" not in [p.name for p in default_pipeline()]


def test_unknown_name_shows_the_nearest() -> None:
    with pytest.raises(PassError) as error:
        find_pass("ded_code")
    assert error.value.code == "SS3001" and "did you mean 'dead_code'?" in str(error.value)


def test_options() -> None:
    assert make_pass("fold_constants", limit=3) == find_pass("fold_constants")(limit=3)  # type: ignore[call-arg]
    assert [p.name for p in make_passes(["dead_code", "canonicalize"])] == [
        "dead_code",
        "canonicalize",
    ]
    with pytest.raises(PassError) as error:
        make_pass("fold_constants", limt=3)
    assert error.value.code == "SS3010" and "options: limit" in str(error.value)


def test_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE / "src"))
    offer(monkeypatch, "halve_twice", "shoestring_example_passes.halve_twice:HalveTwice")
    assert find_pass("halve_twice")().name == "halve_twice"


@pytest.mark.parametrize(
    ("name", "target", "code"),
    [
        ("gone", "no_such_package.gone:Gone", "SS3008"),
        ("pathlib", "pathlib:Path", "SS3009"),
        ("other_name", DEAD_CODE, "SS3009"),
        ("dead_code", DEAD_CODE, "SS3009"),
    ],
)
def test_unusable_entry_point(
    monkeypatch: pytest.MonkeyPatch, name: str, target: str, code: str
) -> None:
    offer(monkeypatch, name, target)
    with pytest.raises(PassError) as error:
        available()
    assert error.value.code == code and name in str(error.value)


def test_installed_package(tmp_path: Path) -> None:
    """The example, built and installed without a network, is found by its metadata."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps"]
    source = tmp_path / "source"
    copy_tree(EXAMPLE, source)
    site = tmp_path / "site"
    subprocess.run([*install, "--no-index", "--target", str(site), str(source)], check=True)
    program = "from shoestring.passes import find_pass; print(find_pass('halve_twice')().doc)"
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(site)!r}); {program}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "Halves twice in one multiplication."


def copy_tree(source: Path, target: Path) -> None:
    """Text files only, so that building leaves nothing behind in the repository."""
    for file in source.rglob("*"):
        if file.suffix in (".py", ".toml", ".md"):
            place = target / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(file.read_text())
