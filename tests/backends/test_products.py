"""Generated matrix products: odd sizes, layouts, types, epilogues, narrow vectors."""

from __future__ import annotations

import ctypes
import itertools
import platform
import subprocess
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoestring.backends.c import CBackend, CExecutable
from shoestring.backends.c.build import HERE, defined_names, find_compiler, flags
from shoestring.backends.c.layout import row_major
from shoestring.backends.c.lower import lower
from shoestring.backends.c.nodes import Base, Ref
from shoestring.backends.c.packing import MOST_ROWS, packed_floats
from shoestring.backends.c.room import Extent, Machine, thread_bytes, units_of
from shoestring.backends.c.sides import Side, Sides
from shoestring.backends.instructions import CallKernel
from shoestring.ir import Builder, Function, Role, TensorType, Value, parse, parse_type

from .helpers import Call, compare, together, traced

SIZES = (4, 5, 7, 8, 9, 16, 47, 48, 49, 97, 256, 257)
DEPTHS = (1, 2, 3, 31, 384, 385, 769)
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def values(shape: tuple[int, ...], dtype: torch.dtype, turned: bool) -> torch.Tensor:
    """Random elements; in memory the last two dimensions may be swapped."""
    if turned:
        return torch.randn(*shape[:-2], shape[-1], shape[-2]).to(dtype).transpose(-1, -2)
    return torch.randn(shape).to(dtype)


def turn(b: Builder, x: Value, rank: int) -> Value:
    order = [*range(rank - 2), rank - 1, rank - 2]
    return b.emit("aten.permute.default", x, dims=order)


def product(
    m: int, k: int, n: int, *, batch: int = 0, dtype: str = "f32", left: bool = False,
    right: bool = False, bias: bool = False,
) -> Function:  # fmt: skip
    """A product of parameters, which may be stored turned."""
    lead = f"{batch}," if batch else ""
    b = Builder("product")

    def side(rows: int, cols: int, turned: bool, name: str) -> Value:
        shape = f"{lead}{cols},{rows}" if turned else f"{lead}{rows},{cols}"
        x = b.param(parse_type(f"{dtype}[{shape}]"), Role.BATCH, name)
        return turn(b, x, 3 if batch else 2) if turned else x

    x, y = side(m, k, left, "x"), side(k, n, right, "y")
    name = "bmm" if batch else "mm"
    if bias:
        z = b.param(parse_type(f"{dtype}[{n}]"), Role.PARAMETER, "bias")
        out = b.emit("aten.baddbmm.default" if batch else "aten.addmm.default", z, x, y)
    else:
        out = b.emit(f"aten.{name}.default", x, y)
    b.output("out", out)
    return b.build()


def arguments(function: Function) -> list[torch.Tensor]:
    return [random(p.value.type) for p in function.params]


def random(t: TensorType) -> torch.Tensor:
    return torch.randn(t.static_shape).to(t.dtype)


def check(function: Function, given: list[torch.Tensor] | None = None) -> CExecutable:
    given = arguments(function) if given is None else given
    limit = TOLERANCE[given[0].dtype]
    return compare(function, given, rtol=limit, atol=limit * 30)


@pytest.mark.parametrize("k", [2048, 8192])
def test_long_sums_are_as_exact_as_short_ones(k: int) -> None:
    """Blocks of the sum are summed up by themselves: errors grow with those, not with K."""
    f = product(64, k, 48)
    x, y = given = arguments(f)
    exact = x.double() @ y.double()
    error = (CBackend().compile(f).run(given)[0].double() - exact).norm() / exact.norm()
    assert error < 6e-7, error  # 1.6e-6 at K = 8192 where one sum goes all the way


def kernels(executable: CExecutable) -> list[str]:
    return [i.kernel for i in executable.instructions if isinstance(i, CallKernel)]


BOUNDS = (0, 5, 5, 40, 57)  # where groups end: the first and the third are empty


