"""Runs a program in every way there is and says where two of them disagree.

    eager        PyTorch itself: forward, loss.backward(), optimizer.step()
    interpreter  the captured function, op by op, through `Step`
    passes       the captured function after random exact passes: equal to the bit, interpreted
    compiled     the default pipeline and the c backend (or another), over the same steps

Dropout and its like are compared between interpreter and compiled code only: eager PyTorch draws
other numbers.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache

import torch

import shoestring
from shoestring.backends.base import Executable
from shoestring.backends.registry import get_backend
from shoestring.frontend.capture import Captured
from shoestring.ir import Function, Role, parse, print_function, same_structure, verify
from shoestring.ir.inference import infer_types, same_types
from shoestring.passes.base import Numerics, Pass
from shoestring.passes.chunk_loss import ChunkLoss
from shoestring.passes.pipeline import Pipeline, check
from shoestring.passes.registry import BUILTIN, default_pipeline
from shoestring.runtime.step import Program as StepProgram
from shoestring.runtime.step import Step

from .compare import NOISY_RUNS, Outcome, disturbed, mismatch
from .program import Instance, Program


@dataclass(frozen=True)
class Failure:
    """Where a program went wrong.

    Attributes:
        layer: `capture`, `verify`, `text`, `passes`, `compile`; against the interpreter `eager`,
            `compiled`.
        what: the error, or the first difference.
        kind: what makes two failures the same one while shrinking.
        code: of the error, where it is one of ours.
    """

    layer: str
    what: str
    kind: str = ""
    code: str = ""

    def same_as(self, other: Failure | None) -> bool:
        return other is not None and (self.layer, self.kind) == (other.layer, other.kind)

    def __str__(self) -> str:
        return f"{self.layer}: {self.what}"


@dataclass
class Options:
    """What a check runs beside eager and interpreter.

    Attributes:
        backend: of the compiled run; None for none.
        passes: random pass orders to try.
        seed: of those orders.
        compile: in the place of passes and backend: from the captured function to an executable.
    """

    backend: str | None = None
    passes: int = 1
    seed: int = 0
    compile: Callable[[Function], Executable] | None = None


# -- eager ---------------------------------------------------------------------------------------


@dataclass
class Eager:
    """The program in PyTorch."""

    instance: Instance

    def step(self, number: int) -> Outcome:
        """One micro-batch; the optimizer moves with the last of an update."""
        program, model, optimizer = (
            self.instance.program,
            self.instance.model,
            self.instance.optimizer,
        )
        loss, metrics = model(*self.instance.batch(number))
        (loss / program.accumulate if program.accumulate > 1 else loss).backward()
        if (number + 1) % program.accumulate == 0:
            trained = [p for g in optimizer.param_groups for p in g["params"]]
            if program.clip_grad_value is not None:
                torch.nn.utils.clip_grad_value_(trained, program.clip_grad_value, foreach=False)
            if program.clip_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(trained, program.clip_grad_norm, foreach=False)
            optimizer.step()
            optimizer.zero_grad()
        return results_of(self.instance, loss, metrics)


def results_of(instance: Instance, loss: torch.Tensor, metrics: dict[str, torch.Tensor]) -> Outcome:
    """Everything that a step is judged by, copied."""
    model, optimizer = instance.model, instance.optimizer
    found = {"loss": loss} | {f"metric {k}": v for k, v in metrics.items()}
    found |= {f"parameter {k}": v for k, v in model.named_parameters()}
    found |= {f"buffer {k}": v for k, v in model.named_buffers()}
    for name, p in model.named_parameters():
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, torch.Tensor):
                found[f"moment {name}#{key}"] = value
    return {k: v.detach().clone() for k, v in found.items()}


# -- compiled ------------------------------------------------------------------------------------


@dataclass
class Compiled:
    """An executable of each captured function, over a state of its own.

    Attributes:
        build: from a captured function to an executable.
        state: path -> tensor; copied from the interpreter's before the first step.
    """

    build: Callable[[Function], Executable]
    executables: dict[int, Executable] = field(default_factory=dict[int, Executable])
    state: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])

    def prepare(self, captured: Captured, arguments: Sequence[torch.Tensor]) -> None:
        """Compiles a function that was not met before, and copies the state that it brings."""
        if id(captured) not in self.executables:
            self.executables[id(captured)] = self.build(captured.function)
        pairs = list(zip(captured.function.params, arguments, strict=True))
        new = {
            p.path: t.detach() for p, t in pairs if _lives_on(p.role) and p.path not in self.state
        }
        self.state.update(copy.deepcopy(new))

    def run(self, captured: Captured, arguments: Sequence[torch.Tensor]) -> Outcome:
        """Outputs and all state after one call."""
        given = [
            self.state[p.path] if _lives_on(p.role) else t.detach().clone()
            for p, t in zip(captured.function.params, arguments, strict=True)
        ]
        outputs = self.executables[id(captured)].run(given)
        named = zip(captured.function.outputs, outputs, strict=True)
        found = {f"output {o.name}": t.clone() for o, t in named}
        return found | {f"state {k}": v.clone() for k, v in self.state.items()}


def _lives_on(role: Role) -> bool:
    return role not in (Role.BATCH, Role.HYPER)


def build_with(backend: str, passes: Sequence[Pass]) -> Callable[[Function], Executable]:
    """From a captured function to an executable, through passes."""

    def build(function: Function) -> Executable:
        optimized, _ = Pipeline(passes).run(function, check_ir=False)
        return get_backend(backend).compile(optimized)

    return build


def small_pipeline() -> list[Pass]:
    """The default one, with limits that the sizes of random programs reach."""
    chunks = ChunkLoss(chunk_bytes=64, min_rows=1, min_chunks=1, max_chunks=3, min_bytes=0)
    return [chunks if isinstance(p, ChunkLoss) else p for p in default_pipeline()]


# -- the check -----------------------------------------------------------------------------------


# Limits that are documented, each with an error of its own: such a program is left out.
REFUSALS = frozenset({"SS1013", "SS1014", "SS1020"})


class _Found(Exception):
    def __init__(self, failure: Failure) -> None:
        super().__init__(str(failure))
        self.failure = failure


@contextmanager
def _layer(name: str) -> Iterator[None]:
    """Whatever is raised in here is a failure of this layer."""
    try:
        yield
    except _Found:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        code = getattr(error, "code", "")
        what = f"{type(error).__name__}: " + " | ".join(lines[:4])
        raise _Found(Failure(name, what, f"{type(error).__name__} {code}", code)) from error


def check_program(program: Program, options: Options | None = None) -> Failure | None:
    """The first disagreement, or None."""
    options = options or Options()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _Check(program, options).run()
        except _Found as found:
            refused = found.failure.layer == "capture" and found.failure.code in REFUSALS
            return None if refused else found.failure
    return None


class _Check:
    """One program under examination."""

    def __init__(self, program: Program, options: Options) -> None:
        self.program = program
        self.options = options
        self.eager = None if program.random else Eager(Instance(program))
        self.instance = Instance(program)
        self.compiled = None
        if options.compile is not None:
            self.compiled = Compiled(options.compile)
        elif options.backend is not None:
            self.compiled = Compiled(build_with(options.backend, small_pipeline()))
        self.seen: set[int] = set()
        self.history: list[tuple[Captured, list[torch.Tensor]]] = []
        self.spreads: dict[int, Outcome] = {}

    def run(self) -> None:
        with _layer("capture"):
            step = self._compile()
        for number in range(self.program.steps):
            self._one_step(step, number)

    def _compile(self) -> Step:
        program, i = self.program, self.instance
        return shoestring.compile(
            i.model, i.loss_fn, i.optimizer, i.batch(0), backend="reference", passes=(),
            seed=program.seed, accumulate=program.accumulate,
            clip_grad_norm=program.clip_grad_norm, clip_grad_value=program.clip_grad_value,
        )  # fmt: skip

    def _one_step(self, step: Step, number: int) -> None:
        batch = self.instance.batch(number)
        with _layer("capture"):
            made = step.program(batch)
        captured = made.captured
        with _layer("bind"):
            arguments = [t.detach() for t in step.bind(captured, batch)]
        before = copy.deepcopy(arguments)
        self.history.append((captured, before))
        if id(captured) not in self.seen:
            self.seen.add(id(captured))
            examine(captured.function, before, self.options)
        if self.compiled is not None:
            with _layer("compile"):
                self.compiled.prepare(captured, before)
        with _layer("interpreter"):
            loss, metrics = _as_pair(step(*batch))
        self._against_eager(loss, metrics, number)
        self._against_compiled(made, arguments, before, [loss, *metrics.values()])

    def _against_eager(
        self, loss: torch.Tensor, metrics: dict[str, torch.Tensor], number: int
    ) -> None:
        if self.eager is None:
            return
        found = results_of(self.instance, loss, metrics)
        what = mismatch(self.eager.step(number), found, lambda: self._spread(number, _eager_name))
        if what:
            raise _Found(Failure("eager", f"step {number}: {what}", what.partition(" ")[0]))

    def _against_compiled(
        self, made: StepProgram, arguments: list[torch.Tensor], before: list[torch.Tensor],
        outputs: list[torch.Tensor],
    ) -> None:  # fmt: skip
        if self.compiled is None:
            return
        with _layer("compiled"):
            found = self.compiled.run(made.captured, before)
        function = made.captured.function
        expected = {f"output {o.name}": t for o, t in zip(function.outputs, outputs, strict=True)}
        for p, t in zip(function.params, arguments, strict=True):
            if _lives_on(p.role):
                expected[f"state {p.path}"] = t
        number = len(self.history) - 1
        found = {k: v for k, v in found.items() if k in expected}
        what = mismatch(expected, found, lambda: self._spread(number, _compiled_name))
        if what:
            raise _Found(Failure("compiled", f"step {number}: {what}", what.partition(" ")[0]))

    def _spread(self, number: int, name: Callable[[str, str], str]) -> Outcome:
        """How far rounding carries each result of step `number`, from the first step on."""
        if number not in self.spreads:
            self.spreads[number] = spread_of(self.history[: number + 1])
        renamed: Outcome = {}
        for key, value in self.spreads[number].items():
            kind, _, rest = key.partition(" ")
            renamed[name(kind, rest)] = value
        return renamed


def _as_pair(outcome: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    if isinstance(outcome, tuple):
        loss, metrics = outcome  # pyright: ignore[reportUnknownVariableType]
        return loss, metrics  # pyright: ignore[reportUnknownVariableType]
    assert isinstance(outcome, torch.Tensor)
    return outcome, {}


def _eager_name(kind: str, rest: str) -> str:
    if kind == "output":
        return "loss" if rest == "loss" else f"metric {rest}"
    return f"{kind} {rest}"


def _compiled_name(kind: str, rest: str) -> str:
    return f"output {rest}" if kind == "output" else f"state {rest}"


def spread_of(history: Sequence[tuple[Captured, list[torch.Tensor]]]) -> Outcome:
    """`output loss`, `parameter p0`, ... -> how far disturbed runs of all steps deviate."""
    exact = _rerun(history, None)
    noisy = [_rerun(history, seed) for seed in range(1, NOISY_RUNS + 1)]
    spread: Outcome = {}
    for what, x in exact.items():
        runs = [(x.double() - n[what].double()).abs().nan_to_num(0.0, 0.0, 0.0) for n in noisy]
        spread[what] = torch.stack(runs).amax(0).max() if x.numel() else torch.zeros(())
    return spread


def _rerun(history: Sequence[tuple[Captured, list[torch.Tensor]]], seed: int | None) -> Outcome:
    """Outcome of the last step, its state carried from the first; a seed disturbs it."""
    state: dict[str, torch.Tensor] = {}
    outcome: Outcome = {}
    for captured, arguments in history:
        function = captured.function
        given = [state.get(p.path, t) for p, t in zip(function.params, arguments, strict=True)]
        values = disturbed(function, given, seed)
        nexts = {p.path: values[p.next] for p in function.params if p.next is not None}
        state.update(nexts)
        outcome |= {f"output {o.name}": values[o.value] for o in function.outputs}
        outcome |= {
            f"{p.role.value} {p.path}": nexts[p.path] for p in function.params if p.path in nexts
        }
    return outcome


# -- what is asked of a captured function ----------------------------------------------------------


def examine(function: Function, arguments: Sequence[torch.Tensor], options: Options) -> None:
    """Well-formed, printed and parsed back, and unmoved by exact passes in any order."""
    with _layer("verify"):
        verify_fast(function)
    round_trip(function)
    rng = random.Random(f"{options.seed}/{len(function.ops)}")
    for _ in range(options.passes):
        chosen = random_passes(rng)
        names = ", ".join(p.name for p in chosen)
        with _layer("passes"):
            try:
                result = check(function, arguments, chosen)
            except Exception as error:
                error.add_note(f"passes: {names}")
                raise
        round_trip(result.records[-1].after if result.records else function)


def round_trip(function: Function) -> None:
    with _layer("text"):
        text = print_function(function)
        again = parse(text)
        assert same_structure(function, again), "parse(print(f)) is another function"
        assert print_function(again) == text, "printing what was parsed gives another text"


@cache
def exact_passes() -> tuple[Pass, ...]:
    return tuple(cls() for cls in BUILTIN if cls.numerics is Numerics.EXACT)


def random_passes(rng: random.Random) -> list[Pass]:
    """Some exact passes in some order, some twice; now and then the default pipeline."""
    if rng.random() < 0.2:
        return [p for p in default_pipeline() if p.numerics is Numerics.EXACT]
    every = exact_passes()
    return [rng.choice(every) for _ in range(rng.randint(1, len(every) + 2))]


def verify_fast(function: Function) -> None:
    """As `verify`, with inferred types remembered between functions."""
    verify(function, types=False)
    for op in function.ops:
        found = tuple(r.type for r in op.results)
        if not same_types(infer_types(op), found):
            verify(function)
