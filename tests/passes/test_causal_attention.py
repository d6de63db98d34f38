"""Masks that models compute: attention is told what they say whatever the batch is."""

import itertools
import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import shoestring as ss
from shoestring.ir import Function, Op, Value, run_op
from shoestring.passes import Pass, Pipeline, check, default_pipeline
from shoestring.passes.causal_attention import ATTENTION, CausalAttention, _Masks
from shoestring.runtime.step import Step

from ..backends.helpers import compare, traced
from .training import train_both

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
LOWEST = torch.finfo(torch.float32).min
Mask = Callable[[Tensor, int, int], Tensor]


def allowed(t: int, s: int) -> Tensor:
    return torch.arange(t).unsqueeze(1) >= torch.arange(s)


def by_triangle(_: Tensor, t: int, s: int) -> Tensor:
    return torch.full((t, s), -math.inf).triu(1)


def by_filling(_: Tensor, t: int, s: int) -> Tensor:
    return torch.zeros(t, s).masked_fill(
        torch.ones(t, s, dtype=torch.bool).tril().logical_not(), LOWEST
    )


def by_positions(_: Tensor, t: int, s: int) -> Tensor:
    """As models of transformers: with batch, heads, and documents of which there is one."""
    positions = torch.arange(max(t, s)).view(1, -1).expand(2, -1)
    document = (positions[:, 1:] - positions[:, :-1] != 1).cumsum(-1)
    document = torch.cat([torch.zeros(2, 1, dtype=torch.int64), document], 1)
    later = positions[:, None, None, :s] <= positions[:, None, :t, None]
    same = document[:, None, None, :s] == document[:, None, :t, None]
    return torch.where(later & same, 0.0, -math.inf)


def by_constants(_: Tensor, t: int, s: int) -> Tensor:
    return torch.where(allowed(t, s), 0.0, -math.inf)[None, None].expand(2, 3, t, s)


def with_padding(seen: Tensor, t: int, s: int) -> Tensor:
    return torch.where(allowed(t, s) & (seen > 0)[:, None, None, :s], 0.0, -math.inf)


def with_padding_added(seen: Tensor, t: int, s: int) -> Tensor:
    padding = torch.where(seen[:, None, None, :s] > 0, 0.0, -math.inf)
    return by_triangle(seen, t, s) + padding


def in_windows(_: Tensor, t: int, s: int) -> Tensor:
    near = torch.arange(t).unsqueeze(1) - torch.arange(s) < 3
    return torch.where(allowed(t, s) & near, 0.0, -math.inf)


def with_slopes(_: Tensor, t: int, s: int) -> Tensor:
    distance = torch.arange(s) - torch.arange(t).unsqueeze(1)
    return torch.where(allowed(t, s), distance * 0.5, -math.inf)


def hiding_nothing(_: Tensor, t: int, s: int) -> Tensor:
    return torch.zeros(t, s)


def hiding_padding(seen: Tensor, t: int, s: int) -> Tensor:
    return torch.where((seen > 0)[:, None, None, :s], 0.0, -math.inf).expand(2, 1, t, s)


def with_a_prefix(_: Tensor, t: int, s: int) -> Tensor:
    return torch.where(allowed(t, s) | (torch.arange(s) < 2), 0.0, -math.inf)


def one_later(_: Tensor, t: int, s: int) -> Tensor:
    return torch.full((t, s), -math.inf).triu(2)


def with_nan(_: Tensor, t: int, s: int) -> Tensor:
    return torch.where(allowed(t, s), 0.0, math.nan)


def biased(_: Tensor, t: int, s: int) -> Tensor:
    return torch.where(allowed(t, s), 0.0, -1e4)


CAUSAL = [by_triangle, by_filling, by_positions, by_constants]
IN_PART = [with_padding, with_padding_added, in_windows, with_slopes]
OTHERS = [hiding_padding, with_a_prefix, one_later, with_nan, biased]


def attention(mask: Mask, t: int, s: int, causal: bool = False) -> tuple[Function, list[Tensor]]:
    """Attention of t queries and s keys and its gradients."""
    torch.manual_seed(0)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

    def both(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, seen: Tensor) -> tuple[Tensor, ...]:
        m = mask(seen, t, s)
        out, lse = FLASH(q, k, v, 0.0, causal, attn_mask=m)
        return out, *backward(grad, q, k, v, out, lse, 0.0, causal, attn_mask=m)

    q, k, v = (torch.randn(2, 3, n, 8) for n in (t, s, s))
    seen = (torch.arange(max(t, s)) + torch.tensor([[5], [1]]) < max(t, s) + 1).long()
    arguments = [q, k, v, torch.randn_like(q), seen]
    return traced(both, arguments), arguments