def by_rows(x: torch.Tensor, y: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Each group of rows times its matrix; rows behind the last group are 0."""
    out = torch.zeros(x.shape[0], y.shape[2], dtype=torch.float64)
    start = 0
    for e, end in enumerate(ends.tolist()):
        out[start:end] = x[start:end].double() @ y[e].double()
        start = end
    return out


def by_sum(x: torch.Tensor, y: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The product of each group of columns of `x` and rows of `y`."""
    starts = [0, *ends.tolist()[:-1]]
    pairs = zip(starts, ends.tolist(), strict=True)
    return torch.stack([x[:, a:b].double() @ y[a:b].double() for a, b in pairs])


def grouped(dtype: str, left: bool, right: bool, *, rows: int, sums: bool) -> Function:
    """A product by groups of rows, or one that sums each group up; its sides stored turned."""
    b, count = Builder("grouped"), len(BOUNDS)

    def side(shape: list[int], turned: bool, name: str) -> Value:
        stored = [*shape[:-2], shape[-1], shape[-2]] if turned else shape
        t = parse_type(f"{dtype}[{','.join(map(str, stored))}]")
        x = b.param(t, Role.BATCH, name)
        return turn(b, x, len(shape)) if turned else x

    x = side([33, rows] if sums else [rows, 33], left, "x")
    y = side([rows, 21] if sums else [count, 33, 21], right, "y")
    ends = b.param(parse_type(f"i32[{count}]"), Role.BATCH, "ends")
    out = b.emit("aten._grouped_mm.default", x, y, ends, None)
    b.output("out", b.emit("aten.relu.default", out))
    return b.build()


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("sums", [False, True])
def test_groups(dtype: str, sums: bool) -> None:
    for left, right in itertools.product([False, True], repeat=2):
        function = grouped(dtype, left, right, rows=BOUNDS[-1], sums=sums)
        given = [*arguments(function)[:2], torch.tensor(BOUNDS, dtype=torch.int32)]
        executable = CBackend().compile(function)
        assert len(kernels(executable)) == len(executable.instructions) == 1
        x, y = (g.mT if t else g for g, t in zip(given, (left, right), strict=False))
        wanted = (by_sum if sums else by_rows)(x, y, given[2]).relu()
        found = executable.run(given)[0].double()
        limit = TOLERANCE[given[0].dtype]
        torch.testing.assert_close(found, wanted, rtol=limit, atol=limit * 5)


@pytest.mark.parametrize("ends", [(3, 3, 3, 3, 9), (9, 2, 5, 80, 99), (-4, 0, 0, 0, 0)])
def test_ends_that_do_not_fit_stay_within_memory(ends: tuple[int, ...]) -> None:
    """Rows behind the last group are 0; PyTorch leaves them as they were."""
    function = grouped("f32", False, True, rows=BOUNDS[-1], sums=False)
    given = [*arguments(function)[:2], torch.tensor(ends, dtype=torch.int32)]
    found = CBackend().compile(function).run(given)[0]
    assert found.isfinite().all()
    assert not found[max(ends[-1], 0) :].any()


def test_update_of_experts_in_the_epilogue() -> None:
    executable = check_groups(
        """
func @update {
  parameter %w: f32[3,24,40] "w" -> %new
  batch %x: f32[32,24] "x"
  batch %g: f32[32,40] "g"
  batch %ends: i32[3] "ends"
  %xt: f32[24,32] = aten.permute.default(%x) {dims=[1,0]}
  %grad: f32[3,24,40] = aten._grouped_mm.default(%xt, %g, %ends, _)
  %step: f32[3,24,40] = aten.mul.Tensor(%grad, 0.1)
  %new: f32[3,24,40] = aten.sub.Tensor(%w, %step)
  return
}
"""
    )
    assert len(executable.instructions) == 1


def check_groups(text: str) -> CExecutable:
    function = parse(text)
    *floats, ends = (p.value.type for p in function.params)
    assert ends.dtype is torch.int32
    given = [*map(random, floats), torch.tensor([7, 7, 32], dtype=torch.int32)]
    return compare(function, given, rtol=2e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("right", [False, True])
def test_layouts(dtype: str, left: bool, right: bool) -> None:
    for m, k, n in [(9, 33, 50), (64, 96, 48), (5, 1, 4), (257, 400, 49)]:
        function = product(m, k, n, dtype=dtype, left=left, right=right)
        assert len(kernels(check(function))) == 1


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(SIZES), st.sampled_from(DEPTHS), st.sampled_from(SIZES), st.booleans(),
    st.booleans(), st.booleans(), st.sampled_from([0, 1, 3]), st.sampled_from(["f32", "bf16"]),
)  # fmt: skip
def test_sizes(
    m: int, k: int, n: int, left: bool, right: bool, bias: bool, batch: int, dtype: str
) -> None:
    options = {"left": left, "right": right, "bias": bias, "batch": batch, "dtype": dtype}
    check(product(m, k, n, **options))  # type: ignore[arg-type]


def test_epilogue_is_one_kernel() -> None:
    executable = check(
        parse("""
func @layer {
  parameter %w: f32[40,24] "w"
  parameter %bias: f32[40] "bias"
  batch %x: f32[6,5,24] "x"
  batch %skip: f32[6,5,40] "skip"
  %flat: f32[30,24] = aten.view.default(%x) {size=[30,24]}
  %wt: f32[24,40] = aten.permute.default(%w) {dims=[1,0]}
  %h: f32[30,40] = aten.addmm.default(%bias, %flat, %wt)
  %back: f32[6,5,40] = aten.view.default(%h) {size=[6,5,40]}
  %act: f32[6,5,40] = aten.gelu.default(%back)
  %y: f32[6,5,40] = aten.add.Tensor(%act, %skip)
  return y=%y, h=%h
}
""")
    )
    assert len(executable.instructions) == 1


def test_update_in_the_epilogue() -> None:
    """A gradient that only its update reads is never in memory; the weight is replaced in place."""
    executable = check(
        parse("""
func @update {
  parameter %w: f32[24,40] "w" -> %new
  batch %x: f32[30,24] "x"
  batch %g: f32[30,40] "g"
  %xt: f32[24,30] = aten.permute.default(%x) {dims=[1,0]}
  %grad: f32[24,40] = aten.mm.default(%xt, %g)
  %step: f32[24,40] = aten.mul.Tensor(%grad, 0.1)
  %new: f32[24,40] = aten.sub.Tensor(%w, %step)
  return
}
""")
    )
    assert len(executable.instructions) == 1


def test_a_side_of_the_product_is_not_overwritten_early() -> None:
    check(
        parse("""
func @square {
  parameter %w: f32[64,64] "w" -> %new
  %grad: f32[64,64] = aten.mm.default(%w, %w)
  %step: f32[64,64] = aten.mul.Tensor(%grad, 0.01)
  %new: f32[64,64] = aten.sub.Tensor(%w, %step)
  return
}
""")
    )


def test_a_reader_in_another_order_has_a_kernel_of_its_own() -> None:
    executable = check(
        parse("""
func @turned {
  batch %x: f32[30,24] "x"
  batch %y: f32[24,40] "y"
  batch %z: f32[40,30] "z"
  %p: f32[30,40] = aten.mm.default(%x, %y)
  %t: f32[40,30] = aten.permute.default(%p) {dims=[1,0]}
  %s: f32[40,30] = aten.add.Tensor(%t, %z)
  return s=%s
}
""")
    )
    assert len(executable.instructions) == 2


def test_a_vector_that_is_no_row_of_the_product() -> None:
    """[6,5,40] + [6,1,40]: what is added changes every five rows."""
    check(
        parse("""
func @positions {
  batch %x: f32[30,24] "x"
  batch %y: f32[24,40] "y"
  batch %z: f32[6,1,40] "z"
  %p: f32[30,40] = aten.mm.default(%x, %y)
  %b: f32[6,5,40] = aten.view.default(%p) {size=[6,5,40]}
  %s: f32[6,5,40] = aten.add.Tensor(%b, %z)
  return s=%s
}
""")
    )


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("sizes", list(itertools.product((1, 3), (1, 2, 20), (1, 2, 384))), ids=str)
def test_small_products_need_no_library(sizes: tuple[int, int, int], dtype: str) -> None:
    rows, cols, summed = sizes
    executable = check(
        parse(f"""
func @small {{
  batch %x: {dtype}[{rows},{summed}] "x"
  batch %y: {dtype}[{summed},{cols}] "y"
  batch %b: {dtype}[{cols}] "b"
  %p: {dtype}[{rows},{cols}] = aten.addmm.default(%b, %x, %y)
  %q: {dtype}[{cols},{rows}] = aten.permute.default(%p) {{dims=[1,0]}}
  return q=%q
}}
""")
    )
    assert all(isinstance(i, CallKernel) for i in executable.instructions)


def test_dropout_in_the_epilogue() -> None:
    function = parse("""
func @dropout {
  rng %key: i64[2] "#rng"
  batch %x: f32[30,24] "x"
  batch %y: f32[24,40] "y"
  %p: f32[30,40] = aten.mm.default(%x, %y)
  %u: f32[30,40] = rng.uniform.default(%key) {site=3, shape=[30, 40], dtype=f32}
  %keep: bool[30,40] = aten.lt.Scalar(%u) {other=0.5}
  %d: f32[30,40] = aten.mul.Tensor(%p, %keep)
  return d=%d
}
""")
    given = [torch.tensor([5, 7]), torch.randn(30, 24), torch.randn(24, 40)]
    assert len(compare(function, given, rtol=2e-5, atol=1e-4).instructions) == 1


def test_nan_and_infinity_stay_in_their_rows_and_columns() -> None:
    function = product(9, 33, 50, dtype="bf16", right=True)
    x, y = arguments(function)
    x[3, 7], y[11, 2] = torch.nan, torch.inf
    found = CBackend().compile(function).run([x, y])[0]
    wanted = x @ y.T
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.isinf(), wanted.isinf())


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize(
    ("m", "k", "n"), [(265, 77, 131), (600, 1, 1), (521, 385, 49), (1024, 770, 7)]
)
def test_many_rows_share_a_packed_side(m: int, k: int, n: int, dtype: str) -> None:
    """Every layout of both sides, with what is added."""
    for left, right, bias in itertools.product([False, True], repeat=3):
        executable = check(product(m, k, n, dtype=dtype, left=left, right=right, bias=bias))
        assert "ss_gemm_pack(&g" in executable.source


