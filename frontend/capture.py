"""Captures a model, its loss and its optimizer as one function.

The user's code runs once, as it is, under the tracer: forward, `loss.backward()`, then the update
rule of the optimizer. The model's own tensors are met on the way and become parameters, so what
the code refers to in whatever way (tied weights, `_flat_weights`, closures) is found.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from shoestring.ir import Function, Param, Phase, Role, Tracer, Value, type_of
from shoestring.ir.errors import CaptureError, ShoestringError
from shoestring.ir.tracing.sparse import touched_rows
from shoestring.ir.tracing.tracer import CALLED_AS, memory_of

from .bindings import (
    BatchBinding,
    Binding,
    CountBinding,
    FirstBinding,
    HyperBinding,
    MomentBinding,
    StateBinding,
)
from .embedding import PaddedEmbeddings, has_padded_embeddings
from .intact import Attributes, Carried, NoPeeking, no_hidden_randomness
from .library import traceable_library
from .modules import module_paths
from .optimizers import rule_of, static_value
from .optimizers.tracing import Updates
from .pytree import leaves, map_leaves

LossFn = Callable[..., Any]


@dataclass
class Captured:
    """A function and where each of its parameters comes from.

    Attributes:
        function: the program.
        bindings: one a parameter, in order.
        outputs: a tree like what the user's function returned, an output's index at each tensor.
        static: (group, fact) -> value that the program was specialized to.
        gradients: path -> accumulated gradient, where the step accumulates.
        trained: (group, parameter) that have a gradient, and so a state in the optimizer.
    """

    function: Function
    bindings: list[Binding]
    outputs: Any
    static: dict[tuple[int, str], Any] = field(default_factory=dict[tuple[int, str], Any])
    gradients: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    trained: list[tuple[int, torch.Tensor]] = field(default_factory=list[tuple[int, torch.Tensor]])


@dataclass(frozen=True)
class StepOptions:
    """What a training step does beside forward, backward and update.

    Attributes:
        clip_grad_norm: largest global 2-norm of the gradients; None leaves them.
        clip_grad_value: largest absolute value of a gradient's element.
        accumulate: micro-batches per update; their gradients are averaged.
        update: whether this program ends with the update (the last micro-batch).
    """

    clip_grad_norm: float | None = None
    clip_grad_value: float | None = None
    accumulate: int = 1
    update: bool = True


class _Names:
    """Who a tensor is, by identity."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        self.table: dict[int, tuple[Role, str]] = {}
        self.memory: dict[Any, tuple[Role, str]] = {}
        self.unknown = 0
        for role, named in (
            (Role.PARAMETER, model.named_parameters()),
            (Role.BUFFER, model.named_buffers()),
        ):
            for path, tensor in named:
                self.table.setdefault(id(tensor), (role, path))
                self.memory.setdefault(memory_of(tensor), (role, path))
        for i, group in enumerate(optimizer.param_groups if optimizer else ()):
            for j, p in enumerate(group["params"]):
                self.table.setdefault(id(p), (Role.PARAMETER, f"#group{i}.params.{j}"))

    def anew(self) -> _Names:
        """The same names for another capture, which counts its own constants."""
        other = copy.copy(self)
        other.unknown = 0
        return other

    def __call__(self, tensor: torch.Tensor) -> tuple[Role, str]:
        if id(tensor) in self.table:
            return self.table[id(tensor)]
        if memory_of(tensor) in self.memory:  # `weight.data`, kept from before the capture
            return self.memory[memory_of(tensor)]
        self.unknown += 1
        return Role.CONSTANT, f"#constant.{self.unknown - 1}"


def capture_step(
    model: torch.nn.Module,
    loss_fn: LossFn,
    optimizer: torch.optim.Optimizer,
    batch: Sequence[Any],
    options: StepOptions = StepOptions(),
) -> Captured:
    """The whole training step.

    Args:
        model: as written; its mode (train or eval), frozen parameters and hooks are respected.
        loss_fn: `loss_fn(model, *batch)` gives a scalar loss, or (loss, {name: metric}).
        optimizer: of `torch.optim`; its state is looked at and neither made nor written.
        batch: example arguments; their sizes and types count, their values do not.
        options: clipping and accumulation.

    Raises:
        CaptureError: SS1xxx with the user's file and line.
    """
    rule_of(optimizer)
    names = _Names(model, optimizer)

    def capture(carried: Carried | None) -> tuple[Captured, Carried]:
        session = _Session("step", model, optimizer, names.anew(), carried)
        captured = _capture_step(session, loss_fn, optimizer, batch, options)
        return captured, session.attributes.carried

    return _repeatable(capture)


