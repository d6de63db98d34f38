"""What counts as a difference, and what is rounding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import shoestring
from shoestring.ir import Builder, Function, Op, Role, parse_type
from shoestring.ir.errors import PassError
from shoestring.passes.base import Numerics, Pass, PassReport
from shoestring.passes.disturbance import Disturbance
from shoestring.passes.numerics import difference, evaluate
from shoestring.passes.registry import default_pipeline


def cancelling() -> Function:
    """A sum whose terms cancel, and a whole step in its direction, as Adam takes it."""
    b = Builder("f")
    x = b.param(parse_type("f32[64,5]"), Role.BATCH, "x")
    mean = b.emit("aten.mean.dim", x, dim=(0,), keepdim=True)
    rest = b.emit("aten.sum.dim_IntList", b.emit("aten.sub.Tensor", x, mean), dim=(0,))
    size = b.emit("aten.abs.default", rest)
    b.output("direction", b.emit("aten.div.Tensor", rest, b.emit("aten.add.Tensor", size, 1e-12)))
    b.output("mean", mean)
    return b.build()


def test_what_is_rounding_alone_is_no_difference() -> None:
    f, x = cancelling(), torch.randn(64, 5)
    expected = evaluate(f, [x])

    def disturbed(seed: int) -> dict[str, torch.Tensor]:
        return evaluate(f, [x], Disturbance(seed).run_op)

    turned = expected | {"output direction": -expected["output direction"]}
    assert difference(expected, turned, exact=False) is not None
    assert difference(expected, turned, exact=False, disturbed=disturbed) is None
    assert difference(expected, turned, exact=True, disturbed=disturbed) is not None
    twice = expected | {"output direction": -3 * expected["output direction"]}
    found = difference(expected, twice, exact=False, disturbed=disturbed)
    assert found is not None and found.what == "output direction"
    moved = turned | {"output mean": expected["output mean"] + 1e-3}
    found = difference(expected, moved, exact=False, disturbed=disturbed)
    assert found is not None and found.what == "output mean"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_never_rounding(bad: float) -> None:
    f, x = cancelling(), torch.randn(64, 5)
    expected = evaluate(f, [x])
    found = {k: t.clone() for k, t in expected.items()}
    found["output direction"][2] = bad
    same = difference(
        expected, found, exact=False, disturbed=lambda s: evaluate(f, [x], Disturbance(s).run_op)
    )
    assert same is not None and "1 of 5 elements" in same.detail


@dataclass(frozen=True)
class Wrong(Pass):
    """Multiplies by one percent too much, somewhere in the update."""

    numerics: ClassVar[Numerics] = Numerics.REASSOCIATING

    def run(self, function: Function) -> tuple[Function, PassReport]:
        *_, last = (i for i, op in enumerate(function.ops) if _scales(op))
        ops = list(function.ops)
        x, factor = ops[last].operands
        assert isinstance(factor, float)
        ops[last] = replace(ops[last], operands=(x, 1.01 * factor))
        return function.with_ops(ops), PassReport()


def _scales(op: Op) -> bool:
    return op.name == "aten.mul.Tensor" and isinstance(op.operands[1], float)


def compiled(**options: Any) -> Any:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(12, 3, 20, dropout=0.1, batch_first=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = torch.randn(3, 7, 12)
    return shoestring.compile(
        model, lambda m, x: m(x).square().mean(), optimizer, (x,), verify=True, **options
    )


def test_attention_and_adam_are_verified() -> None:
    """The gradient of the bias of keys is zero: its sign, and with it Adam's step, is rounding."""
    compiled()


def test_a_wrong_pass_is_found_beside_rounding() -> None:
    with pytest.raises(PassError, match=r"SS3007(.|\n)*pass test_numerics promises"):
        compiled(passes=[*default_pipeline(), Wrong()])
