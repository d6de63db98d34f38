"""Products in bf16: what is rounded, what stays, and what it does to training."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers

import shoestring
from shoestring.ir import Function, Op, parse, print_function, same_structure, verify
from shoestring.ir.errors import PassError, UsageError
from shoestring.passes import Numerics, default_pipeline, make_pass
from shoestring.passes.lower_precision import CONVERT, LowerPrecision
from shoestring.runtime.executor import find_mismatches

BF16, F32 = torch.bfloat16, torch.float32


def lowered(text: str) -> Function:
    """The function after the pass, checked by the verifier and by a round trip through text."""
    function, _ = LowerPrecision().run(parse(text))
    verify(function)
    assert same_structure(parse(print_function(function)), function)
    return function


def ops_of(function: Function, name: str) -> list[Op]:
    return [op for op in function.ops if op.name == f"aten.{name}"]


def conversions(function: Function, dtype: torch.dtype) -> list[str]:
    """The names of what is converted to a type, in order."""
    found = [op for op in function.ops if op.name == CONVERT and op.result.type.dtype is dtype]
    return [op.inputs[0].name for op in found]


# --- the rewrite --------------------------------------------------------------------------------


def test_weights_are_rounded_once_for_forward_and_backward() -> None:
    f = lowered("""
func @f {
  parameter %w: f32[4,4] "w"
  batch %x: f32[2,4] "x"
  %t: f32[4,4] = aten.permute.default(%w) {dims=[1, 0]}
  %y: f32[2,4] = aten.mm.default(%x, %t)
  %g: f32[2,4] = aten.exp.default(%y)
  %dx: f32[2,4] = aten.mm.default(%g, %w) loc("m.py":1 "" backward)
  return dx=%dx
}
""")
    assert conversions(f, BF16) == ["x", "w", "g"]
    assert conversions(f, F32) == ["y.1", "dx.1"]


def test_round_trips_vanish() -> None:
    f = lowered("""
func @f {
  batch %x: f32[4,4] "x"
  %y: f32[4,4] = aten.mm.default(%x, %x)
  %h: bf16[4,4] = aten._to_copy.default(%y) {dtype=bf16}
  %u: f32[4,4] = aten._to_copy.default(%h) {dtype=f32}
  %z: f32[4,4] = aten.mm.default(%u, %y)
  return z=%z
}
""")
    assert conversions(f, BF16) == ["x"] and conversions(f, F32) == ["z.1"]


def test_values_move_in_bf16() -> None:
    """Slices of a product, their concatenation and zeros around it: nothing is widened."""
    f = lowered("""
func @f {
  batch %x: f32[4,4] "x"
  %y: f32[4,4] = aten.mm.default(%x, %x)
  %a: f32[4,2] = aten.slice.Tensor(%y) {dim=1, start=0, end=2}
  %b: f32[4,2] = aten.slice.Tensor(%y) {dim=1, start=2, end=4}
  %c: f32[4,4] = aten.cat.default([%b, %a]) {dim=1}
  %p: f32[4,6] = aten.constant_pad_nd.default(%c) {pad=[1, 1], value=0.0}
  %z: f32[4,6] = aten.mm.default(%c, %p)
  return z=%z
}
""")
    assert conversions(f, F32) == ["z.1"]
    assert all(r.type.dtype is BF16 for op in f.ops[:-1] for r in op.results)


def test_a_move_with_an_f32_operand_stays_in_f32() -> None:
    f = lowered("""
func @f {
  batch %x: f32[4,4] "x"
  %y: f32[4,4] = aten.mm.default(%x, %x)
  %c: f32[4,8] = aten.cat.default([%y, %x]) {dim=1}
  %p: f32[4,6] = aten.constant_pad_nd.default(%y) {pad=[1, 1], value=0.1}
  return c=%c, p=%p
}
""")
    assert conversions(f, F32) == ["y.1"]
    assert f.outputs[0].value.type.dtype is F32


def test_a_part_is_rounded_rather_than_the_whole() -> None:
    f = lowered("""
