"""Runs passes in order, verifies after each, and finds the one that changed the numbers."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from shoestring.ir import Function, Op, TensorType, print_function, print_op, verify
from shoestring.ir.errors import IRError, PassError, ShoestringError
from shoestring.ir.inference import infer_types, same_types, signature

from .base import Numerics, Pass, PassReport
from .disturbance import Disturbance
from .numerics import Difference, difference, evaluate


@dataclass(frozen=True, eq=False)
class StepRecord:
    """One pass of one run: the function before and after, the report and the time.

    Attributes:
        name: the pass.
        numerics: what it promises.
        report: what it did.
        seconds: time of the pass itself, without the verifier.
        verify_seconds: time of the verifier.
        before: the function that it was given.
        after: the function that it gave.
    """

    name: str
    numerics: Numerics
    report: PassReport
    seconds: float
    verify_seconds: float
    before: Function
    after: Function

    @property
    def ops_before(self) -> int:
        return len(self.before.ops)

    @property
    def ops_after(self) -> int:
        return len(self.after.ops)

    @property
    def text_before(self) -> str:
        return print_function(self.before)

    @property
    def text_after(self) -> str:
        return print_function(self.after)

    def __str__(self) -> str:
        head = f"{self.name}: {self.ops_before} -> {self.ops_after} ops, {self.seconds:.3f} s"
        return "\n".join([head, *(f"  {line}" for line in self.report.lines())])


@dataclass(frozen=True)
class Pipeline:
    """Passes in order.

    Attributes:
        passes: what to run.
        disabled: names of passes to leave out.

    Raises:
        PassError: SS3001 where `disabled` names no pass of the pipeline.
    """

    passes: tuple[Pass, ...]
    disabled: frozenset[str] = frozenset()

    def __init__(self, passes: Iterable[Pass], disabled: Iterable[str] = ()) -> None:
        object.__setattr__(self, "passes", tuple(passes))
        object.__setattr__(self, "disabled", frozenset(disabled))
        names = [p.name for p in self.passes]
        for name in sorted(self.disabled):
            if name not in names:
                raise unknown_pass(name, names, "disabling a pass of the pipeline")

    @property
    def enabled(self) -> tuple[Pass, ...]:
        return tuple(p for p in self.passes if p.name not in self.disabled)

    def run(
        self, function: Function, *, check_ir: bool = True
    ) -> tuple[Function, list[StepRecord]]:
        """The function after every enabled pass, and one record a pass.

        Args:
            function: a well-formed function; it is not changed.
            check_ir: verify after each pass.

        Raises:
            PassError: SS3002 a pass fails, SS3003 it breaks an invariant, SS3004 it changes the
                function's parameters or outputs.
        """
        records: list[StepRecord] = []
        checker = TypeChecker(function)
        for p in self.enabled:
            record = _run_one(p, function, checker if check_ir else None)
            records.append(record)
            function = record.after
        return function, records


def _run_one(p: Pass, before: Function, checker: TypeChecker | None) -> StepRecord:
    start = time.perf_counter()
    try:
        after, report = p.run(before)
    except ShoestringError:
        raise
    except Exception as error:
        what = f"running pass {p.name} on @{before.name}: {type(error).__name__}: {error}"
        hint = f"disable it with disabled=['{p.name}'] and report the function"
        raise PassError("SS3002", what, hint=hint) from error
    middle = time.perf_counter()
    if checker is not None and after is not before:
        _check(p, before, after, checker)
    end = time.perf_counter()
    return StepRecord(p.name, p.numerics, report, middle - start, end - middle, before, after)


class TypeChecker:
    """Checks result types of ops that have not been seen, so a run costs one inference a kind."""

    def __init__(self, trusted: Function) -> None:
        self._checked = set(trusted.ops)
        self._seen = {_typed_signature(op) for op in trusted.ops}

    def check(self, function: Function) -> None:
        """Checks every op.

        Raises:
            IRError: SS2105 where a result does not have the type that the definition infers.
        """
        for op in function.ops:
            if op in self._checked:
                continue
            self._checked.add(op)
            key = _typed_signature(op)
            if key not in self._seen:
                self._check_op(function, op)
                self._seen.add(key)

    def _check_op(self, function: Function, op: Op) -> None:
        if not all(v.type.is_static for v in (*op.inputs, *op.results)):
            return
        try:
            inferred = infer_types(op)
        except Exception as error:  # the reference refuses its operands in its own words
            what = f"in @{function.name}: {op.name} refuses its operands: {_first_line(error)}"
            raise IRError("SS2105", what, f"{op.loc}\n> {print_op(op)}") from error
        found = tuple(r.type for r in op.results)
        if not same_types(inferred, found):
            what = (
                f"in @{function.name}: {op.name} gives {_shown(inferred)}, written {_shown(found)}"
            )
            raise IRError("SS2105", what, f"{op.loc}\n> {print_op(op)}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _shown(types: Iterable[TensorType]) -> str:
    return ", ".join(map(str, types))


def _typed_signature(op: Op) -> object:
    return signature(op), tuple(r.type for r in op.results)


def _check(p: Pass, before: Function, after: Function, checker: TypeChecker) -> None:
    """Verifies what a pass made; the error names the pass."""
    try:
        verify(after, types=False)
        checker.check(after)
    except IRError as error:
        what = f"pass {p.name} breaks an invariant: {error.what} ({error.code})"
        raise PassError("SS3003", what, error.where, "this is a bug of the pass") from error
    if _interface(before) != _interface(after):
        what = f"pass {p.name} must keep parameters and outputs of @{before.name}"
        found = set(_interface(before)) ^ set(_interface(after))
        raise PassError("SS3004", what, f"differs: {', '.join(sorted(map(str, found)))}")


def _interface(function: Function) -> list[tuple[str, str, str]]:
    """Role, path and type of parameters in order (with whether they are replaced), then outputs."""
    params = [
        (p.role.value + ("" if p.next is None else ", replaced"), p.path, str(p.value.type))
        for p in function.params
    ]
    return [*params, *(("output", o.name, str(o.value.type)) for o in function.outputs)]


def unknown_pass(name: str, known: Iterable[str], doing: str) -> PassError:
    """The error for a name that no pass has, with the nearest that one has."""
    known = sorted(set(known))
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"one of: {', '.join(known)}"
    return PassError(
        "SS3001", f"{doing}: the name of a pass is required, found {name!r}", hint=hint
    )


@dataclass
class NumericCheck:
    """What `check` found out.

    Attributes:
        records: the run of the pipeline.
        compared: names of the passes whose outcome was compared.
        unchecked: lossy passes: their error is theirs to state, nothing is compared across them.
    """

    records: list[StepRecord]
    compared: list[str] = field(default_factory=list[str])
    unchecked: list[str] = field(default_factory=list[str])


def check(
    function: Function,
    arguments: Sequence[torch.Tensor],
    passes: Iterable[Pass],
    *,
    every: bool = False,
) -> NumericCheck:
    """Checks the numbers of each pass against the reference interpreter.

    An exact pass must keep every bit (NaN equals NaN), a reassociating one the tolerance of
    `numerics.TOLERANCE`, or what rounding alone does to the program. Runs of passes between lossy
    ones are compared end to end, and where an end differs the first wrong pass is found by
    bisection.

    Args:
        function: the function before the passes.
        arguments: one tensor a parameter.
        passes: what to run and check.
        every: compare after every pass; a fault hidden by a later pass's tolerance shows too.

    Raises:
        PassError: SS3007, with the first wrong pass and the first output or state that differs.
    """
    _, records = Pipeline(passes).run(function)
    result = NumericCheck(records)
    stages = [function, *(r.after for r in records)]
    outcomes = _Outcomes(stages, arguments)
    start = 0
    for end in _segment_ends(records):
        _check_segment(records, outcomes, start, end, every)
        result.compared += [r.name for r in records[start:end]]
        result.unchecked += [r.name for r in records[end : end + 1]]
        start = end + 1
    return result


def _segment_ends(records: list[StepRecord]) -> list[int]:
    """Positions of lossy passes, and the end."""
    return [i for i, r in enumerate(records) if r.numerics is Numerics.LOSSY] + [len(records)]


class _Outcomes:
    """What each stage computes, on demand and once."""

    def __init__(self, stages: list[Function], arguments: Sequence[torch.Tensor]) -> None:
        self.stages = stages
        self.arguments = arguments
        self._known: dict[int, dict[str, torch.Tensor]] = {}

    def disturbed(self, stage: int, seed: int) -> dict[str, torch.Tensor]:
        """What a stage computes when its roundings fall otherwise."""
        return evaluate(self.stages[stage], self.arguments, Disturbance(seed).run_op)

    def __getitem__(self, stage: int) -> dict[str, torch.Tensor]:
        same = next((s for s in self._known if self.stages[s] is self.stages[stage]), stage)
        if same not in self._known:
            self._known[same] = evaluate(self.stages[same], self.arguments)
        return self._known[same]


def _check_segment(
    records: list[StepRecord], outcomes: _Outcomes, start: int, end: int, every: bool
) -> None:
    def differs(first: int, last: int) -> Difference | None:
        exact = all(r.numerics is Numerics.EXACT for r in records[first:last])
        disturbed = partial(outcomes.disturbed, first)
        return difference(outcomes[first], outcomes[last], exact=exact, disturbed=disturbed)

    pairs = [(i, i + 1) for i in range(start, end)] if every else [(start, end)]
    bad = next(((a, b) for a, b in pairs if differs(a, b) is not None), None)
    if bad is not None:
        first, last = bad
        wrong = bisect(first, last, lambda stage: differs(first, stage) is None)
        raise _wrong_pass(records[wrong], differs(first, wrong + 1))


def bisect(good: int, bad: int, is_good: Callable[[int], bool]) -> int:
    """The last good stage before the first bad one, between a good and a bad stage."""
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if is_good(middle) else (good, middle)
    return good


def _wrong_pass(record: StepRecord, found: Difference | None) -> PassError:
    promise = "equal bits" if record.numerics is Numerics.EXACT else "equality within tolerance"
    what = f"checking the numbers: pass {record.name} promises {promise}; {found}"
    hint = f"disable it with disabled=['{record.name}'] and report the function"
    return PassError("SS3007", what, hint=hint)
