"""Linear layers and cross-entropy in chunks: numbers as in eager mode, and what is left whole."""

import copy
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

import shoestring as ss
from shoestring.ir import Function, Phase, parse, verify
from shoestring.passes import check, default_pipeline
from shoestring.passes.base import Pass
from shoestring.passes.chunk_loss import ChunkLoss
from shoestring.passes.liveness import measure
from shoestring.runtime.step import Step

from .training import Loss, train_both

SMALL = ChunkLoss(chunk_bytes=1, min_rows=2, min_chunks=1, min_bytes=0)


class Model(nn.Module):
    """Embedding -> tanh -> linear, with or without bias and tied weights."""

    def __init__(self, classes: int = 13, size: int = 5, bias: bool = True, tied: bool = False):
        super().__init__()
        self.embedding = nn.Embedding(classes, size)
        self.head = nn.Linear(size, classes, bias=bias)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.embedding(tokens).tanh())
        return out


def pipeline(chunk: ChunkLoss) -> list[Pass]:
    return [chunk if p.name == "chunk_loss" else p for p in default_pipeline()]


def compiled(model: nn.Module, loss: Loss, batch: Sequence[Tensor], **more: Any) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    more.setdefault("passes", pipeline(SMALL))
    return ss.compile(model, loss, optimizer, tuple(batch), **more)


def report_of(step: Step, batch: Sequence[Tensor]) -> str:
    records = step.program(tuple(batch)).records
    return next(str(r.report) for r in records if r.name == "chunk_loss")


def run_both(
    model: nn.Module, loss: Loss, batch: Sequence[Tensor], tolerance: float = 1e-5, **more: Any
) -> str:
    """Two steps of each; the report of the pass."""

    def compiled_with(mine: nn.Module) -> Step:
        return compiled(mine, loss, batch, **more)

    step = train_both(
        model, compiled_with, loss, batch, lr=0.3, tolerance=tolerance, equal_nan=True
    )
    return report_of(step, batch)


def cross_entropy(**options: Any) -> Loss:
    def loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = model(tokens)
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), **options)

    return loss


