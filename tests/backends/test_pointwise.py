"""Every pointwise op, in every element type that PyTorch takes, against the interpreter."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from shoestring.backends.c.expressions import EXPRESSIONS
from shoestring.ir import Builder, Role, TensorType, Value, lookup, make_op
from shoestring.ir.errors import IRError
from shoestring.ir.ops.pointwise import OPS

from .helpers import compare, traced

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32,
          torch.int16, torch.int8, torch.uint8, torch.bool]  # fmt: skip
SPECIAL = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 0.5, -0.5, 2.5, -2.5, 1e-3, 100.0]
# Values of attributes that have no default.
ATTRS: dict[str, Any] = {
    "other": 3, "exponent": 2, "self": 2, "value": 2, "weight": 0.25, "rounding_mode": "floor",
    "threshold": 0.5, "negative_slope": 0.01, "min_val": -1.0, "max_val": 1.0, "grad_scale": 1.0,
    "min": -1, "max": 2,
}  # fmt: skip


# gelu(inf) is NaN in some of PyTorch's kernels; finite numbers are tested below.
KNOWN = {"aten.gelu.default"}


def sample(dtype: torch.dtype, shape: tuple[int, ...], seed: int, special: bool) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, shape, generator=g).to(dtype)
    if not dtype.is_floating_point:
        low = 0 if dtype is torch.uint8 else -9
        t = torch.randint(low, 10, shape, generator=g)
        return torch.where(t == 0, torch.ones_like(t), t).to(dtype)
    t = (torch.randn(shape, generator=g, dtype=torch.float64) * 2).to(dtype)
    if special and t.numel() >= len(SPECIAL):
        t.view(-1)[: len(SPECIAL)] = torch.tensor(SPECIAL, dtype=torch.float64).roll(seed).to(dtype)
    return t


def emit_each(b: Builder, dtype: torch.dtype, operands: list[Value], mask: Value) -> list[str]:
    """Every op that takes these operands, each an output; the names of those taken."""
    taken: list[str] = []
    for op in OPS:
        if op.name not in EXPRESSIONS or (dtype is not torch.float64 and op.name in KNOWN):
            continue
        attrs = {k: ATTRS[k] for k, d in op.attr_defaults.items() if d is None and k in ATTRS}
        attrs |= {
            k: v
            for k, v in ATTRS.items()
            if k in op.attr_defaults and k not in attrs and k in ("threshold", "negative_slope")
        }
        if "dtype" in op.attr_defaults:
            attrs["dtype"] = torch.float32 if dtype is not torch.float32 else torch.int32
        count = len(op.operand_names)
        given: list[Any] = list(operands[:count])
        for i, n in enumerate(op.operand_names):
            if n in ("condition", "mask"):
                given[i] = mask
        if op.name == "aten.masked_fill.Tensor":
            given[2] = 1
        try:
            # Fake tensors accept what kernels refuse: a kernel is asked first.
            torch_args = [
                torch.ones(2, dtype=v.type.dtype) if isinstance(v, Value) else torch.tensor(v)
                for v in given
            ]
            op.reference(*torch_args, **make_op(op.name, (), attrs).attrs)
            lookup(op.name).infer(make_op(op.name, tuple(given), attrs))
        except (RuntimeError, TypeError, IRError, ValueError, NotImplementedError):
            continue
        b.output(op.name, b.emit(op.name, *given, **attrs))
        taken.append(op.name)
    return taken


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_op(dtype: torch.dtype) -> None:
    shape = (7, 13)
    b = Builder("every")
    operands = [b.param(TensorType(dtype, shape), Role.BATCH, f"x{i}") for i in range(3)]
    mask = b.param(TensorType(torch.bool, shape), Role.BATCH, "mask")
    taken = emit_each(b, dtype, operands, mask)
    assert len(taken) > 20
    arguments = [sample(dtype, shape, i, special=True) for i in range(3)]
    executable = compare(b.build(), [*arguments, sample(torch.bool, shape, 5, False)], rtol=None)
    assert not executable.fallbacks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gelu_of_finite_numbers(dtype: torch.dtype) -> None:
    b = Builder("gelu")
    x = b.param(TensorType(dtype, (33, 7)), Role.BATCH, "x")
    for kind in ("none", "tanh"):
        b.output(kind, b.emit("aten.gelu.default", x, approximate=kind))
    compare(b.build(), [sample(dtype, (33, 7), 0, special=False)])


MIXED = ("add.Tensor", "sub.Tensor", "rsub.Tensor", "mul.Tensor", "div.Tensor", "pow.Tensor_Tensor",
         "maximum.default", "remainder.Tensor", "fmod.Tensor", "atan2.default")  # fmt: skip


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("other", [torch.float32, torch.float64, torch.int64], ids=str)
def test_halves_and_one_number_of_another_type(half: torch.dtype, other: torch.dtype) -> None:
    """PyTorch rounds the number to the half's type first, but not the second of a product."""
    b = Builder("mixed")
    x = b.param(TensorType(half, (257,)), Role.BATCH, "x")
    y = b.param(TensorType(other, ()), Role.BATCH, "y")
    for name in MIXED:
        b.output(f"{name} x, y", b.emit(f"aten.{name}", x, y))
        b.output(f"{name} y, x", b.emit(f"aten.{name}", y, x))
    given = sample(half, (257,), 0, special=False).abs() + 0.25
    compare(b.build(), [given, torch.tensor(1.2345 if other.is_floating_point else 1001).to(other)])


def test_bf16_is_rounded_to_even_and_nan_stays_nan() -> None:
    """Every high half of an f32 with low halves about the middle, and those of NaN."""
    high = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int32)
    x = (high.unsqueeze(1) | low).view(torch.float32)
    (mine,) = compare(traced(lambda x: x.bfloat16(), [x]), [x]).run([x])
    assert torch.equal(mine.isnan(), x.isnan())
    known = ~x.isnan()
    assert torch.equal(mine[known].view(torch.int16), x.bfloat16()[known].view(torch.int16))
