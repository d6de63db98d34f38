"""Attention that models write out: which is fused, which stays, and that numbers are kept."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import shoestring as ss
from shoestring.backends import get_backend
from shoestring.backends.c import CExecutable
from shoestring.ir import Function, parse, print_function
from shoestring.ir.python_dump import print_python
from shoestring.passes import PassReport, check
from shoestring.passes.fuse_attention import FuseAttention
from shoestring.runtime.step import Step

from ..backends.helpers import compare, traced

Form = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of queries, keys, values and lengths
LOWEST = torch.finfo(torch.float32).min


def later(x: Tensor) -> Tensor:
    """Where keys come later than queries, as x is of queries and heads."""
    return torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool).triu(1)


def seen(lengths: Tensor, keys: int) -> Tensor:
    return (torch.arange(keys) < lengths[:, None])[:, None, None]


# -- what is fused -----------------------------------------------------------------------------


def plain(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def scaled_scores(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return ((q @ k.mT) / math.sqrt(q.shape[-1])).softmax(-1) @ v


def scaled_queries(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return ((q * 0.3) @ k.mT).softmax(-1) @ v


def scaled_everywhere(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return (((q * 0.7) @ (k / 1.7).mT) * 0.9).softmax(-1) @ v


def scaled_and_read(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    """The scaled queries are read by something else too, so their gradient is a sum."""
    q = q * 0.3
    return (q @ k.mT).softmax(-1) @ v + q.sin()


def of_three_dimensions(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.bmm(torch.softmax(torch.bmm(q, k.mT) * 0.4, -1), v).view(2, 3, -1, 8)


def of_three_with_mask(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    mask = torch.zeros(6, q.shape[1], k.shape[1]).masked_fill(later(q), LOWEST)
    return torch.bmm(torch.softmax(torch.bmm(q, k.mT) + mask, -1), v).view(2, 3, -1, 8)


def lengths_first(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    """Stored as nn.MultiheadAttention has them: rows of all heads and images side by side."""
    q, k, v = (x.permute(2, 0, 1, 3).flatten(1, 2).transpose(0, 1) for x in (q, k, v))
    return torch.bmm(F.dropout(torch.bmm(q, k.mT).softmax(-1), 0.2), v).view(2, 3, -1, 8)


def causal(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    mask = torch.zeros(q.shape[-2], q.shape[-2]).masked_fill(later(q), -math.inf)
    return (mask + q @ k.mT * 0.5).softmax(-1) @ v


def padded(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    mask = torch.where(seen(lengths, k.shape[-2]), 0.0, LOWEST)
    return (q @ k.mT * 0.5 + mask).softmax(-1) @ v


def added_and_hiding(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """For all that can be known, a query may see nothing: NaN."""
    mask = torch.where(seen(lengths, k.shape[-2]), 0.0, -math.inf)
    return (q @ k.mT + mask).softmax(-1) @ v


def added_by_halves(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """Both masks leave some keys, but what is chosen of them may not."""
    s = k.shape[-2]
    one, other = (torch.where((torch.arange(s) < 5) == b, 0.0, -math.inf) for b in (True, False))
    mask = torch.where(seen(lengths, s), one, other)
    return (q @ k.mT + mask).softmax(-1) @ v


def filled(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    """As in nanoGPT."""
    return (q @ k.mT * 0.5).masked_fill(later(q), -math.inf).softmax(-1) @ v


def filled_where_padded(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    mask = seen(lengths, k.shape[-2])
    return F.dropout((q @ k.mT * 0.5).masked_fill(mask == 0, -1e9).softmax(-1), 0.2) @ v


def filled_with_infinity(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~seen(lengths, k.shape[-2]), -math.inf).softmax(-1) @ v


def filled_with_little(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """Hidden keys have weights, but no gradients through them."""
    return (q @ k.mT * 0.5).masked_fill(~seen(lengths, k.shape[-2]), -0.7).softmax(-1) @ v


def filled_twice(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    scores = (q @ k.mT * 0.5).masked_fill(later(q), LOWEST)
    return torch.where(seen(lengths, k.shape[-2]), scores, LOWEST).softmax(-1) @ v


def filled_on_the_left(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """Rows of padding see nothing: hidden scores are all equal there."""
    hidden = ~seen(lengths, k.shape[-2]).flip(-1) | later(q)
    return torch.where(hidden, LOWEST, q @ k.mT * 0.5).softmax(-1) @ v


def filled_with_a_tensor(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    mask = seen(lengths, k.shape[-2])
    return (q @ k.mT).masked_fill(~mask, torch.tensor(-1e4)).softmax(-1) @ v


def filled_in_three_dimensions(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    mask = seen(lengths, k.shape[-2])[:, 0].repeat_interleave(3, 0)
    return ((q @ k.mT * 0.3).masked_fill(~mask, -1e9).softmax(-1) @ v).view(2, 3, -1, 8)


def with_dropout(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return F.dropout((q @ k.mT * 0.5).softmax(-1), 0.3) @ v


def of_three_with_dropout(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.bmm(F.dropout(torch.softmax(torch.bmm(q, k.mT), -1), 0.1), v).view(2, 3, -1, 8)


def by_pytorch(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.2)


def causal_by_pytorch(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.2, is_causal=True, scale=0.4)


def masked_by_pytorch(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    """A row that sees nothing is zero there."""
    mask = seen(lengths, k.shape[-2]) & (lengths > 3)[:, None, None, None]
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=0.5)


def shared_heads(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    k, v = (x[:, :1].repeat_interleave(3, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)


def short_values(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    """As in DeepSeek's models."""
    out = F.scaled_dot_product_attention(q, k, v[..., :5])
    return torch.cat([out, out[..., :3]], -1)


