"""Bugs on purpose: wrong rewrites that the checking machinery has to catch, every one.

Each is a mutation of the IR (what a wrong pass would do), of the C backend's plan, instructions or
emitted source, or of the frontend's rules.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from shoestring.ir import Function, Op, Operand, Phase, TensorType, Value, make_op
from shoestring.passes.base import Numerics, Pass, PassReport

Mutation = Callable[[Function], Function]
MUTATIONS: dict[str, Mutation] = {}
_FRESH = itertools.count()


def mutation(f: Mutation) -> Mutation:
    """Registers a wrong rewrite under its name."""
    MUTATIONS[f.__name__] = f
    return f


@dataclass(frozen=True)
class Wrong(Pass):
    """A pass that carries out a mutation and promises equal bits."""

    mutate: Mutation
    numerics: ClassVar[Numerics] = Numerics.EXACT

    @property
    def name(self) -> str:
        return "wrong"

    def run(self, function: Function) -> tuple[Function, PassReport]:
        return self.mutate(function), PassReport(1, 1)


# -- tools ---------------------------------------------------------------------------------------


def find(function: Function, name: str, accept: Callable[[Op], bool] = lambda op: True) -> Op:
    """The first op of that name. Which must be there: else the bug would not be seeded at all."""
    found = [op for op in function.ops if op.name == name and accept(op)]
    assert found, f"no {name} to break"
    return found[0]


def swap(function: Function, old: Op, *new: Op) -> Function:
    """The function with one op replaced."""
    ops: list[Op] = []
    for op in function.ops:
        ops.extend(new if op is old else [op])
    return function.with_ops(ops)


def forward(
    function: Function, value: Value, by: Value, *, only: Callable[[Op], bool] = lambda op: True
) -> Function:
    """The function whose ops (those of `only`) read another value."""
    ops = [
        op.map_operands(lambda v: by if v is value else v) if only(op) else op
        for op in function.ops
    ]
    return function.with_ops(ops)


def with_attrs(function: Function, op: Op, **attrs: Any) -> Function:
    return swap(function, op, replace(op, attrs={**op.attrs, **attrs}))


def with_operands(function: Function, op: Op, *operands: Operand) -> Function:
    return swap(function, op, replace(op, operands=operands))


def extra(name: str, result: Value | TensorType, *operands: Operand, **attrs: Any) -> Op:
    """A new op whose result is an old value, or a new one of a type."""
    draft = make_op(name, operands, attrs)
    if isinstance(result, TensorType):
        result = Value(result, f"bad{next(_FRESH)}")
    return replace(draft, results=(result,))


def tensors(op: Op) -> bool:
    """Two different tensors of equal type as operands."""
    return (
        len(op.inputs) == 2
        and op.inputs[0] is not op.inputs[1]
        and op.inputs[0].type == op.inputs[1].type
    )


def set_next(function: Function, path: str, value: Callable[[Value], Value | None]) -> Function:
    """The function with another next value of one parameter."""
    params = tuple(
        replace(p, next=value(p.value)) if p.path == path else p for p in function.params
    )
    assert params != function.params
    return Function(function.name, params, function.ops, function.outputs)


def phase(wanted: Phase) -> Callable[[Op], bool]:
    return lambda op: op.loc.phase is wanted


# -- algebra -------------------------------------------------------------------------------------


@mutation
def operands_of_sub_swapped(f: Function) -> Function:
    op = find(f, "aten.sub.Tensor", tensors)
    return with_operands(f, op, op.operands[1], op.operands[0])


@mutation
def difference_becomes_negation(f: Function) -> Function:
    op = find(f, "aten.sub.Tensor", tensors)
    return swap(f, op, extra("aten.neg.default", op.result, op.operands[1]))


@mutation
def sum_becomes_difference(f: Function) -> Function:
    op = find(
        f, "aten.add.Tensor", lambda op: tensors(op) and op.result.type.dtype.is_floating_point
    )
    return swap(f, op, extra("aten.sub.Tensor", op.result, *op.operands))


@mutation
def plus_zero_dropped_from_minus_zero(f: Function) -> Function:
    op = find(f, "aten.add.Tensor", lambda op: op.operands[1] == 0.0 and len(op.inputs) == 1)
    return swap(f, op, extra("aten.clone.default", op.result, op.operands[0]))


@mutation
def times_zero_is_zero_for_nan(f: Function) -> Function:
    op = find(f, "aten.mul.Tensor", lambda op: op.operands[1] == 0.0)
    return swap(f, op, extra("aten.zeros_like.default", op.result, op.operands[0]))


@mutation
def greater_becomes_greater_or_equal(f: Function) -> Function:
    op = find(f, "aten.gt.Scalar")
    every = [o for o in f.ops if o.name == op.name]
    for o in every:
        f = swap(f, o, extra("aten.ge.Scalar", o.result, *o.operands, **o.attrs))
    return f


@mutation
def branches_of_where_swapped(f: Function) -> Function:
    op = find(f, "aten.where.self", lambda op: len(op.inputs) == 3)
    return with_operands(f, op, op.operands[0], op.operands[2], op.operands[1])


@mutation
def maximum_drops_nan(f: Function) -> Function:
    op = find(f, "aten.maximum.default")
    return swap(f, op, extra("aten.fmax.default", op.result, *op.operands))


@mutation
def floor_division_truncates(f: Function) -> Function:
    op = find(f, "aten.div.Tensor_mode")
    return with_attrs(f, op, rounding_mode="trunc")


@mutation
def constant_folded_in_f32(f: Function) -> Function:
    op = find(f, "ir.constant.default", lambda op: op.result.type.dtype is torch.float64)
    rounded = tuple(torch.tensor(n, dtype=torch.float32).item() for n in op.attrs["data"])
    return with_attrs(f, op, data=rounded)


# -- precision -----------------------------------------------------------------------------------


@mutation
def narrowing_round_trip_removed(f: Function) -> Function:
    narrow = find(f, "aten._to_copy.default", lambda op: op.result.type.dtype is torch.float16)
    wide = find(f, "aten._to_copy.default", lambda op: op.inputs[0] is narrow.result)
    return swap(f, wide, extra("aten.clone.default", wide.result, narrow.operands[0]))


@mutation
def bf16_chain_fused_without_rounding(f: Function) -> Function:
    mul = find(f, "aten.mul.Tensor", lambda op: op.result.type.dtype is torch.bfloat16)
    add = find(f, "aten.add.Tensor", lambda op: op.operands[0] is mul.result)
    wide = TensorType(torch.float32, mul.result.type.shape)
    x = extra("aten._to_copy.default", wide, mul.operands[0], dtype=torch.float32)
    y = extra("aten.mul.Tensor", wide, x.result, *mul.operands[1:])
    z = extra("aten.add.Tensor", wide, y.result, *add.operands[1:])
    back = extra("aten._to_copy.default", add.result, z.result, dtype=torch.bfloat16)
    return swap(f, add, x, y, z, back)


@mutation
def f16_sum_rounded_on_the_way(f: Function) -> Function:
    op = find(f, "aten.sum.dim_IntList", lambda op: op.inputs[0].type.dtype is torch.float16)
    x, rows, columns = op.inputs[0], *op.inputs[0].type.static_shape
    part = TensorType(torch.float16, (rows, 1))
    steps = [extra("aten.slice.Tensor", part, x, dim=1, start=i, end=i + 1) for i in range(columns)]
    total = steps[0].result
    for step in list(steps[1:-1]):
        steps.append(extra("aten.add.Tensor", part, total, step.result))
        total = steps[-1].result
    last = extra("aten.add.Tensor", part, total, steps[columns - 1].result)
    return swap(
        f, op, *steps, last, extra("aten.view.default", op.result, last.result, size=(rows,))
    )


# -- shapes and views ----------------------------------------------------------------------------


@mutation
def slice_off_by_one(f: Function) -> Function:
    op = find(f, "aten.slice.Tensor", lambda op: op.attr("start") == 1 and op.attr("end") == 3)
    return with_attrs(f, op, start=0, end=2)


@mutation
def keepdim_forgotten(f: Function) -> Function:
    op = find(f, "aten.sum.dim_IntList", lambda op: op.attr("keepdim") is True)
    return with_attrs(f, op, keepdim=False)


@mutation
def matmul_operand_not_transposed(f: Function) -> Function:
    def square(op: Op) -> bool:
        return op.inputs[0].type.static_shape == (4, 4)

    name = next(
        o.name for o in f.ops if o.name in ("aten.t.default", "aten.permute.default") and square(o)
    )
    op = find(f, name, square)
    return swap(f, op, extra("aten.clone.default", op.result, op.operands[0]))


@mutation
def members_of_cat_swapped(f: Function) -> Function:
    op = find(f, "aten.cat.default")
    members = op.operands[0]
    assert isinstance(members, tuple)
    return with_operands(f, op, tuple(reversed(members)))


@mutation
def broadcast_along_the_wrong_dim(f: Function) -> Function:
    op = find(f, "aten.add.Tensor", lambda op: [len(v.type.shape) for v in op.inputs] == [2, 1])
    x, y = op.inputs
    rows, columns = x.type.static_shape
    short = extra(
        "aten.slice.Tensor", TensorType(y.type.dtype, (rows,)), y, dim=0, start=0, end=rows
    )
    column = extra(
        "aten.unsqueeze.default", TensorType(y.type.dtype, (rows, 1)), short.result, dim=1
    )
    assert columns >= rows
    return swap(f, op, short, column, replace(op, operands=(x, column.result)))


# -- reductions, norms, indexing -----------------------------------------------------------------


@mutation
def softmax_over_the_wrong_dim(f: Function) -> Function:
    return with_attrs(f, find(f, "aten._softmax.default"), dim=0)


@mutation
def scan_over_the_wrong_dim(f: Function) -> Function:
    return with_attrs(f, find(f, "aten.cumsum.default"), dim=0)


@mutation
def reduction_misses_its_last_element(f: Function) -> Function:
    op = find(f, "aten.sum.dim_IntList", lambda op: op.attr("keepdim") is True)
    x = op.inputs[0]
    rows, columns = x.type.static_shape
    shorter = TensorType(x.type.dtype, (rows, columns - 1))
    cut = extra("aten.slice.Tensor", shorter, x, dim=1, start=0, end=columns - 1)
    return swap(f, op, cut, replace(op, operands=(cut.result,)))


@mutation
def wrong_eps_in_norm(f: Function) -> Function:
    return with_attrs(f, find(f, "aten.native_layer_norm.default"), eps=1e-5)


@mutation
def padding_index_ignored(f: Function) -> Function:
    return with_attrs(f, find(f, "aten.embedding_dense_backward.default"), padding_idx=-1)


# -- randomness ----------------------------------------------------------------------------------


def _draws(f: Function) -> Iterator[Op]:
    return (op for op in f.ops if op.name == "rng.uniform.default")


@mutation
def draws_of_two_sites_merged(f: Function) -> Function:
    first, second = list(_draws(f))[:2]
    return forward(f, second.result, first.result)


@mutation
def mask_of_another_dropout_in_the_backward_pass(f: Function) -> Function:
    first, second = (_saved_mask(f, draw.result) for draw in list(_draws(f))[:2])
    return forward(f, second, first, only=phase(Phase.BACKWARD))


def _saved_mask(f: Function, value: Value) -> Value:
    """What follows from a draw alone and is read by the backward pass."""
    users = f.users()
    while not any(op.loc.phase is Phase.BACKWARD for op in users[value]):
        value = next(op.result for op in users[value] if len(op.inputs) == 1)
    return value


@mutation
def key_not_advanced(f: Function) -> Function:
    return set_next(f, "#rng", lambda key: key)


# -- state ---------------------------------------------------------------------------------------


@mutation
def state_update_removed(f: Function) -> Function:
    return set_next(f, "count", lambda old: None)


@mutation
def running_mean_keeps_its_old_value(f: Function) -> Function:
    return set_next(f, "mean", lambda old: old)


@mutation
def state_of_another_parameter(f: Function) -> Function:
    var = next(p.next for p in f.params if p.path == "var")
    return set_next(f, "mean", lambda old: var)


@mutation
def tied_weight_loses_a_gradient(f: Function) -> Function:
    op = find(
        f,
        "aten.add.Tensor",
        lambda op: phase(Phase.BACKWARD)(op) and op.result.type.static_shape == (5, 4),
    )
    first = op.inputs[0]
    return forward(f, op.result, first)


@mutation
def read_before_the_write_in_place(f: Function) -> Function:
    op = find(f, "aten.slice_scatter.default", phase(Phase.FORWARD))
    return forward(f, op.result, op.inputs[0])


@mutation
def bias_correction_missed(f: Function) -> Function:
    op = next(o for o in f.ops if o.name.startswith("aten.pow.") and o.loc.phase is Phase.UPDATE)
    return swap(f, op, extra("aten.mul.Tensor", op.result, op.inputs[-1], 0.0))


@mutation
def weight_decay_skipped(f: Function) -> Function:
    by = next(p.value for p in f.params if p.path.endswith("weight_decay"))
    op = find(f, "aten.mul.Tensor", lambda op: by in op.inputs)
    return with_operands(f, op, op.operands[0], 0.0)


@mutation
def moment_updated_from_its_new_value(f: Function) -> Function:
    """The order of two writes exchanged: the update reads what is not yet there."""
    p = next(p for p in f.params if p.path == "weight#exp_avg")
    assert p.next is not None
    first = next(op for op in f.ops if p.value in op.inputs)
    return swap(f, first, first.map_operands(lambda v: p.next if v is p.value else v))


# -- form ----------------------------------------------------------------------------------------


@mutation
def value_defined_twice(f: Function) -> Function:
    op = f.ops[3]
    return swap(f, op, op, op)


@mutation
def result_type_wrong(f: Function) -> Function:
    op = find(f, "aten.cumsum.default")
    lie = Value(TensorType(torch.float64, op.result.type.shape), "lie")
    return swap(f, op, replace(op, results=(lie,))).with_ops(
        [replace(o, results=(lie,)) if o is op else o for o in f.ops], {op.result: lie}
    )


@mutation
def output_dropped(f: Function) -> Function:
    return Function(f.name, f.params, f.ops, f.outputs[:-1])
