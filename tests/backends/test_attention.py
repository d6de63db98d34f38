"""Attention and its gradients: generated C against the definition in double precision."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import shoestring
from shoestring.backends import get_backend
from shoestring.backends.c import CBackend, CExecutable
from shoestring.backends.c.build import flags
from shoestring.backends.instructions import CallTorch
from shoestring.ir import Builder, Function, Role, TensorType, Value
from shoestring.ir.errors import BackendError
from shoestring.ir.ops.random import UNIFORM
from shoestring.runtime.executor import find_mismatches

from .helpers import traced

FORWARD = "aten._scaled_dot_product_flash_attention_for_cpu.default"
BACKWARD = "aten._scaled_dot_product_flash_attention_for_cpu_backward.default"

OWN, OWN_BACKWARD = "attention.softmax.default", "attention.softmax_backward.default"
KEY = [(1 << 40) + 17, (1 << 33) + 5]  # of random numbers: words of a seed and of a step
SITE = 3

# batch, heads, heads of keys and values, queries, keys, size of a head
Sizes = tuple[int, int, int, int, int, int]
SIZES: list[Sizes] = [
    (1, 1, 1, 1, 1, 1),
    (2, 4, 2, 5, 7, 8),
    (1, 3, 3, 33, 65, 17),
    (2, 3, 1, 130, 257, 40),
    (1, 2, 2, 300, 300, 80),
    (1, 1, 1, 1, 300, 64),
    (1, 2, 1, 97, 31, 3),
    (1, 2, 2, 49, 129, 64),
]
TOLERANCE = {
    torch.float32: 5e-6, torch.float64: 1e-13, torch.bfloat16: 2e-2, torch.float16: 3e-3,
}  # fmt: skip
BOTH = (False, True)
TILED = (1, 2, 2, 80, 96, 96)
RESULTS = ("out", "lse", "dq", "dk", "dv")


@dataclass(frozen=True)
class Case:
    """One call of attention and of its gradients."""

    sizes: Sizes
    dtype: torch.dtype = torch.float32
    mask: tuple[int, ...] | None = None
    causal: bool = False
    scale: float | None = None
    dropout: float = 0.0
    keep: float | None = None
    high: int | None = None  # size of a head of values, if another
    fill: float | None = None  # what scores are that a mask of bools hides
    safe: bool = True

    @property
    def own(self) -> bool:
        """Whether PyTorch has no such op."""
        return not (self.keep is self.high is self.fill is None and self.safe)

    @property
    def attrs(self) -> dict[str, Any]:
        """Attributes of both ops; those with dropout are others."""
        found: dict[str, Any] = {"is_causal": self.causal, "scale": self.scale}
        if not self.own:
            return found | {"dropout_p": self.dropout}
        found |= {"safe": self.safe} | ({} if self.fill is None else {"fill": self.fill})
        return found | ({} if self.keep is None else {"keep": self.keep, "site": SITE})


def add(f: Builder, case: Case) -> tuple[Value, ...]:
    """The five results, with the heads between tokens and elements as in a model."""
    b, h, g, t, s, d = case.sizes
    first = len(f.params)

    def heads(count: int, length: int, size: int) -> Value:
        type_ = TensorType(case.dtype, (b, length, count, size))
        x = f.param(type_, Role.BATCH, f"#{len(f.params)}")
        return f.emit("aten.permute.default", x, dims=(0, 2, 1, 3))

    high = case.high or d
    q, k, v, grad = heads(h, t, d), heads(g, s, d), heads(g, s, high), heads(h, t, high)
    mask = None
    if case.mask is not None:
        dtype = case.dtype if case.fill is None else torch.bool
        mask = f.param(TensorType(dtype, case.mask), Role.BATCH, f"#mask{first}")
    names, more = (FORWARD, BACKWARD), list[Value | None]()
    if case.own:
        names, more = (OWN, OWN_BACKWARD), [None]
    if case.keep is not None:
        more = [f.param(TensorType(torch.int64, (2,)), Role.BATCH, f"#key{first}")]
    out, lse = f.emit_all(names[0], q, k, v, mask, *more, **case.attrs)
    return out, lse, *f.emit_all(names[1], grad, q, k, v, out, lse, mask, *more, **case.attrs)


def program(*cases: Case) -> Function:
    f = Builder("attention")
    for i, case in enumerate(cases):
        for name, x in zip(RESULTS, add(f, case), strict=True):
            f.output(f"{name}{i}", x)
    return f.build()


def definition(case: Case, given: list[Tensor]) -> list[Tensor]:
    """The five results in double precision, by autograd, from `inputs`.

    Weights are kept where `rng.uniform` says so.
    """
    q, k, v = (x.transpose(1, 2).double().detach().requires_grad_() for x in given[:3])
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).mT
    scores = scores * (q.shape[-1] ** -0.5 if case.scale is None else case.scale)
    if case.fill is not None:
        scores = torch.where(given[4], scores, case.fill)
    elif case.mask is not None:
        scores = scores + given[4].double()
    if case.causal:
        unseen = ~torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(unseen, -math.inf)
    blind = (scores == -math.inf).all(-1, keepdim=True)
    seen = scores.masked_fill(blind, 0.0)
    weights = torch.where(blind, 0.0, seen.softmax(-1)) if case.safe else scores.softmax(-1)
    if case.keep is not None:
        shape = tuple(weights.shape)
        drawn = UNIFORM.reference(torch.tensor(KEY), site=SITE, shape=shape, dtype=torch.float32)
        weights = weights * (drawn < case.keep) / case.keep
    out = weights @ v.repeat_interleave(group, 1)
    lse = torch.where(blind, 0.0 if case.safe else math.nan, seen.logsumexp(-1, keepdim=True))
    gradients = torch.autograd.grad(out, (q, k, v), given[3].transpose(1, 2).double())
    return [out.detach(), lse.squeeze(-1).detach(), *gradients]


def inputs(case: Case) -> list[Tensor]:
    b, h, g, t, s, d = case.sizes
    high = case.high or d
    shapes = [(b, t, h, d), (b, s, g, d), (b, s, g, high), (b, t, h, high)]
    tensors = [torch.randn(shape).to(case.dtype) for shape in shapes]
    if case.mask is not None:
        hidden = torch.rand(case.mask) < 0.3
        hidden[..., 0, :] |= case.mask[-2] > 1  # all that the first query sees
        added = torch.where(hidden, -math.inf, torch.randn(case.mask)).to(case.dtype)
        tensors.append(added if case.fill is None else ~hidden)
    return tensors if case.keep is None else [*tensors, torch.tensor(KEY)]


def compare_with_definition(case: Case, given: list[Tensor], found: list[Tensor]) -> None:
    for name, x, y in zip(RESULTS, found, definition(case, given), strict=True):
        x = x.double()
        x = x.sum(-1) if case.own and name == "lse" else x
        assert torch.equal(x.isnan(), y.isnan()), (case, name)
        # Gradients that cancel exactly are compared with the size of what cancels.
        size = max(float(y.nan_to_num().abs().max()), 1.0)
        error = float((x - y).nan_to_num().abs().max()) / size
        assert error <= TOLERANCE[case.dtype], (case, name, error)


def check(*cases: Case) -> None:
    """Compiles them together: building takes longer than running."""
    executable = CBackend().compile(program(*cases))
    assert not any(isinstance(i, CallTorch) for i in executable.instructions)
    arguments = [inputs(case) for case in cases]
    for _ in range(2):
        found = executable.run([t for each in arguments for t in each])
        for case, given in zip(cases, arguments, strict=True):
            compare_with_definition(case, given, [found.pop(0) for _ in RESULTS])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_odd_sizes(dtype: torch.dtype) -> None:
    check(*(Case(sizes, dtype, causal=causal) for sizes in SIZES for causal in (False, True)))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_masks(dtype: torch.dtype) -> None:
    cases: list[Case] = []
    for sizes in SIZES[1:5]:
        b, h, _, t, s, _ = sizes
        masks = [(b, 1, 1, s), (t, s), (b, h, t, s), (1, 1, t, 1)]
        cases += [Case(sizes, dtype, mask) for mask in masks]
    check(*cases)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_dropped_weights(dtype: torch.dtype) -> None:
    cases = [Case(sizes, dtype, causal=c, keep=0.75) for sizes in SIZES for c in BOTH]
    cases += [Case(SIZES[2], dtype, (33, 65), keep=keep) for keep in (0.1, 0.9, 1.0)]
    cases += [Case(SIZES[3], dtype, (2, 1, 1, 257), keep=0.5)]
    check(*cases)


LOWEST = torch.finfo(torch.float32).min
FILLS = (-math.inf, LOWEST, -1e9, -2.0)


def masked(dtype: torch.dtype) -> list[Case]:
    """Masks of bools and queries that see nothing."""
    b, h, _, t, s, _ = SIZES[2]
    shapes = [(b, 1, 1, s), (t, s), (b, h, t, s), (1, 1, t, 1)]
    cases = [Case(SIZES[2], dtype, shapes[i], fill=fill) for i, fill in enumerate(FILLS)]
    cases += [Case(SIZES[2], dtype, (t, s), fill=f, safe=False, keep=0.7) for f in FILLS]
    cases += [
        Case(SIZES[2], dtype, (t, s), safe=False),
        Case(SIZES[3], dtype, (130, 257), fill=-3.0),
    ]
    return [*cases, Case(SIZES[4], dtype, (300, 300), causal=True, fill=-math.inf)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_masks_that_choose(dtype: torch.dtype) -> None:
    check(*masked(dtype))


@pytest.mark.parametrize("sizes", [(2, 3, 3, 130, 130, 8), (2, 4, 2, 5, 9, 8), (2, 1, 1, 9, 5, 8)])
@pytest.mark.parametrize("padded", BOTH)
@pytest.mark.parametrize("fill", [-math.inf, -1e9, -2.0])
def test_a_mask_that_hides_later_keys_is_recognised(
    sizes: Sizes, padded: bool, fill: float
) -> None:
    """Kernels leave them out: a NaN there does not reach earlier blocks of queries."""
    *_, t, s, _ = sizes
    case = Case(sizes, mask=(2, 1, t, s), fill=fill, keep=0.8, safe=False)
    given = inputs(case)
    given[4] = torch.ones(t, s, dtype=torch.bool).tril().expand(2, 1, t, s).clone()
    if padded:
        given[4][1, ..., s // 2 :] = False
    executable = CBackend().compile(program(case))
    compare_with_definition(case, given, executable.run(given))
    last = min(t, s) - 1
    given[2][:, last] = math.nan
    finite = executable.run(given)[0][:, :, :48].isfinite().all()
    assert t < 48 or bool(finite) == (fill < -2)
    given[4][0, 0, 0] = False  # a query that sees nothing gets what the others hide
    given[2][:, last] = 1
    compare_with_definition(case, given, executable.run(given))


@pytest.mark.parametrize("lowest", [-1e4, -1e9, LOWEST])
def test_weights_beside_a_large_mask(lowest: float) -> None:
    """All of a query's scores are as large: what they have in common is not lost."""
    case = Case((1, 2, 2, 9, 70, 8), mask=(9, 70), keep=1.0)
    given = inputs(case)
    given[4] = torch.where(given[4] == -math.inf, lowest, given[4])
    given[4][2, 3] = -math.inf
    found = CBackend().compile(program(case)).run(given)
    for x, y in zip(found, get_backend("reference").compile(program(case)).run(given), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    if lowest > -1e5:
        return  # there f32 keeps some digits of the scores
    assert find_mismatches(CBackend().compile(program(case)), given) == []
    out, v = found[0], given[2].transpose(1, 2)
    torch.testing.assert_close(out[:, :, 0], v.mean(2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_values_of_another_size(dtype: torch.dtype) -> None:
    cases = [
        Case(s, dtype, causal=c, high=high) for s in SIZES[1:4] for c in BOTH for high in (1, 48)
    ]
    cases += [Case(SIZES[5], dtype, high=9), Case(SIZES[3], dtype, (130, 257), high=70, keep=0.6)]
    check(*cases)


def test_dropout_drops_about_as_many_as_it_says() -> None:
    """Equal scores and values of one: what comes out is the share of weights that are kept."""
    case = Case((1, 2, 2, 300, 300, 8), keep=0.9)
    q, k, v, grad, key = inputs(case)
    given = [torch.zeros_like(q), k, torch.ones_like(v), grad, key]
    out = CBackend().compile(program(case)).run(given)[0]
    assert abs(float(out.mean()) - 1) < 5e-3
    assert 0.01 < float(out.std()) < 0.03  # (0.1 / 0.9 / 300) ** 0.5 is 0.019


# Narrower paths are the same C for fewer lanes; bf16 without products of pairs is computed in f32.
def test_every_instruction_set(isa: str) -> None:
    dtypes = [d for d in TOLERANCE if isa != "emulated-amx" or d is torch.bfloat16]
    cases = [Case(sizes, dtype, causal=c) for sizes in SIZES for dtype in dtypes for c in BOTH]
    cases += [Case(TILED, torch.bfloat16, causal=c) for c in BOTH]
    cases += [Case(sizes, dtype, keep=0.6) for sizes in SIZES for dtype in dtypes]
    cases += [Case(SIZES[2], dtype, causal=True, high=33) for dtype in dtypes]
    cases += [Case(TILED, torch.bfloat16, causal=c, keep=0.6, high=64) for c in BOTH]
    cases += [case for dtype in dtypes for case in masked(dtype)]
    check(*cases, *(Case(SIZES[3], dtype, (130, 257)) for dtype in dtypes))


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOESTRING_ISA", "sse9")
    with pytest.raises(BackendError, match="SS4204"):
        flags()


def test_weights_sum_to_one_after_rounding() -> None:
    """What all values have in common comes out as it went in."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 2, 67, 24).bfloat16()
    v = torch.full_like(k, 1.5)
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    function = traced(lambda q, k, v: attention(q, k, v)[0], (q, k, v))
    (out,) = CBackend().compile(function).run([q, k, v])
    assert torch.equal(out, v)


def test_scale() -> None:
    check(Case((1, 2, 2, 9, 9, 8), scale=0.7))


@pytest.mark.parametrize("keep", [None, 0.7])
def test_same_for_every_number_of_threads(keep: float | None) -> None:
    case = Case((2, 3, 3, 200, 200, 32), causal=True, keep=keep)
    arguments = inputs(case)
    executable = CBackend().compile(program(case))
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(executable.run(arguments))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


def test_rows_that_see_nothing_are_those_of_pytorch() -> None:
    case = Case((1, 2, 2, 5, 6, 8), mask=(5, 6))
    arguments = inputs(case)
    arguments[4][2] = -math.inf
    executable = CBackend().compile(program(case))
    assert find_mismatches(executable, arguments) == []
    out, lse, dq, *_ = executable.run(arguments)
    assert not out[:, :, 2].any() and not lse[:, :, 2].any() and not dq[:, :, 2].any()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_nan_and_infinity_reach_what_they_reach_in_pytorch(at: int, value: float) -> None:
    case = Case((1, 2, 2, 5, 40, 8))
    arguments = inputs(case)
    arguments[at][0, 3, 1, 2] = value
    found = CBackend().compile(program(case)).run(arguments)
    wanted = get_backend("reference").compile(program(case)).run(arguments)
    # What a row with an infinite score sums to, NaN or infinity, depends on how exp is computed;
    # so do the gradients that are made from it.
    names = RESULTS if math.isnan(value) or at == 3 else RESULTS[:2]
    for name, x, y in zip(names, found, wanted, strict=False):
        same = torch.isfinite if name == "lse" else torch.isnan
        assert torch.equal(same(x), same(y)), name


def test_what_is_left_to_pytorch_says_why() -> None:
    executable = CBackend().compile(program(Case((1, 1, 1, 4, 4, 8), scale=-1.0)))
    whys = [i.why for i in executable.instructions if isinstance(i, CallTorch)]
    assert whys == ["a scale of -1.0", "a scale of -1.0"]
    assert all("a scale of -1.0" in f.why for f in executable.fallbacks)


class Block(nn.Module):
    """Self-attention with one product for queries, keys and values."""

    def __init__(self, heads: int, groups: int, size: int) -> None:
        super().__init__()
        self.sizes = [heads * size, groups * size, groups * size]
        self.size, self.grouped = size, heads != groups
        self.inside = nn.Linear(heads * size, sum(self.sizes))
        self.outside = nn.Linear(heads * size, heads * size)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, t, _ = x.shape
        parts = self.inside(x).split(self.sizes, -1)
        q, k, v = (p.view(b, t, -1, self.size).transpose(1, 2) for p in parts)
        out = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=self.grouped
        )
        return self.outside(out.transpose(1, 2).reshape(b, t, -1))


@pytest.mark.parametrize("groups", [4, 2])
def test_a_step_copies_nothing_around_attention(groups: int) -> None:
    torch.manual_seed(0)
    model, x = Block(4, groups, 8), torch.randn(2, 9, 32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss_fn(m: nn.Module, x: Tensor) -> Tensor:
        return m(x).square().mean()

    step = shoestring.compile(model, loss_fn, optimizer, (x,))
    executable = step.program((x,)).executable
    assert isinstance(executable, CExecutable)
    names = [i.name for i in executable.instructions]
    assert not any("clone" in n or "cat" in n for n in names)
    assert sum("attention" in n for n in names) == 2
    arguments = [
        torch.randn(p.value.type.static_shape).to(p.value.type.dtype)
        for p in executable.function.params
    ]
    assert find_mismatches(executable, arguments, 1e-5) == []


def test_gradients_that_are_read_twice_are_concatenated_by_a_copy() -> None:
    case = Case((1, 2, 2, 5, 5, 8), causal=True)
    f = Builder("joined")
    rows: list[Value] = []
    for name, x in zip(RESULTS, add(f, case), strict=True):
        f.output(name, x)
        if name.startswith("d"):
            x = f.emit("aten.permute.default", x, dims=(0, 2, 1, 3))
            rows.append(f.emit("aten.view.default", x, size=(1, 5, 16)))
    f.output("all", f.emit("aten.cat.default", tuple(rows), dim=2))
    *_, dq, dk, dv, joined = CBackend().compile(f.build()).run(inputs(case))
    parts = [x.transpose(1, 2).reshape(1, 5, 16) for x in (dq, dk, dv)]
    assert torch.equal(joined, torch.cat(parts, 2))
