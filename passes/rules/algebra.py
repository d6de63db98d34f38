"""Identities that hold to the last bit, for -0.0, NaN, infinities, integers and bools.

What is *not* here, and why: x + 0.0 turns -0.0 into 0.0; x * 0 and x - x are NaN for infinities;
(x * a) * b rounds twice; x * (1 / n) rounds differently from x / n unless n is a power of two.
A rule never fires where the result's element type or shape would differ: that is how
`x_bool * 1`, which is an integer, stays.
"""

from __future__ import annotations

from typing import Any

import torch

from shoestring.ir import Value

from ..rewriter import Match, Rule, RuleSet, Term, anything, number, op, rules, value
from .conditions import (
    is_float,
    is_integer,
    is_negative_zero,
    is_one,
    is_positive_zero,
    is_power_of_two,
    is_real,
    widens,
)

x, y = value("x"), value("y")
c = value("c")
n, one = number("n"), number("one", is_one)
plus0, minus0 = number("zero", is_positive_zero), number("zero", is_negative_zero)
two = number("two", lambda k: not isinstance(k, complex) and k == 2)
power = number("n", is_power_of_two)


def no_bool(m: Match) -> bool:
    """Whether torch subtracts these: it refuses bools."""
    return torch.bool not in (m.type("x").dtype, m.type("y").dtype)


def _neg(operand: Any) -> Any:
    return op("aten.neg.default", operand)


ARITHMETIC = rules(
    (op("aten.add.Tensor", x, minus0, alpha=1), x, is_float),  # x + -0.0 -> x
    (op("aten.add.Tensor", x, plus0), x, is_integer),  # i + 0 -> i
    (op("aten.sub.Tensor", x, plus0, alpha=1), x, is_real),  # x - 0 -> x
    (op("aten.mul.Tensor", x, one), x, is_real),  # x * 1 -> x
    (op("aten.div.Tensor", x, one), x, is_real),  # x / 1 -> x
    (op("aten.pow.Tensor_Scalar", x, exponent=one), x, is_real),  # x^1 -> x
    (op("aten.pow.Tensor_Scalar", x, exponent=two), op("aten.mul.Tensor", x, x), is_real),  # x * x
    (op("aten.neg.default", _neg(x)), x),  # -(-x) -> x
    (op("aten.abs.default", _neg(x)), op("aten.abs.default", x), is_float),  # |-x| -> |x|
    (
        op("aten.add.Tensor", x, _neg(y), alpha=1),
        op("aten.sub.Tensor", x, y),
        no_bool,
    ),  # x + -y -> x - y
    (
        op("aten.add.Tensor", _neg(x), y, alpha=1),
        op("aten.sub.Tensor", y, x),
        no_bool,
    ),  # -x + y -> y - x
    (op("aten.sub.Tensor", x, _neg(y), alpha=1), op("aten.add.Tensor", x, y)),  # x - -y -> x + y
    (op("aten.mul.Tensor", _neg(x), _neg(y)), op("aten.mul.Tensor", x, y), is_real),  # -x * -y
    (op("aten.div.Tensor", _neg(x), _neg(y)), op("aten.div.Tensor", x, y), is_float),  # -x / -y
    Rule(
        op("aten.div.Tensor", x, power),
        lambda m: op("aten.mul.Tensor", m["x"], 1.0 / m["n"]),
        is_float,
    ),  # x / 2^k -> x * 2^-k
)

IDEMPOTENT = rules(
    (op("aten.where.self", c, x, x), x),  # where(c, x, x) -> x
    (op("aten.maximum.default", x, x), x),  # max(x, x) -> x
    (op("aten.minimum.default", x, x), x),  # min(x, x) -> x
    (op("aten.bitwise_and.Tensor", x, x), x),  # x & x -> x
    (op("aten.bitwise_or.Tensor", x, x), x),  # x | x -> x
    (op("aten.logical_not.default", op("aten.logical_not.default", x)), x),  # !!b -> b
    (op("aten.bitwise_not.default", op("aten.bitwise_not.default", x)), x),  # ~~i -> i
    (op("aten.relu.default", op("aten.relu.default", x)), op("aten.relu.default", x)),
    (op("aten.abs.default", op("aten.abs.default", x)), op("aten.abs.default", x)),
)


def _cast_once(m: Match) -> Term:
    """cast(cast(x)) in one cast, where the first loses nothing."""
    inner: Value = m["x"]
    if inner.type == m.result:
        return inner
    return op("aten._to_copy.default", inner, dtype=m.result.dtype)


