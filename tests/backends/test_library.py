"""PyTorch kernels that write where the arena wants the result, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._ops import OpOverload

from shoestring.backends.c.library import way_of
from shoestring.backends.instructions import Way
from shoestring.ir import Builder, Role, interpret, parse_type, type_of
from shoestring.ir.ops.networks import TYPED_BY_INPUT

from .helpers import compare

CANARY = 7.0
REDUCTIONS = (0, 1, 2)  # none, mean, sum
REFUSE_MIXED = {"aten.huber_loss_backward.default"}  # PyTorch's kernel does


def losses() -> Iterator[str]:
    """Every loss of two tensors of one shape that can reduce."""
    for name in sorted(set(dir(torch.ops.aten))):
        packet = getattr(torch.ops.aten, name, None)
        overloads: list[str] = getattr(packet, "overloads", list[str])()
        if "out" not in overloads or "default" not in overloads or not name.endswith("_loss"):
            continue
        schema: OpOverload = getattr(torch.ops.aten, name).default
        tensors = [a.name for a in schema._schema.arguments if str(a.type) == "Tensor"]
        if tensors == ["self", "target"] and "nll" not in name and "multi" not in name:
            yield name


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", [*losses(), "binary_cross_entropy"])
def test_out_variant_stays_in_its_place(name: str, reduction: int) -> None:
    b = Builder("loss")
    x, y = (b.param(parse_type("f32[50,17]"), Role.BATCH, n) for n in ("x", "y"))
    operands = (x, y, None) if name == "binary_cross_entropy" else (x, y)
    b.emit(f"aten.{name}.default", *operands, reduction=reduction)
    op = b.build().ops[-1]
    if way_of(op) is not Way.OUT:
        return
    given, target = torch.rand(50, 17), torch.randint(0, 2, (50, 17)).float()
    shape = (50, 17) if reduction == 0 else ()
    count = 850 if reduction == 0 else 1
    memory = torch.full((count + 8,), CANARY)
    out = torch.as_strided(memory, shape, (17, 1)[: len(shape)], 4)
    address, size = out.data_ptr(), memory.untyped_storage().nbytes()
    getattr(torch.ops.aten, name).out(given, target, reduction=reduction, out=out)
    assert out.data_ptr() == address and memory.untyped_storage().nbytes() == size
    assert (memory[:4] == CANARY).all() and (memory[4 + count :] == CANARY).all()


@pytest.mark.parametrize("name", sorted(TYPED_BY_INPUT - REFUSE_MIXED))
@pytest.mark.parametrize("shape", [(3,), ()], ids=str)
def test_losses_of_mixed_types(name: str, shape: tuple[int, ...]) -> None:
    """PyTorch's kernels and its rules for types disagree about these; the kernels count."""
    for x, y in (("f16", "f32"), ("f32", "f64"), ("f64", "f32"), ("bf16", "f16")):
        b = Builder("loss")
        types = [x, x, y] if "backward" in name else [x, y]
        params = [
            b.param(parse_type(f"{t}{list(shape)}"), Role.BATCH, f"{i}")
            for i, t in enumerate(types)
        ]
        options: dict[str, Any] = {"delta": 0.4} if "huber" in name else {}
        options |= {"beta": 0.4} if "smooth" in name else {}
        b.output("loss", b.emit(name, *params, reduction=0, **options))
        function = b.build()
        assert function.outputs[0].value.type.dtype is params[0].type.dtype
        given = [torch.rand(shape).to(p.type.dtype) for p in params]
        (found,) = interpret(function, given)[0]
        assert type_of(found) == function.outputs[0].value.type
        compare(function, given)


def test_statistics_that_are_one_number_expanded() -> None:
    """PyTorch's kernel takes them to be contiguous, and reads beside the number otherwise."""
    b = Builder("norm")
    grad, x = (b.param(parse_type("f64[10,5]"), Role.BATCH, n) for n in ("grad", "x"))
    weight, mean = (b.param(parse_type(f"f64[{n}]"), Role.BATCH, f"p{n}") for n in ("5", "1"))
    wide = b.emit("aten.expand.default", mean, size=[5])
    ones = b.emit("aten.ones_like.default", wide)
    none = b.emit("aten.empty.memory_format", size=[0], dtype=torch.float64)
    found = b.emit_all(
        "aten.native_batch_norm_backward.default", grad, x, weight, wide, ones, none, none,
        train=False, eps=0.1, output_mask=[True, True, True],
    )  # fmt: skip
    for name, value in zip(("x", "weight", "bias"), found, strict=True):
        b.output(name, value)
    function = b.build()
    compare(function, [torch.randn(p.value.type.static_shape).double() for p in function.params])
