"""Layers of recurrent networks, and their gradients, as loops over steps in C.

A step is one product with what the step before left, by gemm.c, and one pass over the states, which
threads share. The weights are packed once for all steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch

from shoestring.ir import Op, operand_values
from shoestring.ir.ops.recurrence import TANH

from ..memory import aligned
from .claims import Claim, comment_of, fork
from .expressions import MEMORY, load, rounded, store
from .layout import Layout, row_major
from .nodes import Base, Node, Ref
from .packing import packed_room
from .product_kernels import PARAMETERS
from .products import FACTORS
from .room import FLOAT, Extent, this_machine, thread_bytes
from .sides import Sides, side_of

LAYERS = {
    f"recurrence.{name}.default": what
    for name, what in (
        ("lstm", "a layer of an LSTM"),
        ("gru", "a layer of a GRU"),
        ("rnn", "a recurrent layer"),
    )
}
GRADIENTS = {
    name.replace(".default", "_backward.default"): f"gradients of {what}"
    for name, what in LAYERS.items()
}
NAMES = {**LAYERS, **GRADIENTS}
# Op -> the result that may be written over an operand: a step reads it where it writes.
OVERWRITES = {
    "recurrence.lstm.default": (2, "input"),
    "recurrence.gru.default": (1, "input"),
    "recurrence.lstm_backward.default": (0, "gates"),
    "recurrence.gru_backward.default": (0, "gates"),
    "recurrence.rnn_backward.default": (0, "grad_h"),
}
OF_LSTM, OF_GRU = ("i", "f", "g", "o"), ("reset", "update", "fresh")  # names of gates
TYPES = (torch.float32, torch.bfloat16)
PARALLEL = 1 << 11  # elements of a state below which one thread is faster


def takes(op: Op) -> bool:
    """Whether there is a kernel for a layer or its gradient."""
    types = [v.type for v in (*operand_values(op.operands), *op.results)]
    return all(t.dtype in TYPES and t.numel for t in types)


def may_overwrite(node: Node, old: Base, new: Base) -> bool:
    """Whether a result takes the place of an operand that it is made from, element by element."""
    if node.op.name not in OVERWRITES:
        return False
    result, operand = OVERWRITES[node.op.name]
    read = node.operands[node.op.opdef.operand_names.index(operand)]
    if not isinstance(read, Ref) or read.base is not old or node.outs[result] is not new:
        return False
    only = sum(ref.base is old for ref in node.refs) == 1
    return only and read.layout == row_major(new.shape)


def claim(node: Node) -> Claim | str | None:
    """The kernel for a layer or its gradient, or why there is none."""
    if node.op.name not in NAMES:
        return None
    if not takes(node.op):
        return "no elements"
    return _layer(node) if node.op.name in LAYERS else _gradients(node)


@dataclass
class _Loops:
    """What all kernels have: operands and results by name, and sizes.

    Attributes:
        refs: in the order of pointers; results last.
        batch, width: of a state.
        steps: how many there are.
        wide: what a state gives or takes by the weight: a number of gates times the width.
    """

    node: Node
    refs: dict[str, Ref]
    results: tuple[str, ...]
    batch: int = field(init=False)
    steps: int = field(init=False)
    width: int = field(init=False)
    wide: int = field(init=False)

    def __post_init__(self) -> None:
        self.wide, self.width = self.refs["weight"].shape
        of_steps = self.refs["input" if "input" in self.refs else self.results[0]]
        self.steps, self.batch, _ = of_steps.shape

    def at(self, name: str, *place: str, gate: int = 0) -> str:
        """Element (place..., r, j) of an operand or a result, as a register."""
        return load(self._element(name, place, gate), self.refs[name].dtype)

    def sum(self, gate: int = 0) -> str:
        """What the product of a step gave, of a layer with the bias."""
        cols = self.width if self.node.op.name in GRADIENTS else self.wide
        return f"sums[r * {cols} + {gate * self.width} + j]" if gate else f"sums[r * {cols} + j]"

    @property
    def carry(self) -> str:
        """What else a gradient carries from step to step."""
        return f"carry[r * {self.width} + j]"

    def put(self, name: str, *place: str, value: str, gate: int = 0) -> str:
        """The statement that stores it."""
        dtype = self.refs[name].dtype
        return f"{self._element(name, place, gate)} = {store(rounded(value, dtype), dtype)};"

    def _element(self, name: str, place: Iterable[str], gate: int) -> str:
        column = f"({gate * self.width} + j)" if gate else "j"
        return f"{name}[{_index((*place, 'r', column), self.refs[name])}]"

    def declared(self) -> str:
        """The pointers."""
        lines = list[str]()
        for i, (name, ref) in enumerate(self.refs.items()):
            const = "" if name in self.results else "const "
            lines.append(f"    {const}{MEMORY[ref.dtype]} *{name} = b[{i}];")
        return "\n".join(lines)

    def each(self, statements: Iterable[str], indented: int = 4) -> str:
        """Statements for every element of a state, of which threads share the rows."""
        space = " " * indented
        text = "\n".join(f"{space}        {statement}" for statement in statements)
        forked = fork(self.batch * self.width, PARALLEL)
        return f"""\
{forked}{space}for (int64_t r = 0; r < {self.batch}; r++) {{
{space}    #pragma omp simd
{space}    for (int64_t j = 0; j < {self.width}; j++) {{
{text}
{space}    }}
{space}}}"""

    def over_steps(self, *parts: str) -> str:
        """The loop over steps as they are computed; step t leads from state `old` to `new`."""
        reverse = bool(self.node.op.attr("reverse"))
        old, new = ("t + 1", "t") if reverse else ("t", "t + 1")
        t = f"{self.steps - 1} - n" if reverse != (self.node.op.name in GRADIENTS) else "n"
        body = "\n".join(parts)
        return f"""\
    for (int64_t n = 0; n < {self.steps}; n++) {{
        const int64_t t = {t}, old = {old}, new = {new};
{body}
    }}"""

    def claim(self, stem: str, product: _Product, finish: str, body: str, scratch: int) -> Claim:
        """The kernel; `scratch` bytes are its own, before those of the product."""
        whole = f"""\
{product.shape}
{self.declared()}
    void *scratch = b[{len(self.refs)}];
{product.rooms(scratch)}
{body}"""
        what = NAMES[self.node.op.name]
        written = tuple(i for i, name in enumerate(self.refs) if name in self.results)
        return Claim(
            stem, comment_of(f"{what}, all steps", self.node), whole, tuple(self.refs.values()),
            written, scratch + product.nbytes, helper=finish,
        )  # fmt: skip


class _Product:
    """The product of a step: [batch, summed] that begin at an address, and packed weights."""

    def __init__(self, left: Layout, weight: Ref) -> None:
        self.left, self.weight = left, weight
        (self.rows, self.summed), self.cols = left.shape, weight.shape[1]
        sides = Sides(side_of(replace(weight, layout=left)), side_of(weight), self.summed)
        extent = Extent(1, self.rows, self.cols, packed=True)
        self.threads = torch.get_num_threads()
        self.packed = packed_room(weight.dtype, self.summed, self.cols)
        self.nbytes = self.packed + self.threads * thread_bytes(this_machine(), sides, extent)

    @property
    def shape(self) -> str:
        """Its `ss_gemm` as C."""
        (row, col), (b_row, b_col) = self.left.strides, self.weight.layout.strides
        kind = FACTORS[self.weight.dtype]
        return f"""\
    static const ss_gemm g = {{
        1, {self.rows}, {self.cols}, {self.summed}, {kind},  // matrices, rows, columns, summed
        0, {row}, {col},  // what the step before left
        0, {b_row}, {b_col},  // weights
        @_finish,
        .b_packed = 1,
    }};"""

    def rooms(self, first: int) -> str:
        """Packed weights, and what the product needs, in scratch."""
        room = first + self.packed
        return f"""\
    void *packed = (char *)scratch + {first}, *room = (char *)scratch + {room};
    ss_gemm_pack(&g, weight, packed);"""

    def run(self, left: str) -> str:
        """The call of one step."""
        return f"        ss_gemm_run(&g, {left}, packed, 0, given, room, {self.threads});"


def _finish(cols: int, plus: str, declared: str = "") -> str:
    """What stores a block of the product, in f32."""
    return f"""\
