"""Running instruction by instruction."""

from __future__ import annotations

import pytest
import torch

from shoestring.backends.c import CBackend, CExecutable
from shoestring.ir import Builder, Role, parse_type
from shoestring.ir.errors import RuntimeFault
from shoestring.runtime.executor import Executor, Timing, check, find_mismatches


def executable() -> CExecutable:
    b = Builder("f")
    w = b.param(parse_type("f32[4,4]"), Role.PARAMETER, "w")
    y = b.emit("aten.exp.default", b.emit("aten.mm.default", w, w))
    b.output("y", y)
    b.replace_state(w, b.emit("aten.mul.Tensor", w, 0.5))
    return CBackend().compile(b.build())


def test_timings_and_the_same_results() -> None:
    compiled, seen = executable(), list[Timing]()
    w = torch.randn(4, 4)
    one, two = w.clone(), w.clone()
    found = Executor(compiled, seen.append).run([one])
    wanted = Executor(compiled).run([two])
    assert torch.equal(found[0], wanted[0]) and torch.equal(one, two)
    assert len(seen) == len(compiled.instructions)
    assert all(t.seconds > 0 for t in seen)


def test_a_right_step_has_no_mismatches() -> None:
    assert find_mismatches(executable(), [torch.randn(4, 4)]) == []


def test_a_wrong_instruction_is_named() -> None:
    compiled = executable()
    with pytest.raises(RuntimeFault, match=r"SS5003(.|\n)*kernel k0_mm_exp"):
        check(compiled, [torch.randn(4, 4)], tolerance=-1.0)
