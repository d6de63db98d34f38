"""Pointwise ops as C expressions, with PyTorch's arithmetic op by op.

An expression is computed in one type and rounded to the result's. Rules of that type:

* `result`: the result's type (f16 and bf16: f32);
* `operands`: what PyTorch promotes the operands to, each rounded to it (comparisons);
* `first`: the first operand's own type (isnan);
* `truth`: every operand is first compared with zero (logical_and).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from shoestring.ir import Op

FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
HALVES = frozenset({torch.float16, torch.bfloat16})
REGISTER = {
    torch.float64: "double", torch.float32: "float", torch.float16: "float",
    torch.bfloat16: "float", torch.int64: "int64_t", torch.int32: "int32_t",
    torch.int16: "int16_t", torch.int8: "int8_t", torch.uint8: "uint8_t", torch.bool: "int",
}  # fmt: skip
MEMORY = {**REGISTER, torch.float16: "_Float16", torch.bfloat16: "uint16_t", torch.bool: "uint8_t"}


def opmath(dtype: torch.dtype) -> torch.dtype:
    """The type in which PyTorch computes elements of `dtype`."""
    return torch.float32 if dtype in HALVES else dtype


def literal(value: bool | int | float, dtype: torch.dtype) -> str:
    """A number as a C constant of a type."""
    if dtype is torch.bool:
        return "1" if value else "0"
    if dtype not in FLOATS:
        whole = int(value)
        text = f"INT64_C({whole})" if dtype is torch.int64 else f"(({REGISTER[dtype]}){whole})"
        return "INT64_MIN" if whole == -(1 << 63) else text
    number = float(value)
    if math.isnan(number):
        return "NAN" if dtype is not torch.float64 else "((double)NAN)"
    if opmath(dtype) is torch.float32:
        return _float_literal(number)
    if math.isinf(number):
        return "((double)INFINITY)" if number > 0 else "(-(double)INFINITY)"
    return repr(number) if number >= 0 and not _negative_zero(number) else f"({number!r})"


def number(value: bool | int | float, dtype: torch.dtype) -> str:
    """A number as an operand: in a comparison of halves it is rounded to their type first."""
    if dtype in HALVES:
        return literal(torch.tensor(value, dtype=dtype).item(), dtype)
    return literal(value, dtype)


def _negative_zero(number: float) -> bool:
    return number == 0 and math.copysign(1, number) < 0


def _float_literal(number: float) -> str:
    """The shortest decimal that is the number's nearest f32."""
    import numpy as np

    with np.errstate(over="ignore"):
        single = np.float32(number)
    if math.isinf(float(single)):
        return "INFINITY" if single > 0 else "(-INFINITY)"
    text = str(single)
    text = f"{text}f" if any(c in text for c in ".e") else f"{text}.0f"
    return f"({text})" if text.startswith("-") else text


def load(text: str, dtype: torch.dtype) -> str:
    """A memory element as a register."""
    return f"ss_from_bf16({text})" if dtype is torch.bfloat16 else text


def store(text: str, dtype: torch.dtype) -> str:
    """A register, already rounded, as a memory element."""
    return f"ss_high_half({text})" if dtype is torch.bfloat16 else f"({MEMORY[dtype]})({text})"


def rounded(text: str, dtype: torch.dtype) -> str:
    """A value of the type's arithmetic, rounded to the type."""
    if dtype is torch.bfloat16:
        return f"ss_round_bf16({text})"
    if dtype is torch.float16:
        return f"ss_round_f16({text})"
    if dtype in (torch.int16, torch.int8, torch.uint8):
        return f"({REGISTER[dtype]})({text})"
    return text


def cast(text: str, old: torch.dtype, new: torch.dtype) -> str:
    """A register of one type as a register of another: PyTorch's `to`."""
    if old is new:
        return text
    if new is torch.bool:
        return f"({text} != 0)"
    if new in HALVES:
        return rounded(text if opmath(old) is torch.float32 else f"(float)({text})", new)
    if REGISTER[old] == REGISTER[new]:
        return text
    if old in FLOATS and new in (torch.uint8, torch.int8, torch.int16):
        return f"({REGISTER[new]})(int64_t)({text})"
    return f"({REGISTER[new]})({text})"


