"""Layers of recurrent networks as one op over all steps, whose number is no number of ops.

T: steps, B: batch, H: width, G: gates. What the input contributes, [T,B,GH], is a product of its
own before; here is what a step needs of the step before. States are those of all steps and the
first one, [T+1,B,H]: step t goes from state t to t+1, or, in `reverse`, from t+1 to t. With weights
in 16 bits, a step is computed in f32, and what is added up over all steps (`c` of an LSTM, `h` of a
GRU) is kept in f32; all else is rounded to the weight's type once a step.

LSTM: Hochreiter, Schmidhuber, 1997, with the forget gate of Gers et al., 2000. GRU: Cho et al.,
2014, with the reset gate behind the product. Gates are in PyTorch's order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..function import Op, Value
from ..opdef import Cost, FactorMap, Kind, OpDef
from ..types import TensorType
from .aten import bytes_moved
from .attention import wide, wide_type

LSTM_GATES, GRU_GATES = 4, 3
RELU, TANH = "relu", "tanh"
Steps = tuple[list[Tensor], ...]


def _of_state(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a step takes from the state before it: [B,GH]."""
    rounded = wide(h.to(weight.dtype))
    return functional.linear(rounded, wide(weight), None if bias is None else wide(bias))


def _inputs(input: Tensor, reverse: bool) -> list[Tensor]:
    steps = [wide(x) for x in input.unbind(0)]
    return steps[::-1] if reverse else steps


