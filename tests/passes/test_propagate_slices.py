"""Slices that are read and gradients that are zero elsewhere: less is computed, equal numbers."""

from collections.abc import Callable, Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

import shoestring as ss
from shoestring.ir import Function, Op, parse, verify
from shoestring.passes import Pass, check, default_pipeline
from shoestring.passes.dead_code import DeadCode
from shoestring.passes.propagate_slices import PropagateSlices, Slice
from shoestring.runtime.step import Step

from ..backends.helpers import compare
from .training import Loss, train_both

Block = Callable[[Tensor], Tensor]
BATCH, TOKENS, SIZE = 3, 8, 6


def narrowed(text: str, **options: Any) -> Function:
    """The function after the pass, with numbers checked; nothing dead."""
    f = parse(f"func @f {{{text}\n}}")
    verify(f)
    arguments = [torch.randn(p.value.type.static_shape) for p in f.params]
    passes: list[Pass] = [PropagateSlices(**options), DeadCode()]
    after = check(f, arguments, passes).records[-1].after
    compare(after, arguments, rtol=1e-4, atol=1e-4)
    return after


def sizes(f: Function, name: str) -> list[int]:
    """Elements of the first result of each op of that name."""
    return [op.results[0].type.numel for op in f.ops if op.name == f"aten.{name}"]


READS = {
    "select": ("f32[4,6]", "aten.select.int(%h) {dim=1, index=0}"),
    "select the last": ("f32[4,6]", "aten.select.int(%h) {dim=-2, index=-1}"),
    "slice": ("f32[4,2,6]", "aten.slice.Tensor(%h) {dim=1, start=3, end=5}"),
    "slice of the end": ("f32[4,2,6]", "aten.slice.Tensor(%h) {dim=1, start=-2}"),
}


@pytest.mark.parametrize("read", READS)
def test_rows_that_are_read(read: str) -> None:
    """Through reshapes, products, normalization, softmax, residual and the order of dimensions."""
    type_, op = READS[read]
    f = narrowed(f"""
  parameter %w: f32[6,6] "w"
  parameter %g: f32[6] "g"
  batch %x: f32[4,10,6] "x"
  %rows: f32[40,6] = aten.view.default(%x) {{size=[40, 6]}}
  %y: f32[40,6] = aten.addmm.default(%g, %rows, %w)
  %y3: f32[4,10,6] = aten.view.default(%y) {{size=[4, 10, 6]}}
  %r: f32[4,10,6] = aten.add.Tensor(%y3, %x)
  %n: f32[4,10,6], %m: f32[4,10,1], %s: f32[4,10,1] = aten.native_layer_norm.default(%r, %g, _) {{normalized_shape=[6], eps=1e-5}}
  %p: f32[10,4,6] = aten.permute.default(%n) {{dims=[1, 0, 2]}}
  %e: f32[10,4,6] = aten._softmax.default(%p) {{dim=2, half_to_float=false}}
  %h: f32[4,10,6] = aten.permute.default(%e) {{dims=[1, 0, 2]}}
  %out: {type_} = {op}
  return out=%out""")  # noqa: E501  (IR text)
    kept = 24 if "select" in read else 48
    for name in ("addmm.default", "add.Tensor", "native_layer_norm.default", "_softmax.default"):
        assert sizes(f, name) == [kept]


WHOLE = {
    "everything is read": "%o: f32[4,10,6] = aten.exp.default(%y)",
    "two slices": "%o: f32[4,6] = aten.select.int(%y) {dim=1, index=3}",
    "more than a quarter": "%o: f32[4,3,6] = aten.slice.Tensor(%y) {dim=1, start=0, end=3}",
    "a larger step": "%o: f32[4,2,6] = aten.slice.Tensor(%y) {dim=1, start=0, end=4, step=2}",
    "rows that need each other": "%z: f32[4,10,6] = aten._softmax.default(%y) {dim=1, half_to_float=false}\n"  # noqa: E501  (IR text)
    "  %o: f32[4,6] = aten.select.int(%z) {dim=1, index=0}",
    "sums that need all": "%z: f32[4,6] = aten.mean.dim(%y) {dim=[1]}\n"
    "  %o: f32[6] = aten.select.int(%z) {dim=0, index=0}",
}


