"""The kernel cache, the compiler, the registry and the matrix."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shoestring.backends import Backend, backend_names, get_backend
from shoestring.backends.c import CBackend
from shoestring.backends.c.build import (
    HERE,
    INCLUDED,
    build,
    build_runtime_ahead,
    find_compiler,
)
from shoestring.backends.matrix import Support, matrix, matrix_text
from shoestring.ir import Builder, Function, Role, core_set, parse_type
from shoestring.ir.errors import BackendError

SOURCE = '#include "prelude.h"\nfloat twice(float x) { return x + x; }\n'


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that has what is written by hand, which takes seconds to build."""
    folder = tmp_path_factory.mktemp("runtime")
    with pytest.MonkeyPatch.context() as changed:
        changed.setenv("SHOESTRING_CACHE", str(folder))
        build_runtime_ahead().join()
    return folder


@pytest.fixture(autouse=True)
def own_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Each test has a cache of its own: empty where it asks for `cache`, else with `runtime`."""
    monkeypatch.setenv("SHOESTRING_CACHE", str(tmp_path))
    if "cache" not in request.fixturenames:
        shutil.copytree(request.getfixturevalue("runtime"), tmp_path, dirs_exist_ok=True)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path


def function(factor: float = 2.0) -> Function:
    b = Builder("double")
    x = b.param(parse_type("f32[3]"), Role.BATCH, "x")
    b.output("y", b.emit("aten.mul.Tensor", x, factor))
    return b.build()


def test_second_build_comes_from_the_cache() -> None:
    first, second = build([SOURCE]), build([SOURCE])
    assert (first.cache_hit, second.cache_hit) == (False, True)
    assert first.path == second.path
    assert not list(first.path.parent.glob("*.o"))
    twice = ctypes.CDLL(str(first.path)).twice
    twice.restype = ctypes.c_float
    assert twice(ctypes.c_float(1.5)) == 3.0


def test_comments_are_not_part_of_the_key() -> None:
    """They name the user's lines, which move."""
    first = build([SOURCE.replace("float", "// mul, train.py:3\nfloat", 1)])
    assert build([SOURCE.replace("float", "  // mul, train.py:4\nfloat", 1)]).cache_hit
    assert not build([SOURCE.replace("x + x", "x - x")]).cache_hit
    assert "train.py:3" in (first.source / "kernels0.c").read_text()


def test_what_is_built_ahead_is_built_once(cache: Path) -> None:
    ahead = build_runtime_ahead()
    build([SOURCE])
    ahead.join()
    assert len(list(cache.glob("*/*/gemm.o"))) == 1


def test_only_what_a_program_calls_is_linked(cache: Path) -> None:
    build([SOURCE])
    assert not list(cache.glob("*/*/attention.o"))
    call = '#include "attention.h"\nvoid *f(void) { return (void *)ss_attention_forward; }\n'
    build([SOURCE, call])
    assert len(list(cache.glob("*/*/attention.o"))) == 1
    assert len(list(cache.glob("*/*/gemm.o"))) == 1


def test_what_fails_ahead_is_reported_by_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    build_runtime_ahead().join()
    with pytest.raises(BackendError, match="SS4201"):
        build([SOURCE])


@pytest.mark.parametrize("damage", ["truncate", "garbage", "remove"])
def test_a_damaged_entry_is_built_again(damage: str) -> None:
    path = build([SOURCE]).path
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100] if damage == "truncate" else b"x" * 5000)
    again = build([SOURCE])
    assert not again.cache_hit
    assert build([SOURCE]).cache_hit


def test_concurrent_processes(cache: Path) -> None:
    script = f"from shoestring.backends.c.build import build; print(build([{SOURCE!r}]).path)"
    command = [sys.executable, "-c", script]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {process.communicate(timeout=300)[0] for process in running}
    assert len(paths) == 1 and all(process.returncode == 0 for process in running)
    assert build([SOURCE]).cache_hit


def test_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(BackendError, match="SS4201.*no-such-compiler") as error:
        CBackend().compile(function())
    assert "install gcc" in str(error.value)


