"""Every seeded miscompile is caught; the table says by what."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch

import shoestring
from shoestring.backends.base import Executable
from shoestring.backends.c import CBackend
from shoestring.backends.c.build import build
from shoestring.backends.c.executable import CExecutable, CompileInfo
from shoestring.backends.c.lower import Lowered, lower
from shoestring.backends.memory import Lifetime, Plan, check_plan, plan_memory
from shoestring.frontend.optimizers.adam import AdamRule
from shoestring.ir import Function, print_function, same_structure
from shoestring.ir.errors import BackendError, PassError
from shoestring.passes.canonicalize import Canonicalize
from shoestring.passes.dead_code import DeadCode
from shoestring.passes.pipeline import check

from .miscompiles import MUTATIONS, Wrong
from .program import Instance, Program
from .run import Options, check_program
from .victims import CALM, VICTIM

CAUGHT: dict[str, list[str]] = {}


@pytest.fixture(scope="module", autouse=True)
def table(request: pytest.FixtureRequest) -> Iterator[None]:
    """Prints which layer caught what, after the last test."""
    yield
    width = max(map(len, CAUGHT), default=0)
    lines = [f"{name:{width}}  {', '.join(layers)}" for name, layers in sorted(CAUGHT.items())]
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n{len(lines)} seeded miscompiles, caught by:\n" + "\n".join(lines))


def captured(program: Program) -> tuple[Function, list[torch.Tensor]]:
    """The victim's function, and arguments as they are in its second step."""
    i = Instance(program)
    step = shoestring.compile(
        i.model, i.loss_fn, i.optimizer, i.batch(0), backend="reference", passes=()
    )
    step(*i.batch(0))
    made = step.program(i.batch(1))
    arguments = [t.detach().clone() for t in step.bind(made.captured, i.batch(1))]
    return made.captured.function, arguments


@pytest.fixture(scope="module")
def victim() -> tuple[Function, list[torch.Tensor]]:
    return captured(VICTIM)


@pytest.mark.parametrize("name", MUTATIONS)
def test_wrong_rewrite_is_caught(name: str, victim: tuple[Function, list[torch.Tensor]]) -> None:
    function, arguments = victim
    mutate = MUTATIONS[name]
    broken = mutate(function)
    assert print_function(broken) != print_function(function) or not same_structure(
        broken, function
    )
    layers = [*_by_pipeline(function, arguments, Wrong(mutate)), *_by_fuzzing(mutate)]
    CAUGHT[name] = layers
    assert layers


def _by_pipeline(function: Function, arguments: Sequence[torch.Tensor], wrong: Wrong) -> list[str]:
    """The verifier or the bisection, which must name the wrong pass among good ones."""
    with pytest.raises(PassError) as raised:
        check(function, arguments, [Canonicalize(), DeadCode(), wrong, DeadCode()]) if _survives(
            function, wrong
        ) else check(function, arguments, [wrong, DeadCode()])
    error = raised.value
    assert "wrong" in error.what
    return [{"SS3003": "verifier", "SS3004": "interface", "SS3007": "bisection"}[error.code]]


def _survives(function: Function, wrong: Wrong) -> bool:
    """Whether the place to break is still there after other passes."""
    for p in (Canonicalize(), DeadCode()):
        function, _ = p.run(function)
    try:
        wrong.run(function)
    except (AssertionError, StopIteration):
        return False
    return True


def _by_fuzzing(mutate: Callable[[Function], Function]) -> list[str]:
    """The comparison of whole runs, with its tolerances: it does not see everything."""

    def tamper(function: Function) -> Executable:
        from shoestring.backends.reference import ReferenceBackend

        return ReferenceBackend().compile(mutate(function))

    failure = check_program(VICTIM, Options(passes=0, compile=tamper))
    return [] if failure is None else [f"fuzzing ({failure.layer})"]


def test_the_victims_are_healthy() -> None:
    for program in (VICTIM, CALM):
        assert check_program(program, Options(backend="c", passes=3)) is None


# -- memory plans --------------------------------------------------------------------------------


def overlap(lifetimes: list[Lifetime], plan: Plan) -> Plan:
    """Two buffers that are alive together at one place."""
    for a in lifetimes:
        for b in lifetimes:
            if (
                a.index < b.index
                and a.nbytes
                and b.nbytes
                and a.first <= b.last
                and b.first <= a.last
            ):
                return replace(plan, offsets={**plan.offsets, b.index: plan.offsets[a.index]})
    raise AssertionError("no two buffers are alive together")


def freed_early(lifetimes: list[Lifetime], plan: Plan) -> Plan:
    """Every buffer freed one instruction before its last reader."""
    return plan_memory([replace(t, last=max(t.first, t.last - 2)) for t in lifetimes])


def arena_too_small(lifetimes: list[Lifetime], plan: Plan) -> Plan:
    return replace(plan, arena_bytes=plan.arena_bytes - 64)


