"""Costs: the FLOPs of contractions are those that PyTorch's own counter counts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from shoestring.frontend.capture import capture_step
from shoestring.ir import Cost, Kind, Op, Value, lookup, parse_type

Batch = tuple[torch.Tensor, ...]
Sample = tuple[torch.nn.Module, Callable[..., torch.Tensor], Batch]


def squares(model: torch.nn.Module, *batch: torch.Tensor) -> torch.Tensor:
    found: Any = model(*batch)
    return (found[0] if isinstance(found, tuple) else found).square().mean()


def gpt2() -> Sample:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=61, n_positions=24)
    model = GPT2LMHeadModel(config).eval()

    def loss(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
        logits = model(tokens).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    return model, loss, (torch.randint(61, (3, 24)),)


def resnet() -> Sample:
    class Block(torch.nn.Module):
        def __init__(self, into: int, out: int, stride: int) -> None:
            super().__init__()
            self.body = torch.nn.Sequential(
                torch.nn.Conv2d(into, out, 3, stride, 1, bias=False),
                torch.nn.BatchNorm2d(out),
                torch.nn.ReLU(),
                torch.nn.Conv2d(out, out, 3, 1, 1),
            )
            self.skip = torch.nn.Conv2d(into, out, 1, stride)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.relu(self.body(x) + self.skip(x))

    head = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(16, 5)]
    model = torch.nn.Sequential(Block(3, 8, 1), Block(8, 16, 2), *head)
    return model, squares, (torch.randn(4, 3, 12, 12),)


def upsampler() -> Sample:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(2, 6, 3), torch.nn.ConvTranspose2d(6, 4, 4, stride=2)
    )
    return model, squares, (torch.randn(2, 2, 7, 9),)


MODELS: dict[str, Callable[[], Sample]] = {
    "gpt2": gpt2,
    "resnet": resnet,
    "upsampler": upsampler,
    "lstm": lambda: (torch.nn.LSTM(7, 5, 2, batch_first=True), squares, (torch.randn(3, 6, 7),)),
    "gru": lambda: (torch.nn.GRU(7, 5, bidirectional=True), squares, (torch.randn(6, 3, 7),)),
    "rnn": lambda: (torch.nn.RNN(7, 5, 2), squares, (torch.randn(6, 3, 7),)),
    "mlp": lambda: (
        torch.nn.Sequential(torch.nn.Linear(9, 17), torch.nn.GELU(), torch.nn.Linear(17, 3)),
        squares,
        (torch.randn(4, 9),),
    ),
    "encoder": lambda: (
        torch.nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True),
        squares,
        (torch.randn(2, 5, 16),),
    ),
    "convolution": lambda: (torch.nn.Conv1d(3, 4, 3, padding=2), squares, (torch.randn(2, 3, 11),)),
}


Shape = tuple[int, ...]


def seen(q: Shape, k: Shape, causal: bool) -> Fraction:
    """The part of the pairs of queries and keys that attention has."""
    pairs = torch.ones(q[-2], k[-2])
    return Fraction(int((pairs.tril() if causal else pairs).sum()), pairs.numel())


def forward_flops(
    q: Shape, k: Shape, v: Shape, dropout: float = 0, causal: bool = False, **_: Any
) -> int:
    return int(sdpa_flop_count(q, k, v) * seen(q, k, causal))


def backward_flops(
    grad: Shape, q: Shape, k: Shape, v: Shape, out: Shape, lse: Shape, dropout: float, causal: bool,
    **_: Any,
) -> int:  # fmt: skip
    return int(sdpa_backward_flop_count(grad, q, k, v) * seen(q, k, causal))


aten = torch.ops.aten
# PyTorch counts attention on other devices, but not this kernel.
ATTENTION: dict[Any, Any] = {
    aten._scaled_dot_product_flash_attention_for_cpu: forward_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: backward_flops,
}


# Switching oneDNN off warns of GPUs that are not there.
@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning")
@pytest.mark.parametrize("name", MODELS)
def test_flops_of_a_training_step(name: str) -> None:
    """Without groups: PyTorch forgets them where it counts a convolution's weight gradient."""
    torch.manual_seed(0)
    model, loss, batch = MODELS[name]()
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter, unfused():
        loss(model, *batch).backward()
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    function = capture_step(model, loss, optimizer, batch).function
    ours = sum(op.opdef.cost(op).flops for op in function.ops if op.opdef.kind is Kind.CONTRACTION)
    assert ours == counter.get_total_flops() > 0


def unfused() -> AbstractContextManager[Any]:
    """An LSTM as single matrix products, which the counter knows."""
    return torch.backends.mkldnn.flags(enabled=False)


def test_flops_of_a_grouped_convolution() -> None:
    shapes = ("f32[2,6,8,8]", "f32[4,3,3,3]")
    op = call(
        "aten.convolution.default",
        *shapes,
        result="f32[2,4,6,6]",
        transposed=False,
        groups=2,
    )
    assert op.opdef.cost(op).flops == 2 * (2 * 4 * 6 * 6) * 3 * 9


def call(name: str, *types: str, result: str, **attrs: Any) -> Op:
    operands = tuple(Value(parse_type(t), f"x{i}") for i, t in enumerate(types))
    opdef = lookup(name)
    return Op(opdef, operands, {**opdef.attr_defaults, **attrs}, (Value(parse_type(result), "y"),))


@pytest.mark.parametrize(
    ("op", "wanted"),
    [
        (call("aten.mm.default", "f32[2,3]", "f32[3,5]", result="f32[2,5]"), Cost(60, 124)),
        (call("aten.add.Tensor", "f32[4,8]", "f32[8]", result="f32[4,8]"), Cost(32, 288)),
        (call("aten.view.default", "f32[4,8]", result="f32[32]", size=(32,)), Cost(0, 0)),
        (call("aten.sum.default", "bf16[4,8]", result="bf16[]"), Cost(32, 66)),
        (call("aten.gather.default", "f32[9]", "i64[3]", result="f32[3]", dim=0), Cost(0, 72)),
    ],
)
def test_costs(op: Op, wanted: Cost) -> None:
    assert op.opdef.cost(op) == wanted


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("t", "s"), [(1, 1), (5, 5), (5, 9), (9, 5), (1, 7)])
def test_causal_attention_is_a_triangle(t: int, s: int, causal: bool) -> None:
    q, k = f"f32[2,3,{t},4]", f"f32[2,3,{s},4]"
    name = "aten._scaled_dot_product_flash_attention_for_cpu.default"
    operands = tuple(Value(parse_type(x), n) for x, n in ((q, "q"), (k, "k"), (k, "v")))
    results = Value(parse_type(q), "out"), Value(parse_type(f"f32[2,3,{t}]"), "lse")
    op = Op(lookup(name), (*operands, None), {"is_causal": causal}, results)
    of_q, of_k, of_v = (v.type.static_shape for v in operands)
    assert op.opdef.cost(op).flops == forward_flops(of_q, of_k, of_v, causal=causal)


def test_a_value_read_twice_moves_once() -> None:
    x = Value(parse_type("f32[4]"), "x")
    opdef = lookup("aten.mul.Tensor")
    op = Op(opdef, (x, x), {}, (Value(x.type, "y"),))
    assert opdef.cost(op).bytes == 32
    assert opdef.cost(op) + Cost(1, 2) == Cost(5, 34)