def test_broken_c(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendError, match="SS4202"):
        build(["int broken("])


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SHOESTRING_CACHE", str(tmp_path / "file"))
    with pytest.raises(BackendError, match="SS4203"):
        build([SOURCE])


def test_no_openmp_runtime() -> None:
    """Parallel loops run on our own pool: two pools would take the cores from each other."""
    assert find_compiler()
    loop = (
        "void f(float *x) {\n#pragma omp parallel for\nfor (int i = 0; i < 8; i++) x[i] = 1;\n}\n"
    )
    assert b"libgomp.so" not in build([SOURCE + loop]).path.read_bytes()


def test_numbers_are_part_of_the_key() -> None:
    x = torch.ones(3)
    two, three = CBackend().compile(function(2.0)), CBackend().compile(function(3.0))
    assert two.run([x])[0].tolist() == [2, 2, 2]
    assert three.run([x])[0].tolist() == [3, 3, 3]
    assert not three.info.cache_hit
    assert all((HERE / name).exists() for name in INCLUDED)


def test_facts_of_an_executable() -> None:
    executable = CBackend().compile(function())
    assert executable.fallbacks == ()
    assert executable.kernels[0].ops == ("aten.mul.Tensor",)
    assert "k0_mul" in executable.source
    assert executable.total_bytes == 12 + executable.arena_bytes
    assert "kernel k0_mul" in str(executable.program)


def test_registry() -> None:
    assert backend_names() == ["c", "reference"]
    for name in (*backend_names(), "cpu"):
        assert isinstance(get_backend(name), Backend)
    with pytest.raises(BackendError, match=r"SS4001.*'refrence'(.|\n)*did you mean 'reference'"):
        get_backend("refrence")


def test_every_core_op_has_a_row() -> None:
    rows = matrix()
    assert [r.op for r in rows] == [op.name for op in core_set()]
    assert all(isinstance(r.c, Support) for r in rows)
    assert "`aten.mm.default` | contraction | interpreted | library" in matrix_text()


def test_symbolic_shapes_are_refused() -> None:
    b = Builder("symbolic")
    x = b.param(parse_type("f32[n]"), Role.BATCH, "x")
    b.output("x", x)
    with pytest.raises(BackendError, match="SS4101"):
        CBackend().compile(b.build())


LANES = """
#include <stdint.h>
void lanes(void *const *b) {
    const float *restrict p0 = b[0];
    const float *restrict p1 = b[1];
    const float *restrict p2 = b[2];
    const float *restrict p3 = b[3];
    float *restrict p4 = b[4];
    for (int64_t i0 = 0; i0 < 4; i0++) {
        for (int64_t i1 = 0; i1 < 16; i1++) {
            for (int64_t c = 0; c < 12; c += 12) {
                const int64_t w = 12;
                float v0[12];
                float v1[12];
                float v2[12];
#pragma omp simd
                for (int64_t l = 0; l < w; l++) {
                    v0[l] = (p0[i0 * 192 + i1 + (c + l) * 16] * p1[i1 + (c + l) * 16]);
                    v1[l] = (p2[i0 * 192 + i1 + (c + l) * 16] * p3[i1 + (c + l) * 16]);
                    v2[l] = (v0[l] + v1[l]);
                }
                for (int64_t j0 = 0; j0 < 2; j0++) {
#pragma omp simd
                    for (int64_t l = 0; l < w; l++) {
                        const float v3 = v2[l];
                        p4[i0 * 384 + i1 * 12 + (c + l) + j0 * 192] = (float)(v3);
                    }
                }
            }
        }
    }
}
"""


def test_arrays_of_functions_that_call_nothing_are_aligned() -> None:
    """A compiler's fault that ended the process; so it runs in one of its own."""
    script = (
        "import ctypes, sys; f = ctypes.CDLL(sys.argv[1]).lanes\n"
        "memory = [ctypes.create_string_buffer(1 << 16) for _ in range(5)]\n"
        "f((ctypes.c_void_p * 5)(*map(ctypes.addressof, memory)))"
    )
    path = str(build([LANES]).path)
    assert subprocess.run([sys.executable, "-c", script, path]).returncode == 0
