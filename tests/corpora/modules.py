"""PyTorch's own module samples (ModuleInfo) as a corpus: whole training steps against eager.

A module is put into a `Probe`, which makes parameters of the inputs that require gradients, so that
one step of plain SGD shows every gradient. The step is captured by the frontend.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.testing._internal.common_modules import module_db
from torch.utils import _pytree as pytree

from shoestring.frontend.capture import BatchBinding, HyperBinding, capture_step
from shoestring.ir.errors import CaptureError, ShoestringError

from .opinfo import Captured, Case, Runner, Tolerance, Verdict, check_text, compare

RATE = 0.5


class Probe(torch.nn.Module):
    """A module with its inputs: those that require gradients are parameters."""

    def __init__(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        super().__init__()
        self.module = module
        flat, self.spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
        self.leaves = [_own(leaf) for leaf in flat]
        self.given: list[torch.Tensor] = []
        for i, leaf in enumerate(self.leaves):
            if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
                self.register_parameter(f"input{i}", torch.nn.Parameter(leaf.detach().clone()))
            elif isinstance(leaf, torch.Tensor):
                self.given.append(leaf)

    def forward(self, *batch: torch.Tensor) -> Any:
        rest = iter(batch)

        def leaf(i: int, old: Any) -> Any:
            if not isinstance(old, torch.Tensor):
                return old
            return getattr(self, f"input{i}") if old.requires_grad else next(rest)

        leaves = [leaf(i, old) for i, old in enumerate(self.leaves)]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return self.module(*args, **kwargs)


def _own(leaf: Any) -> Any:
    """A tensor without a history, which can be copied."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return leaf.detach().requires_grad_(leaf.requires_grad)


def loss(probe: Probe, *batch: torch.Tensor) -> torch.Tensor:
    """All differentiable results with fixed weights, as one number."""
    total = torch.zeros(())
    for result in pytree.tree_leaves(probe(*batch)):
        if isinstance(result, torch.Tensor) and result.requires_grad:
            weights = torch.arange(1, result.numel() + 1, dtype=torch.float32).sin()
            total = total + (result.float() * weights.reshape(result.shape)).sum()
    return total


def modules() -> list[Any]:
    """Every ModuleInfo, in PyTorch's order."""
    return list(module_db)


def probes(info: Any, training: bool, limit: int | None = None) -> Iterator[Probe]:
    """The module's samples, always the same."""
    torch.default_generator.manual_seed(0)
    samples = info.module_inputs_func(
        info, device="cpu", dtype=torch.float32, requires_grad=True, training=training
    )
    for index, sample in enumerate(samples):
        if limit is not None and index >= limit:
            return
        if sample.forward_input is None:
            continue
        build, given = sample.constructor_input, sample.forward_input
        torch.default_generator.manual_seed(index)
        module = info.module_cls(*build.args, **build.kwargs).train(training)
        if any(is_lazy(p) for p in (*module.parameters(), *module.buffers())):
            module(*given.args, **given.kwargs)  # makes the parameters
        yield Probe(module, given.args, given.kwargs).train(training)


def capture(label: str, probe: Probe) -> Captured | None:
    """The module's training step; None where eager PyTorch itself fails on it.

    Raises:
        CaptureError: where shoestring refuses it.
    """
    eager = copy.deepcopy(probe)
    torch.default_generator.manual_seed(1)
    try:
        expected = loss(eager, *probe.given)
        expected.backward()
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        return None
    torch.optim.SGD(eager.parameters(), lr=RATE).step()
    torch.default_generator.manual_seed(1)
    optimizer = torch.optim.SGD(probe.parameters(), lr=RATE)
    found = capture_step(probe, loss, optimizer, tuple(probe.given))
    arguments = [
        _bound(binding, probe)
        for p, binding in zip(found.function.params, found.bindings, strict=True)
        if p.path != "#rng"
    ]
    after = {**dict(eager.named_parameters()), **dict(eager.named_buffers())}
    written = {
        p.path: after[p.path].detach()
        for p in found.function.params
        if p.next is not None and p.path != "#rng"
    }
    case = Case(label, probe, [], lambda _: ((), {}))
    return Captured(case, found.function, arguments, [expected.detach()], written)


def _bound(binding: Any, probe: Probe) -> torch.Tensor:
    if isinstance(binding, HyperBinding):
        return torch.tensor(RATE, dtype=torch.float64)
    if isinstance(binding, BatchBinding):
        return probe.given[binding.index].detach().clone()
    assert isinstance(binding, torch.Tensor)
    return binding.detach().clone()


def check_module(
    info: Any, run: Runner, limit: int | None, tolerance: Tolerance, *, text: bool = True
) -> Verdict:
    """Captures and compares a module's samples in both modes."""
    verdict = Verdict(info.formatted_name)
    ready: list[Captured] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for training in (True, False):
            for index, probe in enumerate(probes(info, training, limit)):
                label = f"{info.formatted_name}[{index}] {'train' if training else 'eval'}"
                ready += attempt(label, probe, verdict, text=text)
        for start in range(0, len(ready), 50):
            compare(ready[start : start + 50], run, tolerance, verdict)
    return verdict


def attempt(label: str, probe: Probe, verdict: Verdict, *, text: bool) -> Sequence[Captured]:
    """The captured step, or nothing; the verdict says why."""
    verdict.samples += 1
    try:
        captured = capture(label, probe)
    except CaptureError as error:
        verdict.refused.append(f"{label}: [{error.code}] {error.what}")
        return ()
    if captured is None:
        verdict.skipped += 1
        return ()
    if text:
        verdict.texts += 1
        try:
            check_text(captured.function)
        except (AssertionError, ShoestringError) as error:
            verdict.mismatches.append(f"{label}: text: {str(error)[:400]}")
    return (captured,)


def first_refusal(info: Any) -> str:
    """Why the first refused sample of a module is refused; nothing where every one is captured."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for training in (True, False):
            for probe in probes(info, training):
                verdict = Verdict("")
                attempt("", probe, verdict, text=False)
                if verdict.refused:
                    return verdict.refused[0]
    return ""


__all__ = ["Probe", "check_module", "first_refusal", "modules"]
