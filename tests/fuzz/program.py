"""A random training program as data, its Python source, and what is made from it.

    Program = inputs, body: Stmt*, loss: name*, metrics: name*, optimizer, options, steps
    Stmt    = targets, code (Python with {0}, {1}, ... for the operands), args

The source is run as it is: by eager PyTorch, and by the capture of shoestring. So what a repro
prints is what was run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch

from .data import make


@dataclass(frozen=True)
class Input:
    """A tensor that the program is given.

    Attributes:
        name: as the body refers to it.
        role: `parameter`, `frozen`, `buffer`, `batch`, `constant` (registered nowhere), or
            `tied:other`: a second name of another parameter.
        dtype, shape, fill, layout: see `data.make`.
        seed: of the numbers; of a batch, one of many that differ by step.
    """

    name: str
    role: str
    dtype: str
    shape: tuple[int, ...]
    fill: str = "unit"
    layout: str = "plain"
    seed: int = 0

    def tensor(self, step: int = 0) -> torch.Tensor:
        return make(self.seed + 7919 * step, self.dtype, self.shape, self.fill, self.layout)


@dataclass(frozen=True)
class Stmt:
    """One or more targets assigned from one expression; no target: run for its effect."""

    targets: tuple[str, ...]
    code: str
    args: tuple[str, ...]
    random: bool = False
    no_grad: bool = False

    def lines(self) -> list[str]:
        text = self.code.format(*self.args)
        if self.targets:
            text = f"{', '.join(self.targets)} = {text}"
        return ["with torch.no_grad():", f"    {text}"] if self.no_grad else [text]


@dataclass(frozen=True)
class Optimizer:
    """A class of `torch.optim`, the options of each parameter group, and who is in the second."""

    name: str = "SGD"
    options: tuple[tuple[str, Any], ...] = (("lr", 0.1),)
    second: tuple[str, ...] = ()
    second_options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Program:
    """A model, a loss, an optimizer and how they are run."""

    inputs: tuple[Input, ...]
    body: tuple[Stmt, ...]
    loss: tuple[str, ...]
    metrics: tuple[str, ...] = ()
    optimizer: Optimizer = Optimizer()
    steps: int = 2
    accumulate: int = 1
    clip_grad_norm: float | None = None
    clip_grad_value: float | None = None
    autocast: bool = False
    special: bool = False
    seed: int = 0

    @property
    def random(self) -> bool:
        return any(s.random for s in self.body)

    def of_role(self, *roles: str) -> Iterator[Input]:
        return (i for i in self.inputs if i.role.partition(":")[0] in roles)


# Names that a body may use beside torch's.
PRELUDE = """\
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


class ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (x * 8).round() / 8

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(-1, 1)


class OwnProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y, x + y

    @staticmethod
    def backward(ctx, g, h):
        x, y = ctx.saved_tensors
        return g * y + h, g * x + h
"""


def loss_term(name: str, special: bool) -> str:
    """One number from a float value of any size: no mean, which zero elements do not have."""
    x = f"{name}.double()"
    if special:
        x = f"torch.nan_to_num({x}, 0.0, 1.0, -1.0).clamp(-9, 9)"
    return f"(0.5 * {x} + torch.sin({x})).sum() / ({name}.numel() + 1)"


def source(program: Program) -> str:
    """The class `Model` as Python: `Model(tensors)(*batch)` gives (loss, metrics)."""
    batch = [i.name for i in program.of_role("batch")]
    lines = [
        "class Model(torch.nn.Module):",
        "    def __init__(self, tensors):",
        "        super().__init__()",
        "        self.free = {}",
        *(f"        {line}" for i in program.inputs for line in _declared(i)),
        "",
        f"    def forward({', '.join(['self', *batch])}):",
    ]
    body: list[str] = []
    for i in program.inputs:
        if i.role == "constant":
            body.append(f"{i.name} = self.free[{i.name!r}]")
        elif i.role != "batch":
            body.append(f"{i.name} = self.{i.name}")
    for s in program.body:
        body += s.lines()
    terms = [loss_term(n, program.special) for n in program.loss]
    body.append(f"loss = {' + '.join(terms) or 'torch.zeros(())'}")
    metrics = ", ".join(f"{n!r}: {n}.clone()" for n in program.metrics)
    body.append(f"return loss, {{{metrics}}}")
    if program.autocast:
        body = ["with torch.autocast('cpu', torch.bfloat16):", *(f"    {line}" for line in body)]
    lines += [f"        {line}" for line in body]
    return PRELUDE + "\n\n" + "\n".join(lines) + "\n"


def _declared(i: Input) -> list[str]:
    kind, _, other = i.role.partition(":")
    given = f"tensors[{i.name!r}]"
    if kind in ("parameter", "frozen"):
        return [f"self.{i.name} = torch.nn.Parameter({given}, requires_grad={kind == 'parameter'})"]
    if kind == "tied":
        return [f"self.{i.name} = self.{other}"]
    if kind == "buffer":
        return [f"self.register_buffer({i.name!r}, {given})"]
    return [f"self.free[{i.name!r}] = {given}"] if kind == "constant" else []


@lru_cache(maxsize=8)
def _compiled(text: str) -> type[torch.nn.Module]:
    namespace: dict[str, Any] = {"__name__": "fuzz_program"}
    exec(compile(text, "fuzz_program.py", "exec"), namespace)
    model: type[torch.nn.Module] = namespace["Model"]
    return model


@dataclass
class Instance:
    """What a program describes, with tensors of its own."""

    program: Program
    model: torch.nn.Module = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        own = {
            i.name: i.tensor()
            for i in self.program.inputs
            if i.role != "batch" and not i.role.startswith("tied:")
        }
        self.model = _compiled(source(self.program))(own)
        self.optimizer = _optimizer(self.program, self.model)

    def loss_fn(self, model: torch.nn.Module, *batch: torch.Tensor) -> Any:
        return model(*batch)

    def batch(self, step: int) -> tuple[torch.Tensor, ...]:
        return tuple(i.tensor(step) for i in self.program.of_role("batch"))


def _optimizer(program: Program, model: torch.nn.Module) -> torch.optim.Optimizer:
    given = program.optimizer
    first = [i.name for i in program.of_role("parameter", "frozen") if i.name not in given.second]
    groups: list[dict[str, Any]] = []
    for names, options in ((first, given.options), (given.second, given.second_options)):
        found = [model.get_parameter(n) for n in names]
        if found:
            groups.append({"params": found, **dict(options)})
    cls: Any = getattr(torch.optim, given.name)
    made: torch.optim.Optimizer = cls(groups, foreach=False, **dict(given.options))
    return made
