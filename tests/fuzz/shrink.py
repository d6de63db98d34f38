"""Makes a failing program small: it tries simpler programs that fail in the same way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from .program import Input, Optimizer, Program, Stmt

Fails = Callable[[Program], bool]


def shrink(program: Program, fails: Fails, *, seconds: float = 60.0) -> Program:
    """The smallest failing program found; `program` itself where nothing simpler fails.

    Args:
        program: one that fails.
        fails: whether a program fails in the same way. A program that PyTorch itself refuses must
            not count as failing.
        seconds: when to stop looking.
    """
    end = time.monotonic() + seconds
    again = True
    while again:
        again = False
        for candidate in _candidates(program):
            if time.monotonic() > end:
                return program
            if candidate != program and fails(candidate):
                program, again = candidate, True
                break
    return program


def _candidates(program: Program) -> Iterator[Program]:
    """Simpler programs, the boldest cuts first."""
    n = len(program.body)
    size = n // 2
    while size:
        for start in range(0, n, size):
            yield _without(program, set(range(start, min(start + size, n))))
        size //= 2
    yield from _simpler_options(program)
    yield from _fewer_results(program)
    for at, stmt in enumerate(program.body):
        if stmt.targets:
            yield _as_input(program, at)
            yield from _bypassed(program, at)
    for at, given in enumerate(program.inputs):
        for simpler in _simpler_inputs(given):
            inputs = (*program.inputs[:at], simpler, *program.inputs[at + 1 :])
            yield replace(program, inputs=inputs)


def _without(program: Program, drop: set[int]) -> Program:
    """Without some statements, and whatever needs what they made."""
    known = {i.name for i in program.inputs}
    body: list[Stmt] = []
    for at, stmt in enumerate(program.body):
        if at not in drop and known.issuperset(stmt.args):
            body.append(stmt)
            known.update(stmt.targets)
    return _tidy(replace(program, body=tuple(body)), known)


def _tidy(program: Program, known: set[str]) -> Program:
    """Without results that are gone and inputs that nobody reads."""
    loss = tuple(n for n in program.loss if n in known)
    if not loss:
        # Something has to be trained: the last float that is left, else a parameter.
        made = [t for s in program.body for t in s.targets]
        loss = tuple(made[-1:]) or tuple(i.name for i in program.of_role("parameter"))[:1]
    metrics = tuple(n for n in program.metrics if n in known)
    read = {a for s in program.body for a in s.args} | {*loss, *metrics}
    tied = {i.role.partition(":")[2] for i in program.inputs if i.name in read}
    inputs = tuple(i for i in program.inputs if i.name in read | tied)
    names = {i.name for i in inputs}
    second = tuple(n for n in program.optimizer.second if n in names)
    optimizer = replace(program.optimizer, second=second)
    return replace(program, inputs=inputs, loss=loss, metrics=metrics, optimizer=optimizer)


def _simpler_options(program: Program) -> Iterator[Program]:
    if program.accumulate > 1:
        yield replace(program, accumulate=1, steps=max(1, program.steps // program.accumulate))
    elif program.steps > 1:
        yield replace(program, steps=1)
        yield replace(program, steps=program.steps - 1)
    yield replace(program, clip_grad_norm=None)
    yield replace(program, clip_grad_value=None)
    yield replace(program, autocast=False)
    yield replace(program, special=False)
    yield replace(program, optimizer=Optimizer())
    options = program.optimizer.options
    for at in range(1, len(options)):
        fewer = options[:at] + options[at + 1 :]
        yield replace(program, optimizer=replace(program.optimizer, options=fewer))
    yield replace(program, optimizer=replace(program.optimizer, second=(), second_options=()))


def _fewer_results(program: Program) -> Iterator[Program]:
    known = {i.name for i in program.inputs} | {t for s in program.body for t in s.targets}
    if program.metrics:
        yield _tidy(replace(program, metrics=()), known)
        for name in program.metrics:
            rest = tuple(n for n in program.metrics if n != name)
            yield _tidy(replace(program, metrics=rest), known)
    for name in program.loss if len(program.loss) > 1 else ():
        yield _tidy(replace(program, loss=tuple(n for n in program.loss if n != name)), known)
    yield _tidy(program, known)


def _bypassed(program: Program, at: int) -> Iterator[Program]:
    """With each operand of a statement in the place of its first result."""
    stmt = program.body[at]
    for operand in dict.fromkeys(stmt.args):
        body = [*program.body[:at], *program.body[at + 1 :]]
        swap = {t: operand for t in stmt.targets}
        renamed = tuple(replace(s, args=tuple(swap.get(a, a) for a in s.args)) for s in body)
        known = {i.name for i in program.inputs} | {t for s in renamed for t in s.targets}
        loss = tuple(dict.fromkeys(swap.get(n, n) for n in program.loss))
        metrics = tuple(n for n in program.metrics if n in known)
        yield _tidy(replace(program, body=renamed, loss=loss, metrics=metrics), known)


def _as_input(program: Program, at: int) -> Program:
    """With a parameter or a batch tensor of the same type in the place of a statement's result."""
    stmt = program.body[at]
    types = types_of(program)
    fresh: list[Input] = []
    for name in stmt.targets:
        dtype, shape, trained = types.get(name, ("", (), False))
        if not dtype:
            return program
        fill = "unit" if dtype.startswith(("f", "b")) and dtype != "bool" else "below:2"
        fresh.append(Input(name, "parameter" if trained else "batch", dtype, shape, fill, seed=at))
    if any(not s.targets and set(s.args) & set(stmt.targets) for s in program.body):
        fresh = [replace(i, role="batch") for i in fresh]
    body = (*program.body[:at], *program.body[at + 1 :])
    known = {i.name for i in program.inputs} | {t for s in program.body for t in s.targets}
    return _tidy(replace(program, inputs=(*program.inputs, *fresh), body=body), known)


def types_of(program: Program) -> dict[str, tuple[str, tuple[int, ...], bool]]:
    """Name -> (dtype, shape, whether it has a gradient), from running the body."""
    import warnings

    import torch

    from .data import NAMES
    from .program import PRELUDE

    scope: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exec(PRELUDE, scope)
            for i in program.inputs:
                kind, _, other = i.role.partition(":")
                tensor = i.tensor().requires_grad_() if kind == "parameter" else i.tensor()
                scope[i.name] = scope[other] if kind == "tied" else tensor
            for stmt in program.body:
                exec("\n".join(stmt.lines()), scope)
        except Exception:  # a candidate that is not valid: its types do not matter
            return {}
    tensors = {n: t for n, t in scope.items() if isinstance(t, torch.Tensor)}
    return {n: (NAMES[t.dtype], tuple(t.shape), t.requires_grad) for n, t in tensors.items()}


def _simpler_inputs(given: Input) -> Iterator[Input]:
    if given.layout != "plain":
        yield replace(given, layout="plain")
    if given.role == "frozen":
        yield replace(given, role="batch")
    if given.fill == "special":
        yield replace(given, fill="unit")
    if given.dtype in ("bf16", "f16", "f64"):
        yield replace(given, dtype="f32")
    for at, size in enumerate(given.shape):
        for smaller in (1, 2, size - 1):
            if 0 < smaller < size:
                yield replace(given, shape=(*given.shape[:at], smaller, *given.shape[at + 1 :]))