@pytest.mark.parametrize("why", WHOLE)
def test_what_is_needed_is_whole(why: str) -> None:
    other = "%b: f32[4,6] = aten.select.int(%y) {dim=1, index=0}" if "two" in why else ""
    f = narrowed(f"""
  batch %x: f32[4,10,6] "x"
  %y: f32[4,10,6] = aten.exp.default(%x)
  {other}
  {WHOLE[why]}
  return o=%o{", b=%b" if other else ""}""")
    assert 240 in sizes(f, "exp.default") or "all" in why


def test_share_is_an_option() -> None:
    text = """
  batch %x: f32[4,6] "x"
  %y: f32[4,6] = aten.exp.default(%x)
  %o: f32[4,3] = aten.slice.Tensor(%y) {dim=1, start=0, end=3}
  return o=%o"""
    assert sizes(narrowed(text), "exp.default") == [24]
    assert sizes(narrowed(text, most=0.5), "exp.default") == [12]


def test_gradient_of_a_slice() -> None:
    """Products and sums run over the slice; what leaves is made whole."""
    f = narrowed("""
  parameter %w: f32[6,7] "w"
  batch %x: f32[4,10,6] "x"
  batch %dy: f32[4,7] "dy"
  %pad: f32[4,10,7] = aten.select_backward.default(%dy) {input_sizes=[4, 10, 7], dim=1, index=2}
  %d: f32[40,7] = aten.view.default(%pad) {size=[40, 7]}
  %wt: f32[7,6] = aten.permute.default(%w) {dims=[1, 0]}
  %dx: f32[40,6] = aten.mm.default(%d, %wt)
  %dx3: f32[4,10,6] = aten.view.default(%dx) {size=[4, 10, 6]}
  %rows: f32[40,6] = aten.view.default(%x) {size=[40, 6]}
  %dt: f32[7,40] = aten.permute.default(%d) {dims=[1, 0]}
  %dw: f32[7,6] = aten.mm.default(%dt, %rows)
  %db: f32[1,7] = aten.sum.dim_IntList(%d) {dim=[0], keepdim=true}
  return dx=%dx3, dw=%dw, db=%db""")
    assert sorted(sizes(f, "mm.default")) == [24, 42]
    assert [op.inputs[0].type.shape for op in f.ops if op.name == "aten.mm.default"][1] == (7, 4)
    assert sizes(f, "sum.dim_IntList") == [7] and sizes(f, "slice_backward.default") == [240]


def test_gradients_of_two_slices_are_added_whole() -> None:
    f = narrowed("""
  batch %a: f32[4,6] "a"
  batch %b: f32[4,6] "b"
  batch %x: f32[4,10,6] "x"
  %p: f32[4,10,6] = aten.select_backward.default(%a) {input_sizes=[4, 10, 6], dim=1, index=2}
  %q: f32[4,10,6] = aten.select_backward.default(%b) {input_sizes=[4, 10, 6], dim=1, index=3}
  %s: f32[4,10,6] = aten.add.Tensor(%p, %q)
  %t: f32[4,10,6] = aten.mul.Tensor(%p, %x)
  %u: f32[4,10,6] = aten.add.Tensor(%p, %x)
  %v: f32[4,10,6] = aten.add.Tensor(%p, 1.0)
  return s=%s, t=%t, u=%u, v=%v, p=%p""")
    assert sizes(f, "add.Tensor") == [240, 240, 240] and sizes(f, "mul.Tensor") == [24]


