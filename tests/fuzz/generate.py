"""From a seed to a valid and tame program."""

from __future__ import annotations

import random
import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .grammar import PRODUCTIONS, Scope, randomness
from .program import PRELUDE, Input, Instance, Optimizer, Program, Stmt

LIMIT = 30.0  # of every value: tolerances stay meaningful
ATTEMPTS = 40
LARGEST = 400  # elements of one value


@dataclass
class _Draft:
    """A program as it grows, and the tensors that its statements have made so far."""

    rng: random.Random
    special: bool
    inputs: list[Input] = field(default_factory=list[Input])
    body: list[Stmt] = field(default_factory=list[Stmt])
    values: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    namespace: dict[str, Any] = field(default_factory=dict[str, Any])
    count: int = 0

    def __post_init__(self) -> None:
        exec(PRELUDE, self.namespace)

    def add_input(self, role: str, dtype: str, shape: tuple[int, ...], fill: str = "unit") -> None:
        short = {"parameter": "p", "frozen": "z", "buffer": "s", "batch": "x", "constant": "c"}
        name = f"{short[role.partition(':')[0]]}{len(self.inputs)}"
        layout = self.rng.choices(["plain", "transposed", "strided", "offset"], [14, 2, 1, 1])[0]
        seed = self.rng.randrange(1 << 30)
        given = Input(name, role, dtype, shape, fill, layout, seed)
        tensor = given.tensor()
        if role in ("parameter", "frozen"):
            tensor = torch.nn.Parameter(tensor, requires_grad=role == "parameter")
        if role == "buffer":
            tensor.is_fuzz_buffer = True  # type: ignore[attr-defined]
        self.inputs.append(given)
        self.values[name] = tensor

    def add_tied(self) -> None:
        first = next((i for i in self.inputs if i.role == "parameter"), None)
        if first is not None:
            name = f"t{len(self.inputs)}"
            self.inputs.append(replace(first, name=name, role=f"tied:{first.name}"))
            self.values[name] = self.values[first.name]

    def try_statement(self, stmt: Stmt) -> bool:
        """Runs and keeps a statement; False where PyTorch refuses or a number runs away."""
        scope = {**self.namespace, **self.values}
        try:
            exec("\n".join(stmt.lines()), scope)
        except Exception:  # whatever PyTorch says: the statement is not valid here
            return False
        made = {t: scope[t] for t in stmt.targets}
        if not all(self._is_fine(v) for v in made.values()):
            return False
        if not stmt.targets and not all(self._is_tame(v) for v in self.values.values()):
            return True  # written already: the whole draft shows whether it is usable
        self.values.update(made)
        self.body.append(stmt)
        self.count += len(stmt.targets)
        return True

    def _is_fine(self, value: Any) -> bool:
        return (
            isinstance(value, torch.Tensor)
            and value.dtype in _USABLE
            and value.numel() <= LARGEST
            and value.dim() <= 5
            and self._is_tame(value)
        )

    def _is_tame(self, value: torch.Tensor) -> bool:
        if self.special or not value.is_floating_point():
            return True
        return bool((value.detach().abs() <= LIMIT).all())


_USABLE = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
     torch.uint8, torch.bool}
)  # fmt: skip


def generate(seed: int) -> Program:
    """The valid program of a seed: it runs in eager PyTorch and its numbers stay bounded."""
    for attempt in range(ATTEMPTS):
        program = _draft(random.Random(f"{seed}/{attempt}"), seed)
        if program is not None and is_valid(program):
            return program
    raise AssertionError(f"no valid program for seed {seed}")


def _draft(rng: random.Random, seed: int) -> Program | None:
    special = rng.random() < 0.12
    draft = _Draft(rng, special)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _inputs(draft)
        try:
            _body(draft)
            return _finish(draft, seed)
        except RuntimeError as error:
            # Autograd refuses to say what a view requires, once its base was written elsewhere.
            if "is a view" in str(error) or "A view was created" in str(error):
                return None
            raise


