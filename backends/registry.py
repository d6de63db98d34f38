"""Backends by name: the built-in ones and those that installed packages offer.

A package offers one with an entry point in the group `shoestring.backends`; the entry point is
called without arguments and gives a `Backend`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from importlib.metadata import entry_points

from shoestring.ir.errors import BackendError

from .base import Backend

GROUP = "shoestring.backends"


def _reference() -> Backend:
    from .reference import ReferenceBackend

    return ReferenceBackend()


def _c() -> Backend:
    from .c import CBackend

    return CBackend()


BUILTIN: dict[str, Callable[[], Backend]] = {"c": _c, "reference": _reference}
ALIASES = {"cpu": "c"}


def backend_names() -> list[str]:
    """Every name that `get_backend` takes, aliases left out."""
    return sorted({*BUILTIN, *(e.name for e in entry_points(group=GROUP))})


def get_backend(name: str) -> Backend:
    """A new backend of that name.

    Raises:
        BackendError: SS4001 where there is none, SS4002 where a third party's does not load.
    """
    name = ALIASES.get(name, name)
    if name in BUILTIN:
        return BUILTIN[name]()
    for entry in entry_points(group=GROUP):
        if entry.name == name:
            return _load(entry.name, entry.load)
    known = backend_names()
    near = difflib.get_close_matches(name, [*known, *ALIASES], 1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
    raise BackendError("SS4001", f"a known backend is required, found {name!r}", "", hint)


def _load(name: str, load: Callable[[], object]) -> Backend:
    try:
        factory = load()
        backend = factory() if callable(factory) else factory
    except Exception as error:
        raise BackendError("SS4002", f"backend {name!r} does not load: {error}") from error
    if not isinstance(backend, Backend):
        what = f"backend {name!r} must have `name` and `compile`, found {type(backend).__name__}"
        raise BackendError("SS4002", what)
    return backend
