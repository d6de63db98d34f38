"""Each invariant of the verifier, broken once, and what it says."""

from dataclasses import replace

import pytest
import torch

from shoestring.ir import Function, Op, Output, Role, Symbol, TensorType, Value, parse, verify
from shoestring.ir.errors import IRError

STEP = """func @step {
  parameter %w: f32[8,4] "weight" -> %w.new
  batch %x: f32[2,8] "#batch.0"
  %y: f32[2,4] = aten.mm.default(%x, %w) loc("model.py":12 "linear" forward)
  %s: f32[] = aten.sum.default(%y)
  %w.new: f32[8,4] = aten.mul.Tensor(%w, 0.5)
  return loss=%s
}
"""


def refused(function: Function) -> IRError:
    with pytest.raises(IRError) as caught:
        verify(function)
    return caught.value


def with_op(function: Function, index: int, op: Op) -> Function:
    ops = list(function.ops)
    ops[index] = op
    return Function(function.name, function.params, tuple(ops), function.outputs)


@pytest.fixture
def step() -> Function:
    return parse(STEP)


def test_a_right_function(step: Function) -> None:
    verify(step)


def test_1_defined_once(step: Function) -> None:
    error = refused(with_op(step, 1, step.ops[0]))
    assert (error.code, error.what) == ("SS2101", "in @step: %y is defined twice")


def test_1_defined_before_use(step: Function) -> None:
    swapped = (step.ops[1], step.ops[0], step.ops[2])
    error = refused(Function("step", step.params, swapped, step.outputs))
    assert error.code == "SS2102"
    assert error.what == "in @step: aten.sum.default reads %y before it is defined"
    assert "> %s: f32[] = aten.sum.default(%y)" in error.where


def test_the_place_is_the_users_line(step: Function) -> None:
    error = refused(with_op(step, 0, replace(step.ops[0], operands=(step.ops[0].inputs[0],))))
    assert error.where.startswith("model.py:12 (linear)\n> %y")
    assert "  %s: f32[] = aten.sum.default(%y)" in error.where


def test_2_unique_names(step: Function) -> None:
    error = refused(
        with_op(step, 1, replace(step.ops[1], results=(Value(step.ops[1].result.type, "x"),)))
    )
    assert (error.code, error.what) == ("SS2103", "in @step: two values are named %x")


def test_3_operands(step: Function) -> None:
    error = refused(with_op(step, 0, replace(step.ops[0], operands=step.ops[0].operands[:1])))
    assert error.code == "SS2104"
    assert error.what == "in @step: aten.mm.default takes 2 operands (self, mat2), found 1"


def test_3_attributes(step: Function) -> None:
    error = refused(with_op(step, 1, replace(step.ops[1], attrs={"dtyp": None})))
    assert (error.code, error.what) == (
        "SS2104",
        "in @step: aten.sum.default has no attribute dtyp",
    )


def test_4_result_types(step: Function) -> None:
    error = refused(parse(STEP.replace("%s: f32[]", "%s: f32[4]")))
    assert (error.code, error.what) == (
        "SS2105",
        "in @step: aten.sum.default gives f32[], written f32[4]",
    )


def test_4_operands_that_do_not_fit(step: Function) -> None:
    error = refused(parse(STEP.replace("%x: f32[2,8]", "%x: f32[2,9]")))
    assert error.code == "SS2105"
    assert error.what.startswith("in @step: aten.mm.default refuses its operands: ")


def test_4_can_be_left_out(step: Function) -> None:
    verify(parse(STEP.replace("%s: f32[]", "%s: f32[4]")), types=False)


def test_5_outputs(step: Function) -> None:
    other = Value(TensorType(torch.float32, ()), "z")
    error = refused(Function("step", step.params, step.ops, (Output("loss", other),)))
    assert (error.code, error.what) == ("SS2106", "in @step: output loss is not defined")


def test_5_next_values(step: Function) -> None:
    def with_next(value: Value) -> Function:
        first = replace(step.params[0], next=value)
        return Function("step", (first, step.params[1]), step.ops, step.outputs)

    error = refused(with_next(Value(step.params[0].value.type, "z")))
    assert error.what == "in @step: the next value of 'weight' is not defined"
    error = refused(with_next(step.ops[0].result))
    assert error.what == "in @step: 'weight' is f32[8,4], its next value f32[2,4]"


def test_5_only_state_has_a_next_value(step: Function) -> None:
    first = replace(step.params[0], role=Role.HYPER)
    error = refused(Function("step", (first, step.params[1]), step.ops, step.outputs))
    assert (error.code, error.what) == ("SS2106", "in @step: hyper 'weight' has a next value")


def test_6_paths(step: Function) -> None:
    error = refused(parse(STEP.replace("#batch.0", "weight")))
    assert (error.code, error.what) == ("SS2107", "in @step: two parameters are called 'weight'")


def test_symbolic_dimensions_pass_without_inference() -> None:
    function = parse(STEP.replace("[2,", "[batch,"))
    assert function.ops[0].result.type.shape[0] == Symbol("batch")
    verify(function)


def test_a_function_without_ops() -> None:
    x = Value(TensorType(torch.float32, ()), "x")
    error = refused(Function("empty", (), (), (Output("y", x),)))
    assert (error.code, error.where) == ("SS2106", "")