func @f {
  batch %x: f32[64,4] "x"
  %last: f32[4,4] = aten.slice.Tensor(%x) {dim=0, start=60, end=64}
  %y: f32[4,4] = aten.mm.default(%last, %last)
  return y=%y
}
""")
    assert conversions(f, BF16) == ["last"]


def test_expanded_heads_are_rounded_before_they_are_repeated() -> None:
    f = lowered("""
func @f {
  batch %x: f32[1,4,4] "x"
  %e: f32[3,4,4] = aten.expand.default(%x) {size=[3, 4, 4]}
  %y: f32[3,4,4] = aten.bmm.default(%e, %e)
  return y=%y
}
""")
    assert conversions(f, BF16) == ["x"]


ATTENTION = """
func @f {
  batch %q: f32[2,2,8,4] "q"
  batch %m: f32[8,8] "m"
  batch %g: f32[2,2,8,4] "g"
  %o: f32[2,2,8,4], %l: f32[2,2,8] = aten._scaled_dot_product_flash_attention_for_cpu.default(%q, %q, %q, %m)
  %a: f32[2,2,8,4], %b: f32[2,2,8,4], %c: f32[2,2,8,4] = aten._scaled_dot_product_flash_attention_for_cpu_backward.default(%g, %q, %q, %q, %o, %l, %m) {dropout_p=0.0, is_causal=false}
  %s: f32[2,2,8] = aten.exp.default(%l)
  return a=%a, s=%s
}
"""  # noqa: E501


def test_attention_keeps_its_statistics_and_its_mask() -> None:
    f = lowered(ATTENTION)
    (forward,) = ops_of(f, "_scaled_dot_product_flash_attention_for_cpu.default")
    (backward,) = ops_of(f, "_scaled_dot_product_flash_attention_for_cpu_backward.default")
    assert [r.type.dtype for r in forward.results] == [BF16, F32]
    assert [v.type.dtype for v in backward.inputs] == [BF16] * 5 + [F32] * 2
    assert all(r.type.dtype is BF16 for r in backward.results)
    assert conversions(f, BF16) == ["q", "g"] and conversions(f, F32) == ["a.1"]


def test_what_stays_and_why() -> None:
    f = parse("""
func @f {
  batch %x: f32[4,4] "x"
  batch %v: f32[4] "v"
  batch %d: f64[4,4] "d"
  %a: f32[4] = aten.mv.default(%x, %v)
  %b: f64[4,4] = aten.mm.default(%d, %d)
  %c: f32[4,4] = aten.mm.default(%x, %x) loc("m.py":3 "" update)
  return a=%a, b=%b, c=%c
}
""")
    g, report = LowerPrecision().run(f)
    assert g is f and (report.matched, report.changed) == (2, 0)
    assert "aten.mv.default is no product of matrices" in str(report)
    assert "aten.mm.default belongs to the optimizer, which stays in f32 (first at m.py:3)" in str(
        report
    )


def test_no_product_matches_nothing() -> None:
    f = parse(
        'func @f {\n batch %x: f32[4] "x"\n %y: f32[4] = aten.exp.default(%x)\n return y=%y\n}'
    )
    g, report = LowerPrecision().run(f)
    assert g is f and "matched nothing" in str(report)


def test_recomputed_values_are_rounded_again() -> None:
    f = lowered("""
func @f {
  parameter %w: f32[4,4] "w"
  batch %x: f32[4,4] "x"
  %h: f32[4,4] = aten.exp.default(%x)
  %y: f32[4,4] = aten.mm.default(%h, %w)
  %z: f32[4,4] = aten.mm.default(%h, %w) loc("m.py":1 "block" recompute)
  return y=%y, z=%z, h=%h
}
""")
    assert conversions(f, BF16) == ["h", "w", "h"]


def test_what_nobody_reads_in_f32_is_rounded_where_it_is_made() -> None:
    f = lowered("""
