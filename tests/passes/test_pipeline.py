"""The pipeline records, verifies, disables and finds the wrong pass."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from shoestring.ir import Function, Op, TensorType, Value, interpret, make_op, parse
from shoestring.ir.errors import PassError
from shoestring.passes import Numerics, Pass, PassReport, Pipeline, check
from shoestring.passes.canonicalize import Canonicalize
from shoestring.passes.common_subexpressions import CommonSubexpressions
from shoestring.passes.dead_code import DeadCode
from shoestring.passes.pipeline import bisect
from shoestring.passes.simplify_algebra import SimplifyAlgebra

FUNCTION = parse("""
func @f {
  parameter %w: f32[3] "w" -> %n
  batch %x: f32[3] "x"
  %a: f32[3] = aten.exp.default(%x)
  %b: f32[3] = aten.exp.default(%x)
  %dead: f32[3] = aten.neg.default(%b)
  %n: f32[3] = aten.add.Tensor(%w, %b)
  %y: f32[3] = aten.mul.Tensor(%a, %b)
  return y=%y
}
""")
ARGUMENTS = [torch.tensor([1.0, -2.0, 0.0]), torch.tensor([0.5, float("nan"), -0.0])]


@dataclass(frozen=True)
class Edit(Pass):
    """Applies a function; stands for passes with faults."""

    edit: Callable[[Function], Function]
    numerics: ClassVar[Numerics] = Numerics.EXACT

    @property
    def name(self) -> str:
        return "edit"

    def run(self, function: Function) -> tuple[Function, PassReport]:
        return self.edit(function), PassReport(1, 1)


@dataclass(frozen=True)
class Lossy(Edit):
    """Changes the numbers and says so."""

    numerics: ClassVar[Numerics] = Numerics.LOSSY


@dataclass(frozen=True)
class Loose(Edit):
    """Changes the numbers a little and says so."""

    numerics: ClassVar[Numerics] = Numerics.REASSOCIATING


def replace_last(f: Function, name: str, *extra: float) -> Function:
    """The function with another last op."""
    old = f.ops[-1]
    new = make_op(name, (old.operands[0], *(extra or old.operands[1:])), {}, old.loc)
    return f.with_ops([*f.ops[:-1], Op(new.opdef, new.operands, new.attrs, old.results, old.loc)])


def test_records() -> None:
    after, records = Pipeline([CommonSubexpressions(), DeadCode()]).run(FUNCTION)
    assert [r.name for r in records] == ["common_subexpressions", "dead_code"]
    assert [(r.ops_before, r.ops_after) for r in records] == [(5, 4), (4, 3)]
    assert records[0].before is FUNCTION and records[1].after is after
    assert "%dead" in records[0].text_after and "%dead" not in records[1].text_after
    assert all(r.seconds >= 0 for r in records)
    assert "dead_code: 4 -> 3 ops" in str(records[1])


def test_a_pass_without_matches_says_so() -> None:
    _, (record,) = Pipeline([Canonicalize()]).run(FUNCTION)
    assert record.after is FUNCTION and "matched nothing" in str(record)


def test_disable() -> None:
    after, records = Pipeline([CommonSubexpressions(), DeadCode()], disabled=["dead_code"]).run(
        FUNCTION
    )
    assert [r.name for r in records] == ["common_subexpressions"] and len(after.ops) == 4
    with pytest.raises(PassError) as error:
        Pipeline([DeadCode()], disabled=["dead_cod"])
    assert error.value.code == "SS3001" and "'dead_code'" in str(error.value)


def test_input_is_not_changed() -> None:
    ops = FUNCTION.ops
    Pipeline([CommonSubexpressions(), DeadCode()]).run(FUNCTION)
    assert FUNCTION.ops is ops and len(ops) == 5


def fails(f: Function) -> Function:
    raise ValueError("no luck")


def undefined_operand(f: Function) -> Function:
    return f.with_ops(f.ops[1:])


def wrong_type(f: Function) -> Function:
    wide = Value(TensorType(torch.float64, (3,)), "wide")
    extra = make_op("aten.neg.default", (f.params[1].value,), {})
    return f.with_ops([*f.ops, Op(extra.opdef, extra.operands, extra.attrs, (wide,))])


def drop_output(f: Function) -> Function:
    return replace(f, outputs=())


@pytest.mark.parametrize(
    ("edit", "code", "text"),
    [
        (fails, "SS3002", "ValueError: no luck"),
        (undefined_operand, "SS3003", "reads %a before it is defined (SS2102)"),
        (wrong_type, "SS3003", "gives f32[3], written f64[3] (SS2105)"),
        (drop_output, "SS3004", "must keep parameters and outputs"),
    ],
)
def test_faulty_passes_are_named(
    edit: Callable[[Function], Function], code: str, text: str
) -> None:
    with pytest.raises(PassError) as error:
        Pipeline([Canonicalize(), Edit(edit)]).run(FUNCTION)
    assert error.value.code == code
    assert "pass edit" in str(error.value) and text in str(error.value)


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("place", range(4))
def test_check_finds_the_wrong_pass(place: int, every: bool) -> None:
    passes: list[Pass] = [CommonSubexpressions(), DeadCode(), Canonicalize()]
    passes.insert(place, Edit(lambda f: replace_last(f, "aten.sub.Tensor")))
    with pytest.raises(PassError) as error:
        check(FUNCTION, ARGUMENTS, passes, every=every)
    assert error.value.code == "SS3007"
    assert "pass edit promises equal bits; output y: 2 of 3 elements differ" in str(error.value)


def test_exact_means_every_bit() -> None:
    slightly = Edit(lambda f: replace_last(f, "aten.mul.Tensor", 1.0000001))
    f = parse(
        'func @f {\n batch %x: f32[3] "x"\n %y: f32[3] = aten.mul.Tensor(%x, 1.0)\n return y=%y\n}'
    )
    with pytest.raises(PassError):
        check(f, ARGUMENTS[:1], [slightly])
    check(f, ARGUMENTS[:1], [Loose(slightly.edit)])


def test_zero_sign_and_nan() -> None:
    """-0.0 is not 0.0, and NaN equals NaN."""
    f = parse(
        'func @f {\n batch %x: f32[2] "x"\n %y: f32[2] = aten.add.Tensor(%x, -0.0)\n return y=%y\n}'
    )
    x = torch.tensor([-0.0, float("nan")])
    check(f, [x], [Edit(lambda f: replace_last(f, "aten.mul.Tensor", 1.0))])
    with pytest.raises(PassError) as error:
        check(f, [x], [Edit(lambda f: replace_last(f, "aten.add.Tensor", 0.0))])
    assert "element 0 was -0.0, is 0.0" in str(error.value)


def test_products_do_not_hang_on_strides() -> None:
    """[4, 1] of strides (1, 4) is contiguous too, but the product would add in another order."""
    f = parse("""
func @f {
  batch %x: f32[1,4] "x"
  batch %b: f32[1] "b"
  %t: f32[4,1] = aten.permute.default(%x) {dims=[1, 0]}
  %y: f32[1,1] = aten.addmm.default(%b, %x, %t)
  return y=%y
}
""")
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x, b = torch.randn(1, 4, generator=generator), torch.randn(1, generator=generator)
        check(f, [x, b], [SimplifyAlgebra()])
        (found,) = interpret(f, [x, b])[0]
        assert torch.equal(found, torch.addmm(b, x, x.view(4, 1)))


def test_lossy_passes_are_not_compared_across() -> None:
    result = check(
        FUNCTION,
        ARGUMENTS,
        [DeadCode(), Lossy(lambda f: replace_last(f, "aten.sub.Tensor")), CommonSubexpressions()],
    )
    assert result.compared == ["dead_code", "common_subexpressions"] and result.unchecked == [
        "edit"
    ]


def test_bisect_asks_few_stages() -> None:
    asked: list[int] = []

    def is_good(stage: int) -> bool:
        asked.append(stage)
        return stage < 700

    assert bisect(0, 1000, is_good) == 699 and len(asked) <= 10
