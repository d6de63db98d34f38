"""What is computed at compile time, bit for bit, and what never is."""

import pytest
import torch

from shoestring.ir import parse, verify
from shoestring.passes.fold_constants import FoldConstants
from shoestring.passes.numerics import difference, evaluate

FULL = "aten.full.default() {{size=[{size}], fill_value={fill}, dtype={dtype}}}"


def folded(text: str) -> tuple[list[str], list[object]]:
    """Names of the ops after folding, and the data of constants."""
    f = parse(text)
    g, _ = FoldConstants().run(f)
    verify(g)
    arguments = [torch.zeros(p.value.type.static_shape, dtype=p.value.type.dtype) for p in f.params]
    assert difference(evaluate(f, arguments), evaluate(g, arguments), exact=True) is None
    return [op.name for op in g.ops], [op.attrs.get("data") for op in g.ops]


@pytest.mark.parametrize("fill", ["-0.0", "nan", "inf", "0.1", "1e-45", "3"])
@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
@pytest.mark.parametrize("size", ["", "3", "1000, 1000", "0, 2"])
def test_fills(fill: str, dtype: str, size: str) -> None:
    full = FULL.format(size=size, fill=fill, dtype=dtype)
    names, _ = folded(f"func @f {{\n %a: {dtype}[{size}] = {full}\n return a=%a\n}}")
    assert names == ["ir.constant.default"]


def test_uniform_values_stay_one_number_at_any_size() -> None:
    full = FULL.format(size="100000, 1000", fill="2.0", dtype="f32")
    names, data = folded(f"""
func @f {{
  %a: f32[100000,1000] = {full}
  %b: f32[100000,1000] = aten.sqrt.default(%a)
  %c: f32[100000] = aten.select.int(%b) {{dim=1, index=3}}
  %d: f32[2] = aten.slice.Tensor(%c) {{end=2}}
  return d=%d
}}
""")
    assert set(names) == {"ir.constant.default"}
    assert data[1] == data[2] == data[3] == (1.4142135381698608,)


def test_bit_casts_are_evaluated() -> None:
    full = FULL.format(size="2", fill="1.0", dtype="f32")
    _, data = folded(
        f"func @f {{\n %a: f32[2] = {full}\n %b: i32[2] = aten.view.dtype(%a) {{dtype=i32}}\n"
        " %c: i16[4] = aten.view.dtype(%a) {dtype=i16}\n return b=%b, c=%c\n}"
    )
    assert data[1:] == [(0x3F800000,), (0, 0x3F80, 0, 0x3F80)]


def test_large_results_stay() -> None:
    arange = "aten.arange.start_step() {start=0, end=100, step=1}"
    f = parse(f"func @f {{\n %a: i64[100] = {arange}\n return a=%a\n}}")
    g, report = FoldConstants().run(f)
    assert g is f and "more than 64 elements" in str(report)


def test_random_numbers_and_undefined_memory_stay() -> None:
    names, _ = folded(
        "func @f {\n %k: i64[2] = ir.constant.default() {data=[1, 2], shape=[2], dtype=i64}\n"
        " %u: f32[1] = rng.uniform.default(%k) {site=0, shape=[1], dtype=f32}\n return u=%u\n}"
    )
    assert names == ["ir.constant.default", "rng.uniform.default"]
    f = parse(
        "func @f {\n %a: f32[2] = aten.empty.memory_format() {size=[2], dtype=f32}\n return\n}"
    )
    assert FoldConstants().run(f)[0] is f


@pytest.mark.parametrize(
    ("x", "constant", "result", "name", "becomes_number"),
    [
        ("f32[4]", "f32[4]", "f32[4]", "mul", True),
        ("bf16[4]", "f32[]", "bf16[4]", "mul", True),
        ("bf16[4]", "f32[4]", "f32[4]", "mul", False),
        ("f32[4]", "f32[3,4]", "f32[3,4]", "add", False),
        ("i64[4]", "f64[]", "f64[4]", "add", False),
        ("i64[4]", "i64[4]", "f32[4]", "div", True),
    ],
)
def test_uniform_operands(
    x: str, constant: str, result: str, name: str, becomes_number: bool
) -> None:
    dtype, size = constant.rstrip("]").split("[")
    full = FULL.format(size=size, fill="3", dtype=dtype)
    f = parse(
        f'func @f {{\n batch %x: {x} "x"\n %c: {constant} = {full}\n'
        f" %y: {result} = aten.{name}.Tensor(%x, %c)\n return y=%y\n}}"
    )
    g, _ = FoldConstants().run(f)
    verify(g)
    assert (g.ops[-1].inputs == (g.params[0].value,)) is becomes_number
    argument = torch.tensor([1.0, -0.3, 7.0, 100.0]).to(f.params[0].value.type.dtype)
    assert difference(evaluate(f, [argument]), evaluate(g, [argument]), exact=True) is None


@pytest.mark.parametrize("size", ["1", "2", "1, 2", "8", "17", "3, 33", "5000"])
@pytest.mark.parametrize("op", ["gelu", "exp", "sin", "tanh", "erf", "log1p", "sigmoid", "silu"])
def test_functions_that_round_by_place(op: str, size: str) -> None:
    """In a vector, behind the last one and of an expanded operand, kernels may round otherwise."""
    full = FULL.format(size=size, fill="-0.5", dtype="f32")
    folded(f"""
func @f {{
  %a: f32[{size}] = {full}
  %b: f32[{size}] = aten.{op}.default(%a)
  %c: f32[{size}] = aten.mul.Tensor(%b, %b)
  %d: f32[{size}] = aten.{op}.default(%c)
  return b=%b, d=%d
}}
""")
