"""How exact gradients are: ours and eager PyTorch's, beside eager PyTorch's in fp64.

    python benchmarks/gradients.py --out docs/numbers

The error of a parameter's gradient is the norm of its difference from the fp64 gradient, relative
to the norm of that. In bf16 eager computes under autocast. A model with ReLUs or maxima may fall to
one side for one and to the other for another wherever two numbers are equal up to rounding: then
errors are thousands of times larger than usual, in eager PyTorch as in ours.
"""

from __future__ import annotations

import copy
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]

import torch  # noqa: E402
import tyro  # noqa: E402
from transformers import PreTrainedModel  # noqa: E402

import shoestring  # noqa: E402
from benchmarks.steps.tables import markdown  # noqa: E402
from benchmarks.workloads import (  # noqa: E402
    WORKLOADS,
    Workload,
    autocast,
    build,
    require_known,
)

NOTHING = 1e-9  # of the norm of all gradients: less is rounding where the gradient is zero
MOST = 2.0

Gradients = dict[str, torch.Tensor]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Options:
    """Compares the gradients of one step.

    Attributes:
        workloads: which; all by default.
        precisions: both by default; bf16 without matrix units for it is slow in eager PyTorch.
        seed: of weights and data.
        out: folder for `gradients.md`; it is not written without it.
        tiny: the test's sizes.
    """

    workloads: tuple[str, ...] = tuple(WORKLOADS)
    precisions: tuple[Precision, ...] = ("fp32", "bf16")
    seed: int = 0
    out: Path | None = None
    tiny: bool = False


@dataclass(frozen=True)
class Errors:
    """Relative errors of one contender: of the loss, and of each parameter's gradient."""

    loss: float
    gradients: list[float]

    @property
    def median(self) -> float:
        """Of the gradients."""
        return statistics.median(self.gradients)


@dataclass(frozen=True)
class Outcome:
    """What one workload gave."""

    workload: str
    precision: Precision
    eager: Errors
    ours: Errors

    @property
    def ratio(self) -> float:
        """Our median error by eager's."""
        return self.ours.median / self.eager.median

    @property
    def holds(self) -> bool:
        """Our gradients are about as exact as eager's."""
        return self.ratio <= MOST


def eager(workload: Workload, precision: Precision | None) -> tuple[float, Gradients]:
    """Loss and gradients of a copy of the model, in fp64 where no precision is given."""
    model, batch = copy.deepcopy(workload.model), workload.batch
    if precision is None:
        model = model.double()
        batch = tuple(t.double() if t.is_floating_point() else t for t in batch)
        if isinstance(model, PreTrainedModel):
            model.set_experts_implementation("eager")  # grouped products are not made for it
    with autocast(precision == "bf16"):
        loss = workload.loss_fn(model, *batch)
    loss.backward()
    named = model.named_parameters()
    return float(loss.detach()), {n: p.grad for n, p in named if p.grad is not None}


def compiled(workload: Workload, precision: Precision) -> tuple[float, Gradients]:
    """Loss and gradients of a compiled step: the first momentum of SGD is the gradient."""
    model = copy.deepcopy(workload.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    step = shoestring.compile(
        model, workload.loss_fn, optimizer, workload.batch, precision=precision
    )
    loss = float(step(*workload.batch))
    named = [(n, optimizer.state.get(p, {})) for n, p in model.named_parameters()]
    return loss, {n: state["momentum_buffer"] for n, state in named if state}


def errors(found: tuple[float, Gradients], exact: tuple[float, Gradients]) -> Errors:
    """Relative differences, without gradients that are zero."""
    norms = {n: float(g.norm()) for n, g in exact[1].items()}
    least = NOTHING * sum(norm**2 for norm in norms.values()) ** 0.5
    relative = [
        float((found[1][n].double() - exact[1][n]).norm()) / norm
        for n, norm in norms.items()
        if norm > least
    ]
    return Errors(abs(found[0] - exact[0]) / abs(exact[0]), relative)


def measure(name: str, options: Options) -> list[Outcome]:
    """One step of one workload: in fp64, and in each precision by both."""
    workload = build(name, tiny=options.tiny, seed=options.seed)
    exact = eager(workload, None)
    return [
        Outcome(name, p, errors(eager(workload, p), exact), errors(compiled(workload, p), exact))
        for p in options.precisions
    ]


HEADER = [
    "workload",
    "precision",
    "gradients",
    "loss, eager",
    "ours",
    "median gradient, eager",
    "ours",
    "ours to eager's",
    "largest, eager",
    "ours",
]


def table(outcomes: Sequence[Outcome]) -> str:
    rows: list[list[str]] = []
    for o in outcomes:
        pairs = [(e.loss, e.median, max(e.gradients)) for e in (o.eager, o.ours)]
        loss, median, largest = ([f"{x:.1e}" for x in pair] for pair in zip(*pairs, strict=True))
        count = str(len(o.ours.gradients))
        rows.append([o.workload, o.precision, count, *loss, *median, f"{o.ratio:.2f}x", *largest])
    return markdown(HEADER, rows)


PAGE = """\
# How exact gradients are

`python benchmarks/gradients.py --out docs/numbers`

Relative errors beside eager PyTorch in fp64; in bf16 eager computes under autocast. Where a ReLU or
a maximum meets numbers that are equal up to rounding, contenders fall to different sides, and a
gradient differs thousands of times as much as usual: the largest error of a model with ReLUs.
"""


def main() -> int:
    options = tyro.cli(Options, description=__doc__)
    require_known(options.workloads)
    outcomes: list[Outcome] = []
    for name in options.workloads:
        found = measure(name, options)
        print(table(found), flush=True)
        outcomes += found
    print(f"\n{table(outcomes)}")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "gradients.md").write_text(f"{PAGE}\n{table(outcomes)}\n")
    return 0 if all(o.holds for o in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
