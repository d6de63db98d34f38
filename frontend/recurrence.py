"""`nn.LSTM`, `nn.GRU` and `nn.RNN` under the tracer: one op a layer and direction for all steps.

PyTorch's own programs are a dozen ops a step. They stay where the op would not be the same: in 16
bits and under autocast, where each op of a step rounds; with projections; of packed sequences; and
under transforms of `torch.func`, which have no rule for the op.
"""

# mypy: disable-error-code="no-any-return"
# torch.ops is untyped: every call through it gives Any.

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.library import Library, register_fake
from torch.nn import functional

from shoestring.ir import Value, lookup, make_op, type_of
from shoestring.ir.inference import infer_types
from shoestring.ir.opdef import as_tuple
from shoestring.ir.ops.recurrence import RELU, TANH, Steps, gru_steps, lstm_steps, rnn_steps

# What the tracer finds by the name of the op; the definition says all else.
_SCHEMAS = {
    "lstm": "Tensor input, Tensor h0, Tensor c0, Tensor weight, Tensor? bias, *, bool reverse",
    "lstm_backward": "Tensor? grad_h, Tensor? grad_c, Tensor c, Tensor gates, Tensor weight, *,"
    " bool first, bool reverse",
    "gru": "Tensor input, Tensor h0, Tensor weight, Tensor? bias, *, bool reverse",
    "gru_backward": "Tensor grad_h, Tensor h, Tensor gates, Tensor held, Tensor weight, *,"
    " bool first, bool reverse",
    "rnn": "Tensor input, Tensor h0, Tensor weight, Tensor? bias, *, str activation, bool reverse",
    "rnn_backward": "Tensor grad_h, Tensor h, Tensor weight, *, str activation, bool first,"
    " bool reverse",
}
_library = Library("recurrence", "DEF")


def _register(name: str) -> None:
    definition = lookup(f"recurrence.{name}.default")

    def without_data(*operands: Tensor | None, **attrs: Any) -> list[Tensor]:
        values = (None if t is None else Value(type_of(t), "") for t in operands)
        types = infer_types(make_op(definition.name, tuple(values), attrs))
        like = next(t for t in operands if t is not None)
        return [like.new_empty(t.static_shape, dtype=t.dtype) for t in types]

    def as_list(*operands: Tensor | None, **attrs: Any) -> list[Tensor | None]:
        return list(as_tuple(definition.reference(*operands, **attrs)))

    _library.define(f"{name}({_SCHEMAS[name]}) -> Tensor[]")
    _library.impl(name, as_list, "CompositeExplicitAutograd")
    register_fake(f"recurrence::{name}", without_data, lib=_library)


for _name in _SCHEMAS:
    _register(_name)


@dataclass(frozen=True)
class _Cell:
    """A kind of layer.

    Attributes:
        name: of its op.
        steps: what a layer computes, in PyTorch's ops.
        attrs: of the op.
    """

    name: str
    steps: Callable[..., Steps]
    attrs: dict[str, Any] = field(default_factory=dict[str, Any])

    def run(self, *operands: Any, reverse: bool) -> list[Tensor]:
        return getattr(torch.ops.recurrence, self.name)(*operands, reverse=reverse, **self.attrs)

    def backward(self, *operands: Any, first: bool, reverse: bool) -> list[Tensor]:
        op = getattr(torch.ops.recurrence, f"{self.name}_backward")
        return op(*operands, first=first, reverse=reverse, **self.attrs)


_CELLS = {
    "lstm": _Cell("lstm", lstm_steps),
    "gru": _Cell("gru", gru_steps),
    "rnn_tanh": _Cell("rnn", rnn_steps, {"activation": TANH}),
    "rnn_relu": _Cell("rnn", rnn_steps, {"activation": RELU}),
}


@contextmanager
def layers_as_ops() -> Iterator[None]:
    """Puts the ops in the place of PyTorch's functions."""
    with ExitStack() as stack:
        for name, cell in _CELLS.items():
            run = _standing_for(getattr(torch._VF, name), cell)
            stack.enter_context(patch.object(torch._VF, name, run))
        yield


def _standing_for(original: Callable[..., Any], cell: _Cell) -> Callable[..., Any]:
    def run(input: Tensor, hx: Any, params: Any, *options: Any) -> Any:
        several = isinstance(hx, (tuple, list))
        packed = isinstance(params, Tensor) or isinstance(params[0], (tuple, list))
        first = tuple(hx) if several else (hx,)
        if packed or not _is_the_same(input, first, params):
            return original(input, hx, params, *options)
        return _layers(cell, input, first, params, *options)

    return run


