"""`shoestring.compile`: from a PyTorch model to a compiled training step or forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

import torch

from shoestring.frontend.capture import StepOptions
from shoestring.ir.errors import UsageError
from shoestring.passes.base import Pass
from shoestring.passes.pipeline import Pipeline
from shoestring.passes.registry import default_pipeline
from shoestring.runtime.step import CompileOptions, Inference, Step


@overload
def compile(
    model: torch.nn.Module,
    loss_fn: Callable[..., Any],
    optimizer: torch.optim.Optimizer,
    example_batch: Sequence[Any],
    *,
    backend: str = ...,
    precision: str = ...,
    passes: Sequence[Pass] | None = ...,
    disable_passes: Sequence[str] = ...,
    verify: bool = ...,
    seed: int = ...,
    accumulate: int = ...,
    clip_grad_norm: float | None = ...,
    clip_grad_value: float | None = ...,
) -> Step: ...


@overload
def compile(
    model: torch.nn.Module,
    *,
    example_inputs: Sequence[Any],
    backend: str = ...,
    precision: str = ...,
    passes: Sequence[Pass] | None = ...,
    disable_passes: Sequence[str] = ...,
    verify: bool = ...,
    seed: int = ...,
) -> Inference: ...


def compile(
    model: torch.nn.Module,
    loss_fn: Callable[..., Any] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    example_batch: Sequence[Any] | None = None,
    *,
    example_inputs: Sequence[Any] | None = None,
    backend: str = "c",
    precision: str = "fp32",
    passes: Sequence[Pass] | None = None,
    disable_passes: Sequence[str] = (),
    verify: bool = False,
    seed: int = 0,
    accumulate: int = 1,
    clip_grad_norm: float | None = None,
    clip_grad_value: float | None = None,
) -> Step | Inference:
    """A compiled training step, or with `example_inputs` a compiled forward pass.

    The step shares the storage of the model and of the optimizer: `model.state_dict()` and
    `optimizer.state_dict()` are always current.

    Args:
        model: any module, as written.
        loss_fn: `loss_fn(model, *batch)` gives a scalar loss, or (loss, {name: metric}).
        optimizer: of `torch.optim`; learning rates are read from it at each call.
        example_batch: a tuple of arguments for `loss_fn`; the values do not matter.
        example_inputs: a tuple of arguments for `model`, for a forward pass without gradients.
        backend: `c` (host CPU), `reference` (the interpreter), or a registered one.
        precision: `fp32`; or `bf16`, which rounds operands and results of products to bf16 and
            keeps all else in f32, as the pass `lower_precision` says.
        passes: the passes to run; None for the default pipeline.
        disable_passes: names of passes to leave out.
        verify: compare the program numerically after each pass.
        seed: of dropout and all other randomness of the program.
        accumulate: micro-batches whose gradients are averaged before an update.
        clip_grad_norm: largest global 2-norm of the gradients.
        clip_grad_value: largest absolute value of an element of a gradient.

    Raises:
        CaptureError: SS1xxx, with the user's file and line.
        UsageError: SS7011 where the arguments do not fit together, SS7013 for another precision.

    Example:
        >>> model = torch.nn.Linear(4, 1)
        >>> loss_fn = lambda model, x, y: ((model(x) - y) ** 2).mean()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> x, y = torch.randn(8, 4), torch.randn(8, 1)
        >>> step = shoestring.compile(model, loss_fn, optimizer, (x, y))
        >>> loss = step(x, y)
    """
    by_default = default_pipeline(precision=precision)
    if passes is not None and precision != "fp32":
        raise UsageError(
            "SS7011",
            f"precision={precision!r} chooses passes, and so does passes=",
            hint="put make_pass('lower_precision') into passes",
        )
    chosen = by_default if passes is None else passes
    pipeline = Pipeline(chosen, disable_passes)
    options = CompileOptions(backend, pipeline, verify)
    if example_inputs is not None:
        if loss_fn is not None or optimizer is not None or example_batch is not None:
            raise UsageError("SS7011", "example_inputs goes without loss_fn, optimizer and batch")
        infer = Inference(model, options, seed)
        infer.program(_as_tuple(example_inputs, "example_inputs"))
        return infer
    if loss_fn is None or optimizer is None or example_batch is None:
        raise UsageError(
            "SS7011",
            "a training step needs loss_fn, optimizer and example_batch",
            hint="for a forward pass alone, give example_inputs",
        )
    if accumulate < 1:
        raise UsageError("SS7011", f"accumulate must be at least 1, found {accumulate}")
    step_options = StepOptions(clip_grad_norm, clip_grad_value, accumulate)
    step = Step(model, loss_fn, optimizer, options, step_options, seed)
    step.program(_as_tuple(example_batch, "example_batch"))
    return step


def _as_tuple(given: Sequence[Any], name: str) -> tuple[Any, ...]:
    if not isinstance(given, (tuple, list)):
        found = type(given).__name__
        raise UsageError("SS7011", f"{name} must be a tuple, found {found}", hint=f"({name},)")
    return tuple(given)