def test_a_packed_side_that_takes_much_memory_is_packed_by_its_readers() -> None:
    for rows, k, n in [(264, 64, 64), (300, 2048, 1024)]:
        assert "ss_gemm_pack(&g" not in check(product(rows, k, n)).source


def test_every_number_of_threads_gives_the_same_bits() -> None:
    function = product(130, 200, 150, right=True, bias=True)
    given = arguments(function)
    before = torch.get_num_threads()
    found: list[torch.Tensor] = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found += CBackend().compile(function).run(given)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


STORE = """
#include "gemm.h"
static void store(void *const *b, int64_t batch, int64_t row, int64_t col, int64_t rows,
                  int64_t cols, const float *tile, int64_t stride) {
    const int64_t *size = b[1];
    float *c = (float *)b[0] + batch * size[0] * size[1];
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < cols; j++) c[(row + i) * size[1] + col + j] = tile[i * stride + j];
}
int64_t product(void *a, void *b, void *ends, float *c, const int64_t *s, void *scratch) {
    int64_t size[2] = {s[1], s[2]};
    void *buffers[2] = {c, size};
    ss_gemm g = {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], store,
                 s[11], s[12]};
    if (scratch) ss_gemm_run(&g, a, b, ends, buffers, scratch, 2);
    return ss_gemm_scratch(&g);
}
int64_t packed_scratch(const int64_t *s) {
    ss_gemm g = {s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], store,
                 s[11], s[12]};
    g.b_packed = 1;
    return ss_gemm_scratch(&g);
}
void packed_product(void *a, void *b, void *panels, float *c, const int64_t *s, void *scratch) {
    int64_t size[2] = {s[1], s[2]};
    void *buffers[2] = {c, size};
    ss_gemm g = {1, s[1], s[2], s[3], s[4], 0, s[6], s[7], 0, s[9], s[10], store};
    ss_gemm_pack(&g, b, panels);
    g.b_packed = 1;
    ss_gemm_run(&g, a, panels, 0, buffers, scratch, 2);
}
"""


