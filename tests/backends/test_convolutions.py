"""Generated convolutions and their gradients: odd sizes, strides, frames, epilogues, machines."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoestring.backends.c import CBackend, CExecutable, tuning
from shoestring.backends.c.decompositions import decompose
from shoestring.backends.c.lower import lower
from shoestring.backends.c.room import Extent, this_machine, thread_bytes
from shoestring.backends.instructions import CallKernel, CallTorch, Instruction

from .helpers import Call, copies, difference, together, traced

aten = torch.ops.aten
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Case:
    """A convolution; `taps`, `stride`, `padding`, `dilation` have a number for each dimension."""

    images: int
    channels: int
    out: int
    size: tuple[int, ...]
    taps: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    dtype: torch.dtype = torch.float32
    bias: bool = True
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    def call(self) -> list[Any]:
        """The arguments behind x, weight and bias."""
        rank = len(self.size)
        strides, gaps = self.stride or (1,) * rank, self.dilation or (1,) * rank
        padding = self.padding or (0,) * rank
        more = list(self.output_padding or (0,) * rank)
        return [list(strides), list(padding), list(gaps), self.transposed, more, self.groups]

    def places(self) -> tuple[int, ...]:
        """The size of a result."""
        strides, padding, gaps, _, more, _ = self.call()
        sizes = zip(self.size, self.taps, strides, padding, gaps, more, strict=True)
        if self.transposed:
            return tuple((n - 1) * s - 2 * p + g * (t - 1) + m + 1 for n, t, s, p, g, m in sizes)
        return tuple((n + 2 * p - g * (t - 1) - 1) // s + 1 for n, t, s, p, g, _ in sizes)

    def inputs(self) -> list[Tensor]:
        """x, weight, bias and the gradient of the result."""
        torch.manual_seed(0)
        x = torch.randn(self.images, self.channels, *self.size)
        outer, inner = self.out, self.channels // self.groups
        if self.transposed:
            outer, inner = self.channels, self.out // self.groups
        w = torch.randn(outer, inner, *self.taps)
        g = torch.randn(self.images, self.out, *self.places())
        scale = (w.numel() / self.out) ** -0.5
        return [t.to(self.dtype) for t in (x, w * scale, torch.randn(self.out), g)]


def everything(case: Case, x: Tensor, w: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """The result and all gradients."""
    bias = b if case.bias else None
    y = aten.convolution(x, w, bias, *case.call())
    mask = [True, True, case.bias]
    backward = aten.convolution_backward(g, x, w, [case.out], *case.call(), mask)
    return (y, *(t for t in backward if t is not None))


def check_all(cases: list[Case], *, measure: bool = False) -> CExecutable:
    """Compares two runs with double precision. Building takes longer than running: once for all."""
    arguments = [case.inputs() for case in cases]
    calls = [(partial(everything, c), own) for c, own in zip(cases, arguments, strict=True)]
    function, given = together(calls)
    executable = CBackend(measure=measure).compile(function)
    for _ in range(2):
        found = iter(executable.run(copies(given)))
        for case, each in zip(cases, arguments, strict=True):
            for reference in everything(case, *(t.double() for t in each)):
                limit = TOLERANCE[case.dtype] * max(1.0, float(reference.abs().max()))
                wrong = difference(next(found).double(), reference, 0, limit)
                assert not wrong, f"{case}: {wrong}"
        assert next(found, None) is None
    assert isinstance(executable, CExecutable)
    return executable


def check(case: Case, *, ours: int | None = None) -> CExecutable:
    """Compares two runs with double precision; `ours`: how many products are generated code."""
    executable = check_all([case], measure=ours is None)
    if ours is not None:
        assert_generated(case, executable.instructions, ours)
    return executable


def assert_generated(case: Case, instructions: Sequence[Instruction], ours: int) -> None:
    """That so many of the products are generated code, and PyTorch's kernels do the rest."""
    kernels = [i for i in instructions if isinstance(i, CallKernel)]
    assert sum(any("convolution" in op for op in k.ops) for k in kernels) == ours, f"{case}"
    assert library_calls(instructions) == (3 if case.groups == 1 else 2) - ours, f"{case}"


