"""Every exact pass keeps every bit, on random programs over awkward numbers, shapes and types."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import Phase as Stage

from shoestring.ir import (
    Builder,
    Function,
    Phase,
    Role,
    TensorType,
    Value,
    parse,
    parse_type,
    print_function,
    run_op,
    verify,
)
from shoestring.ir.function import Loc
from shoestring.passes import Numerics, Pipeline, check
from shoestring.passes.canonicalize import Canonicalize
from shoestring.passes.numerics import difference, evaluate
from shoestring.passes.registry import BUILTIN

# Shrinking runs torch's own inference thousands of times; the failing program prints whole instead.
QUICK = settings(
    deadline=None,
    phases=[Stage.explicit, Stage.reuse, Stage.generate],
    suppress_health_check=list(HealthCheck),
)
EXACT = [cls for cls in BUILTIN if cls.numerics is Numerics.EXACT]
FLOATS = [0.0, -0.0, 1.0, -1.0, 2.0, 0.25, 3.0, float("inf"), float("-inf"), float("nan"), 1e-40]
NUMBERS = [0, 1, 2, -1, 0.0, -0.0, 1.0, 2.0, -1.0, 0.5, 3.0, 8, True]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
SHAPES = [(), (1,), (3,), (2, 3), (3, 1), (2, 0), (1, 2, 3)]
UNARY = ["neg", "abs", "relu", "logical_not", "bitwise_not", "sqrt", "clone", "detach", "square"]
BINARY = ["add.Tensor", "sub.Tensor", "mul.Tensor", "div.Tensor", "maximum.default", "rsub.Tensor"]
SCALAR = ["add.Scalar", "sub.Scalar", "mul.Scalar", "div.Scalar", "rsub.Scalar"]


def elements(data: st.DataObject, type_: TensorType) -> torch.Tensor:
    """A tensor of numbers that identities tend to forget."""
    count = type_.numel
    if type_.dtype.is_floating_point:
        values = data.draw(st.lists(st.sampled_from(FLOATS), min_size=count, max_size=count))
    else:
        top = 1 if type_.dtype is torch.bool else 200
        values = data.draw(st.lists(st.integers(0, top), min_size=count, max_size=count))
    return (
        torch.tensor(values, dtype=torch.float64 if type_.dtype.is_floating_point else torch.int64)
        .to(type_.dtype)
        .reshape(type_.static_shape)
    )


def step(data: st.DataObject, b: Builder, values: list[Value], loc: Loc) -> None:
    """Appends one random op, if torch takes it."""
    x = data.draw(st.sampled_from(values))
    y = data.draw(st.sampled_from(values))
    n = data.draw(st.sampled_from(NUMBERS))
    rank, count = x.type.rank, len(b.ops)
    choices = [
        lambda: b.emit(f"aten.{data.draw(st.sampled_from(UNARY))}.default", x, loc=loc),
        lambda: b.emit(f"aten.{data.draw(st.sampled_from(BINARY))}", x, y, loc=loc),
        lambda: b.emit(f"aten.{data.draw(st.sampled_from(SCALAR))}", x, other=n, loc=loc),
        lambda: b.emit("aten.add.Tensor", x, n, loc=loc),
        lambda: b.emit("aten.sub.Tensor", x, n, loc=loc),
        lambda: b.emit("aten.mul.Tensor", x, n, loc=loc),
        lambda: b.emit("aten.div.Tensor", x, n, loc=loc),
        # Of a bool as exponent PyTorch's rule and its kernel give different types.
        lambda: b.emit("aten.pow.Tensor_Scalar", x, exponent=+n, loc=loc),
        lambda: b.emit(
            "aten._to_copy.default", x, dtype=data.draw(st.sampled_from(DTYPES)), loc=loc
        ),
        lambda: b.emit(
            "aten.view.default", x, size=(-1,) if x.type.numel else x.type.shape, loc=loc
        ),
        lambda: b.emit("aten.unsqueeze.default", x, dim=data.draw(st.integers(-1, rank)), loc=loc),
        lambda: b.emit("aten.squeeze.default", x, loc=loc),
        lambda: b.emit("aten.permute.default", x, dims=tuple(range(-1, -rank - 1, -1)), loc=loc),
        lambda: b.emit("aten.expand.default", x, size=(2, *x.type.shape), loc=loc),
        lambda: b.emit("aten.slice.Tensor", x, dim=0, start=0, end=2, loc=loc),
        lambda: b.emit("aten.select.int", x, dim=-1, index=0, loc=loc),
        lambda: b.emit("aten.cat.default", (x,), loc=loc),
        lambda: b.emit("aten.full_like.default", x, fill_value=n, loc=loc),
        lambda: b.emit(
            "aten.full.default", size=x.type.shape, fill_value=n, dtype=x.type.dtype, loc=loc
        ),
        lambda: b.emit("aten.arange.start_step", start=0, end=3, step=1, loc=loc),
        lambda: b.emit("aten.where.self", b.emit("aten.isnan.default", x, loc=loc), x, x, loc=loc),
        lambda: b.emit("aten.mm.default", x, y, loc=loc),
    ]
    try:
        made = data.draw(st.sampled_from(choices))()
        op = b.ops[-1]
        run_op(op, {v: torch.zeros(v.type.static_shape, dtype=v.type.dtype) for v in op.inputs})
        values.append(made)
    except (RuntimeError, TypeError, IndexError):
        del b.ops[count:]  # torch refuses these operands: another op comes next


def program(data: st.DataObject) -> Function:
    b = Builder("random", "v")
    values = [
        b.param(
            TensorType(data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(SHAPES))),
            role,
            f"p{i}",
        )
        for i, role in enumerate([Role.BATCH, Role.BATCH, Role.PARAMETER])
    ]
    for phase in (Phase.FORWARD, Phase.BACKWARD, Phase.UPDATE):
        for _ in range(data.draw(st.integers(1, 5))):
            step(data, b, values, Loc(phase=phase))
    for i, v in enumerate(values[-4:]):
        b.output(f"o{i}", v)
    return b.build()


@settings(QUICK, max_examples=60)
@given(st.data())
def test_random_programs_keep_every_bit(data: st.DataObject) -> None:
    f = program(data)
    arguments = [elements(data, p.value.type) for p in f.params]
    note(print_function(f))
    note(str(arguments))
    check(f, arguments, [cls() for cls in EXACT], every=True)


@settings(QUICK, max_examples=15)
@given(st.data())
def test_second_run_changes_nothing(data: st.DataObject) -> None:
    """Rules reach their fixpoint in one run."""
    f = program(data)
    for cls in EXACT:
        if cls.__name__ in ("Rematerialize", "FoldConstants"):
            continue
        once, _ = cls().run(f)
        _, report = cls().run(once)
        assert report.changed == 0, (cls, report)


IDENTITIES = {
    "x + -0.0": ("aten.add.Tensor(%x, -0.0)", 0),
    "x + 0.0": ("aten.add.Tensor(%x, 0.0)", 1),
    "x + 0": ("aten.add.Tensor(%x, 0)", 1),
    "x - 0.0": ("aten.sub.Tensor(%x, 0.0)", 0),
    "x - -0.0": ("aten.sub.Tensor(%x, -0.0)", 1),
    "x * 1": ("aten.mul.Tensor(%x, 1)", 0),
    "x * 0": ("aten.mul.Tensor(%x, 0)", 1),
    "x / 1": ("aten.div.Tensor(%x, 1.0)", 0),
    "x / 3": ("aten.div.Tensor(%x, 3.0)", 1),
    "x ^ 1": ("aten.pow.Tensor_Scalar(%x) {exponent=1}", 0),
    "x - x": ("aten.sub.Tensor(%x, %x)", 1),
    "max(x, x)": ("aten.maximum.default(%x, %x)", 0),
    "expand": ("aten.expand.default(%x) {size=[4]}", 0),
    "slice": ("aten.slice.Tensor(%x) {start=0, end=9223372036854775807}", 0),
    "cast": ("aten._to_copy.default(%x) {dtype=f32}", 0),
    "pad": ("aten.constant_pad_nd.default(%x) {pad=[0, 0]}", 0),
}


@pytest.mark.parametrize("case", IDENTITIES)
def test_float_identities(case: str) -> None:
    line, left = IDENTITIES[case]
    f = parse(f'func @f {{\n batch %x: f32[4] "x"\n %y: f32[4] = {line}\n return y=%y\n}}')
    g, _ = Pipeline([cls() for cls in EXACT]).run(f)
    verify(g)
    assert len(g.ops) == left
    x = torch.tensor([-0.0, float("nan"), float("-inf"), 1e-42])
    assert difference(evaluate(f, [x]), evaluate(g, [x]), exact=True) is None


@pytest.mark.parametrize("dtype", ["i64", "u8", "bool", "bf16", "f64"])
def test_promotion_is_kept(dtype: str) -> None:
    """An op that does nothing but promote stays."""
    f = Builder("f")
    x = f.param(parse_type(f"{dtype}[2]"), Role.BATCH, "x")
    for n in (0, 0.0, -0.0, 1, 1.0, True):
        for name in ("add", "mul", "div"):
            f.output(f"{name}{n!r}", f.emit(f"aten.{name}.Tensor", x, n))
    function = f.build()
    g, _ = Pipeline([cls() for cls in EXACT]).run(function)
    assert [o.value.type for o in g.outputs] == [o.value.type for o in function.outputs]
    argument = torch.tensor([0, 1]).to(x.type.dtype)
    assert difference(evaluate(function, [argument]), evaluate(g, [argument]), exact=True) is None


def test_an_operand_that_is_read_for_its_sizes_only_is_not_kept() -> None:
    b = Builder("f")
    grad = b.param(parse_type("f32[1,1,2,2]"), Role.BATCH, "grad")
    x = b.param(parse_type("f32[1,1,4,4]"), Role.BATCH, "x")
    places = b.param(parse_type("i64[1,1,2,2]"), Role.BATCH, "places")
    sizes: dict[str, Any] = {
        "kernel_size": (2, 2),
        "stride": (2, 2),
        "padding": (0, 0),
        "dilation": (1, 1),
    }
    name = "aten.max_pool2d_with_indices_backward.default"
    found = b.emit(name, grad, x, places, **sizes, ceil_mode=False)
    b.output("y", found)
    function = b.build()
    once, report = Canonicalize().run(function)
    assert report.changed == 1
    assert x not in {v for op in once.ops for v in op.inputs}
    assert Canonicalize().run(once)[1].changed == 0