def _is_the_same(input: Tensor, first: Sequence[Tensor], params: Sequence[Tensor]) -> bool:
    """Whether an op a layer computes what PyTorch's ops a step do."""
    level = torch._C._functorch.maybe_current_level()  # pyright: ignore[reportPrivateUsage]
    dual = forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage]
    if level is not None or dual or torch.is_autocast_enabled("cpu"):
        return False
    dtypes = {t.dtype for t in (input, *first, *params)}
    projects = len({t.shape[-1] for t in first}) > 1
    return not projects and dtypes in ({torch.float32}, {torch.float64})


def _layers(
    cell: _Cell, input: Tensor, first: Sequence[Tensor], params: Sequence[Tensor],
    has_biases: bool, num_layers: int, dropout: float, train: bool, bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """`torch.lstm` and the like: the last layer's h of all steps, and every layer's last states."""
    x = input.transpose(0, 1) if batch_first else input
    each, directions = (4 if has_biases else 2), (2 if bidirectional else 1)
    last: list[list[Tensor]] = [[] for _ in first]
    for layer in range(num_layers):
        both = list[Tensor]()
        for reverse in range(directions):
            at = layer * directions + reverse
            of_input, of_h, *biases = params[at * each : (at + 1) * each]
            added, bias = biases or (None, None)
            sums = functional.linear(x, of_input, added)
            apply: Any = _Layer.apply
            states, *carried = apply(cell, bool(reverse), sums, of_h, bias, *(s[at] for s in first))
            both.append(states)
            for own, state in zip(last, (states[0 if reverse else -1], *carried), strict=True):
                own.append(state)
        x = torch.cat(both, -1) if bidirectional else both[0]
        if dropout and train and layer < num_layers - 1:
            x = torch.dropout(x, dropout, train)
    return x.transpose(0, 1) if batch_first else x, *map(torch.stack, last)


class _Layer(Function):
    """h of all steps and what else is carried behind the last, from what the input adds."""

    @staticmethod
    def forward(
        ctx: Any, cell: _Cell, reverse: bool, input: Tensor, weight: Tensor, bias: Any,
        *first: Tensor,
    ) -> Any:  # fmt: skip
        made = cell.run(input, *first, weight, bias, reverse=reverse)
        ctx.set_materialize_grads(False)
        ctx.cell, ctx.reverse, ctx.count = cell, reverse, len(first)
        ctx.save_for_backward(input, *first, weight, bias, *made)
        states, *carried = made[: len(first)]
        end = 0 if reverse else -1
        own = states[:-1] if reverse else states[1:]
        return own.clone(), *(s[end].clone() for s in carried)  # the user may overwrite them

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        cell, reverse, count = ctx.cell, ctx.reverse, ctx.count
        saved = ctx.saved_tensors  # a checkpoint gives them once
        given, made = saved[: count + 3], saved[count + 3 :]
        if torch.is_grad_enabled():  # gradients of these gradients may be wanted
            of_input, *of_first, of_weight, of_bias = _by_steps(cell, given, grads, reverse)
            return None, None, of_input, of_weight, of_bias, *of_first
        weight, bias = given[-2:]
        first = any(ctx.needs_input_grad[-count:])
        operands = *grads, *made[count - 1 :], weight
        found = cell.backward(*operands, first=first, reverse=reverse)
        of_first = found[-count:] if first else [None] * count
        of_input, of_state = found[0], found[-count - 1 if first else -1]
        before = made[0][1:] if reverse else made[0][:-1]
        of_weight = of_state.flatten(0, 1).t() @ before.flatten(0, 1)
        # As PyTorch writes that of the input's bias, which is equal but for a GRU.
        of_bias = None if bias is None else of_state.sum((0, 1), keepdim=True).view(-1)
        return None, None, of_input, of_weight, of_bias, *of_first


def _by_steps(cell: _Cell, given: Any, grads: Any, reverse: bool) -> list[Any]:
    """The gradients by ops of PyTorch's, which have gradients in turn."""
    states, *carried = cell.steps(*given, reverse=reverse, **cell.attrs)[: len(grads)]
    own = states[1:]
    results = torch.stack(own[::-1] if reverse else own), *(c[-1] for c in carried)
    wanted = [t for t in given if t is not None and t.requires_grad]
    pairs = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None]
    found = iter(
        torch.autograd.grad(
            [r for r, _ in pairs], wanted, [g for _, g in pairs], create_graph=True,
            allow_unused=True,
        )
    )  # fmt: skip
    return [next(found) if t is not None and t.requires_grad else None for t in given]