WIDE = ["-DSS_EMULATE_AVX512", "-O1", "-Wno-psabi"]
PATHS = {
    "4 lanes": ["-DSS_NARROW=4"],
    "8 lanes": ["-DSS_NARROW=8"],
    "16 lanes": WIDE,
    "tile registers": ["-DSS_EMULATE_AMX", *WIDE],
}


Libraries = Callable[[str], ctypes.CDLL]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Libraries:
    """gemm.c for each path, built once."""

    @cache
    def library_of(path: str) -> ctypes.CDLL:
        folder = tmp_path_factory.mktemp("product")
        (folder / "store.c").write_text(STORE)
        own = (*flags(), *PATHS.get(path, []), "-I", str(HERE))
        files = ("store.c", str(HERE / "gemm.c"), str(HERE / "pool.c"))
        command = [find_compiler(), *own, "-shared", *files, "-o", "product.so"]
        subprocess.run(command, cwd=folder, check=True)
        library = ctypes.CDLL(str(folder / "product.so"))
        library.product.restype = ctypes.c_int64
        library.ss_pool_resize(ctypes.c_int64(2))
        return library

    return library_of


@pytest.mark.parametrize("path", PATHS)
def test_paths_of_other_machines(path: str, libraries: Libraries) -> None:
    """Narrower vectors, and tile registers in software."""
    library = libraries(path)
    for (m, k, n), dtype in itertools.product(
        [(4, 1, 4), (7, 33, 50), (33, 32, 31), (64, 96, 48), (257, 769, 49)], TOLERANCE
    ):
        for left, right in itertools.product([False, True], repeat=2):
            x, y = values((m, k), dtype, left), values((k, n), dtype, right)
            wanted = x.double() @ y.double()
            numbers = [1, m, n, k, kind_of(x), 0, *x.stride(), 0, *y.stride(), 0, 0]
            assert_near(run(library, x, y, None, wanted, numbers), wanted)