CASTS = rules(
    Rule(
        op("aten._to_copy.default", op("aten._to_copy.default", x, dtype=anything("wide"))),
        _cast_once,
        lambda m: widens(m.type("x").dtype, m["wide"] or m.type("x").dtype),
    ),  # narrow(widen(x)) -> x
)


def _same_shape(m: Match) -> bool:
    return m.type("x").shape == m.result.shape


def _compose(m: Match) -> Term:
    """permute(permute(x, p), q)[i] is x[p[q[i]]]."""
    first, second = m["p"], m["q"]
    return op("aten.permute.default", m["x"], dims=tuple(first[i] for i in second))


def _is_identity(m: Match) -> bool:
    return tuple(d % len(m["p"]) for d in m["p"]) == tuple(range(len(m["p"])))


def _moves_only_ones(m: Match) -> bool:
    """Whether a permutation keeps the order of all dimensions longer than one."""
    shape = m.type("x").shape
    kept = [d % len(shape) for d in m["p"] if shape[d] != 1]
    return m.result.is_static and kept == sorted(kept)


def _reshaped(m: Match) -> Term:
    return op("aten.view.default", m["x"], size=m.result.shape)


def _adds_only_ones(m: Match) -> bool:
    """Whether an expand only adds leading dimensions of size one."""
    shape, new = m.type("x").shape, m.result.shape
    lead = len(new) - len(shape)
    return m.result.is_static and new[lead:] == shape and all(d == 1 for d in new[:lead])


def _takes_all(m: Match) -> bool:
    return m.result.shape == m.type("x").shape and bool(m.root.attr("step") == 1)


def _takes_the_only_one(m: Match) -> bool:
    dim: int = m.root.attr("dim")
    return m.result.is_static and m.type("x").shape[dim] == 1


def _only_member(m: Match) -> Term:
    (member,) = m["list"]
    return member  # type: ignore[no-any-return]


def _is_empty(v: Value) -> bool:
    return v.type.is_static and v.type.numel == 0


def _has_empty_and_full(m: Match) -> bool:
    return any(_is_empty(v) for v in m["list"]) and not all(_is_empty(v) for v in m["list"])


def _without_empty(m: Match) -> Term:
    """Members without elements add nothing; key-value caches begin as such a member."""
    kept = tuple(v for v in m["list"] if not _is_empty(v))
    return kept[0] if len(kept) == 1 else op("aten.cat.default", kept, dim=m.root.attr("dim"))


VIEWS = rules(
    (op("aten.view.default", x), x, _same_shape),  # view(x, its shape) -> x
    (
        op("aten.view.default", op("aten.view.default", x), size=anything("s")),
        op("aten.view.default", x, size=anything("s")),
    ),  # view(view(x, ..), s) -> view(x, s)
    (op("aten.permute.default", x, dims=anything("p")), x, _is_identity),  # permute(x, 0 1) -> x
    Rule(
        op(
            "aten.permute.default",
            op("aten.permute.default", x, dims=anything("p")),
            dims=anything("q"),
        ),
        _compose,
    ),  # permute(permute(x, p), q) -> permute(x, p[q])
    Rule(op("aten.permute.default", x, dims=anything("p")), _reshaped, _moves_only_ones),
    (op("aten.expand.default", x), x, _same_shape),  # expand(x, its shape) -> x
    Rule(op("aten.expand.default", x), _reshaped, _adds_only_ones),  # expand(x, 1 ..) -> view
    (
        op("aten.expand.default", op("aten.expand.default", x), size=anything("s")),
        lambda m: op("aten.expand.default", m["x"], size=m.result.shape),
    ),  # expand(expand(x, ..), s) -> expand(x, s)
    (op("aten.slice.Tensor", x), x, _takes_all),  # x[:] -> x
    Rule(op("aten.select.int", x), _reshaped, _takes_the_only_one),  # x[0] of one -> view
    (op("aten.constant_pad_nd.default", x, pad=anything("pad")), x, lambda m: not any(m["pad"])),
    Rule(
        op("aten.cat.default", anything("list")), _only_member, lambda m: len(m["list"]) == 1
    ),  # cat([x]) -> x
    Rule(
        op("aten.cat.default", anything("list")), _without_empty, _has_empty_and_full
    ),  # cat([x, empty, y]) -> cat([x, y])
)

ALGEBRA: RuleSet = ARITHMETIC + IDEMPOTENT + CASTS + VIEWS
