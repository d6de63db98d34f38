"""Matrix products, convolutions and attention: the ops that take the floating-point work."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..function import Op, Value
from ..opdef import Cost, FactorMap, Kind, OpDef
from ..types import Dim, TensorType
from .aten import bytes_moved, define
from .factors import Dims, einsum, keep_whole


def _sizes(op: Op, spec: str) -> dict[str, int]:
    parts = spec.split("->")[0].split(",")
    pairs = zip(parts, op.inputs, strict=True)
    return {f: n for dims, v in pairs for f, n in zip(dims, v.type.static_shape, strict=True)}


def contraction(name: str, spec: str, *, core: bool = True, doc: str = "") -> OpDef:
    """An op whose meaning is one einsum: two operations a multiply-add."""

    def cost(op: Op) -> Cost:
        return Cost(2 * math.prod(_sizes(op, spec).values()), bytes_moved(op))

    return define(
        name, Kind.CONTRACTION, cost=cost, factors=lambda op: einsum(op, spec), core=core, doc=doc
    )


def biased_contraction(name: str, spec: str, *, doc: str) -> OpDef:
    """beta * bias + alpha * einsum; the bias broadcasts to the result.

    The summed factor has no sharding rule: each part would add the bias once more.
    """

    def cost(op: Op) -> Cost:
        lhs = spec.split("->")[0].split(",")
        shapes = zip(lhs, op.inputs[1:], strict=True)
        sizes = {f: n for dims, v in shapes for f, n in zip(dims, v.type.static_shape, strict=True)}
        return Cost(2 * math.prod(sizes.values()), bytes_moved(op))

    def factors(op: Op) -> FactorMap:
        lhs, rhs = spec.split("->")
        out = op.results[0].type.shape
        bias = op.inputs[0].type.shape
        offset = len(out) - len(bias)
        bias_dims = tuple(
            rhs[offset + i] if d == out[offset + i] else None for i, d in enumerate(bias)
        )
        kept = set(rhs)
        sides = (tuple(f if f in kept else None for f in dims) for dims in lhs.split(","))
        return FactorMap((bias_dims, *sides), (tuple(rhs),))

    return define(name, Kind.CONTRACTION, cost=cost, factors=factors, core=True, doc=doc)


def convolution_cost(op: Op) -> Cost:
    """Two operations for each output element, input channel of its group and kernel tap."""
    weight, out = op.inputs[1].type.static_shape, op.results[0].type.numel
    if op.attr("transposed"):
        out = op.inputs[0].type.numel
    return Cost(2 * out * math.prod(weight[1:]), bytes_moved(op))


def convolution_backward_cost(op: Op) -> Cost:
    """As much as the forward product for each of the two products asked for."""
    grad, x, weight = (v.type for v in op.inputs[:3])
    driver = x.numel if op.attr("transposed") else grad.numel
    products = sum(bool(wanted) for wanted in op.attr("output_mask")[:2])
    return Cost(2 * driver * math.prod(weight.static_shape[1:]) * products, bytes_moved(op))


def convolution_factors(op: Op) -> FactorMap:
    """The batch is free; in one group output channels too, and input channels are summed."""
    x, weight, *bias = (v.type for v in op.inputs)
    batch = "n" if x.rank == weight.rank else None
    out, summed = ("o", "i") if op.attr("groups") == 1 else (None, None)
    if bias:
        summed = None  # each part would add the bias once more
    spatial = (None,) * (weight.rank - 2)
    w: Dims = (summed, out, *spatial) if op.attr("transposed") else (out, summed, *spatial)
    lead = (batch,) if x.rank == weight.rank else ()
    reduce = {summed: "sum"} if summed else {}
    operands = ((*lead, summed, *spatial), w, *((out,) for _ in bias))
    return FactorMap(operands, ((*lead, out, *spatial),), reduce)


def convolution_backward_factors(op: Op) -> FactorMap:
    """(grad, x, weight) -> (dx, dweight, dbias): the batch is summed in both latter."""
    weight = op.inputs[2].type
    if op.inputs[0].type.rank != weight.rank:
        return keep_whole(op)
    out, into = ("o", "i") if op.attr("groups") == 1 else (None, None)
    spatial = (None,) * (weight.rank - 2)
    w: Dims = (into, out, *spatial) if op.attr("transposed") else (out, into, *spatial)
    x: Dims = ("n", into, *spatial)
    wanted = op.attr("output_mask")
    if wanted[2]:
        into = None  # the bias's gradient would be computed in each part
        x, w = ("n", None, *spatial), tuple(None if f == "i" else f for f in w)
    results = [dims for dims, kept in zip((x, w, (out,)), wanted, strict=True) if kept]
    carried = {f for dims in results for f in dims}
    reduce = {f: "sum" for f in ("n", out) if f and (f != "o" or wanted[0] or f not in carried)}
    return FactorMap((("n", out, *spatial), x, w), tuple(results), reduce)


def attention_cost(of_keys: int, of_values: int) -> Callable[[Op], Cost]:
    """Matrix products of queries x keys x size, causal ones without later keys.

    So many of the size of keys, and so many of that of values.
    """

    def cost(op: Op) -> Cost:
        query, key = query_key(op)
        *batch, q_len, head = query.type.static_shape
        k_len = key.type.static_shape[-2]
        value = op.inputs[op.opdef.operand_names.index("value")].type.static_shape[-1]
        seen = min(q_len, k_len)
        later = seen * (seen - 1) // 2 + (k_len - seen) * q_len
        pairs = q_len * k_len - (later if op.attrs.get("is_causal", False) else 0)
        sizes = of_keys * head + of_values * value
        return Cost(2 * math.prod(batch) * pairs * sizes, bytes_moved(op))

    return cost


def query_key(op: Op) -> tuple[Value, Value]:
    """The queries and keys of attention or of its gradients."""
    first = op.opdef.operand_names.index("query")
    return op.inputs[first], op.inputs[first + 1]


def attention_factors(op: Op) -> FactorMap:
    """[batch, heads, length, size]: batch and heads are free where every operand has both.

    Heads that share keys and values are not: a part of them has its own part of the fewer heads.
    Queries are free of each other, unless which keys they see depends on their position. Gradients
    of keys and values are sums over them.
    """
    if any(v.type.rank not in (2, 3, 4) for v in op.inputs) or op.inputs[0].type.rank != 4:
        return keep_whole(op)
    batch, heads = op.inputs[0].type.shape[:2]
    query, key = query_key(op)
    shared = key.type.shape[1] != heads
    backward = op.opdef.operand_names[0] != "query"
    free_queries = not op.attr("is_causal")

    def of(v: Value, queries: bool) -> Dims:
        if v.type.rank == 2:  # a mask of queries and keys
            return ("q" if free_queries and v.type.shape[0] == query.type.shape[2] else None, None)
        free = (v.type.shape[0] == batch, v.type.shape[1] == heads and not shared)
        length = v.type.shape[2] == query.type.shape[2]
        rest = ("q" if queries and length and free_queries else None, *(None,) * (v.type.rank - 3))
        return ("b" if free[0] else None, "h" if free[1] else None, *rest)

    names = (n for n, o in zip(op.opdef.operand_names, op.operands, strict=True) if o is not None)
    operands = tuple(
        of(v, n not in ("key", "value")) for v, n in zip(op.inputs, names, strict=True)
    )
    results = tuple(of(v, not (backward and i)) for i, v in enumerate(op.results))
    return FactorMap(operands, results, {"q": "sum"} if backward and free_queries else {})


def infer_grouped_mm(op: Op) -> tuple[TensorType, ...]:
    """PyTorch's own rule refuses fp32 and fp64, which its CPU kernel takes."""
    x, y = op.inputs[:2]
    a, b = x.type.shape, y.type.shape
    if x.type.rank == 2 and y.type.rank == 2:
        shape: tuple[Dim, ...] = (op.inputs[2].type.shape[0], a[0], b[1])
    elif y.type.rank == 2:
        shape = (a[1], b[1])
    else:
        shape = (*a[:-1], b[-1])
    return (TensorType(op.attrs["out_dtype"] or x.type.dtype, shape),)


