"""The Python dump runs on its own and gives the interpreter's results, bit by bit."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from shoestring.frontend.capture import capture_step
from shoestring.ir import Function, OpDef, Role, interpret, lookup, parse, print_python
from shoestring.ir.errors import IRError

from ..corpora.opinfo import bind, capture, cases, join, ops
from .test_cost import MODELS


def run(function: Function, arguments: list[torch.Tensor]) -> Any:
    scope: dict[str, Any] = {"__name__": "dumped"}
    exec(compile(print_python(function), "dumped.py", "exec"), scope)
    return scope["step"](*arguments)


def check(function: Function, arguments: list[torch.Tensor]) -> None:
    outputs, nexts = run(function, arguments)
    wanted, wanted_nexts = interpret(function, arguments)
    assert len(outputs) == len(wanted)
    assert all(map(same, outputs, wanted))
    assert list(nexts) == list(wanted_nexts)
    assert all(same(nexts[path], wanted_nexts[path]) for path in nexts)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bits; one NaN is as good as another."""
    if a.dtype.is_floating_point or a.dtype.is_complex:
        return a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    return a.dtype == b.dtype and torch.equal(a, b)


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated operators are samples all the same
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("name", MODELS)
def test_training_step(name: str) -> None:
    model, loss, batch = MODELS[name]()
    if name == "gpt2":
        model.train()  # with dropout
    optimizer = torch.optim.AdamW(model.parameters())
    function = capture_step(model, loss, optimizer, batch).function
    arguments = [argument(p.role, p.value.type) for p in function.params]
    assert name != "gpt2" or any(op.name == "rng.uniform.default" for op in function.ops)
    check(function, arguments)


def argument(role: Role, type_: Any) -> torch.Tensor:
    if role is Role.HYPER:
        return torch.tensor(0.1, dtype=torch.float64)
    if type_.dtype.is_floating_point:
        return torch.rand(type_.static_shape, dtype=type_.dtype)
    return torch.randint(0, 5, type_.static_shape).to(type_.dtype)


@pytest.mark.parametrize("start", range(8))
def test_opinfo_functions(start: int) -> None:
    """One function of the first sample of every 24th op."""
    samples = [c for info in ops()[start::24] for c in cases(info, 1)]
    captured = [found for c in samples if (found := attempt(c)) is not None and c.defined]
    function, arguments = join(captured, "samples")
    check(function, arguments)
    assert bind(captured[0]) is not None


def attempt(case: Any) -> Any:
    from shoestring.ir.errors import CaptureError

    try:
        return capture(case)
    except CaptureError:
        return None


TEXT = """func @step {
  parameter %w: f32[2,3] "linear.\\"odd\\"\\nweight" -> %v
  rng %key: i64[2] "#rng"
  %u: f32[2,3] = rng.uniform.default(%key) {site=0, shape=[2, 3], dtype=f32}
  %c: f32[3] = ir.constant.default() {data=[1.0, inf, nan], shape=[3], dtype=f32}
  %v: f32[2,3] = aten.add.Tensor(%w, %u) loc("model.py":7 "linear" update)
  %t: f32[3], %i: i64[3] = aten.max.dim(%v) {dim=0} loc("model.py":8 "" forward)
  return top=%t, where=%i
}
"""


def test_what_it_looks_like() -> None:
    text = print_python(parse(TEXT))
    assert "    arg0,  # f32[2,3] parameter 'linear.\"odd\"\\nweight'" in text
    assert "    v2 = torch.ops.aten.add.Tensor(arg0, v0)  # f32[2,3] model.py:7 (linear)" in text
    assert "    v3, v4 = torch.ops.aten.max.dim(v2.contiguous(), 0)" in text
    assert 'v1 = _constant(data=[1.0, float("inf"), float("nan")], shape=[3]' in text
    assert "def philox(" in text and "shoestring" not in text.split("import torch", 1)[1]
    assert "        v3,  # top" in text
    check(parse(TEXT), [torch.rand(2, 3), torch.tensor([1, 2])])


def test_a_function_of_nothing() -> None:
    function = parse("func @f {\n %x: f32[2] = aten.zeros.default() {size=[2]}\n return x=%x\n}")
    assert run(function, [])[0][0].tolist() == [0, 0]


def test_what_has_no_source() -> None:
    function = parse("func @f {\n %x: f32[2] = aten.zeros.default() {size=[2]}\n return x=%x\n}")
    known = lookup("aten.zeros.default")
    opaque = OpDef(
        "test.opaque.default",
        known.kind,
        torch.zeros,
        (),
        {},
        known.infer,
        known.cost,
        known.factors,
    )
    from dataclasses import replace

    changed = Function("f", (), (replace(function.ops[0], opdef=opaque),), function.outputs)
    with pytest.raises(IRError, match="SS2006.*test.opaque.default has no source"):
        print_python(changed)