static void @_finish({PARAMETERS}) {{
{declared}    for (int64_t i = 0; i < rows; i++) {{
        float *restrict sums = (float *)b[0] + (r0 + i) * {cols} + c0;
        #pragma omp simd
        for (int64_t j = 0; j < cols; j++) sums[j] = tile[i * stride + j]{plus};
    }}
}}
"""


def _index(place: Iterable[str], ref: Ref) -> str:
    """Where an element is from the first one, as C."""
    pairs = zip(place, ref.layout.strides, strict=True)
    terms = (at if stride == 1 else f"{at} * {stride}" for at, stride in pairs if stride)
    return " + ".join(terms) or "0"


def _loops(node: Node, *results: str) -> _Loops:
    """Operands that are there and results, by name."""
    pairs = zip(node.op.opdef.operand_names, node.operands, strict=True)
    given = {name: ref for name, ref in pairs if isinstance(ref, Ref)}
    made = (Ref(out, row_major(out.shape)) for out in node.outs)
    return _Loops(node, given | dict(zip(results, made, strict=True)), results)


def _matrix(rows: int, cols: int) -> Layout:
    """One step of what lies in row-major order."""
    return Layout((rows, cols), (cols, 1))


# -- layers --------------------------------------------------------------------------------------


def _layer(node: Node) -> Claim:
    results, write = {
        "lstm": (("h", "c", "gates"), _lstm),
        "gru": (("h", "gates", "held"), _gru),
        "rnn": (("h",), _rnn),
    }[_kind(node)]
    return write(_loops(node, *results))


def _kind(node: Node) -> str:
    """`lstm`, `gru` or `rnn`."""
    return node.op.name.split(".")[1].removesuffix("_backward")


def _lstm(k: _Loops) -> Claim:
    value = {gate: f"ss_{'tanh' if gate == 'g' else 'sigmoid'}f" for gate in OF_LSTM}
    step = [
        *(f"const float {g} = {value[g]}({k.sum(n)} + {k.at('input', 't', gate=n)});"
          for n, g in enumerate(OF_LSTM)),
        f"const float cell = f * {k.at('c', 'old')} + i * g;",
        k.put("c", "new", value="cell"),
        k.put("h", "new", value="o * ss_tanhf(cell)"),
        *(k.put("gates", "t", gate=n, value=g) for n, g in enumerate(OF_LSTM)),
    ]  # fmt: skip
    return _all_steps(k, "lstm", step)


def _gru(k: _Loops) -> Claim:
    x = [k.at("input", "t", gate=n) for n in range(3)]
    step = [
        f"const float reset = ss_sigmoidf({k.sum(0)} + {x[0]});",
        f"const float update = ss_sigmoidf({k.sum(1)} + {x[1]});",
        f"const float part = {k.sum(2)}, fresh = ss_tanhf({x[2]} + part * reset);",
        f"const float state = ({k.at('h', 'old')} - fresh) * update + fresh;",
        k.put("h", "new", value="state"),
        *(k.put("gates", "t", gate=n, value=v) for n, v in enumerate(OF_GRU)),
        k.put("held", "t", value="part"),
    ]
    return _all_steps(k, "gru", step)


def _rnn(k: _Loops) -> Claim:
    x = f"{k.sum(0)} + {k.at('input', 't')}"
    after = f"ss_tanhf({x})" if k.node.op.attr("activation") == TANH else f"ss_maxf({x}, 0)"
    return _all_steps(k, "rnn", [k.put("h", "new", value=after)])


def _all_steps(k: _Loops, stem: str, step: list[str]) -> Claim:
    """A layer, of which a step does this to each element of the state behind its product."""
    weight, bias, state = k.refs["weight"], k.refs.get("bias"), k.batch * k.width
    turned = Layout((k.width, k.wide), weight.layout.strides[::-1])
    product = _Product(_matrix(k.batch, k.width), replace(weight, layout=turned))
    first = str(k.steps if k.node.op.attr("reverse") else 0)
    start = [k.put(n, first, value=k.at(f"{n}0")) for n in ("h", "c") if f"{n}0" in k.refs]
    scratch, left, low = aligned(FLOAT * k.batch * k.wide), f"h + old * {state}", ""
    if k.refs["h"].dtype is not weight.dtype:  # the product takes a rounded copy
        low = f"    {MEMORY[weight.dtype]} *low = (void *)((char *)scratch + {scratch});\n"
        left, scratch = "low", scratch + aligned(weight.dtype.itemsize * state)
        start.append(_lowered(k, k.at("h0"), weight.dtype))
        step = [*step, _lowered(k, "state", weight.dtype)]
    given, declared, plus = "sums", "", ""
    if bias is not None:
        at = _index(("(c0 + j)",), bias)
        given, declared = "sums, (void *)bias", f"    const {MEMORY[bias.dtype]} *bias = b[1];\n"
        plus = f" + {load(f'bias[{at}]', bias.dtype)}"
    body = f"""\
    float *sums = scratch;
{low}    void *const given[] = {{{given}}};
{k.each(start)}
{k.over_steps(product.run(left), k.each(step, 8))}"""
    return k.claim(stem, product, _finish(k.wide, plus, declared), body, scratch)


def _lowered(k: _Loops, value: str, dtype: torch.dtype) -> str:
    return f"low[r * {k.width} + j] = {store(rounded(value, dtype), dtype)};"


# -- gradients -----------------------------------------------------------------------------------


def _gradients(node: Node) -> Claim:
    write = {"lstm": _lstm_backward, "gru": _gru_backward, "rnn": _rnn_backward}[_kind(node)]
    return write(node)


def _first(node: Node, *results: str) -> tuple[str, ...]:
    """Results for the first state, where they are wanted."""
    return results if node.op.attr("first") else ()


def _lstm_backward(node: Node) -> Claim:
    k = _loops(node, "d_input", *_first(node, "d_h", "d_c"))
    values = ("dc * g * (i * (1 - i))", f"dc * {k.at('c', 'old')} * (f * (1 - f))",
              "dc * i * (1 - g * g)", "dh * ran * (o * (1 - o))")  # fmt: skip
    step = [
        *(f"const float {g} = {k.at('gates', 't', gate=n)};" for n, g in enumerate(OF_LSTM)),
        f"const float dh = {_incoming(k)}, ran = ss_tanhf({k.at('c', 'new')});",
        f"const float dc = {k.carry} + dh * o * (1 - ran * ran);",
        *(k.put("d_input", "t", gate=n, value=v) for n, v in enumerate(values)),
        f"{k.carry} = dc * f;",
    ]
    start = f"{k.carry} = {k.at('grad_c') if 'grad_c' in k.refs else '0'};"
    ends = {"d_h": k.sum(), "d_c": k.carry}
    return _all_steps_back(k, "lstm_backward", [start], step, ends)


def _gru_backward(node: Node) -> Claim:
    k = _loops(node, "d_input", "d_state", *_first(node, "d_h"))
    both = enumerate(("dr", "dz"))
    step = [
        *(f"const float {g} = {k.at('gates', 't', gate=n)};" for n, g in enumerate(OF_GRU)),
        f"const float dh = {_incoming(k)} + {k.carry};",
        "const float dn = dh * (1 - update) * (1 - fresh * fresh);",
        f"const float dr = dn * {k.at('held', 't')} * (reset * (1 - reset));",
        f"const float dz = dh * ({k.at('h', 'old')} - fresh) * (update * (1 - update));",
        *(k.put(name, "t", gate=n, value=v)
          for n, v in both for name in ("d_input", "d_state")),
        k.put("d_input", "t", gate=2, value="dn"),
        k.put("d_state", "t", gate=2, value="dn * reset"),
        f"{k.carry} = dh * update;",
    ]  # fmt: skip
    ends = {"d_h": f"{k.sum()} + {k.carry}"}
    return _all_steps_back(k, "gru_backward", [f"{k.carry} = 0;"], step, ends)


def _rnn_backward(node: Node) -> Claim:
    k = _loops(node, "d_input", *_first(node, "d_h"))
    slope = "1 - y * y" if node.op.attr("activation") == TANH else "y > 0"
    step = [
        f"const float y = {k.at('h', 'new')};",
        k.put("d_input", "t", value=f"({_incoming(k)}) * ({slope})"),
    ]
    return _all_steps_back(k, "rnn_backward", [], step, {"d_h": k.sum()})


def _incoming(k: _Loops) -> str:
    """The gradient of a step's h: from the step behind it, and from outside."""
    outside = f" + {k.at('grad_h', 't')}" if "grad_h" in k.refs else ""
    return k.sum() + outside


def _all_steps_back(
    k: _Loops, stem: str, start: list[str], step: list[str], ends: dict[str, str]
) -> Claim:
    """A gradient, of which a step does this to each element of the state before its product.

    Args:
        ends: what is stored behind the last step, where it is wanted.
    """
    product = _Product(_matrix(k.batch, k.wide), k.refs["weight"])
    left = f"{'d_state' if 'd_state' in k.refs else 'd_input'} + t * {k.batch * k.wide}"
    wanted = [k.put(name, value=value) for name, value in ends.items() if name in k.refs]
    last = [] if wanted else [f"        if (n == {k.steps - 1}) break;"]
    own = aligned(FLOAT * k.batch * k.width)
    carry = f"    float *carry = (float *)((char *)scratch + {own});\n" if start else ""
    end = "\n" + k.each(wanted) if wanted else ""
    body = f"""\
    float *sums = scratch;
{carry}    void *const given[] = {{sums}};
{k.each([f"{k.sum()} = 0;", *start])}
{k.over_steps(k.each(step, 8), *last, product.run(left))}{end}"""
    return k.claim(stem, product, _finish(k.width, ""), body, own * (1 + bool(start)))