def integers(shape: tuple[int, int], turned: bool) -> torch.Tensor:
    """Of the whole range, its ends more often than others."""
    x = torch.randint(-140, 140, shape[::-1] if turned else shape).clamp(-128, 127)
    return (x.t() if turned else x).to(torch.int8)


@pytest.mark.parametrize("path", PATHS)
def test_integers_on_paths_of_other_machines(path: str, libraries: Libraries) -> None:
    library = libraries(path)
    for m, k, n in [(4, 1, 4), (7, 33, 50), (33, 32, 31), (64, 96, 48), (257, 1539, 49)]:
        for left, right in itertools.product([False, True], repeat=2):
            x, y = integers((m, k), left), integers((k, n), right)
            wanted = (x.long() @ y.long()).int()
            numbers = [1, m, n, k, kind_of(x), 0, *x.stride(), 0, *y.stride(), 0, 0]
            assert torch.equal(run(library, x, y, None, wanted, numbers), wanted)


def scaled(left: bool, right: bool, x: Any, y: Any, scale: Any) -> Any:
    """A product of int8, and what usually follows it."""
    whole = torch.ops.aten._int_mm.default(x.t() if left else x, y.t() if right else y)
    return whole, whole.float() * scale + 1


@pytest.mark.usefixtures("isa")
def test_integers_with_what_follows() -> None:
    sizes = [(17, 4, 16), (5, 1, 7), (33, 77, 50), (130, 1538, 48)]
    cases = list(itertools.product(sizes, [False, True], [False, True]))
    sides = [(integers((m, k), a), integers((k, n), b)) for (m, k, n), a, b in cases]
    scales = [torch.rand(y.shape[1]) for _, y in sides]
    calls: list[Call] = []
    for (_, a, b), (x, y), scale in zip(cases, sides, scales, strict=True):
        calls.append((partial(scaled, a, b), (x.t() if a else x, y.t() if b else y, scale)))
        assert len(lower(traced(*calls[-1])).program.instructions) == 1
    function, arguments = together(calls)
    found = iter(CBackend().compile(function).run(arguments))
    for (x, y), scale in zip(sides, scales, strict=True):
        wanted = (x.long() @ y.long()).int()
        assert torch.equal(next(found), wanted)
        torch.testing.assert_close(next(found), wanted.float() * scale + 1)


@pytest.mark.parametrize("path", PATHS)
def test_groups_on_paths_of_other_machines(path: str, libraries: Libraries) -> None:
    library = libraries(path)
    for (m, k, n), dtype in itertools.product([(70, 33, 50), (129, 70, 31)], TOLERANCE):
        for left, right in itertools.product([False, True], repeat=2):
            e, ends = len(BOUNDS), torch.tensor([*BOUNDS[:-1], 70], dtype=torch.int32)
            x, y = values((m, k), dtype, left), values((e, k, n), dtype, right)
            wanted = by_rows(x, y, ends)
            numbers = [1, m, n, k, kind_of(x), 0, *x.stride(), *y.stride(), 1, e]
            assert_near(run(library, x, y, ends, wanted, numbers), wanted)
            x, y = values((k, m), dtype, left), values((m, n), dtype, right)
            wanted = by_sum(x, y, ends)
            numbers = [e, k, n, m, kind_of(x), 0, *x.stride(), 0, *y.stride(), 2, e]
            assert_near(run(library, x, y, ends, wanted, numbers), wanted)