def grouped_mm_cost(op: Op) -> Cost:
    """Two FLOPs an element of the longer operand and column of the other: no row counts twice."""
    x, y = op.inputs[:2]
    columns = y.type.static_shape[-1]
    return Cost(2 * x.type.numel * columns, bytes_moved(op))


def addr_factors(op: Op) -> FactorMap:
    """beta * bias + alpha * outer product: rows and columns are free."""
    out, bias = op.results[0].type.shape, op.inputs[0].type.shape
    names: Dims = ("m", "n")
    offset = 2 - len(bias)
    dims = tuple(names[offset + i] if d == out[offset + i] else None for i, d in enumerate(bias))
    return FactorMap((dims, ("m",), ("n",)), (names,))


def distance_factors(op: Op) -> FactorMap:
    """Distances of rows [..., m, d] to rows [..., n, d]: each pair by itself."""
    a, b = (v.type.shape for v in op.inputs[:2])
    if a[:-2] != b[:-2]:
        return keep_whole(op)
    lead = tuple(f"d{i}" for i in range(len(a) - 2))
    return FactorMap(((*lead, "m", None), (*lead, "n", None)), ((*lead, "m", "n"),))


OPS: tuple[OpDef, ...] = (
    contraction("aten.mm.default", "mk,kn->mn", doc="The product of two matrices."),
    contraction("aten.bmm.default", "bmk,bkn->bmn", doc="The products of two batches of matrices."),
    contraction(
        "aten._int_mm.default",
        "mk,kn->mn",
        core=False,
        doc="The product of two matrices of int8, in int32.",
    ),
    contraction("aten.dot.default", "k,k->", doc="The sum of the products of two vectors."),
    contraction("aten.mv.default", "mk,k->m", doc="The product of a matrix and a vector."),
    biased_contraction(
        "aten.addmm.default",
        "mk,kn->mn",
        doc="beta * bias + alpha * (the product of two matrices).",
    ),
    biased_contraction(
        "aten.baddbmm.default",
        "bmk,bkn->bmn",
        doc="beta * bias + alpha * (the products of two batches of matrices).",
    ),
    biased_contraction(
        "aten.addmv.default",
        "mk,k->m",
        doc="beta * bias + alpha * (the product of a matrix and a vector).",
    ),
    contraction("aten.vdot.default", "k,k->", core=False),
    define("aten.addr.default", Kind.CONTRACTION, factors=addr_factors),
    define("aten._cdist_forward.default", Kind.CONTRACTION, factors=distance_factors),
    define(
        "aten.convolution.default",
        Kind.CONTRACTION,
        cost=convolution_cost,
        factors=convolution_factors,
        core=True,
        doc="Convolution or transposed convolution over one to three dimensions, with groups.",
    ),
    define(
        "aten.convolution_backward.default",
        Kind.CONTRACTION,
        cost=convolution_backward_cost,
        factors=convolution_backward_factors,
        core=True,
        doc="Gradients of a convolution for its input, weight and bias.",
    ),
    define(
        "aten._scaled_dot_product_flash_attention_for_cpu.default",
        Kind.CONTRACTION,
        cost=attention_cost(1, 1),
        factors=attention_factors,
    ),
    define(
        "aten._scaled_dot_product_flash_attention_for_cpu_backward.default",
        Kind.CONTRACTION,
        cost=attention_cost(3, 2),
        factors=attention_factors,
    ),
    define(
        "aten._grouped_mm.default",
        Kind.CONTRACTION,
        infer=infer_grouped_mm,
        cost=grouped_mm_cost,
        doc="One product a group of rows; `offs` says where each group ends.",
    ),
)