func @f {
  batch %x: f32[4,4] "x"
  %h: f32[4,4] = aten.exp.default(%x)
  %g: f32[4,4] = aten.neg.default(%x)
  %a: f32[2,4], %b: f32[2,4] = aten.split.Tensor(%h) {split_size=2, dim=0}
  %y: f32[2,4] = aten.mm.default(%a, %h)
  %z: f32[2,4] = aten.mm.default(%b, %h) loc("m.py":1 "block" recompute)
  return y=%y, z=%z, g=%g
}
""")
    assert [op.results[0].name for op in f.ops[:2]] == ["h", "h.1"]
    assert conversions(f, BF16) == ["h"]


def test_zero_sizes() -> None:
    f = lowered("""
func @f {
  batch %x: f32[0,4] "x"
  batch %w: f32[4,3] "w"
  %y: f32[0,3] = aten.mm.default(%x, %w)
  return y=%y
}
""")
    assert ops_of(f, "mm.default")[0].result.type.dtype is BF16


# --- options ------------------------------------------------------------------------------------


def test_unknown_dtype() -> None:
    with pytest.raises(PassError) as error:
        make_pass("lower_precision", dtype="f8")
    assert error.value.code == "SS3011" and "bf16, found 'f8'" in str(error.value)


def test_only_when_asked_for() -> None:
    assert "lower_precision" not in [p.name for p in default_pipeline()]
    passes = default_pipeline(precision="bf16")
    names = [p.name for p in passes]
    assert names.index("dead_code") < names.index("lower_precision") < names.index("rematerialize")
    lossy = [p.name for p in passes if p.numerics is Numerics.LOSSY]
    assert lossy == ["lower_precision", "round_saved"]


def test_unknown_precision() -> None:
    with pytest.raises(UsageError) as error:
        shoestring.compile(
            torch.nn.Linear(2, 2), example_inputs=(torch.ones(1, 2),), precision="f16"
        )
    assert error.value.code == "SS7013" and "did you mean 'bf16'?" in str(error.value)


def test_precision_and_passes_do_not_go_together() -> None:
    with pytest.raises(UsageError) as error:
        shoestring.compile(
            torch.nn.Linear(2, 2), example_inputs=(torch.ones(1, 2),), precision="bf16", passes=[]
        )
    assert error.value.code == "SS7011"


# --- sums ---------------------------------------------------------------------------------------


def test_a_sum_of_products_stays_in_f32() -> None:
    f = lowered("""
func @f {
  batch %x: f32[4,4] "x"
  batch %b: f32[4] "b"
  %y: f32[4,4] = aten.addmm.default(%b, %x, %x)
  %z: f32[4,4] = aten.addmm.default(%y, %x, %x)
  return z=%z
}
""")
    (product,) = ops_of(f, "addmm.default")
    assert product.result.type.dtype is BF16 and product.inputs[0].type.dtype is BF16
    (total,) = ops_of(f, "add.Tensor")
    assert all(v.type.dtype is F32 for v in total.inputs)
    assert conversions(f, BF16) == ["b", "x"]


def test_the_gradient_of_a_bias_adds_up_what_was_rounded() -> None:
    f = lowered("""
func @f {
  parameter %w: f32[4,4] "w"
  batch %x: f32[8,4] "x"
  %g: f32[8,4] = aten.exp.default(%x) loc("m.py":1 "" backward)
  %dx: f32[8,4] = aten.mm.default(%g, %w) loc("m.py":1 "" backward)
  %db: f32[4] = aten.sum.dim_IntList(%g) {dim=[0]} loc("m.py":1 "" backward)
  return dx=%dx, db=%db
}
""")
    (total,) = ops_of(f, "sum.dim_IntList")
    assert total.result.type.dtype is F32 and conversions(f, F32) == ["g.1", "dx.1"]


# --- models -------------------------------------------------------------------------------------


def loss_of(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(x).float(), y)


class Recurrent(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = torch.nn.LSTM(8, 16, batch_first=True)
        self.head = torch.nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        head: torch.Tensor = self.head(self.lstm(x)[0][:, -1])
        return head


class Tied(torch.nn.Module):
    """Attention over tokens; the embedding is the head, and one weight is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(32, 16)
        self.block = torch.nn.TransformerEncoderLayer(16, 2, 24, 0.0, batch_first=True)
        self.head = torch.nn.Linear(16, 32, bias=False)
        self.head.weight = self.table.weight
        self.block.linear1.weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.block(self.table(x)).mean(1))
        return out


