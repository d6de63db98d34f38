"""A compiled training step and a compiled forward pass: what `shoestring.compile` returns.

Both keep one program per set of input shapes and facts (train or eval mode, frozen parameters,
zero hyper-parameters, autocast) and compile another when they meet a new one, saying so in the log.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from shoestring.backends.base import Backend, Executable
from shoestring.backends.registry import get_backend
from shoestring.frontend.capture import (
    BatchBinding,
    Binding,
    Captured,
    CountBinding,
    FirstBinding,
    HyperBinding,
    MomentBinding,
    OutputIndex,
    StepOptions,
    capture_forward,
    capture_step,
)
from shoestring.frontend.optimizers import lookup, static_value
from shoestring.frontend.pytree import leaves, map_leaves
from shoestring.ir import Function, Role
from shoestring.ir.errors import RuntimeFault, UsageError
from shoestring.passes.pipeline import Pipeline, StepRecord, check

from .kept import Keeper
from .memory import collecting_by_phase
from .moments import Moments
from .report import Report

log = logging.getLogger("shoestring")


@dataclass(frozen=True)
class CompileOptions:
    """How a program is compiled.

    Attributes:
        backend: a name of `shoestring.backends`.
        pipeline: the passes, in order.
        verify: compare the program after each pass with the captured one on the first batch.
    """

    backend: str
    pipeline: Pipeline
    verify: bool = False


@dataclass
class Program:
    """One captured, optimized and compiled function.

    Attributes:
        captured: the function as captured, and where its arguments come from.
        function: after the passes.
        executable: ready to run.
        records: what each pass did.
        seconds: phase of compilation -> seconds.
        kept: whether an earlier compilation left it, so that only the capture was done again.
    """

    captured: Captured
    function: Function
    executable: Executable
    records: list[StepRecord]
    seconds: dict[str, float]
    kept: bool = False


class _Compiled:
    """Programs by key, and the state that they share."""

    def __init__(self, model: torch.nn.Module, options: CompileOptions, seed: int) -> None:
        self.model = model
        self.options = options
        self.rng = torch.tensor([seed, 0], dtype=torch.int64)
        self.gradients: dict[str, torch.Tensor] = {}
        self._numbers: dict[str, tuple[torch.Tensor, Any]] = {}
        self.programs: dict[Any, Program] = {}
        self._backend: Backend = get_backend(options.backend)

    def build(self, capture: Callable[[], Captured], arguments: Any) -> Program:
        """Captures, optimizes and compiles one program."""
        prepare = getattr(self._backend, "prepare", None)
        if prepare is not None:
            prepare()
        with collecting_by_phase() as end_phase:
            return self._build(capture, arguments, end_phase)

    def _build(
        self, capture: Callable[[], Captured], arguments: Any, end_phase: Callable[[], None]
    ) -> Program:
        seconds: dict[str, float] = {}

        def timed(name: str, work: Callable[[], Any]) -> Any:
            start = time.perf_counter()
            result = work()
            end_phase()
            seconds[name] = time.perf_counter() - start
            return result

        pipeline, backend, verify = self.options.pipeline, self._backend, self.options.verify
        captured = timed("capture", capture)
        for path, tensor in captured.gradients.items():
            self.gradients.setdefault(path, tensor)
        before = captured.function
        keeper = None if verify else timed("lookup", lambda: Keeper.of(before, pipeline, backend))
        found = timed("load", keeper.load) if keeper and keeper.path.exists() else None
        if found is not None:
            kept, executable = found
            captured = replace(captured, function=kept.captured)
            return Program(captured, kept.function, executable, kept.records, seconds, True)
        function, records = timed("passes", lambda: pipeline.run(before))
        if verify:
            given = [t.detach().clone() for t in self.bind(captured, arguments)]
            timed("verify", lambda: check(before, given, pipeline.enabled))
        executable = timed(
            "backend",
            lambda: keeper.compile(function, records) if keeper else backend.compile(function),
        )
        return Program(captured, function, executable, records, seconds)

    def bind(self, captured: Captured, batch: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """One tensor for each parameter of the function."""
        pairs = zip(captured.function.params, captured.bindings, strict=True)
        return [self.tensor_of(p.role, p.path, b, batch) for p, b in pairs]

    def tensor_of(
        self, role: Role, path: str, binding: Binding, batch: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        if role is Role.RNG:
            return self.rng
        if role is Role.GRADIENT:
            return self.gradients[path]
        if isinstance(binding, BatchBinding):
            return batch[binding.index]
        assert isinstance(binding, torch.Tensor)
        return binding

    def number(self, path: str, value: Any) -> torch.Tensor:
        """A number as f64[]: the same tensor at each call, so that nothing is bound again."""
        known = self._numbers.get(path)
        if known is not None and known[1] is value and not isinstance(value, torch.Tensor):
            return known[0]
        held = torch.empty((), dtype=torch.float64) if known is None else known[0]
        with torch.no_grad():
            if isinstance(value, torch.Tensor):
                held.copy_(value.reshape(()))
            else:
                held.fill_(value)
        self._numbers[path] = held, value
        return held

    def mode_key(self) -> tuple[Any, ...]:
        """Facts about the model and about torch that a program depends on."""
        return (
            tuple(m.training for m in self.model.modules()),
            tuple((id(p), p.requires_grad, p.dtype) for p in self.model.parameters()),
            torch.is_autocast_enabled("cpu"),
            torch.get_autocast_dtype("cpu"),
            torch.get_default_dtype(),
        )

    def announce(self, batch: Sequence[Any]) -> None:
        """Says that a new program is compiled, and for what."""
        if self.programs:
            shapes = ", ".join(str(s) for s in signature(batch))
            log.warning("compiling again for new inputs or settings: %s", shapes)


class Step(_Compiled):
    """A compiled training step: `loss = step(*batch)` runs forward, backward and update."""

    def __init__(
        self,
        model: torch.nn.Module,
        loss_fn: Callable[..., Any],
        optimizer: torch.optim.Optimizer,
        options: CompileOptions,
        step_options: StepOptions,
        seed: int,
    ) -> None:
        super().__init__(model, options, seed)
        self.loss_fn = loss_fn
        self.optimizer = optimizer
        self.step_options = step_options
        self.calls = 0
        self.moments = Moments(optimizer)
        _refuse_hooks(optimizer)

    def __call__(self, *batch: Any) -> Any:
        """One step.

        Returns:
            The loss, a detached 0-d tensor; (loss, {name: metric}) where `loss_fn` gives metrics.

        Raises:
            CaptureError: SS1xxx, where a new input leads to code that cannot be captured.
        """
        tensors = batch_tensors(batch)
        program = self.program(batch)
        arguments = self.bind(program.captured, tensors)
        outputs = program.executable.run(arguments)
        self.calls += 1
        self.moments.updated(program.captured.bindings)
        # What torch.optim.lr_scheduler looks at before it warns of a wrong order of calls.
        self.optimizer._opt_called = True  # type: ignore[attr-defined]
        names: list[str] = program.captured.outputs
        if len(outputs) == 1:
            return outputs[0]
        return outputs[0], dict(zip(names[1:], outputs[1:], strict=True))

    def program(self, batch: Sequence[Any]) -> Program:
        """The program for this batch, compiled now if there is none yet."""
        accumulate = self.step_options.accumulate
        update = (self.calls + 1) % accumulate == 0
        key = (signature(batch), update, self.mode_key(), self._optimized())
        program = self.programs.get(key)
        if program is not None and self._still_valid(program):
            return program
        self.announce(batch)
        options = replace(self.step_options, update=update)
        program = self.build(
            lambda: capture_step(self.model, self.loss_fn, self.optimizer, batch, options),
            batch_tensors(batch),
        )
        self.programs[key] = program
        return program

    def bytes_to_come(self, batch: Sequence[Any]) -> int | None:
        """What the first step with this batch adds to the memory of the process, in bytes.

        The arena, which no step has touched yet, state that the optimizer does not have yet, and
        what library calls take beside the arena; None where the backend does not say.
        """
        program = self.program(batch)
        own: int | None = getattr(program.executable, "unbound_bytes", None)
        return None if own is None else own + self.moments.missing_bytes(program.captured.bindings)

    def tensor_of(
        self, role: Role, path: str, binding: Binding, batch: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        if isinstance(binding, HyperBinding):
            group: Mapping[str, Any] = self.optimizer.param_groups[binding.group]
            return self.number(path, lookup(group, binding.name))
        if isinstance(binding, MomentBinding):
            moment: torch.Tensor = self.moments.entry(binding)
            return moment
        if isinstance(binding, CountBinding):
            return self.number(path, self.moments.entry(binding))
        if isinstance(binding, FirstBinding):
            return self.number(path, self.moments.is_new(binding))
        return super().tensor_of(role, path, binding, batch)

    def _still_valid(self, program: Program) -> bool:
        groups, captured = self.optimizer.param_groups, program.captured
        facts = captured.static.items()
        return all(
            static_value(groups[index], name) == value for (index, name), value in facts
        ) and self.moments.have_types_of(captured.bindings)

    def _optimized(self) -> tuple[Any, ...]:
        """Which parameters the optimizer has, group by group: groups may be added."""
        groups = self.optimizer.param_groups
        return tuple(tuple((id(p), p.requires_grad) for p in g["params"]) for g in groups)

    def report(self) -> Report:
        """What was captured, what every pass did, memory and times, of the last program."""
        if not self.programs:
            raise RuntimeFault("SS5011", "nothing is compiled yet, so there is nothing to report")
        program = list(self.programs.values())[-1]
        return Report.of(program)

    def state_tensors(self) -> dict[str, torch.Tensor]:
        """Every state tensor by role and path: the live storages, not copies."""
        for program in self.programs.values():
            self.moments.make(program.captured.trained)
        return dict(self._state())

    def _state(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, p in self.model.named_parameters():
            yield f"parameter/{name}", p.detach()
        for name, b in self.model.named_buffers():
            yield f"buffer/{name}", b
        names = {id(p): name for name, p in self.model.named_parameters()}
        for index, group in enumerate(self.optimizer.param_groups):
            for j, p in enumerate(group["params"]):
                owner = names.get(id(p), f"#group{index}.params.{j}")
                for key, value in self.optimizer.state.get(p, {}).items():
                    if isinstance(value, torch.Tensor):
                        yield f"moment/{owner}#{key}", value
        for path, tensor in self.gradients.items():
            yield f"gradient/{path}", tensor
        yield "rng/#rng", self.rng

    def extra_state(self) -> dict[str, Any]:
        """What else a resumed run needs, as plain values."""
        return {"calls": self.calls, "counts": self.moments.counts()}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Takes back what `extra_state` gave."""
        self.calls = int(state["calls"])
        self.moments.load_counts(state.get("counts", []))
        if self.calls >= self.step_options.accumulate:
            self.moments.updated([])