def widened(text: str, old: torch.dtype, new: torch.dtype) -> str:
    """A register as an operand of arithmetic in `new`: halves stay in f32."""
    return cast(text, old, opmath(new))


Write = Callable[["Use"], str]


@dataclass(frozen=True)
class Use:
    """One use of an expression.

    Attributes:
        args: the operands in the type of the arithmetic; None where absent.
        dtype: that type.
        attrs: the op's attributes.
        index: the element's row-major position, for ops that depend on it.
        result: the result's type.
        raw: the operands before conversion, with their types.
    """

    args: tuple[str | None, ...]
    dtype: torch.dtype
    attrs: dict[str, Any]
    index: str
    result: torch.dtype
    raw: tuple[tuple[str, torch.dtype] | None, ...] = ()

    @property
    def floating(self) -> bool:
        return self.dtype in FLOATS

    @property
    def f(self) -> str:
        """The suffix of C's math functions."""
        return "" if self.dtype is torch.float64 else "f"

    def number(self, value: bool | int | float) -> str:
        return number(value, self.dtype)

    def arg(self, i: int) -> str:
        found = self.args[i]
        assert found is not None, "an operand that the op cannot lack"
        return found


@dataclass(frozen=True)
class Expression:
    """How to write an op, and in what type it computes."""

    write: Write
    rule: str = "result"


def template(text: str, rule: str = "result") -> Expression:
    """`{0}` operand, `{f}` suffix of math functions, `{name}` attribute, `#1.5#` number."""
    parts = text.split("#")

    def write(u: Use) -> str:
        numbers = {k: u.number(v) for k, v in u.attrs.items() if isinstance(v, (bool, int, float))}
        out = [
            u.number(float(p)) if i % 2 else p.format(*u.args, f=u.f, **numbers)
            for i, p in enumerate(parts)
        ]
        return "".join(out)

    return Expression(write, rule)


def by_kind(floating: str, integer: str, rule: str = "result") -> Expression:
    """Two templates: for floating-point arithmetic and for integers."""
    a, b = template(floating, rule), template(integer, rule)
    return Expression(lambda u: (a if u.floating else b).write(u), rule)


def _scaled(sign: str, reverse: bool = False) -> Expression:
    """a + alpha * b and its relatives; `rsub` swaps the two."""

    def write(u: Use) -> str:
        a, b = (u.arg(1), u.arg(0)) if reverse else (u.arg(0), u.arg(1))
        alpha = u.attrs.get("alpha", 1)
        if u.dtype is torch.bool:
            return f"({a} | {b})"
        return f"({a} {sign} {b})" if alpha == 1 else f"({a} {sign} {u.number(alpha)} * {b})"

    return Expression(write)


def _scaled_scalar(sign: str, reverse: bool = False) -> Expression:
    """The same with the second operand an attribute."""

    def write(u: Use) -> str:
        other, alpha = u.attrs["other"], u.attrs.get("alpha", 1)
        number = u.number(other * alpha if not reverse else other)
        if u.dtype is torch.bool:
            return f"({u.arg(0)} | {number})"
        return f"({number} {sign} {u.arg(0)})" if reverse else f"({u.arg(0)} {sign} {number})"

    return Expression(write)


def scalar_form(e: Expression, name: str = "other", position: int = 1) -> Expression:
    """An expression whose operand `position` is the attribute `name`."""

    def write(u: Use) -> str:
        number = u.number(u.attrs[name])
        args = (*u.args[:position], number, *u.args[position:])
        return e.write(Use(args, u.dtype, u.attrs, u.index, u.result, u.raw))

    return Expression(write, e.rule)


def _divide(u: Use) -> str:
    mode = u.attrs.get("rounding_mode")
    a, b = u.arg(0), u.arg(1)
    if mode is None:
        return f"({a} / {b})"
    if u.floating:
        return f"ss_floordiv{u.f}({a}, {b})" if mode == "floor" else f"trunc{u.f}({a} / {b})"
    return f"ss_{'floordiv' if mode == 'floor' else 'truncdiv'}i({a}, {b})"


def _floor_divide(u: Use) -> str:
    return _divide(Use(u.args, u.dtype, {"rounding_mode": "floor"}, u.index, u.result))


