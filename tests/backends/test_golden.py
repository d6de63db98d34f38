"""The text of one emitted kernel. `UPDATE_GOLDEN=1` or `--update-golden` writes it anew."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shoestring.backends.c.lower import lower
from shoestring.ir import parse

GOLDEN = Path(__file__).with_name("golden")
FUNCTION = """
func @rows {
  parameter %scale: f32[768] "norm.weight"
  batch %x: f32[64,768] "batch.0"
  %top: f32[64,1] = aten.amax.default(%x) {dim=[1], keepdim=true} loc("m.py":12 "attn" forward)
  %d: f32[64,768] = aten.sub.Tensor(%x, %top) loc("m.py":12 "attn" forward)
  %e: f32[64,768] = aten.exp.default(%d) loc("m.py":12 "attn" forward)
  %s: f32[64,1] = aten.sum.dim_IntList(%e) {dim=[1], keepdim=true} loc("m.py":12 "attn" forward)
  %y: f32[64,768] = aten.div.Tensor(%e, %s) loc("m.py":12 "attn" forward)
  %z: f32[64,768] = aten.mul.Tensor(%y, %scale) loc("m.py":13 "norm" forward)
  return z=%z
}
"""


def test_emitted_kernel(request: pytest.FixtureRequest) -> None:
    (source,) = lower(parse(FUNCTION)).sources
    path = GOLDEN / "softmax.c"
    update = request.config.getoption("--update-golden", default=False)
    if update or os.environ.get("UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
    assert source == path.read_text()


def test_lowering_is_deterministic() -> None:
    assert lower(parse(FUNCTION)).sources == lower(parse(FUNCTION)).sources
