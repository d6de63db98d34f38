"""The command `shoestring`: train, opt, explain, verify."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any, cast

import tyro

from shoestring.ir.errors import ShoestringError

from .arguments import check_names
from .explain import Explain
from .opt import Opt
from .train import Train
from .verify import Verify

COMMANDS: dict[str, type[Any]] = {
    "train": Train,
    "opt": Opt,
    "explain": Explain,
    "verify": Verify,
}
Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Opt, tyro.conf.subcommand("opt")]
    | Annotated[Explain, tyro.conf.subcommand("explain")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
)
FAILED = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the arguments after the program's name; those of the process by default.

    Returns:
        The exit code: 0, 1 where a check failed, 2 after an error, 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    try:
        return int(_parse(arguments).run())
    except ShoestringError as error:
        if debug:
            traceback.print_exc()
        print(error_text(error), file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def error_text(error: ShoestringError) -> str:
    """The block that a command prints for a coded error."""
    return f"error {error}"


def _parse(arguments: list[str]) -> Any:
    check_names(arguments, COMMANDS)
    description = "shoestring compiles a whole training step. Errors have pages in docs/errors.md;"
    return tyro.cli(
        cast(Any, Command),
        prog="shoestring",
        description=f"{description} --debug shows their traceback.",
        args=arguments,
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
    )