POWERS = {
    0.5: "sqrt{f}({0})", 2.0: "({0} * {0})", 3.0: "({0} * {0} * {0})", 1.0: "{0}",
    -1.0: "(#1# / {0})", -2.0: "(#1# / ({0} * {0}))", -0.5: "(#1# / sqrt{f}({0}))",
}  # fmt: skip


def _power_scalar(u: Use) -> str:
    exponent = u.attrs["exponent"]
    if u.floating and float(exponent) in POWERS:
        return template(POWERS[float(exponent)]).write(u)
    return _power(Use((u.arg(0), u.number(exponent)), u.dtype, {}, u.index, u.result))


def _power(u: Use) -> str:
    return f"pow{u.f}({u.arg(0)}, {u.arg(1)})" if u.floating else f"ss_ipow({u.arg(0)}, {u.arg(1)})"


def _power_of_number(u: Use) -> str:
    return _power(Use((u.number(u.attrs["self"]), u.arg(0)), u.dtype, {}, u.index, u.result))


def _max(u: Use, a: str, b: str) -> str:
    return f"ss_max{u.f}({a}, {b})" if u.floating else f"({a} > {b} ? {a} : {b})"


def _min(u: Use, a: str, b: str) -> str:
    return f"ss_min{u.f}({a}, {b})" if u.floating else f"({a} < {b} ? {a} : {b})"


def _clamp(u: Use) -> str:
    text = u.arg(0)
    if u.attrs.get("min") is not None:
        text = _max(u, text, u.number(u.attrs["min"]))
    if u.attrs.get("max") is not None:
        text = _min(u, text, u.number(u.attrs["max"]))
    return text


def _clamp_tensor(u: Use) -> str:
    text = u.arg(0)
    if u.args[1] is not None:
        text = _max(u, text, u.arg(1))
    return text if u.args[2] is None else _min(u, text, u.arg(2))


def _shift(sign: str) -> Expression:
    def write(u: Use) -> str:
        bits = u.dtype.itemsize * 8
        return f"ss_sh{sign}({u.arg(0)}, {u.arg(1)}, {bits})"

    return Expression(write)


def _where(u: Use) -> str:
    raw = u.raw[0]
    assert raw is not None, "where has a condition"
    return f"({raw[0]} ? {u.arg(1)} : {u.arg(2)})"


def _where_attrs(first: bool, second: bool) -> Expression:
    def write(u: Use) -> str:
        a = u.number(u.attrs["self"]) if first else u.arg(1)
        b = u.number(u.attrs["other"]) if second else u.arg(len(u.args) - 1)
        return _where(Use((None, a, b), u.dtype, u.attrs, u.index, u.result, u.raw))

    return Expression(write)


def _masked_fill(u: Use) -> str:
    mask = u.raw[1]
    assert mask is not None, "masked_fill has a mask"
    value = u.number(u.attrs["value"]) if "value" in u.attrs else u.arg(2)
    return f"({mask[0]} ? {value} : {u.arg(0)})"


def _gelu(u: Use) -> str:
    kind = "tanh" if u.attrs.get("approximate") == "tanh" else "erf"
    return f"ss_gelu_{kind}{u.f}({u.arg(0)})"


def _gelu_backward(u: Use) -> str:
    kind = "tanh" if u.attrs.get("approximate") == "tanh" else "erf"
    return f"{u.arg(0)} * ss_gelu_{kind}_grad{u.f}({u.arg(1)})"


def _arange(u: Use) -> str:
    start, step = u.attrs["start"], u.attrs["step"]
    if u.result in FLOATS:
        first, by = literal(start, torch.float64), literal(step, torch.float64)
        return f"({first} + {by} * (double){u.index})"
    return f"({literal(start, torch.int64)} + {literal(step, torch.int64)} * {u.index})"


def _uniform(u: Use) -> str:
    site = u.attrs["site"] & 0xFFFFFFFF
    return f"((float)(ss_philox({u.arg(0)}, {u.arg(1)}, {site}u, {u.index}) >> 8) * 0x1p-24f)"


def _bits(u: Use) -> str:
    site = u.attrs["site"] & 0xFFFFFFFF
    return f"(int64_t)ss_philox({u.arg(0)}, {u.arg(1)}, {site}u, {u.index})"