def _capture_step(
    session: _Session,
    loss_fn: LossFn,
    optimizer: torch.optim.Optimizer,
    batch: Sequence[Any],
    options: StepOptions,
) -> Captured:
    model = session.model
    with session.running():
        arguments = session.batch(batch)
        _refuse_signature(loss_fn, model, arguments)
        loss, metrics = _split_loss(loss_fn(model, *arguments))
        session.tracer.locator.phase = Phase.BACKWARD
        grads = session.gradients(loss, optimizer, options)
        session.tracer.locator.phase = Phase.UPDATE
        if options.accumulate > 1:
            grads = session.accumulate(grads, options)
        if options.update:
            session.update(optimizer, _clip(grads, options))
        session.attributes.settle(session.tracer)
        outputs = [("loss", loss.detach()), *((k, v.detach()) for k, v in metrics.items())]
        function = session.tracer.finish(outputs)
    return session.captured(function, [name for name, _ in outputs])


def capture_forward(model: torch.nn.Module, inputs: Sequence[Any]) -> Captured:
    """The forward pass alone, without gradients; outputs of any nesting."""
    names = _Names(model, None)

    def capture(carried: Carried | None) -> tuple[Captured, Carried]:
        session = _Session("forward", model, None, names.anew(), carried)
        return _capture_forward(session, inputs), session.attributes.carried

    return _repeatable(capture)


def _repeatable(capture: Callable[[Carried | None], tuple[Captured, Carried]]) -> Captured:
    """What is captured, if the next call would be the same program."""
    first, carried = capture(None)
    if carried.values:
        with carried.in_place():
            second, _ = capture(carried)
        carried.refuse_other(first.function, second.function)
    return first


def _capture_forward(session: _Session, inputs: Sequence[Any]) -> Captured:
    model = session.model
    with session.running(), torch.no_grad():
        result = model(*session.batch(inputs))
        found = [(p, t) for p, t in leaves(result) if isinstance(t, torch.Tensor)]
        counter = iter(range(len(found)))
        tree = map_leaves(
            lambda t: OutputIndex(next(counter)) if isinstance(t, torch.Tensor) else t, result
        )
        session.attributes.settle(session.tracer)
        named = [(f"out{i}", t) for i, (_, t) in enumerate(found)]
        function = session.tracer.finish(named)
    return session.captured(function, tree)


class OutputIndex:
    """Stands for the n-th output in a tree of results. Not a dataclass: it is a leaf."""

    def __init__(self, index: int) -> None:
        self.index = index