def tokens_and_targets(
    shape: tuple[int, ...] = (7,), classes: int = 13, ignored: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    targets = torch.randint(0, classes, shape)
    targets.view(-1)[list(ignored)] = -100
    return torch.randint(0, classes, shape), targets


def weights() -> Tensor:
    return torch.tensor([0.5, 0.0, 2.0, *[1.0] * 10])


OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum"},
    {"ignore_index": 3},
    {"label_smoothing": 0.1},
    {"weight": weights()},
    {"weight": weights(), "label_smoothing": 0.1, "reduction": "sum"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_options_of_cross_entropy(options: dict[str, Any], tied: bool) -> None:
    torch.manual_seed(0)
    model = Model(bias=not tied, tied=tied)
    tokens, targets = tokens_and_targets()
    targets[[1, 4]] = options.get("ignore_index", -100)
    report = run_both(model, cross_entropy(**options), (tokens, targets))
    assert "changed 1" in report and "7 rows of 13 logits in 3 chunks of 3" in report


def test_loss_of_each_row() -> None:
    each = cross_entropy(reduction="none")
    report = run_both(Model(), lambda *a: (each(*a) ** 2).mean(), tokens_and_targets())
    assert "aten.add.Tensor" not in report and "waits for a value of all rows" not in report


@pytest.mark.parametrize("ignored", [range(2), range(7)], ids=["a whole chunk", "all"])
def test_ignored_rows(ignored: range) -> None:
    batch = tokens_and_targets(ignored=list(ignored))
    assert "changed 1" in run_both(Model(), cross_entropy(), batch)


def test_infinite_logits_of_other_classes() -> None:
    def loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
        padding = torch.arange(13) >= 11
        logits = model(tokens).masked_fill(padding, float("-inf"))
        return F.cross_entropy(logits, targets)

    assert "changed 1" in run_both(Model(), loss, tokens_and_targets(classes=11))


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("wrong", [13, -1, -101, 1 << 40])
@pytest.mark.parametrize("backend", ["c", "reference"])
def test_target_that_is_no_class_is_an_error(backend: str, wrong: int, weighted: bool) -> None:
    """Nothing is updated, and the next batch trains as if it had not been."""
    tokens, targets = tokens_and_targets()
    loss = cross_entropy(weight=torch.rand(13)) if weighted else cross_entropy()
    model, other = Model(), Model()
    other.load_state_dict(model.state_dict())
    batch = tokens, targets

    def make(m: nn.Module) -> Step:
        optimizer = torch.optim.AdamW(m.parameters(), lr=0.1)
        return ss.compile(m, loss, optimizer, batch, passes=pipeline(SMALL), backend=backend)

    step, alone = make(model), make(other)
    good = targets.clone()
    assert torch.equal(step(tokens, good), alone(tokens, good))
    targets[2] = wrong
    with pytest.raises(IndexError):
        step(tokens, targets)
    assert torch.equal(step(tokens, good), alone(tokens, good))
    for mine, wanted in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, wanted)


@pytest.mark.parametrize("inside", [True, False], ids=["loss inside", "loss outside"])
def test_autocast(inside: bool) -> None:
    def loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(tokens)
            if inside:
                return F.cross_entropy(logits, targets)
        return F.cross_entropy(logits.float(), targets)

    assert "changed 1" in run_both(Model(), loss, tokens_and_targets(), tolerance=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    tolerance = 5e-2 if dtype is torch.bfloat16 else 1e-12
    report = run_both(Model().to(dtype), cross_entropy(), tokens_and_targets(), tolerance)
    assert "changed 1" in report


def shifted(model: nn.Module, tokens: Tensor) -> Tensor:
    """As language models do it: logits of all tokens but the last."""
    logits = model(tokens)[..., :-1, :].contiguous()
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), tokens[..., 1:].reshape(-1))


def test_slices_of_sequences_are_cut_between_sequences() -> None:
    tokens = torch.randint(0, 13, (4, 3))
    assert "12 rows of 13 logits in 4 chunks of 3" in run_both(Model(tied=True), shifted, (tokens,))


def test_classes_in_the_middle() -> None:
    """[batch, classes, length], as image models have it."""
    batch = tokens_and_targets((4, 3), ignored=[2])

    def loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens).transpose(1, 2), targets)

    assert "in 4 chunks of 3" in run_both(Model(), loss, batch)


def test_work_on_rows_goes_along() -> None:
    """Softcapping, z-loss and targets that are probabilities."""

    def loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
        logits = torch.tanh(model(tokens) / 3) * 3
        z = logits.logsumexp(-1).pow(2).mean()
        soft = F.cross_entropy(logits, F.one_hot(targets, 13).float().softmax(-1))
        return F.cross_entropy(logits, targets) + 0.1 * z + soft

    report = run_both(Model(), loss, tokens_and_targets())
    assert "changed 1" in report and "in 3 chunks" in report


def test_metrics_of_rows_go_along() -> None:
    def loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits = model(tokens)
        right = (logits.argmax(-1) == targets).float().mean()
        return F.cross_entropy(logits, targets), {"accuracy": right}

    model, batch = Model(), tokens_and_targets()
    wanted = (model(batch[0]).argmax(-1) == batch[1]).float().mean()
    step = compiled(model, loss, batch)  # type: ignore[arg-type]
    _, metrics = step(*batch)
    assert "changed 1" in report_of(step, batch)
    torch.testing.assert_close(metrics["accuracy"], wanted)


# -- what stays whole -----------------------------------------------------------------------------


def test_logits_that_are_kept() -> None:
    def loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logits = model(tokens)
        return F.cross_entropy(logits, targets), {"most": logits.sort(dim=0).values[-1, 0]}

    batch = tokens_and_targets()
    report = report_of(compiled(Model(), loss, batch), batch)  # type: ignore[arg-type]
    assert "changed 0" in report and "aten.sort" in report