@pytest.mark.parametrize("path", PATHS)
def test_a_packed_side_gives_the_same_bits(path: str, libraries: Libraries) -> None:
    """On every machine, and within the room that is planned for it."""
    library = libraries(path)
    machine = Machine.of(defined_names(*PATHS.get(path, [])))
    for (m, k, n), dtype in itertools.product(
        [(4, 1, 4), (7, 33, 50), (33, 32, 31), (64, 96, 48), (32, 769, 257), (129, 385, 500)],
        TOLERANCE,
    ):
        for left, right in itertools.product([False, True], repeat=2):
            x, y = values((m, k), dtype, left), values((k, n), dtype, right)
            numbers = [1, m, n, k, kind_of(x), 0, *x.stride(), 0, *y.stride(), 0, 0]
            wanted = run(library, x, y, None, x.double() @ y.double(), numbers)
            room = packed_floats((units_of(machine, dtype, k), n))
            panels = torch.full((room + 64,), torch.nan)
            panels[room:] = 7
            assert torch.equal(run(library, x, y, panels, wanted, numbers, packed=True), wanted)
            assert panels[room:].eq(7).all()


@pytest.mark.parametrize("path", ["native", *PATHS])
def test_scratch_is_what_is_planned(path: str, libraries: Libraries) -> None:
    """On every machine; one with tile registers has room to do without them."""
    library = libraries(path)
    machine = Machine.of(defined_names(*PATHS.get(path, [])))

    def room(numbers: ctypes.Array[ctypes.c_int64]) -> int:
        found: int = library.product(None, None, None, None, numbers, None)
        return found

    sizes = (4, 6, 31, 32, 33, 36, 64, 95, 97, 255, 257, 3000)
    for batch, m, n, k in itertools.product((1, 32), sizes, sizes, (1, 352, 353, 384, 385, 5000)):
        for kind, shared, turned in itertools.product((0, 1, 2), (True, False), (True, False)):
            row, col = (1, m) if turned else (k, 1)
            for grouping in range(1 if batch > 1 or shared else 3):
                apart = 0 if shared else m * k
                numbers = [batch, m, n, k, kind, apart, row, col, k * n, n, 1, grouping, 1]
                given = (ctypes.c_int64 * 13)(*numbers)
                sides = sides_of(kind, Side(left(kind), apart, ((m, row),), ((k, col),)), k)
                for packed in (False, True):
                    needed = library.packed_scratch(given) if packed else room(given)
                    extent = Extent(batch, m, n, GROUPINGS[grouping], packed)
                    planned = thread_bytes(machine, sides, extent)
                    exact = not (machine.amx and kind == 1)
                    assert needed == planned if exact else needed <= planned, numbers


GROUPINGS = ("SS_UNGROUPED", "SS_GROUPS_OF_ROWS", "SS_GROUPS_OF_SUM")


def left(kind: int) -> Ref:
    dtype = (torch.float32, torch.bfloat16, torch.int8)[kind]
    return Ref(Base(0, dtype, (), ""), row_major(()))


def sides_of(kind: int, a: Side, summed: int) -> Sides:
    return Sides(a, Side(left(kind), 0, (), ()), summed)


def assert_near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def kind_of(x: torch.Tensor) -> int:
    return [torch.float32, torch.bfloat16, torch.int8].index(x.dtype)


def run(
    library: ctypes.CDLL, x: torch.Tensor, y: torch.Tensor, ends: torch.Tensor | None,
    like: torch.Tensor, numbers: list[int], *, packed: bool = False,
) -> torch.Tensor:  # fmt: skip
    """The product of gemm.c, in f64 or i32; a packed side goes to what `ends` is otherwise."""
    out = torch.full(like.shape, torch.nan)
    sizes = (ctypes.c_int64 * 13)(*numbers)
    given = [x, y, ends, out]
    pointers = [ctypes.c_void_p(t.data_ptr() if t is not None else None) for t in given]
    scratch = torch.empty(2 * library.product(*pointers, sizes, None), dtype=torch.uint8)
    call = library.packed_product if packed else library.product
    call(*pointers, sizes, ctypes.c_void_p(scratch.data_ptr()))
    return out.view(torch.int32) if x.dtype is torch.int8 else out.double()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="tile registers are of x86-64")
