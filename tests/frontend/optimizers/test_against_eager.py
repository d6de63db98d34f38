"""Every optimizer of `torch.optim` with every configuration of PyTorch's own tests."""

from __future__ import annotations

import copy
import importlib.util
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from shoestring.frontend.optimizers import RULES

from .eager import Pair, Shapes, shapes_loss

if importlib.util.find_spec("expecttest") is None:
    pytest.skip("torch's optimizer database needs expecttest", allow_module_level=True)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_optimizers import optim_db

STEPS = 7  # RAdam's variance becomes tractable in step 6
SHAPES = [(), (0,), (3,), (2, 3), (3,)]  # one twice: its update is repeated
MATRICES = [(2, 3), (4, 3), (4, 3)]
NOT_PURE = {torch.optim.LBFGS}
ELSEWHERE = {torch.optim.SparseAdam}  # its gradients are sparse: test_sparse.py

Config = tuple[type[torch.optim.Optimizer], dict[str, Any]]


def _configs() -> Iterator[Config]:
    database: list[Any] = optim_db
    for info in database:
        if info.optim_cls not in NOT_PURE | ELSEWHERE:
            for given in info.optim_inputs_func(device="cpu"):
                yield info.optim_cls, dict(given.kwargs)


CONFIGS = list(_configs())
EXTRA: list[Config] = [
    (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1, "maximize": True}),
    (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "lr": 0.2}),
    (torch.optim.AdamW, {"amsgrad": True, "maximize": True, "betas": (0.5, 0.6)}),
    (torch.optim.Adam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    (torch.optim.Adam, {"fused": True}),
    (torch.optim.Adam, {"foreach": True, "weight_decay": 0.1}),
    (torch.optim.Adafactor, {"eps": (1e-8, 1e-2), "lr": 0.5, "d": 1.0}),
    (torch.optim.RMSprop, {"momentum": 0.9, "alpha": 0.5}),
    (torch.optim.Rprop, {"lr": 0.1, "step_sizes": (0.05, 0.15)}),
    (torch.optim.ASGD, {"t0": 2, "lambd": 0.1, "alpha": 0.5, "lr": 0.1}),
    (torch.optim.RAdam, {"betas": (0.9, 0.95), "lr": 0.1}),
    (torch.optim.Muon, {"nesterov": False, "weight_decay": 0.0}),
    (torch.optim.Muon, {"adjust_lr_fn": "match_rms_adamw"}),
]


def _name(config: Config) -> str:
    cls, kwargs = config
    return "-".join([cls.__name__, *(f"{k}={v}" for k, v in kwargs.items())])


def _pair(config: Config, dtype: torch.dtype, backend: str) -> Pair:
    cls, kwargs = config
    matrices = cls is torch.optim.Muon
    # Adafactor divides by the number of elements, in eager mode as well.
    shapes = MATRICES if matrices else [s for s in SHAPES if s != (0,) or not _divides(cls)]
    model = Shapes(dtype, shapes)
    x = _batch(0, dtype)
    rtol = None
    if isinstance(kwargs.get("lr"), torch.Tensor) and dtype is torch.float64:
        rtol = 1e-6  # eager computes with an f32 tensor here
    if kwargs.get("fused"):
        rtol = 1e-5
    # The rules are the subject here; passes have their own tests, and the C backend runs them all.
    options: dict[str, Any] = {"backend": backend, "passes": [] if backend == "reference" else None}
    return Pair(model, shapes_loss, lambda m: cls(m.parameters(), **kwargs), (x,), options, rtol)


def _divides(cls: type[torch.optim.Optimizer]) -> bool:
    return cls is torch.optim.Adafactor


def _batch(seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, generator=generator, dtype=dtype)


def _same_maths(config: Config) -> bool:
    """Whether the flags choose an implementation that eager mode has for GPUs only."""
    return bool(config[1].get("capturable"))