def _not(u: Use) -> str:
    return f"(!{u.arg(0)})" if u.dtype is torch.bool else f"(~{u.arg(0)})"


def _comparisons() -> dict[str, Expression]:
    signs = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
    table = {f"{n}.Tensor": template(f"({{0}} {s} {{1}})", "operands") for n, s in signs.items()}
    scalars = {f"{n}.Scalar": scalar_form(table[f"{n}.Tensor"]) for n in signs}
    return {**table, **scalars}


def _math(names: str) -> dict[str, Expression]:
    return {f"{n}.default": template(f"{n}{{f}}({{0}})") for n in names.split()}


def _ours(names: str) -> dict[str, Expression]:
    """Functions of the prelude: vectorizable in f32, libm in f64."""
    return {f"{n}.default": template(f"ss_{n}{{f}}({{0}})") for n in names.split()}


def _rounding(names: str) -> dict[str, Expression]:
    return {f"{n}.default": by_kind(f"{n}{{f}}({{0}})", "{0}") for n in names.split()}


_BITWISE = {
    f"bitwise_{n}.{kind}": template(f"({{0}} {s} {{1}})")
    if kind == "Tensor"
    else scalar_form(template(f"({{0}} {s} {{1}})"))
    for n, s in {"and": "&", "or": "|", "xor": "^"}.items()
    for kind in ("Tensor", "Scalar")
}
_MUL = by_kind("({0} * {1})", "({0} * {1})")
_REMAINDER = by_kind("ss_remainder{f}({0}, {1})", "ss_remainderi({0}, {1})")
_FMOD = by_kind("fmod{f}({0}, {1})", "ss_fmodi({0}, {1})")
_COPYSIGN = template("copysign{f}({0}, {1})")
_LERP = template(
    "(fabs{f}({2}) < #0.5# ? {0} + {2} * ({1} - {0}) : {1} - ({1} - {0}) * (#1# - {2}))"
)

