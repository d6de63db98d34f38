"""The contenders: each sets a workload up and runs steps of it, in a process of its own."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

import shoestring
from benchmarks.workloads import Workload, autocast
from shoestring.runtime.executor import Executor, Timing
from shoestring.runtime.memory import current_rss

from .roofline import Work

CONTENDERS = ("shoestring", "eager", "compile", "max-autotune", "jax")
PEERS = CONTENDERS[1:]
NAMED_OPS = 6  # of a kernel, in a profile
OF_OPTIMIZERS = "torch._dynamo"  # which every optimizer of PyTorch imports when it is made


class Unavailable(Exception):
    """This contender cannot run here; the text says why."""


class Runner(Protocol):
    """One contender."""

    def imports(self) -> None:
        """Loads libraries, so that they count neither as compile time nor as memory of a step."""
        ...

    def setup(self, workload: Workload) -> None:
        """Everything up to the first step."""
        ...

    def predict(self) -> int | None:
        """The most resident bytes of steps to come, where it knows."""
        ...

    def step(self) -> float:
        """Forward, backward and update; the loss before the update."""
        ...

    def facts(self) -> dict[str, Any]:
        """What else it knows: the work of a step."""
        ...


def make_runner(contender: str, precision: str) -> Runner:
    """The runner of a contender.

    Raises:
        Unavailable: saying what is missing.
    """
    if contender == "shoestring":
        return ShoestringRunner(precision)
    if contender == "jax":
        if importlib.util.find_spec("jax") is None:
            raise Unavailable("jax is not installed")
        runner: Runner = importlib.import_module("benchmarks.steps.jax_runner").JaxRunner(precision)
        return runner
    return TorchRunner(contender, precision)


def adamw(workload: Workload, **options: Any) -> torch.optim.AdamW:
    """The optimizer of every contender."""
    return torch.optim.AdamW(workload.model.parameters(), lr=workload.learning_rate, **options)


@dataclass
class TorchRunner:
    """Eager PyTorch, or with the loss function compiled; autocast for bf16, fused AdamW."""

    contender: str
    precision: str

    def imports(self) -> None:
        importlib.import_module(OF_OPTIMIZERS)
        if self.contender != "eager":
            importlib.import_module("torch._inductor.compile_fx")

    def setup(self, workload: Workload) -> None:
        self.workload = workload
        self.loss_fn = self._compiled(workload.loss_fn)
        self.optimizer = adamw(workload, fused=True)

    def _compiled(self, loss_fn: Any) -> Any:
        if self.contender == "eager":
            return loss_fn
        if self.contender == "compile":
            return torch.compile(loss_fn)
        config: Any = importlib.import_module("torch._inductor.config")
        config.max_autotune_gemm_backends = "CPP,ATEN"
        return torch.compile(loss_fn, mode="max-autotune")

    def step(self) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.precision == "bf16"):
            loss = self.loss_fn(self.workload.model, *self.workload.batch)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())

    def predict(self) -> int | None:
        return None

    def facts(self) -> dict[str, Any]:
        return {}


@dataclass
class ShoestringRunner:
    """`shoestring.compile` with its defaults."""

    precision: str

    def imports(self) -> None:
        importlib.import_module(OF_OPTIMIZERS)
        if self.precision != "fp32":
            if "precision" not in inspect.signature(shoestring.compile).parameters:
                raise Unavailable("not available yet")

    def setup(self, workload: Workload) -> None:
        compile_step: Any = shoestring.compile
        named = {} if self.precision == "fp32" else {"precision": self.precision}
        model, batch = workload.model, workload.batch
        self.batch = batch
        self.compiled = compile_step(model, workload.loss_fn, adamw(workload), batch, **named)

    def predict(self) -> int | None:
        to_come = self.compiled.bytes_to_come(self.batch)
        return None if to_come is None else current_rss() + to_come

    def step(self) -> float:
        return float(self.compiled(*self.batch))

    def facts(self) -> dict[str, Any]:
        work = Work.of(self.compiled.program(self.batch).captured.function)
        return {"work": asdict(work)}

    def profile(self, steps: int) -> list[dict[str, Any]]:
        """Milliseconds a step by instruction: name, what it is for, calls and time; slowest first.

        A kernel is named by the ops that it carries out, a library call by its op, product sizes
        with it. Timing each instruction adds a few microseconds to it.
        """
        program = self.compiled.program(self.batch)
        tensors = [t for t in self.batch if isinstance(t, torch.Tensor)]
        seen: list[Timing] = []
        executor = Executor(program.executable, seen.append)
        for _ in range(steps):
            executor.run(self.compiled.bind(program.captured, tensors))
        return aggregate(program.executable.instructions, seen, steps)


def aggregate(instructions: Any, timings: list[Timing], steps: int) -> list[dict[str, Any]]:
    """Timings of whole steps, summed over equal descriptions of instructions."""
    seconds: dict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    for index, timing in enumerate(timings):
        name = describe(instructions[index % len(instructions)])
        seconds[name] += timing.seconds
        calls[name] += 1
    rows = sorted(seconds.items(), key=lambda item: -item[1])
    return [{"name": name, "calls": calls[name] / steps, "ms": 1e3 * s / steps} for name, s in rows]


def describe(instruction: Any) -> str:
    """What an instruction does: op or ops, and sizes; a kernel's operands are flat."""
    ops: tuple[str, ...] | None = getattr(instruction, "ops", None)
    if ops is None:
        return f"{short(instruction.name)} {sizes(instruction.regions)}"
    counted = Counter(map(short, ops)).most_common()
    parts = [name if n == 1 else f"{n} {name}" for name, n in counted[:NAMED_OPS]]
    left = len(counted) - len(parts)
    more = f" and {left} more" if left else ""
    results = [v.type for v in instruction.results]
    return f"kernel of {', '.join(parts)}{more} {sizes(instruction.regions)} -> {sizes(results)}"


def sizes(tensors: Sequence[Any]) -> str:
    """The first three: `[2048,384] [384,1536] [2048,1536]`."""
    return " ".join(f"[{','.join(map(str, t.shape))}]" for t in tensors[:3])


def short(op: str) -> str:
    """`aten.mm.default` -> `mm`."""
    pieces = op.split(".")
    return pieces[1] if len(pieces) > 1 else op
