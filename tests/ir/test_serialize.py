"""Programs as bytes."""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

from shoestring.backends.c import CBackend
from shoestring.ir import (
    DTYPE_NAMES,
    Builder,
    Function,
    OpDef,
    Phase,
    Role,
    lookup,
    parse_type,
    same_structure,
    verify,
)
from shoestring.ir.errors import IRError
from shoestring.ir.serialize import dumps, loads


def function() -> Function:
    b = Builder("f")
    w = b.param(parse_type("f32[4,4]"), Role.PARAMETER, "w")
    y = b.emit("aten.mm.default", w, w)
    b.output("y", b.emit("aten.sum.dim_IntList", y, dim=(0,), dtype=torch.float64))
    b.output("z", b.emit("aten.clamp.default", y, min=-0.0, max=float("inf")))
    b.replace_state(w, b.emit("aten.add.Tensor", w, y, alpha=1 + 2**-52))
    return b.build()


def test_a_function_is_itself_again() -> None:
    before = function()
    after = loads(dumps(before))
    verify(after)
    assert same_structure(after, before)
    assert all(a.opdef is b.opdef for a, b in zip(after.ops, before.ops, strict=True))
    assert after.params[0].next is after.ops[-1].result


def test_what_was_one_object_is_one_object() -> None:
    f = function()
    g, (op, value) = loads(dumps((f, (f.ops[0], f.ops[0].result))))
    assert op is g.ops[0] and value is g.ops[0].result
    assert g.producer(value) is op


def test_a_lowered_program_runs_as_before() -> None:
    backend = CBackend()
    lowered = backend.lower(function())
    again = loads(dumps(lowered))
    assert str(again.program) == str(lowered.program)
    assert again.sources == lowered.sources and again.kernels == lowered.kernels
    one, two = torch.randn(4, 4), torch.empty(4, 4)
    two.copy_(one)
    wanted, found = backend.load(lowered).run([one]), backend.load(again).run([two])
    assert all(map(torch.equal, found, wanted)) and torch.equal(one, two)


@pytest.mark.parametrize("dtype", list(DTYPE_NAMES), ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("shape", [(), (3, 5), (2, 0, 3)])
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_tensors(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    whole = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8) & 1
    t = whole.view(dtype).reshape(shape)
    again = loads(dumps(t))
    assert again.dtype is dtype and again.shape == t.shape
    assert torch.equal(again.reshape(-1).view(torch.uint8), t.reshape(-1).view(torch.uint8))


def test_tensors_of_odd_layout() -> None:
    whole = torch.randn(6, 4, dtype=torch.complex64)
    for t in (whole.t(), whole[::2, 1:], whole.conj(), whole.real[3], whole.imag.neg()):
        assert torch.equal(loads(dumps(t)), t)
    assert loads(dumps(torch.tensor(float("nan")))).isnan()


def test_plain_values() -> None:
    values = (
        1,
        -0.0,
        2.5 + 1j,
        "ü",
        None,
        True,
        [1, (2,)],
        {"a": {3}},
        frozenset("x"),
        Phase.UPDATE,
    )
    assert repr(loads(dumps(values))) == repr(values)
    assert loads(dumps(1e400)) == float("inf")


@dataclass(frozen=True)
class Foreign:
    """No part of a program."""

    number: int


class Subclass(torch.Tensor):
    pass


def _own_op() -> OpDef:
    return replace(lookup("aten.exp.default"), doc="mine")


@pytest.mark.parametrize(
    "value",
    [lambda: 1, torch.ones(2, requires_grad=True), torch.ones(2).as_subclass(Subclass),
     torch.ones(2, device="meta"), _own_op(), open(os.devnull)],
    ids=["function", "gradient", "subclass", "meta", "op", "file"],
)  # fmt: skip
def test_what_cannot_be_written_is_refused(value: Any) -> None:
    with pytest.raises(IRError, match="SS2007"):
        dumps([value])


@pytest.mark.parametrize(
    "value",
    [Foreign(1), os.system, eval, nn.Linear, CBackend.lower, torch.load, pickle.loads, verify],
    ids=lambda v: getattr(v, "__name__", "foreign"),
)  # fmt: skip
def test_what_is_no_part_of_a_program_is_not_read(value: Any) -> None:
    with pytest.raises(IRError, match="SS2007"):
        loads(pickle.dumps(value))


class Call:
    """Calls a function when it is read."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


def test_nothing_is_executed(tmp_path: Any) -> None:
    made = tmp_path / "made"
    for call in (Call(os.system, f"touch {made}"), Call(exec, f"open({str(made)!r}, 'w')")):
        with pytest.raises(IRError, match="SS2007"):
            loads(pickle.dumps(call))
    assert not made.exists()


@pytest.mark.parametrize("data", [b"", b"\x80", b"hello", dumps(function())[:-20]])
def test_damaged_bytes(data: bytes) -> None:
    with pytest.raises(IRError, match="SS2007"):
        loads(data)
