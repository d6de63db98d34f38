"""Traces the update of every parameter of an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from shoestring.ir import Recording, Role, TensorType, Tracer, type_of
from shoestring.ir.errors import CaptureError

from ..bindings import Binding, CountBinding, FirstBinding, HyperBinding, MomentBinding
from . import rule_of
from .rule import Hyper, Rule, State, lookup

NUMBER = TensorType(torch.float64, ())


@dataclass
class Updates:
    """The updates of one program.

    Attributes:
        tracer: which records them.
        optimizer: whose rule and groups count; its state is looked at, not made.
        path_of: the qualified name of a parameter.
        bindings: path -> source, of each program input made here.
        static: (group, fact) -> value that the updates were specialized to.
    """

    tracer: Tracer
    optimizer: torch.optim.Optimizer
    path_of: Callable[[torch.Tensor], str]
    bindings: dict[str, Binding] = field(default_factory=dict[str, Binding])
    static: dict[tuple[int, str], Any] = field(default_factory=dict[tuple[int, str], Any])

    def trace(
        self,
        grads: Mapping[torch.Tensor, torch.Tensor],
        touched: Mapping[torch.Tensor, torch.Tensor],
    ) -> None:
        """Updates each parameter that has a gradient, as the optimizer's `step` does.

        Args:
            grads: parameter -> gradient.
            touched: parameter -> bool[rows], where the gradient is sparse.

        Raises:
            CaptureError: SS1203 to SS1205 for what the rule does not take.
        """
        rule = rule_of(self.optimizer)
        for index, group in enumerate(self.optimizer.param_groups):
            hyper = Hyper(group, self._numbers(index, group))
            known: dict[object, Recording] = {}
            for p in group["params"]:
                if p not in grads:
                    continue
                mask = touched.get(p)
                self._check(rule, p, group, sparse=mask is not None)
                first = self._first(p, index)
                own = Hyper(group, hyper.tensor, hyper.static, first, mask)
                self._update(rule, p, grads[p], self._state(rule, p, index), own, known)
            self.static.update({(index, k): v for k, v in hyper.static.items()})

    def _update(
        self,
        rule: Rule,
        p: torch.Tensor,
        grad: torch.Tensor,
        state: State,
        hyper: Hyper,
        known: dict[object, Recording],
    ) -> None:
        """Updates one parameter: as one before it, where their sizes and types are the same."""
        tensors = [p, grad, *state.values()]
        key = self.tracer.layouts(tensors) if hyper.touched is None else None
        if key in known:
            self.tracer.replay(known[key], tensors)
            return
        made = self.tracer.record(tensors, lambda: rule.update(p, grad, state, hyper))
        if key is not None and made is not None:
            known[key] = made

    def _check(
        self, rule: Rule, p: torch.Tensor, group: Mapping[str, Any], *, sparse: bool
    ) -> None:
        name, path = type(self.optimizer).__name__, self.path_of(p)
        if p.is_complex():
            what = f"{name} updates real parameters only, found {path!r} of type {p.dtype}"
            raise CaptureError("SS1203", what, hint="keep its real and imaginary parts apart")
        reason = rule.refuses_sparse(group) if sparse else ""
        if reason:
            what = f"{name} cannot take the sparse gradient of {path!r}: {reason}"
            raise CaptureError("SS1204", what, hint="build its module with sparse=False")
        if rule.needs_sparse and not sparse:
            what = f"{name} takes sparse gradients only, that of {path!r} is dense"
            raise CaptureError("SS1205", what, hint="use Adam for it, or sparse=True in its module")

    def _numbers(self, index: int, group: Mapping[str, Any]) -> Callable[[str], torch.Tensor]:
        made: dict[str, torch.Tensor] = {}

        def tensor(name: str) -> torch.Tensor:
            if name not in made:
                lookup(group, name)
                made[name] = self._number(f"#group{index}.{name}", HyperBinding(index, name))
            return made[name]

        return tensor

    def _first(self, p: torch.Tensor, index: int) -> Callable[[str], torch.Tensor]:
        def tensor(key: str) -> torch.Tensor:
            return self._number(f"#first.{self.path_of(p)}#{key}", FirstBinding(p, index, key))

        return tensor

    def _number(self, path: str, binding: Binding) -> torch.Tensor:
        self.bindings[path] = binding
        return self.tracer.input(NUMBER, Role.HYPER, path)

    def _state(self, rule: Rule, p: torch.Tensor, index: int) -> State:
        """The parameter's optimizer state as program inputs.

        What is not there yet is made at the first call and not here, since it may depend on a
        hyper-parameter that a scheduler sets in between.
        """
        group = self.optimizer.param_groups[index]
        with self.tracer.untraced():
            initial = rule.init(torch.empty_like(p, device="meta", requires_grad=False), group)
        present = self.optimizer.state.get(p, {})
        state: State = {}
        for key, made in initial.items():
            path = f"{self.path_of(p)}#{key}"
            if not isinstance(made, torch.Tensor):
                state[key] = self._number(f"#count.{path}", CountBinding(p, index, key))
                continue
            kept = present.get(key)
            type_ = type_of(made if kept is None else kept)
            self.bindings[path] = MomentBinding(p, index, key, type_.dtype, type_.nbytes)
            state[key] = self.tracer.input(type_, Role.MOMENT, path)
        return state