class _Session:
    """One capture in progress."""

    def __init__(
        self,
        name: str,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer | None,
        names: _Names,
        carried: Carried | None,
    ) -> None:
        self.model = model
        self.attributes = Attributes(model, carried)
        self.names = names
        self.without_history: list[torch.Tensor] = []
        self.tracer = Tracer(name, self._adopt, _user_fake_mode(model))
        self.bindings: dict[str, Binding] = {}
        self.static: dict[tuple[int, str], Any] = {}
        self.accumulated: dict[str, torch.Tensor] = {}
        self.touched: dict[torch.Tensor, torch.Tensor] = {}
        self.trained: list[tuple[int, torch.Tensor]] = []
        groups = optimizer.param_groups if optimizer else []
        self.optimized: list[torch.Tensor] = [p for group in groups for p in group["params"]]

    @contextmanager
    def running(self) -> Iterator[None]:
        """The user's code runs in here: traced, its own random state and gradients untouched."""
        parameters = list(dict.fromkeys([*self.model.parameters(), *self.optimized]))
        saved = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        try:
            with (
                torch.random.fork_rng(devices=[]),
                no_hidden_randomness(),
                traceable_library(),
                module_paths(self.model, self.tracer),
                self.tracer,
                NoPeeking(self.tracer),
                self._padded_embeddings(),
            ):
                yield
        except ShoestringError:
            raise
        except Exception as error:
            if self.tracer.is_ours(error):
                raise
            raise self.tracer.refusal_of(error) from error
        finally:
            self.attributes.restore()
            self.drop_histories()
            for p, grad in zip(parameters, saved, strict=True):
                p.grad = grad

    def _adopt(self, tensor: torch.Tensor) -> tuple[Role, str]:
        if tensor.grad_fn is None and not tensor._is_view():
            self.without_history.append(tensor)
        return self.names(tensor)

    def drop_histories(self) -> None:
        """Autograd ties what is written in place to the traced step; the user's tensor stays free.

        Tensors that were tied to something before the capture are left alone.
        """
        for tensor in self.without_history:
            if tensor.grad_fn is not None:
                self.attributes.with_history.append(tensor)
                tensor.detach_()

    def _padded_embeddings(self) -> AbstractContextManager[Any]:
        found = has_padded_embeddings(self.model)
        return PaddedEmbeddings(self.tracer) if found else nullcontext()

    def batch(self, batch: Sequence[Any]) -> list[Any]:
        """The batch with a tensor without data in place of each tensor."""
        paths = iter([path for path, _ in leaves(list(batch), "#batch")])
        index = 0

        def replace(leaf: Any) -> Any:
            nonlocal index
            path = next(paths)
            if not isinstance(leaf, torch.Tensor):
                return leaf
            self.bindings[path] = BatchBinding(index)
            index += 1
            return self.tracer.input(
                type_of(leaf), Role.BATCH, path, requires_grad=leaf.requires_grad, like=leaf
            )

        return [map_leaves(replace, item) for item in batch]

    def gradients(
        self, loss: torch.Tensor, optimizer: torch.optim.Optimizer, options: StepOptions
    ) -> dict[torch.Tensor, torch.Tensor]:
        """Parameter -> gradient, for each parameter of the optimizer that has one."""
        if options.accumulate > 1:
            loss = loss / options.accumulate
        for p in self.optimized:
            p.grad = None
        loss.backward()
        grads = {p: p.grad for p in self.optimized if p.is_leaf and p.grad is not None}
        for p in self.optimized:
            p.grad = None
        groups = enumerate(optimizer.param_groups)
        self.trained = [(i, p) for i, group in groups for p in group["params"] if p in grads]
        masks = {p: touched_rows(self.tracer, grad) for p, grad in grads.items()}
        self.touched = {p: mask for p, mask in masks.items() if mask is not None}
        if self.touched and options.accumulate > 1:
            path = self.names(next(iter(self.touched)))[1]
            what = f"gradients are accumulated dense, that of {path!r} is sparse"
            raise CaptureError("SS1206", what, hint="build its module with sparse=False")
        return grads

    def accumulate(
        self, grads: dict[torch.Tensor, torch.Tensor], options: StepOptions
    ) -> dict[torch.Tensor, torch.Tensor]:
        """Adds to the gradients kept so far; the last micro-batch leaves them at zero."""
        totals: dict[torch.Tensor, torch.Tensor] = {}
        for p, grad in grads.items():
            path = f"{self.names(p)[1]}#grad"
            kept = p
            if not isinstance(p, FakeTensor):
                with self.tracer.untraced():
                    kept = torch.zeros_like(p, requires_grad=False)
            self.accumulated[path] = kept
            self.bindings[path] = kept
            sofar = self.tracer.input(type_of(p), Role.GRADIENT, path)
            total = sofar + grad
            sofar.copy_(torch.zeros_like(total) if options.update else total)
            totals[p] = total
        return totals

    def update(
        self, optimizer: torch.optim.Optimizer, grads: Mapping[torch.Tensor, torch.Tensor]
    ) -> None:
        updates = Updates(self.tracer, optimizer, lambda p: self.names(p)[1])
        with torch.no_grad():
            updates.trace(grads, self.touched)
        self.bindings.update(updates.bindings)
        self.static.update(updates.static)

    def captured(self, function: Function, outputs: Any) -> Captured:
        self._refuse_overlaps(function)
        self._refuse_histories(function)
        bindings: list[Binding] = []
        for p, tensor in zip(function.params, self.tracer.bound, strict=True):
            if p.path in self.bindings:
                bindings.append(self.bindings[p.path])
            else:
                assert tensor is not None or p.role is Role.RNG
                bindings.append(tensor if tensor is not None else torch.zeros(2, dtype=torch.int64))
        static, accumulated, trained = self.static, self.accumulated, self.trained
        return Captured(function, bindings, outputs, static, accumulated, trained)

    def _refuse_overlaps(self, function: Function) -> None:
        """State that shares memory with what is written has no order of reads and writes."""
        pairs = zip(function.params, self.tracer.bound, strict=True)
        real = [(p, t) for p, t in pairs if t is not None and t.numel()]
        spans: dict[int, list[tuple[int, int, Param]]] = {}
        for p, t in real:
            begin = int(t.storage_offset()) * t.itemsize
            reach = int(sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)))
            end = begin + (reach + 1) * t.itemsize
            spans.setdefault(t.untyped_storage()._cdata, []).append((begin, int(end), p))
        for group in spans.values():
            for (a, b, p), (c, d, q) in itertools.combinations(group, 2):
                if a < d and c < b and (p.next is not None or q.next is not None):
                    what = f"{p.path!r} and {q.path!r} share memory, and one of them is written"
                    hint = "use one tensor under both names, or give one of them its own memory"
                    raise CaptureError("SS1018", what, hint=hint)

    def _refuse_histories(self, function: Function) -> None:
        """In eager mode a gradient would flow through such state into the step before."""
        tied = {id(t) for t in self.attributes.with_history}
        pairs = zip(function.params, self.tracer.bound, strict=True)
        written = [p for p, t in pairs if id(t) in tied and p.next is not None]
        read = _trained_through(function) if written else set[Value]()
        for p in written:
            if p.value in read:
                what = f"{p.path!r} takes a gradient from one step into the next"
                where = next((str(op.loc) for op in function.ops if p.next in op.results), "")
                hint = "write to it under torch.no_grad(), or write a detached value"
                raise CaptureError("SS1020", what, where, hint)


