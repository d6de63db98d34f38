"""Batch norms whose results are computed from their statistics: equal numbers, less memory."""

import pytest
import torch
from torch import Tensor, nn

import shoestring as ss
from shoestring.ir import Function, Phase, TensorType, trace
from shoestring.passes import check
from shoestring.passes.liveness import measure
from shoestring.passes.split_norms import SplitNorms
from shoestring.runtime.step import Step

from .training import train_both

aten = torch.ops.aten
SHAPES = [(5, 3), (2, 1, 7), (4, 6, 3, 5), (2, 3, 1, 2, 4)]


def norm(
    shape: tuple[int, ...], dtype: torch.dtype, affine: str = "wb", train: bool = True
) -> Function:
    """A norm, and the averages over batches."""

    def f(x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, ...]:
        scales = [t if name in affine else None for name, t in (("w", w), ("b", b))]
        rest = (mean, var, train, 0.1, 1e-5)
        found: tuple[Tensor, ...] = aten._native_batch_norm_legit_functional(x, *scales, *rest)
        return found

    wide = torch.float64 if dtype is torch.float64 else torch.float32
    one = TensorType(wide, (shape[1],))
    return trace(f, [TensorType(dtype, shape), *[one] * 4], "f")


def numbers(f: Function) -> list[Tensor]:
    """Channels that lie far apart; positive variances."""
    torch.manual_seed(0)
    x, *rest = (torch.randn(p.value.type.static_shape) for p in f.params)
    channels = torch.arange(x.shape[1]).reshape(-1, *(1 for _ in x.shape[2:]))
    given = [x * (1 + channels) + 3 * channels, *rest[:-1], rest[-1].abs()]
    return [t.to(p.value.type.dtype) for t, p in zip(given, f.params, strict=True)]


@pytest.mark.parametrize("affine", ["wb", "w", "b", ""])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_numbers(shape: tuple[int, ...], dtype: torch.dtype, affine: str) -> None:
    f = norm(shape, dtype, affine)
    (record,) = check(f, numbers(f), [SplitNorms()]).records
    assert record.report.changed == 1
    (split,) = (op for op in record.after.ops if "batch_norm" in op.name)
    assert all(split.results[0] not in op.inputs for op in record.after.ops)


def test_statistics_of_other_batches_stay() -> None:
    f = norm((4, 3), torch.float32, train=False)
    result, report = SplitNorms().run(f)
    assert result is f and list(report.skipped) == ["its statistics are not those of its input"]


class Block(nn.Module):
    """A residual block; norms with averages over batches, and one without."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.norms = nn.ModuleList(
            [nn.BatchNorm2d(channels), nn.BatchNorm2d(channels, track_running_stats=False)]
        )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norms[0](self.first(x)))
        return torch.relu(x + self.norms[1](self.second(y)))


def network() -> nn.Module:
    torch.manual_seed(0)
    blocks = [Block(8) for _ in range(3)]
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *blocks)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def test_activations_are_computed_again() -> None:
    """Two steps like PyTorch's; of each activation, only what its norm was given is kept."""
    x = torch.randn(5, 3, 9, 10, dtype=torch.float64)

    def compiled(model: nn.Module, *disabled: str) -> Step:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return ss.compile(model, loss, optimizer, (x,), disable_passes=disabled)

    step = train_both(network().double(), compiled, loss, (x,), lr=0.1, tolerance=1e-9)
    program = step.program((x,))
    forward = {op.result for op in program.function.ops if op.name == "aten.relu.default"
               and op.loc.phase is Phase.FORWARD}  # fmt: skip
    late = [op for op in program.function.ops if op.loc.phase is Phase.BACKWARD]
    assert len(forward) == 7
    assert sum(not forward.isdisjoint(op.inputs) for op in late) <= 2
    whole = compiled(network().double(), "split_norms").program((x,))
    assert measure(program.function).peak < measure(whole.function).peak
