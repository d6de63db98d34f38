"""Compiled programs that stay: who captures the same program again loads what became of it.

The key is all that passes and lowering depend on: the program's text, the passes and their options,
the backend's settings and machine, and the code of shoestring itself. So nothing is ever out of
date, and a pass that is edited runs. A program is kept only where all of this is known: passes and
ops that are not shoestring's own may depend on anything.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import zlib
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from shoestring.backends.base import Backend, Executable, KeepingBackend
from shoestring.backends.cache import cache_folder, keep, mark_used
from shoestring.ir import Function, lookup, print_function
from shoestring.ir.errors import BackendError, IRError
from shoestring.ir.serialize import dumps, loads
from shoestring.passes.base import Pass
from shoestring.passes.pipeline import Pipeline, StepRecord

log = logging.getLogger("shoestring")

SWITCH = "SHOESTRING_KEEP_PROGRAMS"  # "0": nothing is kept, and nothing kept is loaded
_PACKAGE = __name__.partition(".")[0]
_LAYERS = ("ir", "passes", "backends", "runtime")
_HASH = hashlib.sha256
_HASH_BYTES = _HASH().digest_size


@dataclass(frozen=True)
class Kept:
    """What became of a captured function.

    Attributes:
        captured: before the passes.
        function: after them.
        records: what each pass did, then.
        lowered: what the backend's `load` takes.
    """

    captured: Function
    function: Function
    records: list[StepRecord]
    lowered: Any


@dataclass(frozen=True)
class Keeper:
    """The place of one captured function.

    Attributes:
        captured: the function.
        backend: what it is compiled for.
        path: the file, which is there if the function was compiled before.
    """

    captured: Function
    backend: KeepingBackend
    path: Path

    @classmethod
    def of(cls, captured: Function, pipeline: Pipeline, backend: Backend) -> Keeper | None:
        """None where a program cannot be kept, as something may depend on what nobody knows."""
        if os.environ.get(SWITCH) == "0" or not isinstance(backend, KeepingBackend):
            return None
        if not all(map(_is_ours, pipeline.enabled)):
            return None
        try:
            if any(lookup(op.name) is not op.opdef for op in captured.ops):
                return None
            text, target = print_function(captured), backend.identity()
        except (IRError, BackendError):  # an op or an attribute that has no text; no compiler
            return None
        passes = [f"{type(p).__qualname__} {p!r}" for p in pipeline.enabled]
        parts = [text, *passes, target, _code(), torch.__version__, sys.version]
        key = _HASH("\0".join(parts).encode()).hexdigest()
        return cls(captured, backend, cache_folder() / "programs" / f"{key}.bin")

    def load(self) -> tuple[Kept, Executable] | None:
        """The program that was kept, ready to run; None where there is none, or it is damaged.

        Raises:
            BackendError: SS4xxx, where its code has to be built again and does not build.
        """
        try:
            kept = _read(self.path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, zlib.error, IRError) as error:
            log.warning("compiling anew: %s is damaged: %s", self.path, error)
            return None
        mark_used(self.path)
        return kept, self.backend.load(kept.lowered)

    def compile(self, function: Function, records: list[StepRecord]) -> Executable:
        """The function after the passes, ready to run, and kept for the next process."""
        lowered = self.backend.lower(function)
        executable = self.backend.load(lowered)
        try:
            _write(self.path, Kept(self.captured, function, records, lowered))
        except (IRError, OSError) as error:  # it is compiled again next time
            log.info("the compiled program is not kept: %s", error)
        return executable


def _write(path: Path, kept: Kept) -> None:
    packed = zlib.compress(dumps(kept), 1)
    keep(path, _HASH(packed).digest() + packed)


def _read(path: Path) -> Kept:
    data = path.read_bytes()
    head, packed = data[:_HASH_BYTES], data[_HASH_BYTES:]
    if _HASH(packed).digest() != head:
        raise ValueError("it does not have the hash that it begins with")
    kept = loads(zlib.decompress(packed))
    if not isinstance(kept, Kept):
        raise ValueError(f"it holds a {type(kept).__name__}")
    return kept


def _is_ours(p: Pass) -> bool:
    return type(p).__module__.partition(".")[0] == _PACKAGE


@cache
def _code() -> str:
    """The code of shoestring, as it is on the disk."""
    digest = _HASH()
    for layer in _LAYERS:
        (folder,) = import_module(f"{_PACKAGE}.{layer}").__path__
        for path in sorted(Path(folder).rglob("*.py")):
            digest.update(_HASH(path.read_bytes()).digest())
    return digest.hexdigest()