class Inference(_Compiled):
    """A compiled forward pass: `outputs = infer(*inputs)`."""

    def __init__(self, model: torch.nn.Module, options: CompileOptions, seed: int) -> None:
        super().__init__(model, options, seed)

    def __call__(self, *inputs: Any) -> Any:
        """What the model returns for these inputs, without gradients."""
        program = self.program(inputs)
        outputs = program.executable.run(self.bind(program.captured, batch_tensors(inputs)))

        def fill(leaf: Any) -> Any:
            return outputs[leaf.index] if isinstance(leaf, OutputIndex) else leaf

        return map_leaves(fill, program.captured.outputs)

    def program(self, inputs: Sequence[Any]) -> Program:
        """The program for these inputs, compiled now if there is none yet."""
        key = (signature(inputs), self.mode_key())
        if key not in self.programs:
            self.announce(inputs)
            self.programs[key] = self.build(
                lambda: capture_forward(self.model, inputs), batch_tensors(inputs)
            )
        return self.programs[key]

    def report(self) -> Report:
        """What was captured, what every pass did, memory and times, of the last program."""
        return Report.of(list(self.programs.values())[-1])


def batch_tensors(batch: Sequence[Any]) -> list[torch.Tensor]:
    """The tensors of a batch, in the order of capture."""
    return [leaf for _, leaf in leaves(list(batch)) if isinstance(leaf, torch.Tensor)]


def signature(batch: Sequence[Any]) -> tuple[Any, ...]:
    """What a program depends on of its inputs: sizes and types of tensors, all else by value.

    Strides count where they are not those of row-major order: with them the same code may copy
    where it would make a view, and then write elsewhere.
    """
    return tuple((path, _fact(leaf)) for path, leaf in leaves(list(batch)))


def _fact(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        fact = (tuple(leaf.shape), leaf.dtype, leaf.requires_grad)
        return fact if leaf.is_contiguous() else (*fact, leaf.stride())
    if leaf is None or isinstance(leaf, (bool, int, float, str)):
        return (type(leaf), leaf)
    return id(leaf)


def _refuse_hooks(optimizer: torch.optim.Optimizer) -> None:
    hooks = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
    if any(getattr(optimizer, name, None) for name in hooks):
        raise UsageError(
            "SS7010",
            "the optimizer has step hooks, which a compiled step does not call",
            hint="remove them and run their code around step(...)",
        )
