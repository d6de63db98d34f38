"""Running instruction by instruction."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import shoestring as ss
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


def test_a_wrong_instruction_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = executable()
    call = compiled.call

    def wrong(index: int) -> None:
        call(index)
        for region in compiled.instructions[index].results.values():
            compiled.tensor(region).mul_(1.1)

    monkeypatch.setattr(compiled, "call", wrong)
    with pytest.raises(RuntimeFault, match=r"SS5003(.|\n)*kernel k0_mm_exp"):
        check(compiled, [torch.randn(4, 4)])


@pytest.mark.parametrize("factor", [1.0, 1.01])
def test_a_step_of_rounding_is_not_off(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a bias of keys is zero, and Adam makes a whole step of what is left of it."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(16, 2, batch_first=True)
    batch = (torch.randn(4, 70, 16),)

    def squares(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = m(x, x, x)[0].square().mean()
        return out

    step = ss.compile(model, squares, torch.optim.Adam(model.parameters(), lr=0.1), batch)
    program = step.program(batch)
    compiled = program.executable
    assert isinstance(compiled, CExecutable)
    call = compiled.call

    def scaled(index: int) -> None:
        call(index)
        if index == len(compiled.instructions) - 1:
            for region in compiled.instructions[index].results.values():
                compiled.tensor(region).mul_(factor)

    monkeypatch.setattr(compiled, "call", scaled)
    found = find_mismatches(compiled, step.bind(program.captured, list(batch)))
    assert bool(found) == (factor != 1)