def misaligned(lifetimes: list[Lifetime], plan: Plan) -> Plan:
    big = max(lifetimes, key=lambda t: t.nbytes).index
    return replace(plan, offsets={**plan.offsets, big: plan.offsets[big] + 4})


def forgotten(lifetimes: list[Lifetime], plan: Plan) -> Plan:
    return replace(plan, offsets={k: v for k, v in plan.offsets.items() if k != lifetimes[0].index})


LIFETIMES = [Lifetime(i, 100 + 36 * (i % 5), i, i + 1 + i % 4, f"b{i}") for i in range(30)]


@pytest.mark.parametrize("wrong", [overlap, freed_early, arena_too_small, misaligned, forgotten])
def test_wrong_memory_plan_is_caught(wrong: Callable[[list[Lifetime], Plan], Plan]) -> None:
    plan = plan_memory(LIFETIMES)
    with pytest.raises(BackendError, match="SS4301"):
        check_plan(LIFETIMES, wrong(LIFETIMES, plan))
    CAUGHT[f"plan: {wrong.__name__}"] = ["memory plan checker"]


# -- emitted code --------------------------------------------------------------------------------


def compile_with(edit: Callable[[Lowered], Lowered]) -> Callable[[Function], Executable]:
    """The C backend with its output edited before it is built."""

    def compile(function: Function) -> Executable:
        lowered = edit(lower(function))
        library = ctypes.CDLL(str(build(lowered.sources).path))
        info = CompileInfo(0.0, False, None)
        return CExecutable(lowered.program, lowered.kernels, library, lowered.sources, info)

    return compile


def edited(pattern: str, by: str | Callable[[re.Match[str]], str]) -> Callable[[Lowered], Lowered]:
    """The emitted source with a regular expression replaced; it must occur."""

    def edit(lowered: Lowered) -> Lowered:
        sources = [re.sub(pattern, by, s) for s in lowered.sources]
        assert sources != lowered.sources, f"{pattern} does not occur"
        return replace(lowered, sources=sources)

    return edit


def without_copies(lowered: Lowered) -> Lowered:
    """New state that is never written back, or one instruction less."""
    program = lowered.program
    rest = program.instructions[:-1] if not program.copies else program.instructions
    return replace(lowered, program=replace(program, instructions=rest, copies=()))


def first_torch_call_skipped(lowered: Lowered) -> Lowered:
    program = lowered.program
    calls = [i for i in program.instructions if i.name.startswith("aten.")]
    rest = tuple(i for i in program.instructions if i is not calls[0])
    return replace(lowered, program=replace(program, instructions=rest))


def instructions_reversed(lowered: Lowered) -> Lowered:
    program = lowered.program
    return replace(lowered, program=replace(program, instructions=program.instructions[::-1]))


def everything_at_one_place(lowered: Lowered) -> Lowered:
    """A plan that the checker was not shown: all buffers share their bytes."""
    plan = lowered.program.plan
    offsets = dict.fromkeys(plan.offsets, 0)
    return replace(lowered, program=replace(lowered.program, plan=replace(plan, offsets=offsets)))


EMITTED: dict[str, Callable[[Lowered], Lowered]] = {
    "state not written back": without_copies,
    "library call skipped": first_torch_call_skipped,
    "instructions in reverse": instructions_reversed,
    "all buffers share memory": everything_at_one_place,
    "loops end one element early": edited(
        r"(j0 < )(\d+);", lambda m: f"{m[1]}{max(1, int(m[2]) - 1)};"
    ),
    "draws of two sites are equal": edited(r"(ss_philox\(\w+, \w+, )1u", r"\g<1>0u"),
    "operands of a difference swapped": edited(r"\((v\d+) - (v\d+)\)", r"(\2 - \1)"),
    "f16 results not rounded": edited(r"ss_round_f16\(", "("),
    "root of the second moment missed": edited(r"\bsqrtf?\(", "("),
}


@pytest.mark.parametrize("name", EMITTED)
def test_wrong_code_is_caught(name: str) -> None:
    failure = check_program(VICTIM, Options(passes=0, compile=compile_with(EMITTED[name])))
    assert failure is not None and failure.layer == "compiled"
    CAUGHT[f"c: {name}"] = [f"fuzzing ({failure.layer})"]


# -- the frontend --------------------------------------------------------------------------------


def test_wrong_update_rule_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = AdamRule.update

    def twice(self: AdamRule, *args: object) -> None:
        right(self, *args)  # type: ignore[arg-type]
        right(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(AdamRule, "update", twice)
    failure = check_program(CALM, Options(passes=0))
    assert failure is not None and failure.layer == "eager"
    CAUGHT["frontend: update carried out twice"] = ["fuzzing (eager)"]


def test_at_least_24_are_seeded() -> None:
    assert len(MUTATIONS) >= 24
    assert CBackend().name == "c"
