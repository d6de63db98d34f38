"""Random numbers of generated code, strip by strip: to the last bit those of the reference."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import shoestring as ss
from shoestring.ir import Builder, Function, Phase, Role, TensorType, Value

from .helpers import compare

KEYS = [torch.tensor([17, 3]), torch.tensor([-(1 << 40) - 5, (1 << 33) + 1])]


def uniform(
    b: Builder, key: Value, shape: tuple[int, ...], site: int, dtype: torch.dtype = torch.float32
) -> Value:
    return b.emit("rng.uniform.default", key, site=site, shape=shape, dtype=dtype)


def program(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> Function:
    """Draws that are stored, summed up, read turned, and drawn twice in one kernel."""
    b = Builder("draws")
    key = b.param(TensorType(torch.int64, (2,)), Role.BATCH, "key")
    for site, shape in enumerate(shapes):
        u = uniform(b, key, shape, site, dtype=dtype)
        v = uniform(b, key, shape, 1 << 31 | site, dtype=dtype)
        name = str(shape)
        b.output(f"{name} kept", b.emit("aten.mul.Tensor", u, 2.0))
        b.output(f"{name} both", b.emit("aten.sub.Tensor", b.emit("aten.exp.default", u), v))
        b.output(f"{name} largest", b.emit("aten.amax.default", u, dim=(-1,), keepdim=False))
        b.output(f"{name} first", b.emit("aten.amax.default", v, dim=(0,), keepdim=True))
        turned = b.emit("aten.permute.default", v, dims=tuple(reversed(range(len(shape)))))
        b.output(f"{name} turned", b.emit("aten.add.Tensor", turned, 1.0))
    return b.build()


SHAPES = [(1,), (3,), (513,), (5, 1), (3, 1030), (7, 5, 33), (2, 3, 4), (70001,), (1, 9)]


@pytest.mark.usefixtures("isa")
def test_numbers() -> None:
    for key in KEYS:
        executable = compare(program(SHAPES), [key], rtol=1e-6, atol=1e-6)
    assert "ss_uniform(" in executable.source


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_types(dtype: torch.dtype) -> None:
    compare(program(SHAPES[2:6], dtype), [KEYS[0]])


@pytest.mark.parametrize("columns", [1, 5, 40, 530])
def test_in_the_kernel_of_a_product(columns: int) -> None:
    b = Builder("epilogue")
    key = b.param(TensorType(torch.int64, (2,)), Role.BATCH, "key")
    x = b.param(TensorType(torch.float32, (37, 9)), Role.BATCH, "x")
    w = b.param(TensorType(torch.float32, (9, columns)), Role.BATCH, "w")
    product = b.emit("aten.mm.default", x, w)
    kept = b.emit("aten.lt.Scalar", uniform(b, key, (37, columns), 5), other=0.75)
    b.output(
        "y",
        b.emit(
            "aten.mul.Tensor", product, b.emit("aten._to_copy.default", kept, dtype=torch.float32)
        ),
    )
    arguments = [KEYS[1], torch.randn(37, 9), torch.randn(9, columns)]
    executable = compare(b.build(), arguments, rtol=1e-5, atol=1e-5)
    assert len(executable.kernels) == 1


class Net(nn.Module):
    """Dropout behind a product, a sum and an activation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(width, 70), nn.Linear(70, width), nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = nn.functional.dropout(self.a(self.norm(x)).relu(), 0.3)
        return x + nn.functional.dropout(self.b(h), 0.1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("width", [33, 600])
def test_a_net_drops_what_the_reference_drops(width: int, precision: str) -> None:
    """In both passes, of which the second draws again."""

    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model(x).square().mean()

    torch.manual_seed(0)
    x, found = torch.randn(6, 7, width), list[list[torch.Tensor]]()
    for options in ({"backend": "reference", "passes": []}, {"precision": precision}):
        torch.manual_seed(1)
        model = nn.Sequential(Net(width), Net(width))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = ss.compile(model, loss, optimizer, [x], seed=2, **options)
        losses = [step(x) for _ in range(3)]
        found.append([*losses, *(p.detach() for p in model.parameters())])
    tolerance = 1e-5 if precision == "fp32" else 3e-2
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    (compiled,) = step.programs.values()
    draws = [op.loc.phase for op in compiled.function.ops if op.name == "rng.uniform.default"]
    assert set(draws) == {Phase.FORWARD, Phase.RECOMPUTE}