def library_calls(instructions: Sequence[Instruction]) -> int:
    return sum(isinstance(i, CallTorch) and "convolution" in i.name for i in instructions)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rank = draw(st.integers(1, 3))
    sizes = [1, 2, 4, 5, 8, 9, 16, 17, 33] if rank < 3 else [1, 2, 3, 6]

    def each(values: list[int]) -> tuple[int, ...]:
        return tuple(draw(st.sampled_from(values)) for _ in range(rank))

    case = Case(
        draw(st.sampled_from([1, 2, 3, 8])),
        draw(st.sampled_from([1, 3, 4, 5, 16])),
        draw(st.sampled_from([4, 5, 7, 16, 33])),
        each(sizes),
        each([1, 2, 3, 5]),
        each([1, 1, 1, 2, 3]),
        each([0, 1, 2, 3]),
        each([1, 1, 2]),
        draw(st.sampled_from(list(TOLERANCE))),
        draw(st.booleans()),
        transposed=draw(st.sampled_from([False, False, True])),
    )
    assume(min(case.places()) > 0)
    return case


@settings(max_examples=40, deadline=None)
@given(cases())
def test_any(case: Case) -> None:
    check(case)


SOME = [
    Case(3, 5, 7, (16, 16), (3, 3), padding=(1, 1)),
    Case(33, 16, 24, (2, 2), (3, 3), padding=(1, 1)),  # images side by side, over several panels
    Case(3, 70, 40, (9, 11), (3, 3), padding=(1, 1), bias=False),  # K in two blocks
    Case(2, 16, 8, (7, 5), (1, 1), bias=False),
    Case(2, 4, 8, (12, 12, 3), (3, 3, 3), padding=(1, 1, 0)),
    Case(2, 6, 8, (40,), (4,), padding=(2,), dilation=(2,)),
    Case(3, 8, 5, (16, 12), (3, 3), (2, 2), (1, 1)),  # an image a matrix
    Case(33, 16, 24, (4, 4), (3, 3), (2, 2), (1, 1), bias=False),  # images side by side
    Case(3, 5, 7, (8, 9), (1, 1), (2, 3)),  # phases without a tap
    Case(2, 4, 8, (9, 20), (7, 5), (3, 1), (3, 6)),  # one dimension in phases, much padding
    Case(2, 4, 6, (4, 6, 8), (3, 2, 5), (2, 2, 2), (1, 0, 2)),
    Case(3, 5, 8, (20,), (5,), (4,), (9,)),
    Case(2, 5, 8, (2, 2), (3, 3), (2, 2), (1, 1)),  # phases of one element
    Case(2, 5, 8, (16, 6), (3, 3), (2, 1), (1, 2), (1, 2)),
    Case(3, 8, 5, (8, 6), (4, 4), (2, 2), (1, 1), transposed=True),
    Case(33, 16, 24, (2, 3), (3, 3), (2, 2), (1, 1), transposed=True, output_padding=(1, 1)),
    Case(2, 7, 8, (9, 5), (3, 2), padding=(1, 0), dilation=(2, 1), transposed=True),
    Case(5, 40, 50, (8, 8), (3, 3), (2, 2), (1, 1)),  # channels in three vectors, one half full
    Case(2, 17, 8, (6, 7), (5, 5), padding=(2, 2)),  # windows of more taps than a vector has lanes
    Case(2, 5, 8, (9, 12), (3, 3), padding=(1, 2), dilation=(1, 2)),  # few channels, taps apart
    Case(9, 33, 64, (9, 9), (3, 3), padding=(1, 1)),  # weights that are packed once
    Case(9, 256, 512, (16, 16), (3, 3), (2, 2), (1, 1), bias=False),  # those of some phases are
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", SOME, ids=str)
def test_all_three_products_are_generated(case: Case, dtype: torch.dtype) -> None:
    case = replace(case, dtype=dtype)
    function = traced(partial(everything, case), case.inputs())
    assert_generated(case, lower(function).program.instructions, 3)


def test_windows_that_see_nothing_but_padding() -> None:
    check(Case(2, 4, 5, (1, 2), (1, 1), stride=(10, 9), padding=(3, 4)))
    check(Case(2, 4, 5, (3,), (2,), stride=(7,), padding=(1,), dilation=(4,)))


def test_the_library_takes_what_has_no_kernel() -> None:
    check(Case(2, 8, 8, (9, 9), (3, 3), (2, 2), (1, 1)), ours=2)  # an odd size has uneven phases
    check(Case(2, 8, 8, (8, 8), (3, 3), (4, 4)), ours=2)  # many phases
    check(Case(2, 8, 8, (8, 8), (3, 3), (2, 2), dilation=(2, 2)), ours=2)
    check(Case(2, 8, 8, (9, 9), (3, 3), groups=2), ours=0)
    check(Case(2, 3, 8, (9, 9), (3, 3)), ours=2)  # rows of three channels
    check(Case(2, 4, 2, (9, 9), (3, 3)), ours=1)


def test_every_instruction_set(isa: str) -> None:
    dtypes = [d for d in TOLERANCE if isa != "emulated-amx" or d is torch.bfloat16]
    check_all([replace(case, dtype=dtype) for case in SOME for dtype in dtypes])


@pytest.mark.usefixtures("isa")
def test_weights_are_rounded_while_they_are_packed() -> None:
    """To the last bit what weights give that are bf16 from the start."""
    cases = [replace(case, dtype=torch.bfloat16) for case in SOME]
    half: list[Call] = []
    wide: list[Call] = []
    for case in cases:
        x, w, b, g = case.inputs()
        values = w.float() * (1 + 2**-9)  # halfway between two bf16, and some near that
        values.view(-1)[::7] *= 1 + 2**-15
        values.view(-1)[:6] = torch.tensor([torch.nan, torch.inf, 3e-41, -0.0, 3.4e38, 1e-38])
        half.append((partial(everything, case), (x, values.bfloat16(), b, g)))
        wide.append((partial(rounding, case), (x, values, b, g)))
        function = traced(*wide[-1])
        kernels = [i for i in lower(function).program.instructions if isinstance(i, CallKernel)]
        rounded = sum(k.ops == ("aten._to_copy.default",) for k in kernels)
        assert rounded == (max(case.taps) == 1 or _taps_are_alone(case)), f"{case}"
    plain, fused = (
        CBackend(measure=False).compile(function).run(given)
        for function, given in (together(half), together(wide))
    )
    for found, reference in zip(fused, plain, strict=True):
        assert torch.equal(found.nan_to_num(7), reference.nan_to_num(7))


def rounding(case: Case, x: Tensor, w: Tensor, b: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """`everything` of weights that are rounded to bf16."""
    return everything(case, x, w.bfloat16(), b, g)


def _taps_are_alone(case: Case) -> bool:
    """Whether the input's gradient has one tap a window, and reads weights as they are."""
    strides = case.stride or (1,) * len(case.taps)
    return all(t <= s for t, s in zip(case.taps, strides, strict=True))


def test_weights_that_others_read_are_rounded_before() -> None:
    """Into the bf16 that a program shows; and f32 weights that are updated, after they are read."""
    case = Case(2, 5, 7, (9, 9), (3, 3), padding=(1, 1), dtype=torch.bfloat16)
    x, w, _, _ = case.inputs()
    wide = w.float() * (1 + 2**-9)

    def shown(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        half = w.bfloat16()
        return aten.convolution(x, half, None, *case.call()), half

    y, half = CBackend().compile(traced(shown, [x, wide])).run([x, wide])
    assert torch.equal(half, wide.bfloat16())
    (alone,) = CBackend().compile(traced(lambda x, w: shown(x, w)[:1], [x, wide])).run([x, wide])
    assert torch.equal(y, alone)


def test_weights_that_are_read_backwards_are_rounded_before() -> None:
    case = Case(2, 5, 7, (9, 9), (3, 3), padding=(1, 1), dtype=torch.bfloat16)
    x, w, _, _ = case.inputs()
    backwards: list[Callable[[Tensor], Tensor]] = [
        lambda w: w.flip(2, 3),
        lambda w: w.flip(0).transpose(2, 3),
        lambda w: w[:, :, torch.arange(2, -1, -1)],
    ]
    for turn in backwards:

        def f(x: Tensor, w: Tensor) -> Tensor:
            return aten.convolution(x, turn(w).bfloat16(), None, *case.call())  # noqa: B023

        executable = CBackend().compile(traced(f, [x, w.float()]))
        assert library_calls(executable.instructions) == 0
        assert not difference(executable.run([x, w.float()])[0], f(x, w.float()), 2e-2, 2e-2)


@pytest.mark.usefixtures("isa")
def test_scratch_is_what_is_planned() -> None:
    tuning._runtime.cache_clear()
    machine = this_machine()
    large = [
        Case(2, 300, 100, (4, 4), (2, 2)),
        Case(9, 512, 64, (6, 6), (2, 2)),
        Case(1, 33, 5, (4, 4), (7, 7), padding=(3, 3)),
        Case(2, 130, 300, (8, 8), (3, 3), (2, 2), (1, 1)),
        Case(32, 64, 64, (16, 16), (3, 3), padding=(1, 1)),
    ]
    for case, dtype in itertools.product([*SOME, *large], TOLERANCE):
        arguments = replace(case, dtype=dtype).inputs()
        function = traced(partial(everything, case), arguments)
        for op in decompose(function).ops:
            ways = tuning.both_ways(op)
            if ways is None:
                continue
            trial = ways[0].call
            assert isinstance(trial, tuning.Trial)
            for product in trial.products:
                g = product.gemm
                extent = Extent(g.batch, g.m, g.n, packed=bool(g.b_packed))
                planned = thread_bytes(machine, product.sides, extent)
                needed = trial.library.ss_gemm_scratch(ctypes.byref(g))
                exact = not (machine.amx and dtype is torch.bfloat16)
                assert needed == planned if exact else needed <= planned, f"{case}, {op}"
    tuning._runtime.cache_clear()


def test_what_follows_is_done_in_the_kernel() -> None:
    for size in [(8, 8), (3, 3)]:  # an image a matrix; images side by side
        case = Case(5, 4, 6, size, (3, 3), padding=(1, 1))
        x, w, b, g = case.inputs()
        scale = torch.randn(6, 1, 1)

        def block(x: Tensor, w: Tensor, b: Tensor, g: Tensor, scale: Tensor) -> Tensor:
            y = aten.convolution(x, w, b, *case.call())  # noqa: B023
            return torch.relu(y * scale) + g

        arguments = [x, w, b, g, scale]
        executable = CBackend().compile(traced(block, arguments))
        assert isinstance(executable, CExecutable) and len(executable.instructions) == 1
        (found,) = executable.run(arguments)
        assert not difference(found, block(*arguments), 1e-5, 1e-5)


def test_operands_that_are_views() -> None:
    """Images with their channels last, and a weight that is turned."""

    def f(x: Tensor, w: Tensor) -> Tensor:
        y = aten.convolution(x.permute(0, 3, 1, 2), w.permute(1, 0, 2, 3), None, *case.call())
        return y * 2

    for padding in [(1, 1), (0, 0)]:
        case = Case(3, 5, 6, (9, 8), (3, 3), padding=padding)
        arguments = [torch.randn(3, 9, 8, 5), torch.randn(5, 6, 3, 3)]
        executable = CBackend().compile(traced(f, arguments))
        assert library_calls(executable.instructions) == 0
        assert not difference(executable.run(arguments)[0], f(*arguments), 1e-5, 1e-5)


def test_operands_that_repeat_themselves() -> None:
    """One image many times over, one line of it, and weights with their taps far apart."""
    case = Case(4, 17, 8, (6, 6), (3, 3), padding=(1, 1))

    def f(x: Tensor, w: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        weights, grad, found = w.permute(3, 2, 0, 1), g.expand(4, 8, 6, 6), list[Tensor]()
        for part in (x[:1], x[:, :, :1]):
            images, mask = part.expand(4, 17, 6, 6), [False, True, False]
            more = (weights, None, *case.call())
            found.append(aten.convolution(images, *more))
            found.append(aten.convolution_backward(grad, images, *more, mask)[1])
        return tuple(t * 2 for t in found)

    for dtype, tolerance in TOLERANCE.items():
        shapes = [(4, 17, 6, 6), (3, 3, 17, 8), (1, 8, 6, 6)]
        arguments = [torch.randn(*shape).to(dtype) for shape in shapes]
        executable = CBackend().compile(traced(f, arguments))
        assert isinstance(executable, CExecutable) and library_calls(executable.instructions) == 0
        wanted = f(*(t.double() for t in arguments))
        for found, reference in zip(executable.run(arguments), wanted, strict=True):
            limit = tolerance * float(reference.abs().max())
            assert not difference(found.double(), reference, 0, limit)


def test_same_for_every_number_of_threads() -> None:
    case = Case(6, 16, 32, (12, 12), (3, 3), padding=(1, 1))
    arguments = case.inputs()
    executable = CBackend().compile(traced(lambda *t: everything(case, *t), arguments))
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append([t.clone() for t in executable.run(arguments)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("channels", [4, 5, 17])
def test_nan_stays_where_it_is(channels: int, dtype: torch.dtype) -> None:
    case = Case(2, channels, 4, (6, 6), (3, 3), padding=(1, 1), bias=False, dtype=dtype)
    x, w, b, g = case.inputs()
    x[0, 1, 2, 3] = x[1, channels - 1, 5, 5] = torch.nan
    executable = CBackend().compile(traced(lambda *t: everything(case, *t), [x, w, b, g]))
    found = executable.run([x, w, b, g])
    wanted = everything(case, *(t.double() for t in (x, w, b, g)))  # oneDNN spreads it in bf16
    for mine, reference in zip(found, wanted, strict=True):
        assert torch.equal(mine.isnan(), reference.isnan())


def test_one_tensor_on_both_sides() -> None:
    def f(x: Tensor) -> Tensor:
        return aten.convolution(x, x, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1) * 2

    (x,) = arguments = [torch.randn(5, 5, 3, 3)]
    (found,) = CBackend().compile(traced(f, arguments)).run(arguments)
    assert not difference(found, f(x), 1e-5, 1e-5)
