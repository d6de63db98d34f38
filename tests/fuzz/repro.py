"""A failure as text: the program's source, and a script that shows the failure again."""

from __future__ import annotations

from .generate import is_valid
from .program import PRELUDE, Program, source
from .run import Failure, Options, check_program
from .shrink import shrink


def minimized(
    program: Program, failure: Failure, options: Options, *, seconds: float = 60.0
) -> tuple[Program, Failure]:
    """The smallest program found that fails in the same way, and its failure."""

    def fails(candidate: Program) -> bool:
        return is_valid(candidate) and failure.same_as(check_program(candidate, options))

    small = shrink(program, fails, seconds=seconds)
    return small, check_program(small, options) or failure


def report(program: Program, failure: Failure, options: Options) -> str:
    """What a developer needs: the model as Python and a script to run from the repository."""
    model = source(program).removeprefix(PRELUDE).strip()
    return f"""\
{failure}

The model (names of tests/fuzz/program.py):

{model}

Run from the root of the repository:

from tests.fuzz.program import Input, Optimizer, Program, Stmt
from tests.fuzz.run import Options, check_program

program = {_literal(program)}
options = Options(backend={options.backend!r}, passes={options.passes}, seed={options.seed})
print(check_program(program, options))
"""


def _literal(program: Program) -> str:
    """The program as Python, one input or statement a line."""
    defaults = Program((), (), ())
    parts = [
        "    inputs=(\n" + "".join(f"        {i!r},\n" for i in program.inputs) + "    ),",
        "    body=(\n" + "".join(f"        {s!r},\n" for s in program.body) + "    ),",
    ]
    for name in ("loss", "metrics", "optimizer", "steps", "accumulate", "clip_grad_norm",
                 "clip_grad_value", "autocast", "special", "seed"):  # fmt: skip
        value = getattr(program, name)
        if name == "loss" or value != getattr(defaults, name):
            parts.append(f"    {name}={value!r},")
    return "Program(\n" + "\n".join(parts) + "\n)"


def examine_seed(
    seed: int, options: Options, *, shrink_seconds: float = 60.0
) -> tuple[Failure, str] | None:
    """Checks the program of a seed; (failure, report of the minimized program) where it fails."""
    from .generate import generate

    program = generate(seed)
    failure = check_program(program, options)
    if failure is None:
        return None
    small, found = minimized(program, failure, options, seconds=shrink_seconds)
    return found, f"seed {seed}: {report(small, found, options)}"
