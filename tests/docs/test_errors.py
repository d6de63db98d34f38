"""Every error code of the source has an entry in docs/errors.md, and the other way round."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    "ir",
    "frontend",
    "passes",
    "backends",
    "runtime",
    "src/shoestring/cli",
    "src/shoestring/api.py",
)


def raised() -> set[str]:
    found: set[str] = set()
    for name in SOURCES:
        path = ROOT / name
        for file in [path] if path.is_file() else path.rglob("*.py"):
            found |= set(re.findall(r'"(SS\d{4})"', file.read_text()))
    return found


def documented() -> set[str]:
    page = (ROOT / "docs/errors.md").read_text()
    return set(re.findall(r"^\| `(SS\d{4})`", page, re.MULTILINE))


def test_every_code_is_documented() -> None:
    assert raised() == documented()