FUSED: list[Form] = [
    plain, scaled_scores, scaled_queries, scaled_everywhere, scaled_and_read, of_three_dimensions,
    of_three_with_mask, lengths_first, causal, padded, added_and_hiding, added_by_halves, filled,
    filled_where_padded, filled_with_infinity, filled_with_little, filled_twice, filled_on_the_left,
    filled_with_a_tensor, filled_in_three_dimensions, with_dropout, of_three_with_dropout,
    by_pytorch, causal_by_pytorch, masked_by_pytorch, shared_heads, short_values,
]  # fmt: skip
MASKED = [f for f in FUSED if f.__name__.startswith(("padded", "added", "filled", "masked"))]


# -- what stays --------------------------------------------------------------------------------


def read_weights(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    return weights @ v + weights.square().mean()


def read_kept_weights(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    weights = F.dropout((q @ k.mT).softmax(-1), 0.3)
    return weights @ v + weights.square().mean()


def negative_scale(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return (q @ k.mT * -0.5).softmax(-1) @ v


def over_queries(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-2) @ v


def with_bias(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    """What is added has a gradient."""
    bias = q.sum(-1, keepdim=True) * torch.arange(k.shape[-2])
    return F.scaled_dot_product_attention(q, k, v, bias, dropout_p=0.2)


def of_one_head(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    """Queries of all heads see the values of the first, in one product."""
    weights = (q @ k.mT).softmax(-1)
    return (weights.flatten(1, 2) @ v[:, 0]).unflatten(1, (3, -1))


def dropped_twice(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    return F.dropout(F.dropout((q @ k.mT).softmax(-1), 0.3), 0.3) @ v


def filled_with_two_numbers(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    scores = (q @ k.mT).masked_fill(later(q), LOWEST)
    return scores.masked_fill(~seen(lengths, k.shape[-2]), -math.inf).softmax(-1) @ v


def filled_with_no_number(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    return (q @ k.mT).masked_fill(~seen(lengths, k.shape[-2]), math.nan).softmax(-1) @ v


def filled_and_added(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    mask = torch.where(seen(lengths, k.shape[-2]), 0.0, -1e4)
    return (q @ k.mT + mask).masked_fill(later(q), LOWEST).softmax(-1) @ v


def filled_with_what_has_gradients(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
    return torch.where(seen(lengths, k.shape[-2]), q @ k.mT, v.sum()).softmax(-1) @ v


def other_factors(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    return (weights * (torch.rand(weights.shape) < 0.5).float() * 3) @ v


STAY: list[Form] = [
    read_weights, read_kept_weights, negative_scale, over_queries, with_bias, dropped_twice,
    other_factors, of_one_head, filled_with_two_numbers, filled_and_added, filled_with_no_number,
    filled_with_what_has_gradients,
]  # fmt: skip


class Layer(nn.Module):
    """Attention of three heads between two projections."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.project, self.out, self.form = nn.Linear(24, 72), nn.Linear(24, 24), form

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        q, k, v = self.project(x).view(2, -1, 3, 3, 8).permute(2, 0, 3, 1, 4)
        return self.out(self.form(q, k, v, lengths).transpose(1, 2).flatten(2))


def loss(model: nn.Module, x: Tensor, lengths: Tensor) -> Tensor:
    return model(x, lengths).square().mean()


BATCH = [torch.randn(2, 11, 24, generator=torch.Generator().manual_seed(0)), torch.tensor([11, 3])]


def train(
    form: Form, precision: str = "fp32", tolerance: float = 2e-5, lengths: Tensor = BATCH[1]
) -> tuple[Step, PassReport]:
    """Three steps beside those of the program as captured, by the reference."""
    torch.manual_seed(0)
    model, batch = Layer(form), [BATCH[0], lengths]
    found: list[tuple[Layer, list[Tensor]]] = []
    for options in ({"backend": "reference", "passes": []}, {"precision": precision}):
        mine = copy.deepcopy(model)
        optimizer = torch.optim.SGD(mine.parameters(), lr=0.3)
        step = ss.compile(mine, loss, optimizer, batch, seed=3, **options)
        found.append((mine, [step(*batch) for _ in range(3)]))
    (theirs, wanted), (mine, losses) = found
    torch.testing.assert_close(losses, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
    (program,) = step.programs.values()
    return step, next(r.report for r in program.records if r.name == "fuse_attention")


def kernels(step: Step) -> list[str]:
    (program,) = step.programs.values()
    assert isinstance(program.executable, CExecutable)
    return [i.name for i in program.executable.instructions]


@pytest.mark.parametrize("form", FUSED, ids=lambda f: f.__name__)
def test_fused(form: Form) -> None:
    step, report = train(form)
    assert (report.changed, report.skipped) == (1, {})
    names = kernels(step)
    assert sum("attention" in n for n in names) == 2
    assert not any("softmax" in n or "bmm" in n or "uniform" in n for n in names)


@pytest.mark.parametrize("form", STAY, ids=lambda f: f.__name__)
def test_stays(form: Form) -> None:
    step, report = train(form)
    assert report.changed == 0
    assert not any("attention" in n for n in kernels(step))


def test_reasons() -> None:
    _, report = train(with_bias)
    assert list(report.skipped) == ["something else reads scores, weights or their gradients"]
    _, report = train(filled_and_added)
    assert list(report.skipped) == ["scores that a mask is added to and others fill in"]


@pytest.mark.parametrize("form", MASKED, ids=lambda f: f.__name__)
def test_queries_that_see_nothing(form: Form) -> None:
    """They get what the softmax gives them, and so do gradients, be it NaN."""
    _, report = train(form, lengths=torch.tensor([4, 0]))
    assert report.changed == 1


@pytest.mark.parametrize("fill", [-1e4, -1e9, LOWEST])
def test_pytorch_attention_whose_mask_hides_everything(fill: float) -> None:
    def form(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        mask = torch.where(seen(lengths, k.shape[-2]), 0.0, fill)
        return F.scaled_dot_product_attention(q, k, v, mask)

    train(form, lengths=torch.tensor([4, 0]))


@pytest.mark.parametrize(
    "form", [plain, padded, filled_where_padded, with_dropout, causal_by_pytorch, shared_heads]
)
def test_in_bf16(form: Form) -> None:
    _, report = train(form, "bf16", 3e-2)
    assert report.changed == 1


def test_layers_of_pytorch() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(24, 3, 32, batch_first=True)
    x = torch.randn(2, 9, 24)

    def squares(model: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = model(x).square().mean()
        return out

    found = list[list[Tensor]]()
    for options in ({"backend": "reference", "passes": []}, {"precision": "fp32"}):
        mine = copy.deepcopy(layer)
        step = ss.compile(
            mine, squares, torch.optim.SGD(mine.parameters(), lr=0.1), [x], seed=3, **options
        )
        found.append([step(x) for _ in range(3)])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    assert sum("attention" in n for n in kernels(step)) == 2


def test_a_causal_mask_is_recognised_afterwards() -> None:
    for form in (causal, causal_by_pytorch, filled):
        step, _ = train(form)
        (program,) = step.programs.values()
        ops = [op for op in program.function.ops if "attention" in op.name]
        assert [op.attr("is_causal") for op in ops] == [True, True]
        assert all(op.operands[op.opdef.operand_names.index("attn_mask")] is None for op in ops)


def fused(function: Function) -> Function:
    after, report = FuseAttention().run(function)
    assert report.changed == 1
    return after


def test_a_forward_pass() -> None:
    """Nothing has gradients; the sides are read as they are."""
    torch.manual_seed(0)
    given = [torch.randn(2, 3, 9, 8), torch.randn(2, 3, 8, 7), torch.randn(2, 3, 7, 8)]

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.view(6, 9, 8), k.view(6, 8, 7), v.view(6, 7, 8)
        return torch.bmm(
            torch._softmax(torch.bmm(q, k).view(2, 3, 9, 7), -1, False).view(6, 9, 7), v
        )

    function = traced(forward, given)
    after = fused(function)
    names = [op.name.split(".")[1] for op in after.ops]
    assert names == ["permute", "_scaled_dot_product_flash_attention_for_cpu", "view"]
    check(function, given, [FuseAttention()])
    compare(after, given, rtol=1e-5, atol=1e-6)


SMALL = """
func @f {
  batch %q: f32[6,5,4] "q"
  batch %k: f32[6,4,7] "k"
  batch %v: f32[6,7,4] "v"
  rng %key: i64[2] "rng"
  %s: f32[6,5,7] = aten.bmm.default(%q, %k)
  %p: f32[6,5,7] = aten._softmax.default(%s) {dim=-1, half_to_float=false}
  %u: f32[6,5,7] = rng.uniform.default(%key) {site=4, shape=[6,5,7], dtype=f32}
  %b: bool[6,5,7] = aten.lt.Scalar(%u) {other=0.5}
  %c: f32[6,5,7] = aten._to_copy.default(%b) {dtype=f32}
  %d: f32[6,5,7] = aten.mul.Tensor(%c, 2.0)
  %w: f32[6,5,7] = aten.mul.Tensor(%p, %d)
  %o: f32[6,5,4] = aten.bmm.default(%w, %v)
  return o=%o
}
"""
GIVEN = [torch.randn(6, 5, 4), torch.randn(6, 4, 7), torch.randn(6, 7, 4), torch.tensor([5, 1])]


def test_factors_may_stand_on_either_side() -> None:
    for text in (SMALL, SMALL.replace("(%p, %d)", "(%d, %p)")):
        function = parse(text)
        compare(fused(function), GIVEN, rtol=1e-5, atol=1e-6)
        check(function, GIVEN, [FuseAttention()])


def test_it_can_be_written_as_python() -> None:
    function = fused(parse(SMALL))
    names: dict[str, Any] = {}
    exec(print_python(function), names)
    (found,), _ = names["step"](*GIVEN)
    (wanted,) = get_backend("reference").compile(function).run(GIVEN)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("aten.mul.Tensor(%c, 2.0)", "aten.mul.Tensor(%c, 3.0)"),
        ("{other=0.5}", "{other=0.25}"),
        ("{dim=-1,", "{dim=1,"),
        ("return o=%o", "return o=%o, w=%w"),
        ("return o=%o", "return o=%o, p=%p"),
        ("aten.bmm.default(%w, %v)", "aten.bmm.default(%w, %t)"),
    ],
)
def test_near_misses(old: str, new: str) -> None:
    text = SMALL.replace(old, new)
    text = text.replace(
        "  %o:", "  %t: f32[6,7,4] = aten.permute.default(%k2) {dims=[0,2,1]}\n  %o:"
    )
    text = text.replace("  %t:", "  %k2: f32[6,4,7] = aten.mul.Tensor(%k, %k)\n  %t:")
    function = parse(text)
    after, report = FuseAttention().run(function)
    if "%t)" in new:  # another value, but a value
        assert report.changed == 1
    else:
        assert report.changed == 0 and print_function(after) == print_function(function)
    compare(after, GIVEN, rtol=1e-5, atol=1e-6)


def test_many_layers_and_one_that_stays() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(map(Layer, (with_dropout, read_weights, by_pytorch)))

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(x, lengths)
            return x

    torch.manual_seed(0)
    model = Stack()
    step = ss.compile(model, loss, torch.optim.AdamW(model.parameters()), BATCH)
    step(*BATCH)
    assert sum("attention" in n for n in kernels(step)) == 4
