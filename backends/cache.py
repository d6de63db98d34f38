"""The folder of what is kept between processes, and whole files in it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


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
