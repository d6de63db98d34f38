"""Every sharding rule by brute force: split each factor, run the parts, put them together.

Calls come from OpInfo samples (`sharding_calls.txt` says which ops a sample's function has), from
`EXTRA` and from small models. Factors of at least three units are split unevenly.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from shoestring.frontend.capture import capture_step
from shoestring.ir import (
    REGISTRY,
    FactorMap,
    Function,
    Op,
    Value,
    core_set,
    make_op,
    parse_type,
    trace,
)
from shoestring.ir.ops.aten import find_overload, replicate
from shoestring.ir.ops.parts import factor_size

from ..corpora.opinfo import bind, capture, cases, ops
from ..corpora.sharding import Call, broken, calls

# For each op, the name and number of an OpInfo sample whose function has it and can be split.
LINES = Path(__file__).with_name("sharding_calls.txt").read_text().splitlines()
FROM_OPINFO: dict[tuple[str, int], list[str]] = {}
for _op, _name, _index in (line.split("\t") for line in LINES):
    FROM_OPINFO.setdefault((_name, int(_index)), []).append(_op)
INFOS = {info.formatted_name: info for info in ops()}
RULED = {name for name, op in REGISTRY.items() if op.factors is not replicate}
# Core ops that have no rule: nothing to split, or elements counted through the whole tensor.
WHOLE = {
    "aten.mean.default",
    "aten.prod.default",
    "aten.squeeze.default",
    "aten.arange.start_step",
    "aten.as_strided.default",
    "aten.as_strided_scatter.default",
    "aten.full.default",
    "ir.constant.default",
    "rng.advance.default",
    "rng.bits.default",
    "rng.uniform.default",
}
aten = torch.ops.aten
I64, F32, BOOL = "i64[6,4]", "f32[6,4]", "bool[6,4]"
IMAGE, VOLUME = "f32[3,5,6,6]", "f32[3,2,4,4,4]"


def backward(f: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The gradient of `f` for its first argument."""

    def g(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            y = f(leaf, *rest)
            return torch.autograd.grad(y, leaf, y.detach())[0]

    return g


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask)


QKV = ["f32[3,4,8,16]"] * 3
GROUPED = ["f32[3,4,8,16]", "f32[3,2,8,16]", "f32[3,2,8,16]"]


def grouped_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]
    return out


# What no OpInfo sample leads to: a program, its argument types and the op that it has.
EXTRA: list[tuple[Callable[..., Any], list[str], str]] = [
    (
        lambda x: F.batch_norm(x, None, None, training=True),
        [IMAGE],
        "_native_batch_norm_legit.no_stats",
    ),
    (attention, QKV, "_scaled_dot_product_flash_attention_for_cpu.default"),
    (backward(attention), QKV, "_scaled_dot_product_flash_attention_for_cpu_backward.default"),
    *(
        (f, [*QKV, mask], f"_scaled_dot_product_flash_attention_for_cpu{name}.default")
        for f, name in ((masked_attention, ""), (backward(masked_attention), "_backward"))
        for mask in ("f32[8,8]", "f32[1,8]", "f32[1,1,8,8]", "f32[3,4,1,8]")
    ),
    (grouped_attention, GROUPED, "_scaled_dot_product_flash_attention_for_cpu.default"),
    (
        backward(grouped_attention),
        GROUPED,
        "_scaled_dot_product_flash_attention_for_cpu_backward.default",
    ),
    (
        lambda x: F.interpolate(x, size=(4, 4), mode="bicubic", antialias=True),
        [IMAGE],
        "_upsample_bicubic2d_aa.default",
    ),
    (lambda x: F.pad(x, (1, 2, 1, 1), "reflect"), [IMAGE], "reflection_pad2d.default"),
    (
        backward(lambda x: F.pad(x, (1, 2, 1, 1), "reflect")),
        [IMAGE],
        "reflection_pad2d_backward.default",
    ),
    (lambda x: F.pad(x, (1,) * 6, "reflect"), [VOLUME], "reflection_pad3d.default"),
    (
        backward(lambda x: F.pad(x, (1,) * 6, "reflect")),
        [VOLUME],
        "reflection_pad3d_backward.default",
    ),
    (lambda x: F.pad(x, (1,) * 6, "replicate"), [VOLUME], "replication_pad3d.default"),
    (
        backward(lambda x: F.pad(x, (1,) * 6, "replicate")),
        [VOLUME],
        "replication_pad3d_backward.default",
    ),
    (lambda x: x.view(torch.int32), [F32], "view.dtype"),
    (lambda x: x.view(torch.int16), [F32], "view.dtype"),
    (lambda x, i: aten.scatter.reduce(x, 1, i % 4, x, reduce="add"), [F32, I64], "scatter.reduce"),
    (
        lambda x, i: aten.scatter.value_reduce(x, 1, i % 4, 2.0, reduce="multiply"),
        [F32, I64],
        "scatter.value_reduce",
    ),
    (lambda x: aten.copy.default(x, x[0]), [F32], "copy.default"),
    (lambda x: aten.fill.Tensor(x, x[0, 0]), [F32], "fill.Tensor"),
    (lambda x: aten.clamp_max.default(x, 0.5), [F32], "clamp_max.default"),
    (
        lambda x, w: F.conv_transpose2d(x, w, stride=2),
        [IMAGE, "f32[5,4,3,3]"],
        "convolution.default",
    ),
    (
        backward(lambda x, w: F.conv2d(x, w)),
        [IMAGE, "f32[4,5,3,3]"],
        "convolution_backward.default",
    ),
    (lambda x: x.reshape(6, 2, 2).reshape(12, 2), [F32], "view.default"),
    (lambda x: x.reshape(3, 8).reshape(2, 12), [F32], "view.default"),
]


