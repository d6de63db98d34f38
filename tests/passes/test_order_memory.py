"""The order with the least peak, by a model that is checked against brute force."""

import hypothesis.strategies as st
from hypothesis import given, settings

from shoestring.ir import Builder, Function, Loc, Phase, Role, TensorType, Value, parse_type, verify
from shoestring.passes.liveness import measure, size_of, storage_roots
from shoestring.passes.order_memory import OrderMemory


@st.composite
def functions(draw: st.DrawFn) -> Function:
    """Random programs of views, sums and products."""
    b = Builder("f", "v")
    w = b.param(parse_type("f32[4]"), Role.PARAMETER, "w")
    values: list[Value] = [w, b.param(parse_type("f32[4]"), Role.BATCH, "x")]
    for _ in range(draw(st.integers(1, 12))):
        x = draw(st.sampled_from(values))
        loc = Loc(phase=draw(st.sampled_from([Phase.BACKWARD, Phase.UPDATE])))
        kind = draw(st.integers(0, 3))
        if kind == 0:
            values.append(b.emit("aten.exp.default", x, loc=loc))
        elif kind == 1:
            values.append(b.emit("aten.view.default", x, size=(x.type.numel,), loc=loc))
        elif kind == 2:
            values.append(b.emit("aten.mul.Tensor", x, draw(st.sampled_from(values[:2])), loc=loc))
        else:
            values.append(b.emit("aten.full.default", size=(4,), fill_value=1.0, loc=loc))
    b.output("y", values[-1])
    if values[-2].type == w.type and len(values) > 3:
        b.replace_state(w, values[-2])
    return b.build()


def brute_force_peak(f: Function) -> int:
    """The most bytes alive at any op, straight from the definition."""
    roots = storage_roots(f)
    params = {p.value for p in f.params}
    return max(
        (sum(map(bytes_of, alive(f, roots, params, i))) for i in range(len(f.ops))), default=0
    )


def bytes_of(v: Value) -> int:
    return size_of(TensorType(v.type.dtype, v.type.shape))


def alive(f: Function, roots: dict[Value, Value], params: set[Value], now: int) -> set[Value]:
    made = {roots[r] for op in f.ops[: now + 1] for r in op.results if roots[r] is r}
    later = {roots[v] for op in f.ops[now:] for v in (*op.inputs, *op.results)}
    later |= {roots[v] for v in f.results}
    return {v for v in made & later if v not in params and not in_place(f, roots, v)}


def in_place(f: Function, roots: dict[Value, Value], v: Value) -> bool:
    """Whether a value takes the storage of the parameter that it replaces."""
    for p in f.params:
        if p.next is v and p.value not in {roots[o.value] for o in f.outputs}:
            made = next(i for i, op in enumerate(f.ops) if v in op.results)
            return all(roots[x] is not p.value for op in f.ops[made + 1 :] for x in op.inputs)
    return False


@settings(max_examples=60, deadline=None)
@given(functions())
def test_model_and_order(f: Function) -> None:
    assert measure(f).peak == brute_force_peak(f)
    g, report = OrderMemory().run(f)
    verify(g, types=False)
    assert set(g.ops) == set(f.ops)
    assert measure(g).peak <= measure(f).peak
    assert report.changed == 0 or measure(g).peak < measure(f).peak
