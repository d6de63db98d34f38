"""One spelling for each meaning. Every rule here only renames: same elements, same bits."""

from __future__ import annotations

from typing import Any

from shoestring.ir import REGISTRY, Number, Op, TensorType, lookup

from ..rewriter import (
    Match,
    Pattern,
    Rule,
    RuleSet,
    Term,
    anything,
    known,
    number,
    op,
    rules,
    value,
)

x, y = value("x"), value("y")
n, a = number("n"), number("a")
size = anything("size")

# PyTorch accepts a number in the place of a tensor for these four only; comparisons keep `Scalar`.
SCALARS = rules(
    (op("aten.add.Scalar", x, other=n, alpha=a), op("aten.add.Tensor", x, n, alpha=a)),  # x + a*n
    (op("aten.sub.Scalar", x, other=n, alpha=a), op("aten.sub.Tensor", x, n, alpha=a)),  # x - a*n
    (op("aten.mul.Scalar", x, other=n), op("aten.mul.Tensor", x, n)),  # x * n
    (op("aten.div.Scalar", x, other=n), op("aten.div.Tensor", x, n)),  # x / n
    (
        op("aten.div.Scalar_mode", x, other=n, rounding_mode=size),
        op("aten.div.Tensor_mode", x, n, rounding_mode=size),
    ),  # floor(x / n), trunc(x / n)
    (op("aten.rsub.Scalar", x, other=n, alpha=a), op("aten.sub.Tensor", n, x, alpha=a)),  # n - a*x
    (op("aten.rsub.Tensor", x, y, alpha=a), op("aten.sub.Tensor", y, x, alpha=a)),  # y - a*x
    (op("aten.mul.Tensor", n, x), op("aten.mul.Tensor", x, n)),  # n * x -> x * n
    (op("aten.add.Tensor", n, x, alpha=1), op("aten.add.Tensor", x, n)),  # n + x -> x + n
    (op("aten.square.default", x), op("aten.mul.Tensor", x, x)),  # x^2 -> x * x
)


def _plain_shape(m: Match) -> Term:
    """The reshape to the result's own shape."""
    if not m.result.is_static:
        return None
    return op("aten.view.default", m["x"], size=m.result.shape)


def _is_implicit(m: Match) -> bool:
    """Whether a view's size is not yet the result's shape: it has a -1."""
    return bool(m["size"] != m.result.shape)


def _permutation(order: list[int]) -> Any:
    def replacement(m: Match) -> Term:
        rank = m.type("x").rank
        return op("aten.permute.default", m["x"], dims=tuple(order) if rank == 2 else (0,) * rank)

    return replacement


def _transpose(m: Match) -> Term:
    order = list(range(m.type("x").rank))
    if order:
        i, j = m.root.attr("dim0"), m.root.attr("dim1")
        order[i], order[j] = order[j], order[i]
    return op("aten.permute.default", m["x"], dims=tuple(order))


def _counted_from_front(m: Match) -> Term:
    rank = m.type("x").rank
    return op("aten.permute.default", m["x"], dims=tuple(d % rank for d in m["dims"]))


def _shape_names() -> list[str]:
    """Every op that only regroups elements in row-major order."""
    names = """_unsafe_view.default reshape.default _reshape_alias.default view_copy.default
    squeeze.default squeeze.dim squeeze.dims unsqueeze.default squeeze_copy.default
    unsqueeze_copy.default flatten.using_ints unflatten.int""".split()
    return [f"aten.{name}" for name in names if known(f"aten.{name}")]


VIEWS = rules(
    *(Rule(op(name, x), _plain_shape) for name in _shape_names()),  # -> view(x, its shape)
    Rule(op("aten.view.default", x, size=size), _plain_shape, _is_implicit),  # view(x, -1)
    Rule(op("aten.t.default", x), _permutation([1, 0])),  # t(x) -> permute(x, 1 0)
    Rule(op("aten.transpose.int", x), _transpose),  # transpose(x, i, j) -> permute(x, ..)
    Rule(
        op("aten.permute.default", x, dims=anything("dims")),
        _counted_from_front,
        lambda m: any(d < 0 for d in m["dims"]),
    ),  # permute(x, -1 0) -> permute(x, 1 0)
)

# A value is its elements: copies and aliases are the value itself.
IDENTITIES = rules(
    *(
        Rule(op(f"aten.{name}", x), x)  # name(x) -> x
        for name in """alias.default detach.default clone.default lift_fresh.default
        lift_fresh_copy.default alias_copy.default detach_copy.default lift.default
        contiguous.default positive.default""".split()
        if known(f"aten.{name}")
    ),
    Rule(op("aten._to_copy.default", x), x, lambda m: m.type("x") == m.result),  # same type
)


def _filled(type_: TensorType, fill: Number) -> Term:
    if not type_.is_static:
        return None
    return op("aten.full.default", size=type_.shape, fill_value=fill, dtype=type_.dtype)


def _fill(name: str, fill: Number | None = None) -> Rule:
    """`name` -> full; the number is `fill`, or the op's own."""

    def replacement(m: Match) -> Term:
        own = fill if fill is not None else _own_fill(m.root)
        return None if own is None else _filled(m.result, own)

    operands = tuple(anything(o) for o in lookup(name).operand_names)
    return Rule(Pattern(name, operands, {}), replacement)


def _own_fill(root: Op) -> Number | None:
    for key in ("fill_value", "s", "value"):
        if key in root.attrs:
            found: Number = root.attrs[key]
            return found
    return None


# The operand of a `like` op gives no elements; without it the op no longer keeps it alive.
FILLS = rules(
    _fill("aten.zeros.default", 0),  # zeros(s) -> full(s, 0)
    _fill("aten.ones.default", 1),  # ones(s) -> full(s, 1)
    _fill("aten.zeros_like.default", 0),
    _fill("aten.ones_like.default", 1),
    _fill("aten.full_like.default"),
    _fill("aten.new_zeros.default", 0),
    _fill("aten.new_ones.default", 1),
    _fill("aten.new_full.default"),
    _fill("aten.scalar_tensor.default"),
    _fill("aten.fill.Scalar", None),
)


def _steps_of_one(m: Match) -> Term:
    start, end = m.root.attrs.get("start", 0), m.root.attr("end")
    return op("aten.arange.start_step", start=start, end=end, step=1, dtype=m.result.dtype)


RANGES = rules(
    Rule(op("aten.arange.default"), _steps_of_one),  # arange(n) -> arange(0, n, 1)
    Rule(op("aten.arange.start"), _steps_of_one),
)


def _sizes_only(name: str) -> Rule:
    """Operands of which only sizes count become numbers: the op no longer keeps them alive."""
    places = lookup(name).sizes_only
    operands = tuple(anything(o) for o in lookup(name).operand_names)

    def replacement(m: Match) -> Term:
        given: list[Term] = list(m.root.operands)
        for i in places:
            given[i] = _filled(m.type(operands[i].name), 0)
        return op(name, *given, **m.root.attrs)

    def reads_elements(m: Match) -> bool:
        made = [m.producer(operands[i].name) for i in places]
        static = all(m.type(operands[i].name).is_static for i in places)
        return static and any(p is None or p.inputs for p in made)

    return Rule(Pattern(name, operands, {}), replacement, reads_elements)


SIZES_ONLY = rules(*map(_sizes_only, (d.name for d in REGISTRY.values() if d.sizes_only)))

CANONICAL: RuleSet = IDENTITIES + SCALARS + VIEWS + FILLS + RANGES + SIZES_ONLY