def convolutional() -> torch.nn.Module:
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=2, padding=1), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
        torch.nn.MaxPool2d(2), torch.nn.Conv2d(8, 8, 3, groups=2), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(32, 5),
    )  # fmt: skip


def perceptron() -> torch.nn.Module:
    layers = torch.nn.Linear(7, 13), torch.nn.GELU(), torch.nn.LayerNorm(13)
    return torch.nn.Sequential(*layers, torch.nn.Linear(13, 5))


IMAGE, ROWS, SEQUENCE = (6, 3, 16, 16), (6, 7), (6, 9, 8)
MODELS: dict[str, tuple[Callable[[], torch.nn.Module], Callable[[], torch.Tensor], int]] = {
    "conv": (convolutional, lambda: torch.randn(IMAGE), 5),
    "lstm": (Recurrent, lambda: torch.randn(SEQUENCE), 5),
    "tied": (Tied, lambda: torch.randint(0, 32, (6, 9)), 32),
    "mlp": (perceptron, lambda: torch.randn(ROWS), 5),
}


def eager_losses(
    model: torch.nn.Module, batches: list[Any], autocast: bool, clip: float | None = None
) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses: list[float] = []
    for x, y in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", BF16, enabled=autocast):
            loss = loss_of(model, x, y)
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def compiled_losses(
    model: torch.nn.Module, batches: list[Any], **options: Any
) -> tuple[list[float], Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    step: Any = shoestring.compile(model, loss_of, optimizer, batches[0], **options)
    return [float(step(*batch)) for batch in batches], step


def batches_of(name: str, count: int = 6) -> list[Any]:
    torch.manual_seed(1)
    _, sample, classes = MODELS[name]
    return [(sample(), torch.randint(0, classes, (6,))) for _ in range(count)]


def lowered_count(step: Any) -> int:
    (record,) = [r for r in step.report().records if r.name == "lower_precision"]
    return int(record.report.changed)


@pytest.fixture
def halves_in_eager() -> Iterator[None]:
    """Recurrent layers of oneDNN fail on a machine for which it has no bf16."""
    before = torch.backends.mkldnn.enabled
    able = before and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about GPUs
        with torch.backends.mkldnn.flags(enabled=able):
            yield


@pytest.mark.usefixtures("halves_in_eager")
@pytest.mark.parametrize("backend", ["c", "reference"])
@pytest.mark.parametrize("name", MODELS)
def test_models_train_as_under_autocast(name: str, backend: str) -> None:
    torch.manual_seed(0)
    model, batches = MODELS[name][0](), batches_of(name)
    twin = copy.deepcopy(model)
    mine, step = compiled_losses(model, batches, precision="bf16", backend=backend)
    theirs = eager_losses(twin, batches, autocast=True)
    assert lowered_count(step) >= 3
    assert mine == pytest.approx(theirs, rel=2e-2)
    for (path, p), q in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert p.dtype is q.dtype, path
        torch.testing.assert_close(p, q, rtol=5e-2, atol=2e-2, msg=path)


@pytest.mark.parametrize("name", MODELS)
def test_every_instruction_agrees_with_the_reference(name: str) -> None:
    torch.manual_seed(0)
    batch = batches_of(name, 1)[0]
    _, step = compiled_losses(MODELS[name][0](), [batch], precision="bf16")
    program = step.program(batch)
    assert find_mismatches(program.executable, step.bind(program.captured, list(batch))) == []


def test_clipping_and_accumulation() -> None:
    torch.manual_seed(0)
    model, batches = perceptron(), batches_of("mlp")
    clipped, twin = copy.deepcopy(model), copy.deepcopy(model)
    mine, _ = compiled_losses(clipped, batches, precision="bf16", clip_grad_norm=0.1)
    assert mine == pytest.approx(eager_losses(twin, batches, True, clip=0.1), rel=2e-2)
    mine, step = compiled_losses(model, batches, precision="bf16", accumulate=2)
    assert all(t.dtype is F32 for n, t in step.state_tensors().items() if n.startswith("gradient"))
    assert all(map(math.isfinite, mine))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_are_left_alone(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(7, 8), torch.nn.Tanh()).to(dtype)
    x = torch.randn(6, 7).to(dtype)
    plain = shoestring.compile(model, example_inputs=(x,))
    step = shoestring.compile(model, example_inputs=(x,), precision="bf16")
    assert torch.equal(step(x), plain(x)) and step(x).dtype is dtype
    assert "matched nothing" in str(step.report())


def test_a_model_with_autocast_of_its_own() -> None:
    class Cast(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = torch.nn.Linear(7, 8), torch.nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", BF16):
                y: torch.Tensor = self.inner(x)
            out: torch.Tensor = self.outer(y.float())
            return out

    torch.manual_seed(0)
    model, batches = Cast(), batches_of("mlp")
    twin = copy.deepcopy(model)
    mine, step = compiled_losses(model, batches, precision="bf16")
    assert mine == pytest.approx(eager_losses(twin, batches, True), rel=2e-2)
    assert lowered_count(step) >= 2


def test_inference() -> None:
    torch.manual_seed(0)
    model, (x, _) = perceptron(), batches_of("mlp", 1)[0]
    found = shoestring.compile(model, example_inputs=(x,), precision="bf16")(x)
    with torch.no_grad(), torch.autocast("cpu", BF16):
        wanted = model(x)
    assert found.dtype is F32
    torch.testing.assert_close(found, wanted.float(), rtol=2e-2, atol=2e-2)


# --- a language model ---------------------------------------------------------------------------


def language_model(layers: int = 2, width: int = 32) -> torch.nn.Module:
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=32, n_embd=width, n_layer=layers, n_head=2, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model: Any = transformers.GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"
    trained: torch.nn.Module = model.train()
    return trained


def next_token_loss(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    return loss


def texts(seed: int, count: int) -> list[torch.Tensor]:
    """Arithmetic progressions: something to learn."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 64, (count, 4, 1), generator=generator)
    step = torch.randint(1, 6, (count, 4, 1), generator=generator)
    return list((start + step * torch.arange(32)) % 64)


def trained_losses(model: torch.nn.Module, batches: list[Any], how: str) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    if how == "compiled":
        step = shoestring.compile(model, next_token_loss, optimizer, batches[:1], precision="bf16")
        return [float(step(tokens)) for tokens in batches]
    losses: list[float] = []
    for tokens in batches:
        optimizer.zero_grad()
        with torch.autocast("cpu", BF16, enabled=how == "autocast"):
            loss = next_token_loss(model, tokens)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_training_stays_in_the_band_of_autocast() -> None:
    """Over three seeds: as near to f32 as autocast is, give or take its own spread."""
    ours: list[float] = []
    band: list[float] = []
    for seed in range(3):
        torch.manual_seed(seed)
        model, batches = language_model(), texts(seed, 200)
        curves = {
            how: torch.tensor(trained_losses(copy.deepcopy(model), batches, how))
            for how in ("compiled", "autocast", "f32")
        }
        smooth = {k: v.unfold(0, 20, 20).mean(-1) for k, v in curves.items()}
        ours.append(float((smooth["compiled"] / smooth["f32"] - 1).abs().max()))
        band.append(float((smooth["autocast"] / smooth["f32"] - 1).abs().max()))
        assert curves["compiled"][-20:].mean() < 0.7 * curves["compiled"][0]
    assert max(ours) <= 2 * max(band) + 2e-3, (ours, band)


def test_no_activation_of_bf16_is_stored_in_f32() -> None:
    """What is stored of a widened value would be called a copy."""
    tokens = texts(0, 1)[0]

    def compiled(precision: str) -> Any:
        torch.manual_seed(0)
        model = language_model(width=64)
        optimizer = torch.optim.AdamW(model.parameters())
        step = shoestring.compile(model, next_token_loss, optimizer, (tokens,), precision=precision)
        return step.program((tokens,)).executable

    wide, low = compiled("fp32"), compiled("bf16")
    copies = [b for b in low.program.buffers if b.label.startswith("copy of") and b.nbytes > 4096]
    assert copies == []
    assert low.arena_bytes < wide.arena_bytes
