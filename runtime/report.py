"""What happened to a program: capture, passes, code, memory and time; as data and as text."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shoestring.ir import Cost, Function, Role

if TYPE_CHECKING:
    from shoestring.passes.pipeline import StepRecord

    from .step import Program


@dataclass(frozen=True)
class Report:
    """One program's story; `str()` gives it as text.

    Attributes:
        function: the program after the passes.
        captured_ops: operations before the passes.
        records: what each pass did.
        seconds: phase of compilation -> seconds.
        state_bytes: role -> bytes of state.
        cost: of one step.
        backend: facts that the backend tells: arena bytes, kernels, fallbacks.
        kept: whether passes and backend did this earlier, for an equal program.
    """

    function: Function
    captured_ops: int
    records: list[StepRecord]
    seconds: dict[str, float]
    state_bytes: dict[str, int]
    cost: Cost
    backend: dict[str, Any] = field(default_factory=dict[str, Any])
    kept: bool = False

    @classmethod
    def of(cls, program: Program) -> Report:
        """The report of a compiled program."""
        describe = getattr(program.executable, "describe", None)
        return cls(
            program.function,
            len(program.captured.function.ops),
            program.records,
            program.seconds,
            state_bytes(program.function),
            total_cost(program.function),
            describe() if describe is not None else {},
            program.kept,
        )

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """The report, a line a fact."""
        times = ", ".join(f"{name} {s:.2f} s" for name, s in self.seconds.items())
        times += "; passes and code are those of an earlier compilation" if self.kept else ""
        state = ", ".join(f"{role} {_mb(n)}" for role, n in self.state_bytes.items())
        lines = [
            f"captured {self.captured_ops} operations; {len(self.function.ops)} after the passes",
            f"compile time: {times}",
            f"cost of a step: {self.cost.flops / 1e9:.3f} GFLOP, {_mb(self.cost.bytes)} moved",
            f"state: {state or 'none'}",
        ]
        for record in self.records:
            lines += str(record).splitlines()
        lines += [f"{name}: {_shown(value)}" for name, value in self.backend.items()]
        return lines


def state_bytes(function: Function) -> dict[str, int]:
    """Role -> bytes of the parameters of a function that have it."""
    total: Counter[str] = Counter()
    for p in function.params:
        if p.role is not Role.HYPER:
            total[p.role.value] += p.value.type.nbytes
    return dict(total)


def total_cost(function: Function) -> Cost:
    """Operations and bytes of one run."""
    return sum((op.opdef.cost(op) for op in function.ops), Cost(0, 0))


def _mb(count: float) -> str:
    return f"{count / 1e6:.1f} MB"


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) if value else "none"  # pyright: ignore
    return str(value)
