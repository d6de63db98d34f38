"""Kernels on another machine: compiled for 64-bit ARM (NEON) and run in emulation.

Needs Debian's gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from shoestring.backends.c.build import GCC_FLAGS, HERE, runtime_of
from shoestring.backends.c.lower import Lowered, lower
from shoestring.backends.instructions import CallKernel, Region, Space
from shoestring.ir import interpret, parse

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
pytestmark = pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
    reason=f"needs {COMPILER} and {EMULATOR}",
)
FLAGS = ("-std=gnu11", "-O3", "-fopenmp", "-ffp-contract=off", "-fwrapv", "-static", "-w")

# A layer forward and backward, in f32 and in bf16: products, epilogues, rows, columns.
FUNCTION = """
func @layer {{
  parameter %w: {t}[40,24] "w" -> %new
  parameter %bias: {t}[40] "bias"
  batch %x: {t}[37,24] "x"
  %wt: {t}[24,40] = aten.permute.default(%w) {{dims=[1,0]}}
  %h: {t}[37,40] = aten.addmm.default(%bias, %x, %wt)
  %act: {t}[37,40] = aten.gelu.default(%h)
  %top: {t}[37,1] = aten.amax.default(%act) {{dim=[1], keepdim=true}}
  %d: {t}[37,40] = aten.sub.Tensor(%act, %top)
  %e: {t}[37,40] = aten.exp.default(%d)
  %s: {t}[37,1] = aten.sum.dim_IntList(%e) {{dim=[1], keepdim=true}}
  %y: {t}[37,40] = aten.div.Tensor(%e, %s)
  %yt: {t}[40,37] = aten.permute.default(%y) {{dims=[1,0]}}
  %grad: {t}[40,24] = aten.mm.default(%yt, %x)
  %step: {t}[40,24] = aten.mul.Tensor(%grad, 0.1)
  %new: {t}[40,24] = aten.sub.Tensor(%w, %step)
  %cols: {t}[40] = aten.sum.dim_IntList(%y) {{dim=[0]}}
  return y=%y, cols=%cols
}}
"""

FLASH = "aten._scaled_dot_product_flash_attention_for_cpu"
ATTENTION = f"""
func @attention {{{{
  batch %a: {{t}}[1,21,2,20] "q"
  batch %b: {{t}}[1,35,2,20] "k"
  batch %c: {{t}}[1,35,2,20] "v"
  batch %d: {{t}}[1,21,2,20] "grad"
  %q: {{t}}[1,2,21,20] = aten.permute.default(%a) {{{{dims=[0,2,1,3]}}}}
  %k: {{t}}[1,2,35,20] = aten.permute.default(%b) {{{{dims=[0,2,1,3]}}}}
  %v: {{t}}[1,2,35,20] = aten.permute.default(%c) {{{{dims=[0,2,1,3]}}}}
  %g: {{t}}[1,2,21,20] = aten.permute.default(%d) {{{{dims=[0,2,1,3]}}}}
  %o: {{t}}[1,2,21,20], %l: f32[1,2,21] = {FLASH}.default(%q, %k, %v, _)
  %dq: {{t}}[1,2,21,20], %dk: {{t}}[1,2,35,20], %dv: {{t}}[1,2,35,20] = \
{FLASH}_backward.default(%g, %q, %k, %v, %o, %l, _) {{{{dropout_p=0.0, is_causal=false}}}}
  %ot: {{t}}[1,21,2,20] = aten.permute.default(%o) {{{{dims=[0,2,1,3]}}}}
  %qt: {{t}}[1,21,2,20] = aten.permute.default(%dq) {{{{dims=[0,2,1,3]}}}}
  %kt: {{t}}[1,35,2,20] = aten.permute.default(%dk) {{{{dims=[0,2,1,3]}}}}
  %vt: {{t}}[1,35,2,20] = aten.permute.default(%dv) {{{{dims=[0,2,1,3]}}}}
  return out=%ot, dq=%qt, dk=%kt, dv=%vt
}}}}
"""


# Windows of framed images, one image a matrix and images side by side.
CONVOLUTION = """
func @convolution {{
  batch %x: {t}[3,5,9,7] "x"
  parameter %w: {t}[8,5,3,3] "w"
  parameter %b: {t}[8] "b"
  parameter %v: {t}[6,8,2,2] "v"
  batch %g: {t}[3,6,3,3] "g"
  %y: {t}[3,8,9,7] = aten.convolution.default(%x, %w, %b) {{
    stride=[1,1], padding=[1,1], dilation=[1,1], transposed=false, output_padding=[0,0], groups=1}}
  %z: {t}[3,6,3,3] = aten.convolution.default(%y, %v, _) {{
    stride=[3,2], padding=[0,0], dilation=[1,1], transposed=false, output_padding=[0,0], groups=1}}
  %dv: {t}[6,8,2,2] = aten.convolution_backward.default(%g, %y, %v) {{bias_sizes=none,
    stride=[3,2], padding=[0,0], dilation=[1,1], transposed=false, output_padding=[0,0], groups=1,
    output_mask=[false,true,false]}}
  %dx: {t}[3,5,9,7] = aten.convolution_backward.default(%y, %x, %w) {{bias_sizes=none,
    stride=[1,1], padding=[1,1], dilation=[1,1], transposed=false, output_padding=[0,0], groups=1,
    output_mask=[true,false,false]}}
  return z=%z, dv=%dv, dx=%dx
}}
"""


INTEGERS = """
func @integers {
  batch %x: i8[37,53] "x"
  parameter %w: i8[40,53] "w"
  %t: i8[53,40] = aten.permute.default(%w) {dims=[1,0]}
  %y: i32[37,40] = aten._int_mm.default(%x, %t)
  return y=%y
}
"""


def address(lowered: Lowered, r: Region) -> str:
    """Where a region is, as C."""
    if r.buffer.space is Space.ARENA:
        return f"arena + {lowered.program.plan.offsets[r.buffer.index] + r.byte_offset}"
    assert r.buffer.space is Space.ARGUMENT, "the function has no constants"
    return f"argument{r.buffer.index} + {r.byte_offset}"


def main_text(lowered: Lowered, sizes: list[int]) -> str:
    """Reads the arguments, runs every instruction, writes all arguments and outputs."""
    program = lowered.program
    lines = ["#include <stdio.h>", f"static _Alignas(64) char arena[{program.plan.arena_bytes}];"]
    lines += [f"static _Alignas(64) char argument{i}[{n}];" for i, n in enumerate(sizes)]
    calls = [i for i in program.instructions if isinstance(i, CallKernel)]
    assert len(calls) == len(program.instructions) and not program.copies
    lines += [f"void {name}(void *const *b);" for name in sorted({c.kernel for c in calls})]
    lines.append("int main(void) {")
    lines += [f"fread(argument{i}, 1, {n}, stdin);" for i, n in enumerate(sizes)]
    for call in calls:
        pointers = ", ".join(address(lowered, r) for r in call.pointers)
        lines.append(f"{{ void *b[] = {{{pointers}}}; {call.kernel}(b); }}")
    results = [(f"argument{i}", n) for i, n in enumerate(sizes)]
    for r in program.outputs:
        count = torch.empty(r.shape, dtype=r.dtype).nbytes
        results.append((address(lowered, r), count))
    lines += [f"fwrite({where}, 1, {n}, stdout);" for where, n in results]
    return "\n".join([*lines, "return 0; }", ""])


def emulated(lowered: Lowered, given: list[torch.Tensor], folder: Path) -> bytes:
    for index, source in enumerate(lowered.sources):
        (folder / f"kernels{index}.c").write_text(source)
    (folder / "main.c").write_text(main_text(lowered, [t.nbytes for t in given]))
    written = [str(HERE / name) for part in runtime_of(lowered.sources) for name in part]
    files = [*written, *map(str, folder.glob("*.c"))]
    command = [COMPILER, *FLAGS, *GCC_FLAGS, "-I", str(HERE), *files, "-o", "program", "-lm"]
    subprocess.run(command, cwd=folder, check=True)
    data = b"".join(raw(t) for t in given)
    done = subprocess.run([EMULATOR, "./program"], cwd=folder, input=data, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def raw(t: torch.Tensor) -> bytes:
    return bytes(t.contiguous().view(torch.uint8).flatten().tolist())


@pytest.mark.parametrize(
    "text", [FUNCTION, ATTENTION, CONVOLUTION], ids=["layer", "attention", "convolution"]
)
@pytest.mark.parametrize(("name", "limit"), [("f32", 1e-4), ("bf16", 3e-2)])
def test_a_function(text: str, name: str, limit: float, tmp_path: Path) -> None:
    function = parse(text.format(t=name))
    dtype = function.params[0].value.type.dtype
    given = [torch.randn(p.value.type.static_shape).to(dtype) for p in function.params]
    data = bytearray(emulated(lower(function), given, tmp_path))
    outputs, state = interpret(function, given)
    wanted = [state.get(p.path, t) for p, t in zip(function.params, given, strict=True)]
    for t in [*wanted, *outputs]:
        found = torch.frombuffer(data[: t.nbytes], dtype=dtype).reshape(t.shape)
        del data[: t.nbytes]
        most = max(1.0, float(t.abs().max()))
        torch.testing.assert_close(found, t, rtol=limit, atol=limit * most)
    assert not data


def test_integers(tmp_path: Path) -> None:
    function = parse(INTEGERS)
    shapes = [p.value.type.static_shape for p in function.params]
    given = [torch.randint(-128, 128, shape, dtype=torch.int8) for shape in shapes]
    data = bytearray(emulated(lower(function), given, tmp_path))
    found = torch.frombuffer(data[sum(t.nbytes for t in given) :], dtype=torch.int32)
    assert torch.equal(found.reshape(37, 40), given[0].int() @ given[1].int().t())
