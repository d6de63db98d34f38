"""Results in the place of what they are made from."""

import pytest
import torch

from shoestring.backends.c import CExecutable
from shoestring.ir import Function, parse

from .helpers import compare


def check(f: Function) -> CExecutable:
    torch.manual_seed(0)
    arguments = [torch.randn(p.value.type.static_shape) / 8 for p in f.params]
    return compare(f, arguments, rtol=1e-4, atol=1e-4)


def program(body: str, returned: str = "%y") -> Function:
    """A product %a of 64 x 64 numbers; `body` follows, a product of %e ends it."""
    return parse(f"""
func @f {{
  batch %x: f32[64,64] "x"
  %a: f32[64,64] = aten.mm.default(%x, %x)
  %b: f32[64,64] = aten.mm.default(%a, %a)
{body}
  %y: f32[64,64] = aten.mm.default(%e, %e)
  return y={returned}
}}
""")


SIZE = 64 * 64 * 4


def places(executable: CExecutable) -> int:
    """Buffers of the arena that hold matrices."""
    return sum(b.nbytes == SIZE and b.space.value == "arena" for b in executable.program.buffers)


def test_elements_of_one_position() -> None:
    """%a is read by the softmax-like kernel only: its result goes there."""
    executable = check(
        program("""
  %m: f32[64,1] = aten.amax.default(%a) {dim=[1], keepdim=true}
  %d: f32[64,64] = aten.sub.Tensor(%a, %m)
  %s: f32[64,1] = aten.sum.dim_IntList(%d) {dim=[1], keepdim=true}
  %c: f32[64,64] = aten.div.Tensor(%d, %s)
  %e: f32[64,64] = aten.add.Tensor(%c, %a)""")
    )
    assert places(executable) == 2  # a and e, y; nobody reads b


@pytest.mark.parametrize(
    "body",
    [
        "%e: f32[64,64] = aten.add.Tensor(%a, %b)\n",
        "%t: f32[64,64] = aten.permute.default(%a) {dims=[1, 0]}\n"
        "%u: f32[64,64] = aten.exp.default(%t)\n%e: f32[64,64] = aten.mul.Tensor(%u, 2.0)",
        "%t: f32[64,64] = aten.permute.default(%b) {dims=[1, 0]}\n"
        "%u: f32[64,64] = aten.sigmoid.default(%t)\n%e: f32[64,64] = aten.mul.Tensor(%u, %b)",
        "%s: f32[64] = aten.sum.dim_IntList(%b) {dim=[0]}\n"
        "%u: f32[64,64] = aten.sigmoid.default(%b)\n%e: f32[64,64] = aten.mul.Tensor(%u, %s)",
        "%s: f32[] = aten.sum.default(%b)\n%u: f32[64,64] = aten.sigmoid.default(%b)\n"
        "%e: f32[64,64] = aten.mul.Tensor(%u, %s)",
        "%s: f32[64,1] = aten.sum.dim_IntList(%b) {dim=[1], keepdim=true}\n"
        "%u: f32[64,64] = aten.sigmoid.default(%b)\n%v: f32[64,64] = aten.mul.Tensor(%u, %s)\n"
        "%w: f32[64,1] = aten.amax.default(%v) {dim=[1], keepdim=true}\n"
        "%e: f32[64,64] = aten.sub.Tensor(%b, %w)",
        "%h: f32[32,64] = aten.slice.Tensor(%b) {start=32, end=64}\n"
        "%l: f32[32,64] = aten.slice.Tensor(%b) {start=0, end=32}\n"
        "%u: f32[64,64] = aten.cat.default([%h, %l])\n%e: f32[64,64] = aten.exp.default(%u)",
        "%v: f32[4096] = aten.view.default(%b) {size=[4096]}\n"
        "%u: f32[4096] = aten.neg.default(%v)\n%e: f32[64,64] = aten.view.default(%u) "
        "{size=[64, 64]}",
        "%c: f32[64,64] = aten.mm.default(%a, %b)\n%u: f32[64,64] = aten.mul.Tensor(%c, %b)\n"
        "%e: f32[64,64] = aten.tanh.default(%u)",
        "%c: f32[64,64] = aten.mm.default(%b, %x)\n%u: f32[64,64] = aten.mul.Tensor(%c, %a)\n"
        "%e: f32[64,64] = aten.tanh.default(%u)",
        "%i: i32[64,64] = aten._to_copy.default(%b) {dtype=i32}\n"
        "%e: f32[64,64] = aten._to_copy.default(%i) {dtype=f32}",
        "%g: f32[64,64] = aten.gt.Scalar(%b) {other=0.0}\n%e: f32[64,64] = aten.mul.Tensor(%b, %a)",
    ],
)
def test_values_are_right(body: str) -> None:
    check(program(body.replace("%g: f32[64,64]", "%g: bool[64,64]")))


def test_what_is_returned_stays() -> None:
    executable = check(program("%e: f32[64,64] = aten.exp.default(%b)", "%y, b=%b"))
    assert places(executable) == 4


def test_two_results_of_one_operand_take_two_places() -> None:
    check(
        program("""
  %c: f32[64,64] = aten.exp.default(%b)
  %d: f32[64,64] = aten.neg.default(%b)
  %f: f32[64,64] = aten.mm.default(%c, %d)
  %e: f32[64,64] = aten.mm.default(%d, %f)""")
    )


def test_a_chain_of_places() -> None:
    """Each kernel writes over what the one before it wrote; products come between them."""
    executable = check(
        program("""
  %c: f32[64,64] = aten.sub.Tensor(%a, %b)
  %p: f32[64,64] = aten.mm.default(%c, %x)
  %d: f32[64,64] = aten.mul.Tensor(%c, %p)
  %q: f32[64,64] = aten.mm.default(%d, %x)
  %n: f32[64,1] = aten.amax.default(%q) {dim=[1], keepdim=true}
  %e: f32[64,64] = aten.add.Tensor(%d, %n)""")
    )
    assert places(executable) <= 5