def test_tile_registers_compile(tmp_path: Path) -> None:
    command = [find_compiler(), "-std=gnu11", "-O2", "-fopenmp", "-march=sapphirerapids", "-I",
               str(HERE), "-S", str(HERE / "gemm.c"), "-o", "gemm.s"]  # fmt: skip
    subprocess.run(command, cwd=tmp_path, check=True)
    assert "tdpbf16ps" in (tmp_path / "gemm.s").read_text()


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("rows", [5, 32, 128, 129])
def test_a_side_that_many_products_share_is_packed_once(
    dtype: str, turned: bool, rows: int
) -> None:
    """A recurrence, whose weight is updated in place: later products read what was packed."""
    b = Builder("recurrence")
    x = b.param(parse_type(f"{dtype}[{rows},70]"), Role.BATCH, "x")
    w = b.param(parse_type(f"{dtype}[70,70]"), Role.PARAMETER, "w")
    bias = b.param(parse_type(f"{dtype}[70]"), Role.PARAMETER, "bias")
    side, h = turn(b, w, 2) if turned else w, x
    for _ in range(3):
        h = b.emit("aten.tanh.default", b.emit("aten.addmm.default", bias, h, side))
        h = b.emit("aten.tanh.default", b.emit("aten.mm.default", h, side))
    b.replace_state(w, b.emit("aten.mul.Tensor", w, 0.5))
    b.output("out", h)
    function = b.build()
    given = [t / 8 for t in arguments(function)]
    executable = check(function, given)
    packs = [k for k in kernels(executable) if "pack" in k]
    assert len(packs) == (rows <= MOST_ROWS)


def test_a_packed_side_is_a_left_side_and_a_group_s_too() -> None:
    """What is packed for some readers is where it was for all others."""
    b = Builder("powers")
    w = b.param(parse_type("f32[32,32]"), Role.BATCH, "w")
    ends = b.param(parse_type("i32[2]"), Role.BATCH, "ends")
    power = w
    for _ in range(5):
        power = b.emit("aten.mm.default", power, w)
    b.output("left", b.emit("aten.mm.default", w, power))
    b.output("sums", b.emit("aten._grouped_mm.default", power, w, ends, None))
    b.output("batch", b.emit("aten.bmm.default", *[b.emit("aten.unsqueeze.default", w, dim=0)] * 2))
    image = b.emit("aten.view.default", w, size=(4, 8, 2, 16))
    weight = b.emit("aten.view.default", w, size=(32, 8, 2, 2))
    attrs = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "transposed": False}
    given: dict[str, Any] = {**attrs, "output_padding": (0, 0), "groups": 1}
    b.output("convolved", b.emit("aten.convolution.default", image, weight, None, **given))
    ends_given = torch.tensor([10, 32], dtype=torch.int32)
    executable = check(b.build(), [torch.randn(32, 32) / 6, ends_given])
    assert len([k for k in kernels(executable) if "pack" in k]) == 1


def test_a_bias_is_added_before_the_product_is_rounded() -> None:
    """Also where the rest of what follows does not fit: else the product would be stored twice."""
    executable = compare(
        parse("""
func @f {
  batch %x: bf16[64,64] "x"
  batch %w: bf16[64,64] "w"
  parameter %b: f32[64] "b"
  %c: bf16[64] = aten._to_copy.default(%b) {dtype=bf16}
  %h: bf16[64,64] = aten.addmm.default(%c, %x, %w)
  %u: f32[64,64] = aten._to_copy.default(%h) {dtype=f32}
  %s: f32[64,1] = aten.mean.dim(%u) {dim=[1], keepdim=true}
  %d: f32[64,64] = aten.sub.Tensor(%u, %s)
  %e: f32[64,64] = aten.exp.default(%u)
  return h=%h, d=%d, e=%e
}
"""),
        [torch.randn(64, 64).bfloat16(), torch.randn(64, 64).bfloat16(), torch.randn(64)],
        rtol=2e-2,
        atol=2e-1,
    )
    assert not any(b.label.startswith("product of") for b in executable.program.buffers)