ATTENTION = "aten._scaled_dot_product_flash_attention_for_cpu"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", ["_", "%mask"])
def test_queries_of_attention(causal: bool, mask: str) -> None:
    """Keys and values stay whole; queries that see keys by their position, too."""
    if causal and mask != "_":
        pytest.skip("torch takes a mask or causality")
    more = f"dropout_p=0.0, is_causal={str(causal).lower()}"
    f = narrowed(f"""
  batch %q: f32[2,3,8,4] "q"
  batch %k: f32[2,3,8,4] "k"
  batch %v: f32[2,3,8,4] "v"
  batch %mask: f32[2,1,8,8] "mask"
  batch %d: f32[2,3,4] "d"
  %out: f32[2,3,8,4], %lse: f32[2,3,8] = {ATTENTION}.default(%q, %k, %v, {mask}) {{{more}}}
  %o: f32[2,3,4] = aten.select.int(%out) {{dim=2, index=5}}
  %pad: f32[2,3,8,4] = aten.select_backward.default(%d) {{input_sizes=[2, 3, 8, 4], dim=2, index=5}}
  %dq: f32[2,3,8,4], %dk: f32[2,3,8,4], %dv: f32[2,3,8,4] = {ATTENTION}_backward.default(%pad, %q, %k, %v, %out, %lse, {mask}) {{{more}}}
  return o=%o, dq=%dq, dk=%dk, dv=%dv""")  # noqa: E501  (IR text)
    sizes_of = [op.results[0].type.shape[2] for op in f.ops if op.name.startswith(ATTENTION)]
    assert sizes_of == ([8, 8] if causal else [1, 1])


# -- training steps --------------------------------------------------------------------------------


class Layer(nn.Module):
    """Attention and a feed-forward layer, each with a residual, as in an encoder."""

    def __init__(self, size: int, heads: int, norm_first: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)
        self.norms = nn.ModuleList([nn.LayerNorm(size), nn.LayerNorm(size)])
        self.heads, self.norm_first = heads, norm_first

    def attend(self, x: Tensor) -> Tensor:
        batch, length, size = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        done: Tensor = self.out(y.transpose(1, 2).reshape(batch, length, size))
        return done

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.norms
        if self.norm_first:
            x = x + self.attend(first(x))
            return x + self.down(F.gelu(self.up(second(x))))
        x = first(x + self.attend(x))
        done: Tensor = second(x + self.down(F.gelu(self.up(x))))
        return done


class Encoder(nn.Module):
    """Tokens to classes, by way of the first token."""

    def __init__(self, layers: int, size: int, norm_first: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, size)
        self.layers = nn.Sequential(*(Layer(size, 2, norm_first) for _ in range(layers)))
        self.head = nn.Linear(size, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layers(self.embedding(tokens))[:, 0].tanh())
        return logits


def classify(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens), targets)


def trained(
    model: nn.Module, loss: Loss, batch: Sequence[Tensor], tolerance: float, lr: float = 0.1
) -> Step:
    """The compiled step, after two steps that are equal to PyTorch's."""

    def compiled(mine: nn.Module) -> Step:
        return ss.compile(mine, loss, torch.optim.SGD(mine.parameters(), lr=lr), tuple(batch))

    return train_both(model, compiled, loss, batch, lr=lr, tolerance=tolerance)


def products(step: Step, batch: Sequence[Tensor], path: str) -> list[Op]:
    function = step.program(tuple(batch)).records[-1].after
    names = {"aten.mm.default", "aten.addmm.default"}
    return [op for op in function.ops if op.name in names and op.loc.module.startswith(path)]


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_last_layer_of_a_classifier(norm_first: bool, dtype: torch.dtype) -> None:
    """Only keys and values of the last layer see all tokens; the others stay as they are."""
    torch.manual_seed(0)
    model = Encoder(2, 8, norm_first).to(dtype)
    batch = torch.randint(0, 11, (4, 12)), torch.randint(0, 5, (4,))
    step = trained(model, classify, batch, 1e-9 if dtype is torch.float64 else 2e-5)
    for name in ("up", "down", "out"):
        last, before = (products(step, batch, f"layers.{i}.{name}") for i in (1, 0))
        assert len(last) == len(before) == 3
        assert (
            max(v.type.static_shape[i] for op in last for v in op.inputs[-2:] for i in (0, 1)) <= 16
        )
        assert all(48 in (*op.inputs[-2].type.shape, *op.inputs[-1].type.shape) for op in before)


