"""Larger ops equal their decompositions, in core ops only."""

import pytest
import torch

from shoestring.ir import Builder, Function, Role, type_of, verify
from shoestring.ir.ops import find_overload, overload_name, split_arguments
from shoestring.passes.decompose import Decompose
from shoestring.passes.numerics import difference, evaluate

aten = torch.ops.aten
POINTWISE = """gelu silu mish hardswish hardsigmoid softplus elu leaky_relu hardtanh
log_sigmoid_forward square sgn frac nan_to_num isposinf signbit rad2deg sinc""".split()
BACKWARD = "gelu_backward silu_backward hardswish_backward sigmoid_backward tanh_backward".split()
SCALAR = "eq ne lt le gt ge fmod remainder".split()


def r(*shape: int) -> torch.Tensor:
    return torch.linspace(-3.0, 3.0, max(1, torch.Size(shape).numel()))[
        : torch.Size(shape).numel()
    ].reshape(shape)


def one_op(name: str, *args: object, **kwargs: object) -> tuple[Function, list[torch.Tensor]]:
    """A function of one op whose tensors are parameters, and their values."""
    operands, attrs = split_arguments(find_overload(name), args, kwargs)
    b = Builder("f")
    tensors: list[torch.Tensor] = []

    def param(x: object) -> object:
        if isinstance(x, torch.Tensor):
            tensors.append(x)
            return b.param(type_of(x), Role.BATCH, f"p{len(tensors)}")
        return tuple(param(v) for v in x) if isinstance(x, tuple) else x

    for i, v in enumerate(b.emit_all(name, *(param(o) for o in operands), **attrs)):  # type: ignore[arg-type]
        b.output(f"o{i}", v)
    return b.build(), tensors


def assert_decomposes(name: str, *args: object, **kwargs: object) -> None:
    f, tensors = one_op(name, *args, **kwargs)
    g, report = Decompose().run(f)
    verify(g)
    assert all(op.opdef.core for op in g.ops), report
    assert difference(evaluate(f, tensors), evaluate(g, tensors), exact=False) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise(name: str, dtype: torch.dtype) -> None:
    # torch's vectorized gelu makes a NaN of infinity, its scalar one does not: 1e4 stands for it.
    large = 1e4 if name == "gelu" else float("inf")
    for x in (r(7), r(0), torch.tensor(0.5), torch.tensor([float("nan"), large, -0.0])):
        assert_decomposes(f"aten.{name}.default", x.to(dtype))


@pytest.mark.parametrize("name", BACKWARD)
def test_backward(name: str) -> None:
    assert_decomposes(f"aten.{name}.default", r(7), r(7).flip(0))


def test_tanh_form() -> None:
    assert_decomposes("aten.gelu.default", r(9), approximate="tanh")
    assert_decomposes("aten.gelu_backward.default", r(9), r(9), approximate="tanh")


@pytest.mark.parametrize("name", SCALAR)
@pytest.mark.parametrize("x", [r(5), torch.arange(5), r(5).bfloat16()], ids=["f32", "i64", "bf16"])
def test_scalar_operands(name: str, x: torch.Tensor) -> None:
    for n in (2, 1.5):
        assert_decomposes(f"aten.{name}.Scalar", x, n)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 0.5, -1, -0.5, 2.5])
def test_powers(n: float) -> None:
    assert_decomposes("aten.pow.Tensor_Scalar", r(6).abs(), n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["_softmax", "_log_softmax"])
def test_softmax(name: str, dtype: torch.dtype) -> None:
    for shape, dim in (((3, 5), 1), ((2, 3, 4), 1), ((0, 4), 1), ((4,), -1)):
        assert_decomposes(f"aten.{name}.default", r(*shape).to(dtype), dim, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms(dtype: torch.dtype) -> None:
    x, w = r(4, 6).to(dtype), r(6).to(dtype)
    assert_decomposes("aten.native_layer_norm.default", x, [6], w, w, 1e-5)
    assert_decomposes("aten.native_layer_norm.default", x, [6], None, None, 1e-5)
    assert_decomposes(
        "aten.native_group_norm.default", r(2, 6, 3).to(dtype), w, w, 2, 6, 3, 2, 1e-5
    )


@pytest.mark.parametrize("causal", [False, True])
def test_attention(causal: bool) -> None:
    q, k, v = torch.randn(3, 2, 2, 5, 4, generator=torch.Generator().manual_seed(0))
    name = "aten._scaled_dot_product_flash_attention_for_cpu"
    assert_decomposes(f"{name}.default", q, k, v, 0.0, causal)
    out, lse = getattr(aten, name.removeprefix("aten."))(q, k, v, 0.0, causal)
    assert_decomposes(f"{name}_backward.default", out, q, k, v, out, lse, 0.0, causal)


POOLING = {
    "max": ("max_pool2d_with_indices", [3, 3], [2, 2], [1, 1], [1, 1], True),
    "average": ("avg_pool2d", [3, 3], [2, 2], [1, 1], True, True, None),
    "average of what is there": ("avg_pool2d", [3, 2], [2, 2], [1, 0], False, False, None),
    "average by a given number": ("avg_pool2d", [2, 2], [2, 2], [0, 0], False, True, 3),
}


@pytest.mark.parametrize("case", POOLING)
def test_pooling(case: str) -> None:
    name, *args = POOLING[case]
    x = r(2, 3, 8, 9)
    assert_decomposes(f"aten.{name}.default", x, *args)
    if name == "avg_pool2d":
        grad = getattr(aten, name)(x, *args)
        assert_decomposes(f"aten.{name}_backward.default", grad, x, *args)


def test_losses() -> None:
    target = torch.tensor([1, 2, -100, 0])
    assert_decomposes("aten.nll_loss_forward.default", r(4, 6), target, None, 1, -100)
    count = torch.tensor(3.0)
    args = (torch.tensor(2.0), r(4, 6), target, None, 1, -100, count)
    assert_decomposes("aten.nll_loss_backward.default", *args)
    assert_decomposes("aten.mse_loss.default", r(4), r(4).flip(0))


def test_kept_ops_stay() -> None:
    f, _ = one_op("aten._softmax.default", r(3, 4), 1, False)
    g, report = Decompose(frozenset({"aten._softmax.default"})).run(f)
    assert g is f and report.matched == 0


def test_what_has_no_decomposition_is_named() -> None:
    f, _ = one_op("aten.cumprod.default", r(3, 4), 1)
    g, report = Decompose().run(f)
    assert g is f
    assert "aten.cumprod.default has no decomposition" in str(report)
    assert "not core: aten.cumprod.default" in report.notes


def test_results_keep_names_and_location() -> None:
    f, _ = one_op("aten.silu.default", r(4))
    g, _ = Decompose().run(f)
    assert g.outputs[0].value is f.outputs[0].value


def test_names_of_overloads() -> None:
    assert overload_name(aten.mish.default) == "aten.mish.default"
