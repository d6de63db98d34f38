"""Stands in for torchvision and Pillow, which timm imports and its `test_*` models do not use.

The torchvision on PyPI does not import beside the CPU build of torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any


class _Anything(type):
    """A class with every attribute, so that `class A(torchvision.B)` and defaults work."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (_Stub,), {})


class _Stub(metaclass=_Anything):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass


class _Module(ModuleType):
    __version__ = "0"
    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (_Stub,), {})


class _Finder(MetaPathFinder, Loader):
    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.split(".")[0] not in self.names:
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def import_timm() -> Any:
    """The timm package; what it lacks is a stub while it is imported, and absent afterwards."""
    names = {"torchvision"} if find_spec("PIL") else {"torchvision", "PIL"}
    finder = _Finder(names)
    sys.meta_path.insert(0, finder)
    try:
        import timm
    finally:
        sys.meta_path.remove(finder)
        for name in [n for n in sys.modules if n.split(".")[0] in names]:
            del sys.modules[name]
    return timm