def _trained_through(function: Function) -> set[Value]:
    """Values from which a gradient of the loss may flow on: the loss hangs on them smoothly."""
    found = {o.value for o in function.outputs if o.name == "loss"}
    for op in reversed(function.ops):
        if found.intersection(op.results):
            found.update(v for v in op.inputs if _has_gradient(v))
    return found


def _has_gradient(v: Value) -> bool:
    return v.type.dtype.is_floating_point or v.type.dtype.is_complex


def _refuse_signature(loss_fn: LossFn, model: torch.nn.Module, batch: Sequence[Any]) -> None:
    """Refuses a function that takes other arguments, such as `loss_fn(output, target)`."""
    try:
        inspect.signature(loss_fn).bind(model, *batch)
    except TypeError as error:
        what = f"the loss function takes other arguments than the model and the batch: {error}"
        raise CaptureError("SS1004", what, "", CALLED_AS) from error
    except ValueError:
        return  # built in, without a signature


def _split_loss(result: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A loss function's result as (loss, metrics).

    Raises:
        CaptureError: SS1101 where the loss is not one number that depends on a parameter.
    """
    metrics: dict[str, torch.Tensor] = {}
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict):  # pyright: ignore
        result, metrics = result  # pyright: ignore[reportUnknownVariableType]
    if not isinstance(result, torch.Tensor):
        what = f"loss_fn must return a tensor or (tensor, metrics), found {type(result).__name__}"  # pyright: ignore
        raise CaptureError("SS1101", what)
    if result.numel() != 1:
        what = f"the loss must be one number, found a tensor of shape {tuple(result.shape)}"
        raise CaptureError("SS1101", what, hint="reduce it, for example with .mean()")
    if not result.requires_grad:
        what = "the loss does not depend on any parameter that requires a gradient"
        raise CaptureError("SS1102", what, hint="check requires_grad and torch.no_grad()")
    for name, value in metrics.items():
        if not isinstance(value, torch.Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise CaptureError("SS1103", f"the metric {name!r} must be a tensor")
    return result, metrics


def _clip(
    grads: dict[torch.Tensor, torch.Tensor], options: StepOptions
) -> dict[torch.Tensor, torch.Tensor]:
    """As `torch.nn.utils.clip_grad_value_` and then `clip_grad_norm_` do."""
    if options.clip_grad_value is not None:
        limit = options.clip_grad_value
        grads = {p: g.clamp(-limit, limit) for p, g in grads.items()}
    if options.clip_grad_norm is not None and grads:
        norms = [torch.linalg.vector_norm(g) for g in grads.values()]
        total = torch.linalg.vector_norm(torch.stack(norms))
        scale = torch.clamp(options.clip_grad_norm / (total + 1e-6), max=1.0)
        grads = {p: g * scale for p, g in grads.items()}
    return grads


def _user_fake_mode(model: torch.nn.Module) -> FakeTensorMode | None:
    """The mode under which a model without data was built, if it was."""
    for tensor in (*model.parameters(), *model.buffers()):
        if isinstance(tensor, FakeTensor):
            return tensor.fake_mode
    return None


__all__ = [
    "BatchBinding",
    "Binding",
    "Captured",
    "CountBinding",
    "FirstBinding",
    "HyperBinding",
    "MomentBinding",
    "OutputIndex",
    "StateBinding",
    "StepOptions",
    "capture_forward",
    "capture_step",
    "static_value",
]