def told(f: Function, arguments: list[Tensor], p: CausalAttention | None = None) -> list[Op]:
    """Ops of attention after the passes, which keep the numbers; both backends agree on them."""
    passes = default_pipeline(ATTENTION)
    chosen = [p if p is not None and x.name == p.name else x for x in passes]
    after = check(f, arguments, chosen).records[-1].after
    compare(after, arguments, rtol=1e-4, atol=1e-5)
    return [op for op in after.ops if op.name in ATTENTION]


def earlier_passes() -> list[Pass]:
    named = CausalAttention().name
    return list(itertools.takewhile(lambda p: p.name != named, default_pipeline(ATTENTION)))


def facts(ops: list[Op]) -> set[tuple[bool, bool]]:
    """Whether attention is causal, and whether it has a mask."""
    assert len(ops) == 2
    names = [op.opdef.operand_names.index("attn_mask") for op in ops]
    masks = [op.operands[i] for op, i in zip(ops, names, strict=True)]
    return {
        (op.attrs.get("is_causal", False), m is not None) for op, m in zip(ops, masks, strict=True)
    }


SIZES = [(5, 5), (5, 9), (9, 5), (70, 70), (1, 4)]


@pytest.mark.parametrize(("t", "s"), SIZES)
@pytest.mark.parametrize("mask", CAUSAL, ids=lambda f: f.__name__)
def test_later_keys_are_hidden(mask: Mask, t: int, s: int) -> None:
    assert facts(told(*attention(mask, t, s))) == {(True, False)}


@pytest.mark.parametrize(("t", "s"), [size for size in SIZES if size[0] > 1])
@pytest.mark.parametrize("mask", IN_PART, ids=lambda f: f.__name__)
def test_more_than_later_keys_may_be_hidden(mask: Mask, t: int, s: int) -> None:
    assert facts(told(*attention(mask, t, s))) == {(True, True)}


@pytest.mark.parametrize("mask", OTHERS, ids=lambda f: f.__name__)
def test_other_masks_stay(mask: Mask) -> None:
    assert facts(told(*attention(mask, 7, 7))) == {(False, True)}


@pytest.mark.parametrize("causal", [True, False])
def test_a_mask_that_hides_nothing(causal: bool) -> None:
    assert facts(told(*attention(hiding_nothing, 7, 7, causal))) == {(causal, False)}


@pytest.mark.parametrize("mask", [by_triangle, with_a_prefix], ids=lambda f: f.__name__)
def test_a_mask_that_hides_no_more_than_causal_attention_does(mask: Mask) -> None:
    assert facts(told(*attention(mask, 7, 7, causal=True))) == {(True, False)}


def test_one_key_is_never_later() -> None:
    assert facts(told(*attention(hiding_padding, 4, 1))) == {(False, True)}
    assert facts(told(*attention(by_triangle, 4, 1))) == {(False, False)}


def test_the_least_f16_is_no_infinity() -> None:
    def mask(_: Tensor, t: int, s: int) -> Tensor:
        return torch.zeros(t, s).masked_fill(~allowed(t, s), torch.finfo(torch.float16).min)

    assert facts(told(*attention(mask, 5, 5))) == {(False, True)}


@pytest.mark.parametrize("limit", [1000, 4000])
def test_large_masks_are_not_evaluated(limit: int) -> None:
    f, arguments = attention(by_positions, 33, 33)
    few = CausalAttention(limit)
    assert facts(told(f, arguments, few)) == {(False, True)}
    *_, record = check(f, arguments, [*earlier_passes(), few]).records
    assert record.report.matched == 2 and "too large" in str(record)


# -- conditions ------------------------------------------------------------------------------------


def scattered(rng: random.Random) -> Tensor:
    """Sixteen numbers below 17."""
    return (torch.arange(1, 17) * rng.randrange(1, 17) % 17).view(4, 4)


def random_mask(rng: random.Random, depth: int, unknown: Tensor) -> Tensor:
    """A condition of constants and of what is not known."""
    if depth == 0:
        return unknown if rng.random() < 0.4 else scattered(rng) < rng.randrange(17)
    x = random_mask(rng, depth - 1, unknown)
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice([torch.bitwise_not, torch.logical_not])(x)
    if kind == 1:
        return x.transpose(0, 1)
    y = random_mask(rng, depth - 1, unknown)
    names = [torch.bitwise_and, torch.logical_and, torch.bitwise_or, torch.logical_or]
    return rng.choice(names)(x, y)