ORACLE = [c for c in [*CONFIGS, *EXTRA] if not _same_maths(c)]


@pytest.mark.parametrize("config", ORACLE, ids=_name)
def test_follows_eager_in_f64(config: Config) -> None:
    _follow(config, torch.float64)


@pytest.mark.parametrize("config", ORACLE, ids=_name)
def test_follows_eager_in_f32(config: Config) -> None:
    _follow(config, torch.float32)


def _follow(config: Config, dtype: torch.dtype) -> None:
    pair = _pair(config, dtype, "reference")
    before = {n: p.detach().clone() for n, p in pair.model.named_parameters()}
    for i in range(STEPS):
        pair.both(_batch(i, dtype))
    assert len(pair.step.programs) == 1
    for name, p in pair.model.named_parameters():
        stays = name == "unused" or p.numel() == 0
        assert torch.equal(p.detach(), before[name]) == stays, name


BY_CLASS = {cls: kwargs for cls, kwargs in reversed(CONFIGS) if not _same_maths((cls, kwargs))}


@pytest.mark.parametrize("cls", BY_CLASS, ids=lambda c: c.__name__)
def test_c_backend_follows_eager(cls: type[torch.optim.Optimizer]) -> None:
    pair = _pair((cls, BY_CLASS[cls]), torch.float32, "c")
    pair.rtol = 2e-2 if cls is torch.optim.Muon else pair.rtol  # bf16 inside
    for i in range(STEPS):
        pair.both(_batch(i, torch.float32))


@pytest.mark.parametrize("flag", ["capturable", "differentiable", "foreach"])
def test_flags_that_choose_an_implementation_are_taken(flag: str) -> None:
    pair = _pair((torch.optim.Adam, {}), torch.float64, "reference")
    for group in pair.optimizer.param_groups:
        group[flag] = True
    x = _batch(0, torch.float64)
    pair.close(pair.step(x), pair.eager(x))


@pytest.mark.parametrize("cls", [c for c in RULES if c not in ELSEWHERE], ids=lambda c: c.__name__)
def test_eager_and_compiled_steps_may_alternate(cls: type[torch.optim.Optimizer]) -> None:
    pair = _pair((cls, {"lr": 0.05}), torch.float64, "reference")
    for i in range(STEPS):
        x = _batch(i, torch.float64)
        if i in (0, 3, 4):
            pair.optimizer.zero_grad()
            pair.loss_fn(pair.model, x).backward()
            pair.optimizer.step()
            pair.eager(x)
            pair.compare()
        else:
            pair.both(x)


@pytest.mark.parametrize("cls", [c for c in RULES if c not in ELSEWHERE], ids=lambda c: c.__name__)
def test_state_moves_both_ways(cls: type[torch.optim.Optimizer]) -> None:
    """The compiled state goes into the eager optimizer, and the eager state comes back."""
    pair = _pair((cls, {"lr": 0.05}), torch.float64, "reference")
    for i in range(2):
        pair.both(_batch(i, torch.float64))
    # PyTorch would share the tensors between the two optimizers.
    pair.twin_optimizer.load_state_dict(copy.deepcopy(pair.optimizer.state_dict()))
    pair.optimizer.load_state_dict(copy.deepcopy(pair.twin_optimizer.state_dict()))
    for i in range(2, 5):
        pair.both(_batch(i, torch.float64))


def test_every_optimizer_is_covered() -> None:
    assert set(RULES) == {cls for cls, _ in CONFIGS} | ELSEWHERE


def test_state_is_made_by_the_first_call_and_not_before() -> None:
    pair = _pair((torch.optim.Rprop, {"lr": 0.1}), torch.float64, "reference")
    assert not pair.optimizer.state
    for optimizer in (pair.optimizer, pair.twin_optimizer):
        optimizer.param_groups[0]["lr"] = 0.3  # a step size begins as the learning rate
    pair.both(_batch(0, torch.float64))
    assert len(pair.step.programs) == 1