def _inputs(draft: _Draft) -> None:
    rng = draft.rng
    a, b, c = (rng.choice([2, 3, 4, 5]) for _ in range(3))
    odd = rng.choice([0, 1, 1, 1, 1, 17])
    shapes = [
        (a, b),
        (b, c),
        (c, a),
        (b,),
        (c,),
        (a, b, c),
        (),
        (a, 1),
        (odd, b),
        (2, b, a, 3),
        (b, b),
        (c, b),
    ]
    main = rng.choices(["f32", "f64", "bf16", "f16"], [11, 3, 3, 2])[0]

    def dtype() -> str:
        return main if rng.random() < 0.8 else rng.choice(["f32", "f64", "bf16", "f16"])

    for _ in range(rng.randint(2, 5)):
        draft.add_input("parameter", dtype(), rng.choice(shapes))
    draft.add_input("parameter", main, (b,))
    if rng.random() < 0.2:
        draft.add_input("frozen", dtype(), rng.choice(shapes))
    if rng.random() < 0.2:
        draft.add_tied()
    for _ in range(rng.randint(1, 3)):
        fill = rng.choice(["unit", "unit", "positive"])
        draft.add_input("batch", dtype(), rng.choice(shapes), "special" if draft.special else fill)
    if rng.random() < 0.7:
        small = max(1, min(a, b, c))
        draft.add_input(
            "batch", rng.choice(["i64", "i32"]), (rng.choice([a, b, 1, 0]),), f"below:{small}"
        )
    if rng.random() < 0.4:
        draft.add_input("batch", "bool", rng.choice(shapes), "coin")
    if rng.random() < 0.6:
        draft.add_input("buffer", main, (b,))
        draft.add_input("buffer", main, rng.choice([(b,), ()]), "positive")
    if rng.random() < 0.2:
        draft.add_input("buffer", "i64", (), "zero")
    if rng.random() < 0.2:
        draft.add_input("constant", dtype(), rng.choice(shapes))


def _body(draft: _Draft) -> None:
    rng = draft.rng
    productions, weights = list(PRODUCTIONS), list(PRODUCTIONS.values())
    if rng.random() < 0.15:
        productions, weights = [*productions, randomness], [*weights, 12]
    wanted = rng.choice([4, 6, 8, 10, 14, 18])
    for _ in range(wanted * 6):
        if len(draft.body) >= wanted:
            return
        scope = Scope(rng, draft.values, draft.count, draft.special)
        stmt = rng.choices(productions, weights)[0](scope)
        if stmt is not None:
            draft.try_statement(stmt)


def _finish(draft: _Draft, seed: int) -> Program | None:
    rng = draft.rng
    made = [t for s in draft.body for t in s.targets]
    floats = [n for n in made if draft.values[n].is_floating_point()]
    trained = [n for n in floats if draft.values[n].requires_grad]
    if not trained:
        return None
    loss = {trained[-1], *rng.sample(trained, min(len(trained), rng.randint(1, 3)))}
    metrics = rng.sample(made, min(len(made), rng.randint(0, 6 if draft.special else 3)))
    accumulate = 2 if rng.random() < 0.08 else 1
    return Program(
        tuple(draft.inputs), tuple(draft.body), tuple(n for n in made if n in loss),
        tuple(sorted(set(metrics))), _optimizer(draft),
        rng.choice([2, 2, 3]) * accumulate, accumulate,
        rng.choice([0.1, 1.0]) if rng.random() < 0.12 else None,
        rng.choice([0.05, 0.5]) if rng.random() < 0.08 else None,
        rng.random() < 0.06, draft.special, seed,
    )  # fmt: skip


def _optimizer(draft: _Draft) -> Optimizer:
    rng = draft.rng
    name = rng.choice(["SGD", "AdamW", "Adam"])
    lr = rng.choice([0.1, 0.03, 0.01])

    def options(lr: float) -> tuple[tuple[str, Any], ...]:
        found: dict[str, Any] = {"lr": lr}
        if rng.random() < 0.4:
            found["weight_decay"] = 0.1
        if rng.random() < 0.15:
            found["maximize"] = True
        if name == "SGD":
            momentum = rng.choice([0.0, 0.9, 0.5])
            found["momentum"] = momentum
            if momentum and rng.random() < 0.3:
                found["nesterov"] = True
            elif momentum and rng.random() < 0.3:
                found["dampening"] = 0.25
        else:
            # A large eps keeps the update smooth where a gradient is all rounding error.
            found["eps"] = rng.choice([0.1, 0.03])
            found["betas"] = rng.choice([(0.9, 0.99), (0.5, 0.75)])
            found["amsgrad"] = rng.random() < 0.2
        return tuple(found.items())

    names = [i.name for i in draft.inputs if i.role == "parameter"]
    second = tuple(n for n in names if rng.random() < 0.5) if rng.random() < 0.2 else ()
    return Optimizer(name, options(lr), second, (("lr", lr / 2),) if second else ())


def is_valid(program: Program) -> bool:
    """Whether eager PyTorch runs it and all numbers stay bounded."""
    from .run import Eager

    try:
        run = Eager(Instance(program))
        for step in range(program.steps):
            outcome = run.step(step)
            if not _bounded(outcome, program.special):
                return False
    except Exception:  # in-place writes that the backward pass refuses, above all
        return False
    return True


def _bounded(outcome: dict[str, torch.Tensor], special: bool) -> bool:
    for what, t in outcome.items():
        if not t.is_floating_point() or (special and not what.startswith(("loss", "parameter"))):
            continue
        if not bool((t.detach().abs() <= 1e3).all()):
            return False
    return True
