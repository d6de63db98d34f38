"""Ordinary and less ordinary PyTorch: a compiled step does what eager does, or says why not."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import shoestring
from shoestring.ir import Function, Phase, parse, print_function, same_structure, verify
from shoestring.ir.errors import CaptureError

Model = nn.Module
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def mean_square(model: Any, *batch: Any) -> Any:
    return (model(*batch) ** 2).mean()


def compiled(model: Model, batch: Any, loss_fn: Callable[..., Any] = mean_square) -> Any:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return shoestring.compile(model, loss_fn, optimizer, batch, backend="reference", passes=())


def function_of(step: Any) -> Function:
    found: Function = next(iter(step.programs.values())).captured.function
    return found


def trains_like_eager(
    model: Model,
    batch: Any = (X,),
    loss_fn: Callable[..., Any] = mean_square,
    steps: int = 3,
    eager: Model | None = None,
) -> Any:
    """Compares losses and state, and returns the compiled step."""
    eager = eager or copy.deepcopy(model)
    step = compiled(model, batch, loss_fn)
    verify(function_of(step))
    assert same_structure(parse(print_function(function_of(step))), function_of(step))
    optimizer = torch.optim.SGD([p for p in eager.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        wanted = loss_fn(eager, *batch)
        wanted.backward()
        optimizer.step()
        torch.testing.assert_close(step(*batch), wanted.detach(), equal_nan=True)
    torch.testing.assert_close(model.state_dict(), eager.state_dict(), equal_nan=True)
    return step


def refused(
    code: str, line: str, model: Model, batch: Any = (X,), loss_fn: Callable[..., Any] = mean_square
) -> CaptureError:
    """The refusal, which names the line of this file that ends with the comment `# line`."""
    before, grads = copy.deepcopy(model.state_dict()), [p.grad for p in model.parameters()]
    torch.manual_seed(5)
    with pytest.raises(CaptureError) as caught:
        compiled(model, batch, loss_fn)
    after = torch.rand(())
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(())), "the random state is as it was"
    torch.testing.assert_close(model.state_dict(), before)
    assert [p.grad for p in model.parameters()] == grads
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert caught.value.code == code, str(caught.value)
    if line:
        file, _, number = caught.value.where.split(" ")[0].rpartition(":")
        with open(file) as source:
            assert source.read().splitlines()[int(number) - 1].endswith(f"# {line}")
    return caught.value


class Net(nn.Module):
    """Two layers with `middle` between them."""

    scale: torch.Tensor

    def __init__(self, middle: Callable[..., Any] = torch.relu) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)
        self.middle = middle
        self.register_buffer("scale", torch.tensor([2.0]))

    def forward(self, x: Any) -> Any:
        return self.second(self.middle(self.first(x)))


# -- control flow that depends on data ----------------------------------------------------------


def branch(x: Any) -> Any:
    if x.sum() > 0:  # branch
        return x
    return -x


def item(x: Any) -> Any:
    return x * x.max().item()  # item


def to_list(x: Any) -> Any:
    return x * x.detach().tolist()[0][0]  # to_list


def to_numpy(x: Any) -> Any:
    return x * float(x.detach().numpy()[0, 0])  # to_numpy


def indices(x: Any) -> Any:
    return x[(x[:, 0] > 0).nonzero()[:, 0]]  # indices


def mask(x: Any) -> Any:
    return x[x > 0].sum() * x  # mask


def wrong_shape(x: Any) -> Any:
    return x @ torch.ones(5, 5)  # wrong_shape


def wrong_name(x: Any) -> Any:
    return getattr(x, "no_such_method")()  # noqa: B009  # wrong_name


@pytest.mark.parametrize(
    ("code", "middle"),
    [
        ("SS1001", branch),
        ("SS1001", item),
        ("SS1001", to_list),
        ("SS1001", to_numpy),
        ("SS1002", indices),
        ("SS1002", mask),
        ("SS1004", wrong_shape),
        ("SS1004", wrong_name),
    ],
)
def test_refused_with_the_line(code: str, middle: Callable[..., Any]) -> None:
    refused(code, middle.__name__, Net(middle))


def test_buffer_read_in_python_is_refused() -> None:
    class Peeks(Net):
        def forward(self, x: Any) -> Any:
            return super().forward(x) * self.scale.tolist()[0]  # peeks

    refused("SS1001", "peeks", Peeks())


def test_python_random_is_refused() -> None:
    class Skips(Net):
        def forward(self, x: Any) -> Any:
            return super().forward(x) * random.random()

    refused("SS1016", "", Skips())


def test_user_exceptions_pass_with_a_code() -> None:
    def loss_fn(model: Any, x: Any) -> Any:
        return dict[str, Any]()["missing"]  # missing

    assert "missing" in str(refused("SS1004", "missing", Net(), (X,), loss_fn))


@pytest.mark.parametrize(
    "loss_fn",
    [lambda output, target: F.mse_loss(output, target), nn.MSELoss(), F.mse_loss],
    ids=["arguments", "module", "function"],
)
def test_a_loss_of_output_and_target_is_refused_with_its_form(loss_fn: Any) -> None:
    error = refused("SS1004", "", Net(), (X, X), loss_fn)
    assert "loss_fn(model, *batch)" in error.hint


def test_unknown_custom_operator() -> None:
    library = torch.library.Library("shoestring_test", "FRAGMENT")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CPU")

    def middle(x: Any) -> Any:
        return torch.ops.shoestring_test.twice(x)  # custom

    refused("SS1003", "custom", Net(middle))


# -- ordinary modules ---------------------------------------------------------------------------


class Batched(nn.Module):
    """Batch norm, a recurrent layer and weight norm."""

    def __init__(self, recurrent: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.BatchNorm1d(6)
        self.recurrent = recurrent(6, 5, 2, batch_first=True, bidirectional=True)
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(10, 2))

    def forward(self, x: Any) -> Any:
        return self.head(self.recurrent(self.norm(x).reshape(2, 2, 6))[0])


@pytest.mark.parametrize("recurrent", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_with_norms(recurrent: type[nn.Module]) -> None:
    trains_like_eager(Batched(recurrent))


def test_spectral_norm_updates_its_vectors() -> None:
    model = Net()
    nn.utils.parametrizations.spectral_norm(model.first)
    trains_like_eager(model)


def test_batch_norm_in_eval_mode() -> None:
    trains_like_eager(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 2)).eval())


@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_whose_scale_shares_memory_with_its_statistics(training: bool) -> None:
    """PyTorch updates the statistics first, so the scale is the new one."""

    class Shared(Net):
        def __init__(self) -> None:
            super().__init__()
            self.mean = nn.Buffer(torch.tensor([0.5, 0.7, 0.9, 1.1, 1.3, 1.5]))

        def forward(self, x: Any) -> Any:
            ones, scale = torch.ones_like(self.mean), self.mean.view(-1)
            x = nn.functional.batch_norm(x, self.mean, ones, scale, scale, training, 0.5)
            return super().forward(x)

    trains_like_eager(Shared())


def test_tied_and_frozen_parameters() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    trains_like_eager(model)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_recomputes_with_the_same_numbers(use_reentrant: bool) -> None:
    inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh())

    class Checkpointed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Any) -> Any:
            h = checkpoint(self.inner, self.first(x), use_reentrant=use_reentrant)
            return self.second(h)

    step = trains_like_eager(Checkpointed())
    phases = {op.loc.phase for op in function_of(step).ops}
    assert Phase.RECOMPUTE in phases

    inner.append(nn.Dropout(0.5))
    ops = function_of(compiled(Checkpointed(), (X,))).ops
    sites = [op.attrs["site"] for op in ops if op.name == "rng.uniform.default"]
    assert len(sites) == 2 and sites[0] == sites[1]


def test_every_op_names_a_line_of_the_user() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    adam = torch.optim.AdamW(model.parameters())
    step = shoestring.compile(model, lambda m, x: m(x).square().mean(), adam, (torch.ones(4, 3),))
    assert {op.loc.file for op in function_of(step).ops} == {__file__}


def test_autocast() -> None:
    class Half(Net):
        def forward(self, x: Any) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x).float()

    step = trains_like_eager(Half())
    assert any(r.type.dtype is torch.bfloat16 for op in function_of(step).ops for r in op.results)


class _Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        ctx.save_for_backward(x)
        return x.clamp(-1, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        return grads[0] * (1 + 0 * x)


def test_custom_autograd_function() -> None:
    trains_like_eager(Net(_Clipped.apply))


def test_hooks_of_modules_and_tensors() -> None:
    def triple(module: Any, grads: Any, outer: Any) -> Any:
        return (grads[0] * 3,)

    def hooked() -> Net:
        model = Net()
        model.first.register_forward_hook(lambda m, args, out: out * 2)
        model.second.register_full_backward_hook(triple)
        model.first.weight.register_hook(lambda grad: grad * 0.5)  # not kept by deepcopy
        return model

    trains_like_eager(hooked(), eager=hooked())


def in_place(x: Any) -> Any:
    y = x.clone()
    y[:, 1:3].mul_(2)
    y.t()[0].add_(1)
    y.unsqueeze(0).select(0, 0)[1] = 0.0
    return y.relu_()


def test_in_place_through_views() -> None:
    trains_like_eager(Net(in_place))


# -- inputs and outputs -------------------------------------------------------------------------


class Pair(NamedTuple):
    x: Any
    y: Any


def test_nested_batch() -> None:
    def loss_fn(model: Any, batch: Any, pair: Any) -> Any:
        return F.mse_loss(model(batch["x"][0]), pair.y) + pair.x.mean()

    trains_like_eager(Net(), ({"x": [X]}, Pair(X, torch.ones(4, 3))), loss_fn)


def test_same_tensor_twice_is_two_inputs() -> None:
    def loss_fn(model: Any, a: Any, b: Any) -> Any:
        return (model(a) * model(b)).mean()

    step = compiled(Net(), (X, X), loss_fn)
    eager = Net()
    other = X * 2
    torch.testing.assert_close(step(X, other), loss_fn(eager, X, other).detach())


def test_non_contiguous_batch() -> None:
    trains_like_eager(Net(), (torch.randn(6, 4).t(),))


def test_zero_size_batch() -> None:
    def loss_fn(model: Any, x: Any) -> Any:
        return model(x).sum()

    trains_like_eager(Net(), (torch.zeros(0, 6),), loss_fn)


def test_metrics_beside_the_loss() -> None:
    def loss_fn(model: Any, x: Any) -> Any:
        out = model(x)
        return (out**2).mean(), {"largest": out.max()}

    loss, metrics = compiled(Net(), (X,), loss_fn)(X)
    assert loss.shape == () and set(metrics) == {"largest"}


def test_writes_to_the_batch_stay_inside() -> None:
    def loss_fn(model: Any, x: Any) -> Any:
        x.mul_(2)
        return (model(x) ** 2).mean()

    x = X.clone()
    step = compiled(Net(), (x,), loss_fn)
    wanted = loss_fn(Net(), x.clone())
    torch.testing.assert_close(step(x), wanted.detach())


# -- state --------------------------------------------------------------------------------------


def test_attribute_and_buffer_that_are_replaced() -> None:
    class Moving(Net):
        def __init__(self) -> None:
            super().__init__()
            self.average = torch.zeros(3)

        def forward(self, x: Any) -> Any:
            out = super().forward(x)
            self.average = 0.9 * self.average + 0.1 * out.detach().mean(0)
            self.scale = self.scale * 0.5
            return out * self.scale + self.average

    model = Moving()
    trains_like_eager(model)
    assert type(model.average) is torch.Tensor and float(model.scale) == 0.25


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
def test_weight_norm_of_old() -> None:
    """It puts a new tensor in the place of `weight` before each forward pass."""

    def normed() -> Net:
        model = Net()
        nn.utils.weight_norm(model.first)
        return model

    trains_like_eager(normed(), eager=normed())


def test_counter_in_a_buffer() -> None:
    class Counts(Net):
        calls: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.tensor(0))

        def forward(self, x: Any) -> Any:
            self.calls += 1
            return super().forward(x) * self.calls

    trains_like_eager(Counts())


def test_parameters_in_one_memory_that_do_not_overlap() -> None:
    def flat() -> Net:
        model = Net()
        memory = torch.arange(42.0) / 42
        model.first.weight.data = memory[:36].view(6, 6)
        model.first.bias.data = memory[36:]
        return model

    trains_like_eager(flat(), eager=flat())


class Counting(Net):
    """Counts its calls in Python."""

    def __init__(self, used: bool) -> None:
        super().__init__()
        self.used, self.calls = used, 0

    def forward(self, x: Any) -> Any:
        self.calls += 1
        return super().forward(x) * (self.calls if self.used else 1)


class Remembering(Net):
    """Keeps its last output."""

    def __init__(self, used: bool) -> None:
        super().__init__()
        self.used, self.last = used, None

    def forward(self, x: Any) -> Any:
        out = super().forward(x)
        if self.used and self.last is not None:
            out = out + self.last
        self.last = out.detach()
        return out


@pytest.mark.parametrize("kind", [Counting, Remembering])
def test_attributes_that_the_next_step_would_see(kind: Callable[[bool], Model]) -> None:
    trains_like_eager(kind(False))
    error = refused("SS1019", "", kind(True))
    assert "calls" in error.what or "last" in error.what


def test_data_of_a_parameter_is_the_parameter() -> None:
    class Clamped(Net):
        def forward(self, x: Any) -> Any:
            self.first.weight.data.clamp_(-0.1, 0.1)
            return super().forward(x)

    trains_like_eager(Clamped())


def test_state_that_overlaps_is_refused() -> None:
    model = Net()
    model.register_buffer("row", model.first.weight.detach()[0])

    def loss_fn(model: Any, x: Any) -> Any:
        return (model(x) * model.row.sum()).mean()

    refused("SS1018", "", model, (X,), loss_fn)


class Keeping(Net):
    """Adds to a buffer with a gradient."""

    total: torch.Tensor

    def __init__(self, used: str, replaced: bool = False) -> None:
        super().__init__()
        self.used, self.replaced = used, replaced
        self.register_buffer("total", torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.first.bias
        if self.replaced:
            self.total = self.total + bias
        elif self.used == "all":
            self.total.copy_(bias)
        else:
            self.total.add_(bias)  # kept
        return super().forward(x) + (self.total.sin().sum() if self.used else 0.0)


@pytest.mark.parametrize("replaced", [False, True])
def test_state_that_takes_a_gradient_into_the_next_step(replaced: bool) -> None:
    """Eager PyTorch goes back into the step before, where that saved nothing for its gradient."""
    refused("SS1020", "" if replaced else "kept", Keeping("sum", replaced))


@pytest.mark.parametrize("used", ["", "all"])
def test_state_written_with_a_gradient_that_no_loss_hangs_on(used: str) -> None:
    model, eager = Keeping(used), Keeping(used)
    eager.load_state_dict(model.state_dict())
    trains_like_eager(model, eager=eager)
    assert not model.total.requires_grad and model.total.grad_fn is None


def test_frozen_parameter_written_with_a_gradient() -> None:
    model = Keeping("")
    frozen = nn.Parameter(torch.zeros(6), requires_grad=False)
    model.total = frozen

    def loss_fn(model: Any, x: Any) -> Any:
        return mean_square(model, x) + model.total.sum()

    refused("SS1020", "kept", model, (X,), loss_fn)
    assert frozen.is_leaf and not frozen.requires_grad


def laid_out(shape: tuple[int, ...], how: str) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    if how == "channels last":
        return x.contiguous(memory_format=torch.channels_last)
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order) if how == "transposed" else x


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("how", ["plain", "transposed", "channels last"])
def test_layouts_of_results_are_those_of_the_kernels(how: str, training: bool) -> None:
    """What may be viewed in eager mode may be viewed in the capture."""
    shape = (4, 2, 3, 2)

    class Normalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(laid_out(shape, how))
            self.norm = nn.BatchNorm2d(2)
            self.strides: list[tuple[int, ...]] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found = [self.norm(self.weight), F.logsigmoid(self.weight)]
            self.strides += [y.stride() for y in found]
            found = [y.view(-1) if y.is_contiguous() else y.flatten() for y in found]
            return found[0] * found[1] * x.sum()

    model = Normalized().train(training)
    step = compiled(model, (X,))
    seen = model.strides[:2]
    del model.strides[:]
    with torch.no_grad():
        model(X)
    assert model.strides == seen
    step(X)


@pytest.mark.parametrize("shape", [(3, 0), (0, 4), (2, 4, 0)])
def test_group_norm_without_elements(shape: tuple[int, ...]) -> None:
    """PyTorch's rule for the sizes of its gradient divides by zero."""

    class Normalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before = nn.Parameter(torch.ones(shape))
            self.weight = nn.Parameter(torch.ones(shape[1]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = F.group_norm(self.before, 1, self.weight, self.weight)
            return y.sum() + self.weight.sum() + x.sum()

    trains_like_eager(Normalized())


@pytest.mark.parametrize("loss", [F.mse_loss, F.smooth_l1_loss, F.huber_loss, F.soft_margin_loss])
def test_mean_losses_without_elements(loss: Callable[..., Any]) -> None:
    model = nn.Linear(6, 2)

    def loss_fn(model: Any, x: Any) -> Any:
        y = model(x)
        return torch.nan_to_num(loss(y[:0], y[:0].detach() * 2)) + y.sum()

    trains_like_eager(model, loss_fn=loss_fn)


class Writing(nn.Module):
    """Writes to what may be saved for a gradient, or seen by a view."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.weight = what, nn.Parameter(torch.full((2,), 0.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.what == "saved":
            x = x * 1.5
            y = F.group_norm(x, 2, self.weight)
            x.fill_(0.5)
            return y
        y = x + self.weight.sum()
        flat = y.flatten(-2)
        y.transpose(0, -1).mul_(0.5)
        return flat


@pytest.mark.parametrize("what", ["saved", "viewed"])
def test_layouts_of_a_batch(what: str) -> None:
    """Eager mode copies a transposed tensor where it takes a view of one in row-major order."""
    model, shape = Writing(what), (3, 2, 4)
    steps = []
    for how in ("transposed", "plain")[: 1 if what == "saved" else 2]:
        steps.append(trains_like_eager(model, (laid_out(shape, how),), eager=copy.deepcopy(model)))
    if what == "viewed":
        for how in ("plain", "transposed", "plain"):
            eager = copy.deepcopy(model)
            wanted = mean_square(eager, laid_out(shape, how))
            torch.testing.assert_close(steps[0](laid_out(shape, how)), wanted.detach())
        assert len(steps[0].programs) == 2


def test_model_without_data() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from shoestring.frontend.capture import capture_step

    with FakeTensorMode():
        model, x = Net(), torch.empty(4, 6)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    captured = capture_step(model, mean_square, optimizer, (x,))
    verify(captured.function)
    assert {p.path for p in captured.function.params} >= {"first.weight", "second.bias"}


def test_dropout_differs_by_step_and_repeats_by_seed() -> None:
    def loss_fn(model: Any, x: Any) -> Any:
        return model(x).mean() + 0 * model[0].weight.sum()

    x = torch.ones(100, 100)

    def losses() -> list[float]:
        first = nn.Linear(100, 100)
        nn.init.zeros_(first.weight)
        nn.init.ones_(first.bias)
        model = nn.Sequential(first, nn.Dropout(0.25))
        step = shoestring.compile(
            model, loss_fn, torch.optim.SGD(model.parameters(), lr=0.0), (x,), backend="reference"
        )
        return [float(step(x)) for _ in range(3)]

    first = losses()
    assert first == losses() and len(set(first)) == 3
    assert all(abs(v - 1) < 0.03 for v in first)


class Switching(torch.nn.Module):
    """Replaces a part of itself in its first call, as BigBird does for short texts."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.mode, self.again = "long", again
        self.part: torch.nn.Module = torch.nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.mode == "long":
            self.mode = "short"
            self.part = torch.nn.Sequential(self.part, torch.nn.Tanh())
        elif self.again:
            return self.part(self.part(x))
        return self.part(x)


def test_a_part_replaced_in_the_first_call() -> None:
    model, x = Switching(again=False), torch.randn(2, 3)
    part = model.part
    infer = shoestring.compile(model, example_inputs=(x,), backend="reference")
    assert model.mode == "long" and model.part is part
    torch.testing.assert_close(infer(x), part(x).tanh().detach())


def test_a_part_replaced_that_changes_the_next_call() -> None:
    with pytest.raises(CaptureError, match="SS1019"):
        shoestring.compile(Switching(again=True), example_inputs=(torch.randn(2, 3),))