def test_gradient_that_depends_on_the_loss() -> None:
    each = cross_entropy()
    report = run_both(Model(), lambda *a: each(*a) ** 2, tokens_and_targets())
    assert "changed 0" in report and "waits for a value of all rows" in report


def test_small_logits() -> None:
    batch = tokens_and_targets()
    report = report_of(compiled(Model(), cross_entropy(), batch, passes=None), batch)
    assert "the logits take less than 2097152 B" in report


def test_by_default_there_are_four_chunks_of_logits_that_fit_into_one() -> None:
    batch = torch.randint(0, 1200, (512,)), torch.randint(0, 1200, (512,))
    step = compiled(Model(1200), cross_entropy(), batch, passes=None)
    assert "512 rows of 1200 logits in 4 chunks of 128" in report_of(step, batch)


def test_one_sequence_cut_inside() -> None:
    report = run_both(Model(), shifted, (torch.randint(0, 13, (1, 7)),))
    assert "changed 0" in report and "aten.slice.Tensor needs all rows at once" in report


def test_logits_that_are_no_product() -> None:
    def loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens).cumsum(-1), targets)

    assert "are not the product of rows and a weight" in run_both(
        Model(), loss, tokens_and_targets()
    )


# -- the whole ------------------------------------------------------------------------------------


def test_logits_that_are_a_broadcast_sum() -> None:
    """No operand is as large as half of the logits."""

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.row, self.column = (nn.Parameter(torch.randn(s)) for s in ((4,), (17, 1)))

        def forward(self, tokens: Tensor) -> Tensor:
            out: Tensor = self.row + self.column
            return out

    batch = torch.zeros(17, dtype=torch.int64), torch.arange(17) % 4
    assert "not made of a product" in run_both(Sum(), cross_entropy(), batch)


