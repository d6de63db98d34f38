"""Normalizations, softmax and their gradients as generated kernels, against PyTorch's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from shoestring.backends.c import CBackend, CExecutable
from shoestring.backends.c.decompositions import BODIES, decompose
from shoestring.backends.instructions import CallKernel
from shoestring.ir import interpret

from .helpers import Call, compare, together, traced

aten = torch.ops.aten
FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
WIDE = [torch.float64, torch.float32]
# Sums that cancel leave more than a few units in the last place.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def check(f: Callable[..., Any], *arguments: Tensor, loose: float = 1) -> CExecutable:
    """Compares with PyTorch's kernel, in the tolerance of the narrowest type."""
    return check_all([(f, arguments)], loose)


def check_all(calls: Sequence[Call], loose: float = 1) -> CExecutable:
    """The same for each call, as one program."""
    function, given = together(calls)
    tolerance = loose * max(TOLERANCE[t.dtype] for t in given)
    return compare(function, given, rtol=tolerance, atol=tolerance)


def randn(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tuple(shape), dtype=torch.float64).to(dtype)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


# -- softmax -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1,), (7,), (5, 1), (3, 17), (2, 5, 129), (4, 1025), (2, 3, 4)])
def test_softmax_along_every_dimension(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, grad = randn(shape, dtype), randn(shape, dtype)
    calls: list[Call] = []
    for dim in range(-1, len(shape) - 1):
        y, log = torch.softmax(x, dim), torch.log_softmax(x, dim)
        calls += [
            (lambda x, d=dim: aten._softmax(x, d, False), [x]),
            (lambda x, d=dim: aten._log_softmax(x, d, False), [x]),
            (lambda g, y, d=dim: aten._softmax_backward_data(g, y, d, y.dtype), [grad, y]),
            (lambda g, y, d=dim: aten._log_softmax_backward_data(g, y, d, y.dtype), [grad, log]),
        ]
    check_all(calls)


def test_softmax_of_extreme_rows() -> None:
    x = torch.zeros(6, 33)
    x[1], x[2, 3], x[3] = -torch.inf, torch.nan, 1e38
    x[4, 5], x[5, ::2] = torch.inf, -torch.inf
    for f in (aten._softmax, aten._log_softmax):
        check(lambda x, f=f: f(x, -1, False), x)


def test_gradients_whose_probabilities_underflow() -> None:
    """exp(-90) and below are denormal or zero."""
    logits = torch.linspace(0, -120, 64).repeat(3, 1)
    y = torch.log_softmax(logits, 1)
    check(lambda g, y: aten._log_softmax_backward_data(g, y, 1, torch.float32), randn((3, 64)), y)


def test_rows_too_long_to_keep_are_computed_again() -> None:
    check(lambda x: aten._softmax(x, 1, False), randn((2, 20011)))


def test_what_is_expensive_waits_for_later_stages() -> None:
    """The row waits in the result where types agree, else in a buffer."""
    f = traced(lambda x: aten._softmax(x, 1, False), [randn((4, 40))])
    assert CBackend().compile(f).source.count("ss_expf") == 1
    half = traced(lambda x: aten._softmax(x, 1, False), [randn((4, 40), torch.bfloat16)])
    source = CBackend().compile(half).source
    assert source.count("ss_expf") == 1 and "float r" in source

    def normalized(x: Tensor, w: Tensor) -> Any:
        return aten.native_layer_norm(torch.tanh(x) * 2, [65], w, None, 1e-5)[0]

    assert check(normalized, randn((9, 65)), randn((65,))).source.count("ss_tanhf") == 1


# -- layer norm ----------------------------------------------------------------------------------

LAYERS = [((3, 5), 1), ((4, 1), 1), ((2, 3, 257), 1), ((5, 7, 2), 2), ((6, 1031), 1), ((9,), 1)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("affine", ["both", "weight", "none"])
def test_layer_norm(dtype: torch.dtype, affine: str) -> None:
    calls = [layer_norm(shape, rank, dtype, affine) for shape, rank in LAYERS]
    check_all([forward for forward, _ in calls])
    check_all([backward for _, backward in calls], loose=20)


def layer_norm(
    shape: tuple[int, ...], rank: int, dtype: torch.dtype, affine: str
) -> tuple[Call, Call]:
    """Forward and backward."""
    inner = list(shape[-rank:])
    parameters = [randn(inner, dtype) for _ in range({"both": 2, "weight": 1, "none": 0}[affine])]

    def forward(x: Tensor, *p: Tensor) -> Any:
        return aten.native_layer_norm(x, inner, *p, *(None,) * (2 - len(p)), 1e-3)

    x, grad = randn(shape, dtype), randn(shape, dtype)
    _, mean, rstd = forward(x, *parameters)
    has = [True, affine != "none", affine == "both"]

    def backward(g: Tensor, x: Tensor, m: Tensor, s: Tensor, *p: Tensor) -> Any:
        weight, bias = [*p, None, None][:2]
        results = aten.native_layer_norm_backward(g, x, inner, m, s, weight, bias, has)
        return [r for r in results if r is not None]

    return (forward, [x, *parameters]), (backward, [grad, x, mean, rstd, *parameters])


def test_layer_norm_of_bf16_with_f32_weights() -> None:
    x, w, b = randn((7, 33), torch.bfloat16), randn((33,)), randn((33,))
    check(lambda x, w, b: aten.native_layer_norm(x, [33], w, b, 1e-5)[0], x, w, b)


def test_variance_far_from_zero_is_stable() -> None:
    """Against double precision: PyTorch's kernel is itself far from it where vectors are short."""
    x = randn((4, 1000)) + 3e4
    f = traced(lambda x: aten.native_layer_norm(x, [1000], None, None, 1e-5), [x])
    found = CBackend().compile(f).run([x])
    exact = aten.native_layer_norm(x.double(), [1000], None, None, 1e-5)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=4e-3)


def test_nan_stays_in_its_row() -> None:
    x = randn((4, 65))
    x[2, 7] = torch.nan
    check(lambda x: aten.native_layer_norm(x, [65], None, None, 1e-5), x)


def test_norm_takes_its_neighbours_in() -> None:
    """Residual in front, activation and cast behind: one pass over memory."""

    def f(a: Tensor, b: Tensor, w: Tensor) -> Any:
        x = a + b
        y, _, _ = aten.native_layer_norm(x, [64], w, None, 1e-5)
        return x, torch.relu(y).to(torch.bfloat16)

    executable = check(f, randn((16, 64)), randn((16, 64)), randn((64,)))
    assert len(executable.instructions) == 1, str(executable.program)


# -- batch norm and group norm -------------------------------------------------------------------

IMAGES = [(4, 3, 5, 5), (2, 1, 1, 1), (3, 7), (2, 67, 3), (2, 4, 2, 3, 3), (1, 2, 9)]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_batch_norm(affine: bool, dtype: torch.dtype) -> None:
    calls = [batch_norm(shape, affine, dtype) for shape in IMAGES]
    check_all([call for *forward, _ in calls for call in forward])
    check_all([backward for *_, backward in calls], loose=20)


def batch_norm(shape: tuple[int, ...], affine: bool, dtype: torch.dtype) -> tuple[Call, Call, Call]:
    """Forward with running statistics and without, and backward."""
    c = [shape[1]]
    stat = torch.float64 if dtype is torch.float64 else torch.float32
    mean, var = randn(c, stat), torch.rand(c, dtype=stat)
    parameters = [randn(c, stat), randn(c, stat)] if affine else []

    def forward(x: Tensor, mean: Tensor, var: Tensor, *p: Tensor) -> Any:
        w, b = p if p else (None, None)
        f = aten._native_batch_norm_legit_functional
        results = f(x, w, b, mean, var, True, 0.1, 1e-3)
        # The types that PyTorch infers for saved statistics of mixed types are not those it gives.
        return results if dtype is stat else (results[0], *results[3:])

    def alone(x: Tensor, *p: Tensor) -> Any:
        w, b = p if p else (None, None)
        results = aten._native_batch_norm_legit.no_stats(x, w, b, True, 0.1, 1e-3)
        return results if dtype is stat else results[0]

    x, grad = randn(shape, dtype), randn(shape, dtype)
    saved = randn(c, stat), torch.rand(c, dtype=stat)

    def backward(
        g: Tensor, x: Tensor, m: Tensor, v: Tensor, s: Tensor, r: Tensor, *p: Tensor
    ) -> Any:
        w, mask = p[0] if p else None, [True, affine, affine]
        results = aten.native_batch_norm_backward(g, x, w, m, v, s, r, True, 1e-3, mask)
        return [r for r in results if r is not None]

    return (
        (forward, [x, mean, var, *parameters]),
        (alone, [x, *parameters]),
        (backward, [grad, x, mean, var, *saved, *parameters[:1]]),
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("shape", "groups"), [((2, 6, 5, 5), 3), ((3, 4, 1), 2), ((1, 5, 7), 5)])
def test_group_norm(shape: tuple[int, ...], groups: int, dtype: torch.dtype) -> None:
    n, c, *rest = shape
    hw = int(torch.tensor(rest).prod())
    x, grad, w, b = randn(shape, dtype), randn(shape, dtype), randn((c,), dtype), randn((c,), dtype)
    sizes = (n, c, hw, groups)
    check(lambda x, w, b: aten.native_group_norm(x, w, b, *sizes, 1e-3), x, w, b)
    check(lambda x: aten.native_group_norm(x, None, None, *sizes, 1e-3), x)
    _, mean, rstd = aten.native_group_norm(x, w, b, *sizes, 1e-3)
    backward = aten.native_group_norm_backward
    check(
        lambda g, x, m, r, w: backward(g, x, m, r, w, *sizes, [True, True, True]),
        grad, x, mean, rstd, w, loose=20,
    )  # fmt: skip


def test_group_norm_of_a_transposed_operand() -> None:
    """PyTorch's kernel refuses one that is not contiguous."""
    sizes = (3, 4, 1, 2)
    x, w = randn((4, 3)), randn((4,))
    check(lambda x, w: aten.native_group_norm(x.t().tanh(), w, w, *sizes, 1e-2), x, w)
    check(lambda x, w: aten.native_group_norm(x.t(), w, w, *sizes, 1e-2), x, w)


# -- the rewriting -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,)])
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    x = randn(shape)
    check(lambda x: aten._softmax(x, 0, False), x)
    check(lambda x: aten.native_layer_norm(x, list(x.shape), None, None, 1e-5), x)


def test_decomposing_keeps_meaning_and_drops_what_nobody_reads() -> None:
    def f(x: Tensor, w: Tensor) -> Any:
        y, _, _ = aten.native_layer_norm(x, [9], w, w, 1e-5)
        z = aten._softmax(y, -1, False)
        g = aten.native_layer_norm_backward(z, x, [9], z[:, :1], z[:, :1], w, w, [True, True, True])
        return g[0], y

    arguments = [randn((5, 9)), randn((9,))]
    function = traced(f, arguments)
    lowered = decompose(function)
    assert not any(op.name in BODIES for op in lowered.ops)
    read = {v for op in lowered.ops for v in op.inputs} | {o.value for o in lowered.outputs}
    assert all(read.intersection(op.results) for op in lowered.ops)
    found, wanted = (interpret(g, arguments)[0] for g in (lowered, function))
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-5)


def test_threads_do_not_change_norms() -> None:
    def f(x: Tensor, w: Tensor, g: Tensor) -> Any:
        y, m, s = aten.native_layer_norm(x, [193], w, None, 1e-5)
        mask = [True, True, False]
        return y, *aten.native_layer_norm_backward(g, x, [193], m, s, w, None, mask)[:2]

    arguments = [randn((1009, 193)), randn((193,)), randn((1009, 193))]
    executable = CBackend().compile(traced(f, arguments))
    assert all(isinstance(i, CallKernel) for i in executable.instructions)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = executable.run(arguments)
        torch.set_num_threads(2)
        two = executable.run(arguments)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(p, q) for p, q in zip(one, two, strict=True))