def check(function: Function, arguments: list[torch.Tensor]) -> set[str]:
    """Asserts that every rule met holds; the ops of which something was split."""
    split: set[str] = set()
    for call in calls(function, arguments):
        assert not list(broken(call))
        if is_split(call.op):
            split.add(call.op.name)
    return split


def is_split(op: Op) -> bool:
    rule = op.opdef.factors(op)
    return rule is not None and any(factor_size(op, rule, f) > 1 for f in rule.factors)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Deprecated operators warn; they have rules all the same."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize(("name", "index"), FROM_OPINFO)
def test_rules_of_opinfo(name: str, index: int) -> None:
    captured = capture(list(cases(INFOS[name], index + 1))[index])
    assert captured is not None
    split = check(captured.function, bind(captured))
    assert not set(FROM_OPINFO[name, index]) - split


@pytest.mark.parametrize(("f", "types", "op"), EXTRA, ids=[e[2] for e in EXTRA])
def test_rules_of_other_ops(f: Callable[..., Any], types: list[str], op: str) -> None:
    function = trace(f, [parse_type(t) for t in types])
    assert f"aten.{op}" in check(function, arguments_of(function))


def arguments_of(function: Function) -> list[torch.Tensor]:
    """Numbers of the right types."""
    torch.manual_seed(0)
    return [number(p.value) for p in function.params]


def number(v: Value) -> torch.Tensor:
    if v.type.dtype.is_floating_point or v.type.dtype.is_complex:
        return torch.randn(v.type.static_shape, dtype=v.type.dtype)
    return torch.randint(0, 2, v.type.static_shape).to(v.type.dtype)


def test_rules_of_direct_calls() -> None:
    """Overloads that PyTorch's Python interface does not lead to."""
    x, i, c, z, image, line, volume, square, index = values(
        F32, I64, BOOL, "c64[6,4]", IMAGE, "f32[3,4,5]", VOLUME, "f32[3,4,4]", "i64[2]"
    )
    scalar = values("f32[]")[0]
    grads = values("f32[3,4,10]", "f32[3,5,12,12]", "f32[3,2,8,8,8]")
    given: dict[str, tuple[Any, ...]] = {
        "bitwise_and.Scalar": (i, 5),
        "bitwise_or.Scalar": (i, 5),
        "bitwise_xor.Scalar": (i, 5),
        "copysign.Scalar": (x, -1.0),
        "conj_physical.default": (z,),
        "div.Scalar_mode": (x, 2.0, "floor"),
        "floor_divide.Scalar": (x, 2.0),
        "fmod.Scalar": (x, 0.5),
        "positive.default": (x,),
        "square.default": (x,),
        "silu_backward.default": (x, x),
        "mish_backward.default": (x, x),
        "alias.default": (x,),
        "detach.default": (x,),
        "where.Scalar": (c, 1.0, 2.0),
        "where.ScalarOther": (c, x, 2.0),
        "where.ScalarSelf": (c, 1.0, x),
        "xlogy.Scalar_Other": (x, 2.0),
        "xlogy.Scalar_Self": (2.0, x),
        "index_fill.int_Tensor": (x, 0, index, scalar),
        "avg_pool1d.default": (line, (2,)),
        "im2col.default": (image, (2, 2), (1, 1), (0, 0), (1, 1)),
        "ormqr.default": (square, values("f32[3,4]")[0], square),
        "pixel_shuffle.default": (values("f32[3,4,5,5]")[0], 2),
        "pixel_unshuffle.default": (image, 2),
        "_int_mm.default": tuple(values("i8[4,6]", "i8[6,8]")),
    }
    for kind in ("upsample_nearest", "_upsample_nearest_exact"):
        for rank, source, grad in zip("123", (line, image, volume), grads, strict=True):
            shape = source.type.static_shape
            large = tuple(2 * n for n in shape[2:])
            given[f"{kind}{rank}d.default"] = (source, large)
            given[f"{kind}{rank}d_backward.default"] = (grad, large, shape)
    for name, arguments in given.items():
        op = direct(f"aten.{name}", arguments)
        inputs = [number(v) for v in op.inputs]
        call = Call(op, inputs, [run(op, inputs)])
        assert not list(broken(call))
        assert is_split(op), name
    others = FROM_OTHERS.union(*FROM_MODELS.values())
    assert {f"aten.{n}" for n in given} | others >= RULED