def test_accumulated_gradients() -> None:
    torch.manual_seed(1)
    model, batch = Model(tied=True), tokens_and_targets((4,))
    whole, parts = copy.deepcopy(model), copy.deepcopy(model)
    loss = cross_entropy()
    step = compiled(parts, loss, batch, accumulate=2)
    reference = compiled(whole, loss, batch, accumulate=2, passes=[])
    for _ in range(4):
        step(*batch)
        reference(*batch)
    for a, b in zip(parts.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_loss_without_gradient() -> None:
    model, (tokens, targets) = Model(), tokens_and_targets()

    class Validation(nn.Module):
        def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(model(tokens), targets)

    infer = ss.compile(Validation(), example_inputs=(tokens, targets), passes=pipeline(SMALL))
    wanted = F.cross_entropy(model(tokens), targets)
    torch.testing.assert_close(infer(tokens, targets), wanted.detach())


def gradient_program(n: int, d: int, v: int, reduction: int, bias: bool) -> Function:
    logits = "aten.addmm.default(%b, %x, %w)" if bias else "aten.mm.default(%x, %w)"
    return parse(
        f"""
func @f {{
  parameter %w: f32[{d},{v}] "w"
  parameter %b: f32[{v}] "b"
  batch %x: f32[{n},{d}] "x"
  batch %t: i64[{n}] "t"
  batch %g: f32[] "g"
  %z: f32[{n},{v}] = {logits}
  %p: f32[{n},{v}] = aten._log_softmax.default(%z) {{dim=1, half_to_float=false}}
  %l: f32[], %total: f32[] = aten.nll_loss_forward.default(%p, %t, _)
      {{reduction={reduction}, ignore_index=-100}}
  %dp: f32[{n},{v}] = aten.nll_loss_backward.default(%g, %p, %t, _, %total)
      {{reduction={reduction}, ignore_index=-100}}
  %dz: f32[{n},{v}] = aten._log_softmax_backward_data.default(%dp, %p) {{dim=1, input_dtype=f32}}
  %wt: f32[{v},{d}] = aten.permute.default(%w) {{dims=[1, 0]}}
  %dx: f32[{n},{d}] = aten.mm.default(%dz, %wt)
  %xt: f32[{d},{n}] = aten.permute.default(%x) {{dims=[1, 0]}}
  %dw: f32[{d},{v}] = aten.mm.default(%xt, %dz)
  %db: f32[{v}] = aten.sum.dim_IntList(%dz) {{dim=[0]}}
  return l=%l, total=%total, dx=%dx, dw=%dw, db=%db
}}
""".replace("\n      {", " {")
    )


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.integers(1, 9), st.integers(1, 4), st.integers(2, 7), st.sampled_from([1, 2]),
    st.booleans(), st.integers(1, 4), st.integers(1, 5), st.data(),
)  # fmt: skip
def test_any_shape(
    n: int, d: int, v: int, reduction: int, bias: bool, rows: int, most: int, data: st.DataObject
) -> None:
    f = gradient_program(n, d, v, reduction, bias)
    targets = data.draw(st.lists(st.sampled_from([-100, *range(v)]), min_size=n, max_size=n))
    chunk = ChunkLoss(chunk_bytes=1, min_rows=rows, max_chunks=most, min_bytes=0)
    g, report = chunk.run(f)
    verify(g)
    assert report.changed == 1
    chunks = sum(op.name == "aten.amax.default" for op in g.ops)
    assert chunks <= most and chunks <= max(1, n // rows)
    arguments = [torch.randn(p.value.type.static_shape) for p in f.params[:3]]
    check(f, [*arguments, torch.tensor(targets), torch.tensor(1.5)], [chunk])


def test_no_value_is_as_large_as_all_logits() -> None:
    f = gradient_program(640, 3, 50, 1, True)
    g, _ = ChunkLoss(chunk_bytes=128 * 50 * 4, min_bytes=0).run(f)
    assert max(v.type.numel for v in g.values) == 128 * 50
    assert measure(g).peak < measure(f).peak / 2


def test_memory_of_a_step() -> None:
    """The arena has room for two chunks (logits and gradient) in the place of three times all."""
    torch.manual_seed(0)
    rows, classes = 1024, 2053
    batch = tokens_and_targets((rows,), classes)
    chunk = ChunkLoss(chunk_bytes=256 * classes * 4)
    steps = [
        compiled(Model(classes, 8), cross_entropy(), batch, passes=passes)
        for passes in (pipeline(chunk), [p for p in pipeline(chunk) if p.name != "chunk_loss"])
    ]
    chunked, whole = (arena_bytes(step, batch) for step in steps)
    logits = rows * classes * 4
    assert whole > 1.9 * logits and chunked < 0.6 * logits


def test_nothing_is_computed_again_for_the_gradient_of_a_chunk() -> None:
    """Rows that are cheap to compute: a copy of them for the gradient would keep chunks alive."""

    def loss(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
        x = model.embedding(tokens)  # type: ignore[operator]
        for _ in range(3):
            x = (x * x + 1).tanh()
        return F.cross_entropy(model.head(x), targets)  # type: ignore[operator]

    batch = tokens_and_targets((1024,), 1031)
    chunk = ChunkLoss(chunk_bytes=256 * 1031 * 4, min_bytes=0)
    step = compiled(Model(1031, 64), loss, batch, passes=pipeline(chunk))
    products = [
        op for op in step.program(batch).function.ops
        if op.name.startswith(("aten.mm", "aten.addmm"))
    ]  # fmt: skip
    assert len(products) == 3 * 4 and {op.loc.phase for op in products} == {Phase.FORWARD}
    assert arena_bytes(step, batch) < 5.2 * 256 * 1031 * 4


def arena_bytes(step: Step, batch: Sequence[Tensor]) -> int:
    executable: Any = step.program(tuple(batch)).executable
    return int(executable.program.plan.arena_bytes)
