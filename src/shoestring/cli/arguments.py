"""Names on the command line: unknown ones are refused with the nearest valid name."""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shoestring.ir.errors import UsageError


def check_names(arguments: Sequence[str], commands: Mapping[str, type[Any]]) -> None:
    """Checks the command's and the options' names; values are checked by the parser.

    Raises:
        UsageError: SS7001 for a name that does not exist.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        return
    command = arguments[0]
    if command not in commands:
        raise unknown("command", command, list(commands))
    valid = [*option_names(commands[command]), "--help", "--debug"]
    for argument in arguments[1:]:
        name = argument.partition("=")[0].replace("_", "-")
        if name.startswith("--") and name not in valid:
            raise unknown(f"option of `shoestring {command}`", name, valid)


def unknown(kind: str, name: str, valid: Sequence[str]) -> UsageError:
    """The error for a name that does not exist."""
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(valid))}"
    return UsageError("SS7001", f"{name} is no {kind}", hint=hint)


def option_names(command: type[Any]) -> Iterator[str]:
    """`--name` for each field; a section, a field that is a dataclass, shows its own fields."""
    hints = typing.get_type_hints(command)
    for field in dataclasses.fields(command):
        section = hints[field.name]
        if dataclasses.is_dataclass(section):
            yield from option_names(typing.cast(type[Any], section))
        else:
            prefix = "--no-" if field.default is True else "--"  # a flag says what it changes
            yield prefix + field.name.replace("_", "-")
