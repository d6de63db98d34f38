"""State in place: updates, swaps, aliasing and unusual arguments."""

from __future__ import annotations

import os

import pytest
import torch

from shoestring.backends.c import CBackend
from shoestring.ir import Builder, Function, Role, Value, parse_type
from shoestring.ir.errors import RuntimeFault

from .helpers import compare, copies


def parameter(b: Builder, name: str, text: str = "f32[4,6]", role: Role = Role.PARAMETER) -> Value:
    return b.param(parse_type(text), role, name)


def update() -> Function:
    """A gradient step with momentum, and an output that reads the old parameter."""
    b = Builder("update")
    w, m, x = (
        parameter(b, "w"),
        parameter(b, "w#m", role=Role.MOMENT),
        b.param(parse_type("f32[6]"), Role.BATCH, "x"),
    )
    lr = b.param(parse_type("f64[]"), Role.HYPER, "lr")
    b.output("y", b.emit("aten.mv.default", w, x))
    grad = b.emit("aten.mul.Tensor", w, x)
    new_m = b.emit("aten.add.Tensor", b.emit("aten.mul.Tensor", m, 0.9), grad)
    b.replace_state(m, new_m)
    b.replace_state(w, b.emit("aten.sub.Tensor", w, b.emit("aten.mul.Tensor", new_m, lr)))
    return b.build()


def arguments() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [
        torch.randn(4, 6),
        torch.randn(4, 6),
        torch.randn(6),
        torch.tensor(0.1, dtype=torch.float64),
    ]


def test_update_is_one_kernel_in_place() -> None:
    executable = compare(update(), arguments(), rtol=1e-5)
    assert not executable.program.copies
    assert len([i for i in executable.instructions if i.name.startswith("k")]) == 1


def test_storage_stays_where_it_is() -> None:
    given = arguments()
    pointers = [t.data_ptr() for t in given]
    CBackend().compile(update()).run(given)
    assert [t.data_ptr() for t in given] == pointers


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_and_its_parent_step_on() -> None:
    """Memory between ops is each one's own: neither sees what the other writes."""
    b = Builder("f")
    x = b.param(parse_type("f32[700,900]"), Role.BATCH, "x")
    product = b.emit("aten.mm.default", x, b.emit("aten.t.default", x))
    b.output("y", b.emit("aten.mm.default", product, x))
    given, other = torch.randn(700, 900), torch.randn(700, 900)
    executable = CBackend().compile(b.build())
    (wanted,) = executable.run([given])
    child = os.fork()
    if child == 0:
        good = torch.equal(executable.run([given])[0], wanted)
        executable.run([other])
        os._exit(0 if good else 1)
    (found,) = executable.run([given])
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(found, wanted)
    assert torch.equal(executable.run([given])[0], wanted)


def test_swap_and_rotation() -> None:
    b = Builder("swap")
    names = [parameter(b, n) for n in "abcde"]
    for old, new in zip(names, [names[1], names[0], names[3], names[4], names[2]], strict=True):
        b.replace_state(old, new)
    compare(b.build(), [torch.randn(4, 6) for _ in names], runs=3)


def test_next_values_that_are_views_inputs_and_shared() -> None:
    b = Builder("odd")
    a, c, d = (
        parameter(b, "a", "f32[5,5]"),
        parameter(b, "c", "f32[5,5]"),
        parameter(b, "d", "f32[5,5]"),
    )
    x = b.param(parse_type("f32[5,5]"), Role.BATCH, "x")
    e = b.emit("aten.exp.default", a)
    b.replace_state(a, b.emit("aten.t.default", a))
    b.replace_state(c, e)
    b.replace_state(d, e)
    b.output("a", a)
    b.output("view", b.emit("aten.select.int", c, dim=0, index=1))
    b.output("x", x)
    compare(b.build(), [torch.randn(5, 5) for _ in range(4)])


def test_a_reader_that_needs_the_new_and_the_old_value() -> None:
    b = Builder("both")
    w = parameter(b, "w", "f32[5,5]")
    new = b.emit("aten.mm.default", w, w)
    b.output("change", b.emit("aten.sub.Tensor", b.emit("aten.mm.default", new, w), w))
    b.replace_state(w, new)
    executable = compare(b.build(), [torch.randn(5, 5)], rtol=1e-4, atol=1e-4)
    assert len(executable.program.copies) == 1


def test_reduction_of_old_state_then_update() -> None:
    b = Builder("normed")
    w = parameter(b, "w", "f32[7,9]")
    norm = b.emit(
        "aten.sum.dim_IntList", b.emit("aten.mul.Tensor", w, w), dim=(1,), keepdim=True, dtype=None
    )
    b.replace_state(w, b.emit("aten.div.Tensor", w, b.emit("aten.sqrt.default", norm)))
    v = parameter(b, "v", "f32[7,9]")
    total = b.emit("aten.sum.default", v, dtype=None)
    b.replace_state(v, b.emit("aten.sub.Tensor", v, total))
    compare(b.build(), [torch.randn(7, 9), torch.randn(7, 9)], rtol=1e-5)


def test_arguments_of_any_layout() -> None:
    w, m, x, lr = arguments()
    strange = [w.t().contiguous().t(), torch.randn(4, 12)[:, ::2], x.flip(0)[::1], lr]
    compare(update(), strange, rtol=1e-5)
    compare(update(), [w, m, torch.randn(1).expand(6), lr], rtol=1e-5)


def test_arguments_that_share_storage() -> None:
    function = update()
    shared, (_, _, x, lr) = torch.randn(9, 6), arguments()
    theirs = shared.clone()
    reference_w, reference_m = theirs[0:4].clone(), theirs[2:6].clone()
    CBackend().compile(function).run([shared[0:4], shared[2:6], x, lr])
    # As if each argument had its own storage, written back in the order of the parameters.
    CBackend().compile(function).run([reference_w, reference_m, x, lr])
    theirs[0:4] = reference_w
    theirs[2:6] = reference_m
    torch.testing.assert_close(shared, theirs)


def test_new_arguments_are_bound_anew() -> None:
    executable = CBackend().compile(update())
    first, second = arguments(), [t * 2 for t in arguments()]
    executable.run(copies(first))
    (y,) = executable.run(second)
    torch.testing.assert_close(y, arguments()[0].mul(2) @ second[2])


def test_outputs_outlive_the_next_call() -> None:
    executable = CBackend().compile(update())
    given = arguments()
    (y,) = executable.run(given)
    kept = y.clone()
    executable.run(given)
    assert torch.equal(y, kept)


def test_wrong_arguments_are_refused() -> None:
    executable = CBackend().compile(update())
    given = arguments()
    with pytest.raises(RuntimeFault, match="SS5001"):
        executable.run(given[:-1])
    with pytest.raises(RuntimeFault, match=r"SS5002.*parameter 'w' was compiled as f32\[4,6\]"):
        executable.run([given[0].double(), *given[1:]])
    with pytest.raises(RuntimeFault, match="SS5002"):
        executable.run([given[0][:3], *given[1:]])