def _evaluate(f: Function, given: Tensor) -> dict[Value, Tensor]:
    values = {f.params[0].value: given}
    for op in f.ops:
        values.update(zip(op.results, run_op(op, values), strict=True))
    return values


@pytest.mark.parametrize("seed", range(60))
def test_bounds_hold_whatever_the_batch_is(seed: int) -> None:
    torch.manual_seed(seed)
    rng = random.Random(seed)

    def mask(unknown: Tensor) -> Tensor:
        scores, hidden = scattered(rng) - 8.0, torch.full((), -math.inf)
        shown = scores.masked_fill(scores > 4, -math.inf)
        some = torch.where(random_mask(rng, 4, unknown), shown, hidden)
        other = torch.where(random_mask(rng, 3, unknown), hidden, torch.zeros(()))
        return (some + other).transpose(0, 1)

    f, _ = Pipeline(earlier_passes()).run(traced(mask, [torch.rand(4, 4) < 0.5]))
    masks = _Masks(f, 1 << 20)
    (result,) = f.results
    seen = masks.seen(result)
    conditions = [op.result for op in f.ops if op.result.type.dtype is torch.bool]
    for n in range(16):
        values = _evaluate(f, torch.rand(4, 4) < n / 15)
        if seen is not None:
            assert not ((values[result] > -math.inf) & ~seen).any()
        for c in conditions:
            most, rest = masks.may(c, True), masks.may(c, False)
            assert most is None or not (values[c] & ~most).any()
            assert rest is None or not (~values[c] & ~rest).any()


def test_a_long_chain_of_conditions_ends() -> None:
    def mask(seen: Tensor, t: int, s: int) -> Tensor:
        condition = allowed(t, s)
        for _ in range(3000):
            condition = (seen[0, :s] > 0) & condition
        return torch.where(condition, 0.0, -math.inf)

    f, _ = Pipeline(earlier_passes()).run(attention(mask, 5, 5)[0])
    _, report = CausalAttention().run(f)
    assert report.matched == 2 and report.changed == 0


# -- whole steps -----------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, mask: Mask) -> None:
        super().__init__()
        self.inside, self.outside = nn.Linear(24, 72), nn.Linear(24, 24)
        self.mask = mask

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (p.view(b, t, 3, 8).transpose(1, 2) for p in self.inside(x).split(24, -1))
        out = nn.functional.scaled_dot_product_attention(q, k, v, self.mask(seen, t, t))
        return self.outside(out.transpose(1, 2).reshape(b, t, -1))


@pytest.mark.parametrize("mask", [*CAUSAL, *IN_PART], ids=lambda f: f.__name__)
def test_training(mask: Mask) -> None:
    torch.manual_seed(0)
    seen = torch.ones(2, 37, dtype=torch.int64)
    seen[0, :5] = 0  # queries that see nothing but padding
    seen[1, -7:] = 0
    x = torch.randn(2, 37, 24)

    def loss(model: nn.Module, x: Tensor, seen: Tensor) -> Tensor:
        shown: Tensor = model(x, seen)[:, 5:30]
        return shown.square().mean() + shown.abs().amax()

    def compiled(model: nn.Module) -> Step:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return ss.compile(model, loss, optimizer, (x, seen))

    step = train_both(Block(mask), compiled, loss, (x, seen), lr=0.1, tolerance=1e-5)
    records = {r.name: str(r) for r in step.program((x, seen)).records}
    kept = 2 if mask in IN_PART else 0
    assert f"{2 - kept} need no mask any more, {kept} keep it" in records["causal_attention"]
    found = facts(of_attention(step, (x, seen)))
    assert found == {(True, mask in IN_PART)}


def of_attention(step: Step, batch: tuple[Tensor, ...]) -> list[Op]:
    return [op for op in step.program(batch).function.ops if op.name in ATTENTION]


@pytest.mark.parametrize("mask", [by_triangle, by_positions], ids=lambda f: f.__name__)
def test_the_last_query_sees_all_keys(mask: Mask) -> None:
    """Where only it is read, nothing else is computed; what is left of the mask hides nothing."""
    torch.manual_seed(0)
    batch = torch.randn(2, 37, 24), torch.ones(2, 37, dtype=torch.int64)

    def loss(model: nn.Module, x: Tensor, seen: Tensor) -> Tensor:
        last: Tensor = model(x, seen)[:, -1]
        return last.square().mean()

    def compiled(model: nn.Module) -> Step:
        return ss.compile(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), batch)

    step = train_both(Block(mask), compiled, loss, batch, lr=0.1, tolerance=1e-5)
    ops = of_attention(step, batch)
    assert facts(ops) == {(False, False)}
    assert all(v.type.static_shape[2] == 1 for op in ops for v in op.inputs[:1])