def test_dropout_draws_as_many_numbers() -> None:
    """What is random is drawn whole: the numbers of a step do not depend on the pass."""

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return F.dropout(model(x), 0.5)[:, 0].square().sum()

    x, found = torch.randn(4, 8, 6), []
    for without in ("", "propagate_slices"):
        torch.manual_seed(0)
        model = nn.Linear(6, 6)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(1)
        passes = [p for p in default_pipeline() if p.name != without]
        step = ss.compile(model, loss, optimizer, (x,), passes=passes)
        found.append(torch.stack([step(x), step(x)]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


class Chain(nn.Module):
    """Blocks in a row, with parameters of their own."""

    def __init__(self, blocks: Sequence[str], end: tuple[str, int, int]) -> None:
        super().__init__()
        self.blocks, self.end = blocks, end
        self.linears = nn.ModuleList(nn.Linear(SIZE, SIZE) for _ in blocks)
        self.norms = nn.ModuleList(nn.LayerNorm(SIZE) for _ in blocks)
        self.scales = nn.ParameterList(torch.randn(TOKENS, 1) for _ in blocks)

    def forward(self, x: Tensor) -> Tensor:
        kept = [x]
        for i, block in enumerate(self.blocks):
            x = self.block(block, i, x, kept)
            kept.append(x)
        kind, dim, at = self.end
        return x.select(dim, at) if kind == "select" else x.narrow(dim, at, 1)

    def block(self, block: str, i: int, x: Tensor, kept: list[Tensor]) -> Tensor:
        many: dict[str, Callable[[], Tensor]] = {
            "linear": lambda: self.linears[i](x),
            "rows": lambda: self.linears[i](x.reshape(-1, SIZE)).view(x.shape),
            "halves": lambda: (x.reshape(BATCH, 2, TOKENS // 2, SIZE) * 2).view(x.shape),
            "norm": lambda: self.norms[i](x),
            "gelu": lambda: F.gelu(x),
            "softmax": lambda: x.softmax(-1),
            "mix": lambda: x.softmax(1),
            "add": lambda: x + kept[i // 2],
            "mul": lambda: x * kept[i // 2],
            "scale": lambda: x * self.scales[i],
            "turn": lambda: (x.transpose(0, 1).contiguous().tanh()).transpose(0, 1),
            "attend": lambda: F.scaled_dot_product_attention(*3 * (x[:, None],))[:, 0],
            "mean": lambda: x - x.mean(1, keepdim=True),
            "read": lambda: x + x[:, 1:2].tanh(),
        }  # fmt: skip
        return many[block]()


BLOCKS = """linear rows halves norm gelu softmax mix add mul scale turn attend mean read""".split()


@settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=6),
    st.sampled_from(["select", "narrow"]),
    st.sampled_from([(1, 0), (1, TOKENS - 1), (2, 2), (0, 1)]),
)
def test_random_chains(blocks: list[str], kind: str, where: tuple[int, int]) -> None:
    """Losses and parameters after two steps, in f64; these are short, as gradients may be large."""
    torch.manual_seed(0)
    model = Chain(["linear", *blocks], (kind, *where)).double()

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = model(x)
        return out.square().mean()

    x = torch.randn(BATCH, TOKENS, SIZE, dtype=torch.float64)
    trained(model, loss, (x,), 1e-9, lr=1e-4)


# -- the arithmetic of slices ----------------------------------------------------------------------


@given(
    st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4),
    st.data(),
)
def test_slices_survive_reshapes(shape: list[int], data: st.DataObject) -> None:
    """Wherever a slice is found in another shape, it keeps the same elements."""
    dim = data.draw(st.integers(0, len(shape) - 1))
    start = data.draw(st.integers(0, shape[dim] - 1))
    x = torch.arange(torch.Size(shape).numel()).view(shape)
    s = Slice(torch.Size(shape[dim + 1 :]).numel(), shape[dim], start, start + 1)
    wanted = x.narrow(dim, start, 1).flatten()
    for cut in range(len(shape)):
        other = (*shape[:cut], torch.Size(shape[cut:]).numel())
        if s.locate(other) is None:
            continue
        at, unfolded = s.unfold(other, s.size)
        found = x.view(unfolded).narrow(at, start, 1)
        assert found.reshape(s.narrow(other)).flatten().equal(wanted)
