"""Every pass does work linear in the number of ops; benchmarks/pass_scaling.py has the times."""

import cProfile

import torch

from shoestring.ir import Builder, Function, Loc, Phase, Role, TensorType, Value
from shoestring.passes import Pipeline, default_pipeline

F32 = TensorType(torch.float32, (64, 64))


def layered(layers: int) -> Function:
    """A training step of `layers` layers with about 50 ops each, without running the inference."""
    b = Builder("step", "v")
    x = b.param(F32, Role.BATCH, "x")
    weights = [b.param(F32, Role.PARAMETER, f"layers.{i}.weight") for i in range(layers)]
    saved: list[tuple[Value, Value, Value]] = []
    forward, backward, update = Loc(), Loc(phase=Phase.BACKWARD), Loc(phase=Phase.UPDATE)
    emit = quick_emit(b)
    for w in weights:
        t = emit("aten.t.default", w, loc=forward)
        y = z = emit("aten.mm.default", x, t, loc=forward)
        for _ in range(4):
            y = emit("aten.mul.Scalar", y, other=0.5, loc=forward)
            y = emit("aten.tanh.default", emit("aten.add.Tensor", y, z, loc=forward), loc=forward)
            y = emit("aten.mul.Tensor", y, 1.0, loc=forward)
        saved.append((x, z, y))
        x = emit("aten.add.Tensor", x, y, loc=forward)
    b.output("loss", emit("aten.mul.Tensor", x, 2.0, loc=forward))
    g = emit("aten.ones_like.default", x, loc=backward)
    for w, (x, z, y) in zip(reversed(weights), reversed(saved), strict=True):
        for _ in range(4):
            square = emit("aten.mul.Tensor", y, y, loc=backward)
            slope = emit("aten.rsub.Scalar", square, other=1, loc=backward)
            g = emit(
                "aten.mul.Tensor", emit("aten.clone.default", g, loc=backward), slope, loc=backward
            )
            g = emit("aten.mul.Tensor", g, z, loc=backward)
        dw = emit("aten.mm.default", emit("aten.t.default", g, loc=backward), x, loc=backward)
        g = emit("aten.mm.default", g, w, loc=backward)
        new = w
        for _ in range(4):
            new = emit(
                "aten.sub.Tensor", new, emit("aten.mul.Tensor", dw, 0.1, loc=update), loc=update
            )
        b.replace_state(w, new)
    return b.build()


def quick_emit(b: Builder):  # type: ignore[no-untyped-def]
    """`Builder.emit` for ops of one type only: no inference."""
    from shoestring.ir import Op, make_op

    def emit(name: str, *operands: object, loc: Loc, **attrs: object) -> Value:
        op = make_op(name, operands, attrs, loc)  # type: ignore[arg-type]
        result = b.fresh(F32)
        b.ops.append(Op(op.opdef, op.operands, op.attrs, (result,), loc))
        return result

    return emit


def calls(function: Function) -> int:
    """How many function calls the whole pipeline makes: work, whatever else the machine does."""
    profile = cProfile.Profile()
    profile.runcall(Pipeline(default_pipeline(keep=frozenset())).run, function)
    return sum(entry.callcount for entry in profile.getstats())


def test_work_grows_linearly() -> None:
    calls(layered(2))  # fills the caches of inference and decomposition
    small, large = calls(layered(10)), calls(layered(80))
    assert large < 10 * small, "eight times the operations, so about eight times the work"
