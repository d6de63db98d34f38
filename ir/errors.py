"""Every error that shoestring raises on purpose.

    ShoestringError                 SS0xxx
    ├── CaptureError                SS1xxx  the user's program cannot be captured
    ├── IRError                     SS2xxx  a function, text or verifier complaint
    ├── PassError                   SS3xxx  an optimization pass or the pipeline
    ├── BackendError                SS4xxx  lowering, code generation, the C compiler
    ├── RuntimeFault                SS5xxx  executing a compiled step
    ├── CheckpointError             SS6xxx  saving or loading state
    └── UsageError                  SS7xxx  options, files and arguments

A message answers five questions, in this order: what was being done, what is required, what was
found, where, and what to do. `docs/errors.md` has an entry for each code.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class ShoestringError(Exception):
    """Base of the tree.

    Args:
        code: `SS` and four digits; an entry in `docs/errors.md`.
        what: one sentence: what was being done, what is required and what was found.
        where: the user's `file:line`, or the line of IR, or nothing.
        hint: what to do about it.
    """

    code: str
    what: str
    where: str = ""
    hint: str = ""

    def __str__(self) -> str:
        lines = [f"[{self.code}] {self.what}"]
        if self.where:
            lines.append(f"  at {self.where}")
        if self.hint:
            lines.append(f"  help: {self.hint}")
        return "\n".join(lines)


class CaptureError(ShoestringError):
    """The user's model, loss or optimizer cannot be captured as one program."""


class IRError(ShoestringError):
    """A function is malformed, or its text does not parse."""


class PassError(ShoestringError):
    """A pass was misused, failed, or changed what it promised to keep."""


class BackendError(ShoestringError):
    """A backend refuses a function, or its code does not build."""


class RuntimeFault(ShoestringError):
    """A compiled step was called with something that it was not compiled for."""


class CheckpointError(ShoestringError):
    """A checkpoint is missing, truncated, tampered with, or of another model."""


class UsageError(ShoestringError):
    """An option, file or argument is not usable."""
