"""Kernels of ours or PyTorch's as measured: what is tried, what is kept, what is done with it."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shoestring.backends.c import CBackend, CExecutable, tuning
from shoestring.backends.c.build import HERE, find_compiler, flags
from shoestring.backends.c.tuning import Times, Trial, both_ways, slower_products, times_of
from shoestring.backends.instructions import CallKernel, CallTorch
from shoestring.ir import Function, Op, TensorType, Value, trace

aten = torch.ops.aten


def program(images: int, dtype: torch.dtype, size: int = 12, stride: int = 1) -> Function:
    """A convolution and its gradients, each an op of its own."""
    rest = [[stride, stride], [1, 1], [1, 1], False, [0, 0], 1]

    def f(x: torch.Tensor, w: torch.Tensor, g: torch.Tensor) -> Any:
        dx, _, _ = aten.convolution_backward(g, x, w, None, *rest, [True, False, False])
        _, dw, _ = aten.convolution_backward(g, x, w, None, *rest, [False, True, False])
        return aten.convolution(x, w, None, *rest), dx, dw

    out = -(-size // stride)
    shapes = [(images, 16, size, size), (32, 16, 3, 3), (images, 32, out, out)]
    return trace(f, [TensorType(dtype, shape) for shape in shapes], "f")


def arguments(function: Function) -> list[torch.Tensor]:
    torch.manual_seed(0)
    types = [p.value.type for p in function.params]
    return [torch.randn(t.static_shape).to(t.dtype) for t in types]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No times but those of the test."""
    monkeypatch.setattr(tuning, "_stored_in", lambda: tmp_path)
    monkeypatch.setattr(tuning, "_KNOWN", {})
    monkeypatch.setattr(tuning, "WORTH", 0)
    yield


def conv_ops(function: Function) -> list[Op]:
    return [op for op in function.ops if "convolution" in op.name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("images", "size", "stride"), [(3, 12, 1), (5, 3, 1), (3, 12, 2), (5, 6, 3)]
)
def test_a_trial_computes_the_product(
    images: int, size: int, stride: int, dtype: torch.dtype
) -> None:
    function = program(images, dtype, size, stride)
    given = dict(zip((p.value for p in function.params), arguments(function), strict=True))
    for op in conv_ops(function):
        operands = [given[v] for v in op.inputs]
        out = torch.full(op.results[0].type.static_shape, torch.nan, dtype=dtype)
        Trial(op, operands, out)()
        rest = iter(operands)
        wide = [next(rest).double() if isinstance(o, Value) else o for o in op.operands]
        found = op.opdef.reference(*wide, **op.attrs)
        wanted = (
            found if isinstance(found, torch.Tensor) else next(t for t in found if t is not None)
        )
        limit = 1e-5 if dtype is torch.float32 else 1e-2
        scale = float(wanted.abs().max())
        torch.testing.assert_close(out.double(), wanted, rtol=limit, atol=limit * scale)


def test_times_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    op = conv_ops(program(2, torch.float32))[0]
    times = times_of(op)
    assert times.own > 0 and times.library > 0 and len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(tuning, "_KNOWN", {})
    monkeypatch.setattr(tuning, "_measured", lambda *_: pytest.fail("measured again"))
    assert times_of(op) == times


@pytest.mark.parametrize("text", ["", "{", "[]", '{"own": 1}', '{"own": -1, "library": 1}'])
def test_a_broken_entry_is_measured_again(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = conv_ops(program(2, torch.float32))[0]
    times_of(op)
    (file,) = tmp_path.iterdir()
    file.write_text(text)
    monkeypatch.setattr(tuning, "_KNOWN", {})
    monkeypatch.setattr(tuning, "_measured", lambda *_: Times(1.0, 2.0))
    assert times_of(op) == Times(1.0, 2.0)


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(tuning, "_stored_in", lambda: tmp_path / "file" / "folder")
    assert times_of(conv_ops(program(2, torch.float32))[0]).own > 0


def test_what_is_slower_goes_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_measured", lambda *_: Times(2.0, 1.0))
    function = program(2, torch.float32)
    given = arguments(function)
    executable = CBackend().compile(function)
    assert isinstance(executable, CExecutable)
    calls = [i for i in executable.instructions if isinstance(i, CallTorch)]
    assert [c.why for c in calls] == ["measured here: 1000.00 ms, ours 2000.00 ms"] * 3
    plain = CBackend(measure=False).compile(function)
    assert all(isinstance(i, CallKernel) for i in plain.instructions)
    for x, y in zip(executable.run(given), plain.run(given), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_integers_are_tried_as_they_lie_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[tuple[bool, ...]] = []

    def measured(op: Op, turned: tuple[bool, ...]) -> Times:
        tried.append(turned)
        own, library = both_ways(op, turned) or pytest.fail("not tried")
        own.call()
        library.call()
        assert torch.equal(own.out, library.out)
        return Times(2.0, 1.0)

    def f(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.ops.aten._int_mm(x, y), torch.ops.aten._int_mm(x, z.t())

    monkeypatch.setattr(tuning, "_measured", measured)
    sizes = [(300, 260), (260, 256), (256, 260)]
    function = trace(f, [TensorType(torch.int8, size) for size in sizes], "f")
    assert len(slower_products(function)) == 2
    assert tried == [(False, False), (False, True)]


def test_small_ones_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "WORTH", 1 << 40)
    monkeypatch.setattr(tuning, "_measured", lambda op: pytest.fail("measured"))
    assert not slower_products(program(2, torch.float32))


def test_structures_are_those_of_c(tmp_path: Path) -> None:
    """A field that Python lacks would be read from behind the structure."""
    found = {
        "ss_gemm": tuning._Gemm,
        "ss_frame": tuning._Frame,
        "ss_digits": tuning._Digits,
        "ss_windows": tuning._Windows,
        "ss_order": tuning._Order,
        "ss_target": tuning._Target,
    }
    numbers = ", ".join(f"sizeof({name})" for name in found)
    source = f'#include "trial.h"\nconst int64_t sizes[] = {{{numbers}}};\n'
    (tmp_path / "sizes.c").write_text(source)
    command = [find_compiler(), *flags(), "-I", str(HERE), "-shared", "sizes.c", "-o", "sizes.so"]
    subprocess.run(command, cwd=tmp_path, check=True)
    library = ctypes.CDLL(str(tmp_path / "sizes.so"))
    sizes = (ctypes.c_int64 * len(found)).in_dll(library, "sizes")
    assert list(sizes) == [ctypes.sizeof(s) for s in found.values()]
    text = (HERE / "gemm.h").read_text().split("} ss_gemm;")[0].rsplit("typedef struct {", 1)[1]
    fields = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)  # one may lie in another's padding
    names = re.findall(r"(\w+)\s*[,;]", fields)
    assert names == [name for name, *_ in tuning._Gemm._fields_]


def test_disturbed_rounds_are_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until enough were not, or it is clear that it does not get better."""
    calls: list[int] = []
    way = tuning.Way(lambda: calls.append(1), torch.empty(0))
    counts = iter([0, 5, 5, 5, 5, 7, 7, 7])  # before and after each round
    monkeypatch.setattr(tuning, "interruptions", lambda: next(counts))
    tuning.measure(way, way, 2)
    assert len(calls) == 4 * 4, "the first and the third round were disturbed"
    calls.clear()
    monkeypatch.setattr(tuning, "interruptions", lambda: len(calls))
    tuning.measure(way, way, 2)
    assert len(calls) == 4 * tuning.MOST_ROUNDS
