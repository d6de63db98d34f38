"""Where the user's program is while it is traced."""

from __future__ import annotations

import os
import sys
from functools import cache, lru_cache
from types import CodeType, FrameType

import torch

from ..function import Loc, Phase

_TORCH = os.path.dirname(torch.__file__) + os.sep
_CHECKPOINT = os.path.join("torch", "utils", "checkpoint.py")
_OURS = tuple(
    os.path.realpath(os.path.join(os.path.dirname(__file__), "..", "..", folder)) + os.sep
    for folder in ("ir", "frontend", "passes", "backends", "runtime")
)
_PACKAGE = os.path.realpath(sys.modules[__name__.partition(".")[0]].__path__[0]) + os.sep


@cache
def _owner(code: CodeType) -> str:
    return _owner_of_file(code.co_filename)


def is_user_file(name: str) -> bool:
    """Whether a source file is neither PyTorch's nor ours."""
    return _owner_of_file(name) == "user"


def is_own_file(name: str) -> bool:
    """Whether a source file is shoestring's."""
    return _owner_of_file(name) == "shoestring" and not name.startswith("<")


def _owner_of_file(name: str) -> str:
    """`user`, `torch`, `checkpoint` or `shoestring`: whose code this is."""
    if name.startswith(_TORCH):
        return "checkpoint" if name.endswith(_CHECKPOINT) else "torch"
    if name.startswith("<") or os.path.realpath(name).startswith((*_OURS, _PACKAGE)):
        return "shoestring"
    return "user"


def _above(frame: FrameType | None) -> tuple[str, int, bool]:
    """File and line of the innermost user code from a frame on, and whether it is recomputed."""
    place: tuple[str, int] | None = None
    recomputed = False
    while frame is not None:
        owner = _owner(frame.f_code)
        recomputed = recomputed or owner == "checkpoint"
        if owner == "user" and place is None:
            place = frame.f_code.co_filename, frame.f_lineno
        frame = frame.f_back
    return (*(place or ("", 0)), recomputed)


class Locator:
    """Gives each traced op its `Loc`; in the backward pass, that of the forward op.

    PyTorch numbers autograd nodes in the order in which forward ops make them; the number of the
    running node therefore leads back to the op that it differentiates.
    """

    def __init__(self) -> None:
        self.phase = Phase.FORWARD
        self.modules: list[str] = []
        self._by_node: dict[int, Loc] = {}
        self._caller: tuple[FrameType, int] | None = None
        self._line = ("", 0, False)

    def here(self) -> Loc:
        file, line, in_checkpoint = self._user_line()
        module = self.modules[-1] if self.modules else ""
        if self.phase is not Phase.BACKWARD:
            loc = _loc(file, line, module, self.phase)
            self._by_node[_next_node()] = loc
            return loc
        if in_checkpoint:
            loc = _loc(file, line, module, Phase.RECOMPUTE)
            self._by_node[_next_node()] = loc
            return loc
        forward = self._forward_loc()
        if forward is None:
            return _loc(file, line, module, Phase.BACKWARD)
        return _loc(forward.file, forward.line, forward.module, Phase.BACKWARD)

    def forget(self) -> None:
        """Lets go of the user's frame, and so of what it holds."""
        self._caller = None

    def _user_line(self) -> tuple[str, int, bool]:
        """Where the program is.

        Looked up once for all ops of one call, such as a whole backward pass: while a frame stands
        still, so do those that it was called from.
        """
        frame: FrameType | None = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
        while frame is not None and _owner(frame.f_code) == "shoestring":
            frame = frame.f_back
        caller = None if frame is None else (frame, frame.f_lasti)
        if caller is None or caller != self._caller:
            self._caller, self._line = caller, _above(frame)
        return self._line

    def _forward_loc(self) -> Loc | None:
        node = torch._C._current_autograd_node()  # pyright: ignore[reportPrivateUsage]
        if node is None:
            return None
        return self._by_node.get(node._sequence_nr())


@lru_cache(1024)
def _loc(file: str, line: int, module: str, phase: Phase) -> Loc:
    """One object for all ops of a line."""
    return Loc(file, line, module, phase)


def _next_node() -> int:
    """The number of the autograd node that the running op has just made, if it made one."""
    return torch._C._autograd._get_sequence_nr() - 1  # pyright: ignore[reportPrivateUsage]