TABLE: dict[str, Expression] = {
    **_comparisons(),
    **_BITWISE,
    **_math("acos acosh asin asinh atan atanh cos cosh erfc exp2 expm1 lgamma log10 log1p log2 "
            "sin sinh sqrt tan"),
    **_ours("exp log erf tanh sigmoid"),
    **_rounding("ceil floor trunc"),
    "round.default": by_kind("nearbyint{f}({0})", "{0}"),
    "abs.default": Expression(
        lambda u: f"fabs{u.f}({u.arg(0)})" if u.floating
        else u.arg(0) if u.dtype in (torch.uint8, torch.bool)
        else f"({u.arg(0)} < 0 ? -{u.arg(0)} : {u.arg(0)})"
    ),
    "neg.default": template("(-{0})"),
    "reciprocal.default": template("(#1# / {0})"),
    "rsqrt.default": template("(#1# / sqrt{f}({0}))"),
    "relu.default": template("({0} < #0# ? #0# : {0})"),
    "sign.default": template("(({0} > #0#) - ({0} < #0#))"),
    "sgn.default": template("(({0} > #0#) - ({0} < #0#))"),
    "square.default": template("({0} * {0})"),
    "frac.default": template("({0} - trunc{f}({0}))"),
    "bitwise_not.default": Expression(_not),
    "logical_not.default": template("(!{0})", "truth"),
    "logical_and.default": template("({0} & {1})", "truth"),
    "logical_or.default": template("({0} | {1})", "truth"),
    "logical_xor.default": template("({0} ^ {1})", "truth"),
    "isnan.default": template("({0} != {0})", "first"),
    "isinf.default": by_kind("(fabs{f}({0}) == INFINITY)", "0", "first"),
    "isposinf.default": by_kind("({0} == INFINITY)", "0", "first"),
    "isneginf.default": by_kind("({0} == -INFINITY)", "0", "first"),
    "signbit.default": by_kind("ss_signbit{f}({0})", "({0} < 0)", "first"),
    "add.Tensor": _scaled("+"),
    "sub.Tensor": _scaled("-"),
    "rsub.Tensor": _scaled("-", reverse=True),
    "add.Scalar": _scaled_scalar("+"),
    "sub.Scalar": _scaled_scalar("-"),
    "mul.Tensor": _MUL,
    "mul.Scalar": scalar_form(_MUL),
    "div.Tensor": Expression(_divide),
    "div.Tensor_mode": Expression(_divide),
    "div.Scalar": scalar_form(Expression(_divide)),
    "div.Scalar_mode": scalar_form(Expression(_divide)),
    "floor_divide.default": Expression(_floor_divide),
    "floor_divide.Scalar": scalar_form(Expression(_floor_divide)),
    "remainder.Tensor": _REMAINDER,
    "remainder.Scalar": scalar_form(_REMAINDER),
    "fmod.Tensor": _FMOD,
    "fmod.Scalar": scalar_form(_FMOD),
    "pow.Tensor_Tensor": Expression(_power),
    "pow.Tensor_Scalar": Expression(_power_scalar),
    "pow.Scalar": Expression(_power_of_number),
    "atan2.default": template("atan2{f}({0}, {1})"),
    "hypot.default": template("hypot{f}({0}, {1})"),
    "maximum.default": Expression(lambda u: _max(u, u.arg(0), u.arg(1))),
    "minimum.default": Expression(lambda u: _min(u, u.arg(0), u.arg(1))),
    "fmax.default": by_kind("fmax{f}({0}, {1})", "({0} > {1} ? {0} : {1})"),
    "fmin.default": by_kind("fmin{f}({0}, {1})", "({0} < {1} ? {0} : {1})"),
    "clamp.default": Expression(_clamp),
    "clamp_min.default": Expression(_clamp),
    "clamp_max.default": Expression(_clamp),
    "clamp.Tensor": Expression(_clamp_tensor),
    "clamp_min.Tensor": Expression(lambda u: _max(u, u.arg(0), u.arg(1))),
    "clamp_max.Tensor": Expression(lambda u: _min(u, u.arg(0), u.arg(1))),
    "bitwise_left_shift.Tensor": _shift("l"),
    "bitwise_right_shift.Tensor": _shift("r"),
    "__lshift__.Scalar": scalar_form(_shift("l")),
    "__rshift__.Scalar": scalar_form(_shift("r")),
    "where.self": Expression(_where),
    "where.ScalarOther": _where_attrs(False, True),
    "where.ScalarSelf": _where_attrs(True, False),
    "where.Scalar": _where_attrs(True, True),
    "masked_fill.Scalar": Expression(_masked_fill),
    "masked_fill.Tensor": Expression(_masked_fill),
    "copysign.Tensor": _COPYSIGN,
    "copysign.Scalar": scalar_form(_COPYSIGN),
    "addcmul.default": template("({0} + {value} * {1} * {2})"),
    "addcdiv.default": template("({0} + {value} * ({1} / {2}))"),
    "lerp.Tensor": _LERP,
    "lerp.Scalar": scalar_form(_LERP, "weight", 2),
    "gelu.default": Expression(_gelu),
    "gelu_backward.default": Expression(_gelu_backward),
    "silu.default": template("({0} / (#1# + ss_exp{f}(-{0})))"),
    "silu_backward.default": template("({0} * ss_silu_grad{f}({1}))"),
    "sigmoid_backward.default": template("({0} * (#1# - {1}) * {1})"),
    "tanh_backward.default": template("({0} * (#1# - {1} * {1}))"),
    "threshold_backward.default": template("({1} <= {threshold} ? #0# : {0})"),
    "threshold.default": template("({0} <= {threshold} ? {value} : {0})"),
    "leaky_relu.default": template("({0} > #0# ? {0} : {0} * {negative_slope})"),
    "leaky_relu_backward.default": template("({1} > #0# ? {0} : {0} * {negative_slope})"),
    "hardtanh.default": Expression(
        lambda u: _min(
            u, _max(u, u.arg(0), u.number(u.attrs["min_val"])), u.number(u.attrs["max_val"])
        )
    ),
    "hardtanh_backward.default": template(
        "(({1} > {min_val}) & ({1} < {max_val}) ? {0} : #0#)"
    ),
    "xlogy.Tensor": template("({1} != {1} ? {1} : {0} == #0# ? #0# : {0} * ss_log{f}({1}))"),
    "deg2rad.default": template(f"({{0}} * #{math.pi / 180!r}#)"),
    "rad2deg.default": template(f"({{0}} * #{180 / math.pi!r}#)"),
    "_to_copy.default": template("{0}"),
    "clone.default": template("{0}"),
    "arange.start_step": Expression(_arange, "index"),
}  # fmt: skip
EXPRESSIONS: dict[str, Expression] = {
    **{f"aten.{name}": e for name, e in TABLE.items()},
    "rng.uniform.default": Expression(_uniform, "key"),
    "rng.bits.default": Expression(_bits, "key"),
    "rng.advance.default": Expression(lambda u: f"({u.arg(0)} + ({u.index} == 1))"),
}
# Ops whose second operand, where it is one number, PyTorch does not round to a half's type first.
EXACT_NUMBER = frozenset({"aten.mul.Tensor", "aten.div.Tensor", "aten.div.Tensor_mode"})
# Ops of which every element costs so much that computing it twice costs more than memory.
EXPENSIVE = frozenset(
    f"aten.{n}.default"
    for n in "exp log erf tanh sigmoid gelu gelu_backward silu silu_backward sin cos pow".split()
) | {"aten.pow.Tensor_Tensor", "rng.uniform.default"}
FILLS = {"aten.zeros.default": 0, "aten.ones.default": 1, "aten.zeros_like.default": 0,
         "aten.ones_like.default": 1, "aten.new_zeros.default": 0, "aten.new_ones.default": 1,
         "aten.empty.memory_format": 0, "aten.empty_like.default": 0,
         "aten.new_empty.default": 0}  # fmt: skip