def lstm_steps(
    input: Tensor, h: Tensor, c: Tensor, weight: Tensor, bias: Tensor | None, *,
    reverse: bool = False,
) -> Steps:  # fmt: skip
    """h and c from the first on, and gates, in the order of computation.

    Args:
        input: [T,B,4H], what the input adds to gates.
        h, c: [B,H], the first state.
        weight: [4H,H].
        bias: [4H].
        reverse: from the last step to the first.
    """
    states, cells = [h.to(weight.dtype)], [wide(c)]
    gates: list[Tensor] = []
    for x in _inputs(input, reverse):
        i, f, g, o = (_of_state(states[-1], weight, bias) + x).chunk(LSTM_GATES, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        cells.append(f * cells[-1] + i * g)
        states.append((o * cells[-1].tanh()).to(weight.dtype))
        gates.append(torch.cat([i, f, g, o], -1).to(weight.dtype))
    return states, cells, gates


def gru_steps(
    input: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, *, reverse: bool = False
) -> Steps:
    """h from the first on, gates, and what h gives for the last of them, as `lstm_steps`."""
    states = [wide(h)]
    gates: list[Tensor] = []
    parts: list[Tensor] = []
    for x in _inputs(input, reverse):
        of_r, of_z, of_n = x.chunk(GRU_GATES, -1)
        r, z, part = _of_state(states[-1], weight, bias).chunk(GRU_GATES, -1)
        r, z = (r + of_r).sigmoid(), (z + of_z).sigmoid()
        n = (of_n + part * r).tanh()
        states.append((states[-1] - n) * z + n)
        gates.append(torch.cat([r, z, n], -1).to(weight.dtype))
        parts.append(part.to(weight.dtype))
    return states, gates, parts


def rnn_steps(
    input: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, *,
    activation: str = TANH, reverse: bool = False,
) -> Steps:  # fmt: skip
    """h from the first on, as `lstm_steps`; `activation` is `tanh` or `relu`."""
    states = [h.to(weight.dtype)]
    for x in _inputs(input, reverse):
        before = _of_state(states[-1], weight, bias) + x
        after = before.tanh() if activation == TANH else before.relu()
        states.append(after.to(weight.dtype))
    return (states,)


def _lstm(
    input: Tensor, h0: Tensor, c0: Tensor, weight: Tensor, bias: Tensor | None, *,
    reverse: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    states, cells, gates = lstm_steps(input, h0, c0, weight, bias, reverse=reverse)
    return _stacked(states, reverse), _stacked(cells, reverse), _stacked(gates, reverse)


def _gru(
    input: Tensor, h0: Tensor, weight: Tensor, bias: Tensor | None, *, reverse: bool = False
) -> tuple[Tensor, ...]:
    states, gates, held = gru_steps(input, h0, weight, bias, reverse=reverse)
    return _stacked(states, reverse), _stacked(gates, reverse), _stacked(held, reverse)


def _rnn(
    input: Tensor, h0: Tensor, weight: Tensor, bias: Tensor | None, *,
    activation: str = TANH, reverse: bool = False,
) -> Tensor:  # fmt: skip
    (states,) = rnn_steps(input, h0, weight, bias, activation=activation, reverse=reverse)
    return _stacked(states, reverse)


def _stacked(steps: list[Tensor], reverse: bool) -> Tensor:
    return torch.stack(steps[::-1] if reverse else steps)


def _backwards(count: int, reverse: bool) -> list[tuple[int, int, int]]:
    """Step, state before it and state after it, the last step first."""
    if reverse:
        return [(t, t + 1, t) for t in range(count)]
    return [(t, t, t + 1) for t in reversed(range(count))]


def _plus(dh: Tensor, grad_h: Tensor | None, t: int) -> Tensor:
    return dh if grad_h is None else dh + wide(grad_h[t])


def _lstm_backward(
    grad_h: Tensor | None, grad_c: Tensor | None, c: Tensor, gates: Tensor, weight: Tensor, *,
    first: bool = True, reverse: bool = False,
) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
    dh = torch.zeros_like(c[0])
    dc = dh if grad_c is None else wide(grad_c)
    found: list[Tensor] = []
    for t, before, after in _backwards(gates.shape[0], reverse):
        i, f, g, o = wide(gates[t]).chunk(LSTM_GATES, -1)
        dh = _plus(dh, grad_h, t)
        ran = c[after].tanh()
        dc = dc + dh * o * (1 - ran * ran)
        parts = (
            dc * g * (i * (1 - i)),
            dc * c[before] * (f * (1 - f)),
            dc * i * (1 - g * g),
            dh * ran * (o * (1 - o)),
        )
        found.append(torch.cat(parts, -1).to(weight.dtype))
        dh, dc = wide(found[-1]) @ wide(weight), dc * f
    of_input = _stacked(found, not reverse)
    return (of_input, dh.to(weight.dtype), dc) if first else of_input


def _gru_backward(
    grad_h: Tensor, h: Tensor, gates: Tensor, held: Tensor, weight: Tensor, *,
    first: bool = True, reverse: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    dh = torch.zeros_like(h[0])
    of_input: list[Tensor] = []
    of_state: list[Tensor] = []
    for t, before, _ in _backwards(gates.shape[0], reverse):
        r, z, n = wide(gates[t]).chunk(GRU_GATES, -1)
        dh = _plus(dh, grad_h, t)
        dn = dh * (1 - z) * (1 - n * n)
        dr, dz = dn * wide(held[t]) * (r * (1 - r)), dh * (h[before] - n) * (z * (1 - z))
        of_input.append(torch.cat([dr, dz, dn], -1).to(weight.dtype))
        of_state.append(torch.cat([dr, dz, dn * r], -1).to(weight.dtype))
        dh = wide(of_state[-1]) @ wide(weight) + dh * z
    both = _stacked(of_input, not reverse), _stacked(of_state, not reverse)
    return (*both, dh) if first else both


def _rnn_backward(
    grad_h: Tensor, h: Tensor, weight: Tensor, *,
    activation: str = TANH, first: bool = True, reverse: bool = False,
) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
    dh = torch.zeros_like(wide(h[0]))
    found: list[Tensor] = []
    for t, _, after in _backwards(grad_h.shape[0], reverse):
        y, dh = wide(h[after]), _plus(dh, grad_h, t)
        slope = 1 - y * y if activation == TANH else (y > 0).to(y.dtype)
        found.append((dh * slope).to(weight.dtype))
        dh = wide(found[-1]) @ wide(weight)
    of_input = _stacked(found, not reverse)
    return (of_input, dh.to(weight.dtype)) if first else of_input


# -- rules ---------------------------------------------------------------------------------------


def operands_of(op: Op) -> dict[str, Value]:
    """The operands that are there, by name."""
    pairs = zip(op.opdef.operand_names, op.operands, strict=True)
    return {name: o for name, o in pairs if isinstance(o, Value)}


def _infer(carries: bool, *saved: int) -> Callable[[Op], tuple[TensorType, ...]]:
    """Results of a layer: h, c where there is one, and what is `saved`, in widths of a state."""

    def infer(op: Op) -> tuple[TensorType, ...]:
        given = operands_of(op)
        (steps, batch, _), weight = given["input"].type.shape, given["weight"].type
        width, kept = weight.shape[1], wide_type(weight.dtype)
        assert isinstance(steps, int), "steps are counted when the program is captured"
        assert isinstance(width, int), "so is the width"
        states = (steps + 1, batch, width)
        types = [TensorType(kept if carries and "c0" not in given else weight.dtype, states)]
        types += [TensorType(kept, states)] if "c0" in given else []
        kept_shapes = ((steps, batch, count * width) for count in saved)
        return *types, *(TensorType(weight.dtype, shape) for shape in kept_shapes)

    return infer


def _infer_backward(op: Op) -> tuple[TensorType, ...]:
    """Results of a gradient: of the input's part, of a GRU the state's, and of the first state."""
    given = operands_of(op)
    weight, states = given["weight"].type, given["c" if "c" in given else "h"].type
    steps, *state = states.shape
    assert isinstance(steps, int), "steps are counted when the program is captured"
    gates = TensorType(weight.dtype, (steps - 1, state[0], weight.shape[0]))
    parts = (gates, gates) if "gates" in given and "h" in given else (gates,)
    first = [TensorType(states.dtype, tuple(state))]
    if "c" in given:
        first.insert(0, TensorType(weight.dtype, tuple(state)))
    return (*parts, *first) if op.attr("first") else parts


def _cost(op: Op) -> Cost:
    """A product of [B,H] and [H,GH] a step; the first step's gradient needs none by itself."""
    given = operands_of(op)
    gates, width = given["weight"].type.static_shape
    of_steps = given["input"] if "input" in given else op.results[0]
    steps, batch, _ = of_steps.type.static_shape
    steps -= op.attrs.get("first") is False
    return Cost(2 * steps * batch * gates * width, bytes_moved(op))


def _factors(op: Op) -> FactorMap:
    """The batch can be split, and nothing else: the last dimension but one, except of weights."""

    def of(v: Value, whole: bool) -> tuple[str | None, ...]:
        at = None if whole else v.type.rank - 2
        return tuple("batch" if i == at else None for i in range(v.type.rank))

    operands = (of(v, name in ("weight", "bias")) for name, v in operands_of(op).items())
    return FactorMap(tuple(operands), tuple(of(r, False) for r in op.results))


def _layer(
    name: str, reference: Callable[..., Any], operands: str, infer: Any, doc: str, **defaults: Any
) -> OpDef:
    return OpDef(
        f"recurrence.{name}.default", Kind.CONTRACTION, reference, tuple(operands.split()),
        {"reverse": False, **defaults}, infer, _cost, _factors, doc=doc,
    )  # fmt: skip


def _gradient(
    of: str, reference: Callable[..., Any], operands: str, doc: str, **defaults: Any
) -> OpDef:
    doc = f"Gradients of `{of}` for {doc}; where `first`, for the first state too."
    return _layer(
        f"{of}_backward", reference, operands, _infer_backward, doc, first=True, **defaults
    )


OPS = (
    _layer("lstm", _lstm, "input h0 c0 weight bias", _infer(True, LSTM_GATES),
           "A layer of an LSTM in one direction: h and c of all steps, and gates."),
    _layer("gru", _gru, "input h0 weight bias", _infer(True, GRU_GATES, 1),
           "A layer of a GRU in one direction: h of all steps, gates, what h adds to the last."),
    _layer("rnn", _rnn, "input h0 weight bias", _infer(False),
           "A layer of a plain recurrent network in one direction: h of all steps.",
           activation=TANH),
    _gradient("lstm", _lstm_backward, "grad_h grad_c c gates weight",
              "what the input adds to gates"),
    _gradient("gru", _gru_backward, "grad_h h gates held weight",
              "what the input and what the state before adds to gates"),
    _gradient("rnn", _rnn_backward, "grad_h h weight", "what the input adds", activation=TANH),
)  # fmt: skip