def values(*types: str) -> list[Value]:
    return [Value(parse_type(t), f"x{i}") for i, t in enumerate(types)]


FROM_MODELS = {
    name: {f"recurrence.{name}.default", f"recurrence.{name}_backward.default"}
    for name in ("lstm", "gru", "rnn")
}
FROM_OTHERS = {n for names in FROM_OPINFO.values() for n in names} | {f"aten.{e[2]}" for e in EXTRA}


def direct(name: str, arguments: tuple[Any, ...]) -> Op:
    """A call with arguments in the order of the schema."""
    draft = make_op(name, (), {})
    schema = find_overload(name)._schema.arguments  # pyright: ignore[reportPrivateUsage]
    operands: list[Any] = []
    attrs = dict(draft.attrs)
    for argument, given in zip(schema, arguments, strict=False):
        if argument.name in draft.opdef.operand_names:
            operands.append(given)
        else:
            attrs[argument.name] = given
    op = Op(draft.opdef, tuple(operands), attrs, ())
    results = tuple(Value(t, f"r{i}") for i, t in enumerate(op.opdef.infer(op)))
    return Op(draft.opdef, tuple(operands), attrs, results)


def run(op: Op, inputs: list[torch.Tensor]) -> torch.Tensor:
    rest = iter(inputs)
    operands = [next(rest) if isinstance(o, Value) else o for o in op.operands]
    result = op.opdef.reference(*operands, **op.attrs)
    assert isinstance(result, torch.Tensor)
    return result


def test_core_ops_without_a_rule() -> None:
    assert {op.name for op in core_set() if op.factors is replicate} == WHOLE


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "transformer": lambda: torch.nn.TransformerEncoderLayer(
        8, 2, 16, dropout=0.0, batch_first=True
    ),
    "lstm": lambda: torch.nn.LSTM(8, 6, batch_first=True),
    "gru": lambda: torch.nn.GRU(8, 6, bidirectional=True),
    "rnn": lambda: torch.nn.RNN(8, 6, 2),
    "convolution": lambda: torch.nn.Sequential(
        torch.nn.Unflatten(2, (2, 4)),
        torch.nn.Conv2d(5, 4, 2, padding=1),
        torch.nn.GroupNorm(2, 4),
        torch.nn.ReLU(),
        torch.nn.BatchNorm2d(4),
        torch.nn.MaxPool2d(2),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_rules_in_a_training_step(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()

    def loss(m: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = m(x)
        return (y[0] if isinstance(y, tuple) else y).square().mean()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    function = capture_step(model, loss, optimizer, (torch.randn(3, 5, 8),)).function
    checked = check(function, arguments_of(function))
    assert len(checked) >= 5 and set(checked) >= FROM_MODELS.get(name, set())


def test_a_reshape_splits_what_is_outermost() -> None:
    """[6,4] -> [24] and [6,4] -> [8,3]: the same fraction of both outermost dimensions."""
    x = Value(parse_type(F32), "x")
    merged = direct("aten.view.default", (x, (24,)))
    rule = merged.opdef.factors(merged)
    assert rule == FactorMap((("d0", None),), (("d0",),))
    assert factor_size(merged, rule, "d0") == 6
    regrouped = direct("aten.view.default", (x, (8, 3)))
    rule = regrouped.opdef.factors(regrouped)
    assert rule is not None and factor_size(regrouped, rule, "d0") == 2


def test_a_wrong_rule_is_found() -> None:
    """The check itself: a cumulative sum cannot be split along its dimension."""
    from dataclasses import replace

    op = direct("aten.cumsum.default", (Value(parse_type(F32), "x"), 0))
    names = ("a", "b")
    wrong = replace(op.opdef, factors=lambda op: FactorMap((names,), (names,)))
    x = torch.randn(6, 4)
    call = Call(replace(op, opdef=wrong), [x], [x.cumsum(0)])
    (complaint,) = broken(call)
    assert "split by a: result 0" in complaint