def scalar_fill(op: Op) -> bool | int | float | None:
    """The number that every element of the result is; None for other ops."""
    if op.name in FILLS:
        return FILLS[op.name]
    names = {"aten.full.default": "fill_value", "aten.full_like.default": "fill_value",
             "aten.new_full.default": "fill_value", "aten.scalar_tensor.default": "s"}  # fmt: skip
    if op.name in names:
        value = op.attr(names[op.name])
        return None if isinstance(value, complex) else value
    if op.name == "ir.constant.default" and len(op.attrs["data"]) == 1:
        value = op.attrs["data"][0]
        return None if isinstance(value, complex) else value
    return None


def has_expression(op: Op) -> bool:
    """Whether generated code can carry out the op."""
    if op.name == "aten.pow.Tensor_Scalar" and isinstance(op.attr("exponent"), complex):
        return False
    if op.name in ("aten.clamp.default", "aten.fmod.Tensor") and op.result.type.dtype is torch.bool:
        return False
    return op.name in EXPRESSIONS or scalar_fill(op) is not None


@cache
def _promote(kinds: tuple[tuple[torch.dtype | type, bool], ...]) -> torch.dtype:
    """PyTorch's promotion of tensors (dtype, has dimensions) and Python numbers."""
    current: torch.Tensor | None = None
    numbers: list[Any] = []
    tensors: list[torch.Tensor] = []
    for kind, dims in kinds:
        if isinstance(kind, torch.dtype):
            tensors.append(torch.empty((1,) if dims else (), dtype=kind, device="meta"))
        else:
            numbers.append(kind(1))
    current = tensors[0]
    dtype = current.dtype
    for other in (*tensors[1:], *numbers):
        dtype = torch.result_type(current, other)
        rank = current.dim() or (other.dim() if isinstance(other, torch.Tensor) else 0)
        current = torch.empty((1,) if rank else (), dtype=dtype, device="meta")
    return dtype


def arithmetic_type(
    rule: str, operands: Sequence[Any], attrs: dict[str, Any], result: torch.dtype
) -> torch.dtype:
    """The type in which an op computes. Operands are (dtype, rank), numbers or None."""
    if rule == "truth":
        return torch.bool
    if rule == "key":
        return torch.int64
    tensors = [o for o in operands if isinstance(o, tuple)]
    if rule == "first":
        return opmath(tensors[0][0])
    if rule == "operands":
        numbers = [type(o) for o in operands if isinstance(o, (bool, int, float))]
        if "other" in attrs:
            numbers.append(type(attrs["other"]))
        kinds = tuple((d, rank > 0) for d, rank in tensors) + tuple((t, False) for t in numbers)
        return _promote(kinds)
    if rule == "index":
        return torch.float64 if result in FLOATS else torch.int64
    return opmath(result)
