"""From ops to nodes: views become layouts, constants are computed, what is left is work.

Base = a tensor with row-major storage: a parameter, a constant, or a node's result
Ref  = base, layout, dtype: a view of a base; needs no code. A half that is widened to f32 is such a
       view too: generated code widens what it loads anyway
Node = one piece of work: pointwise, a reduction, or a call of a PyTorch kernel
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from hashlib import blake2b
from typing import Any

import torch

from shoestring.ir import (
    Function,
    Kind,
    Loc,
    Number,
    Op,
    Operand,
    Value,
    lookup,
    operand_values,
    run_op,
)

from . import packing
from .claims import Orders, result_orders
from .convolutions import role_of
from .expressions import HALVES, has_expression, scalar_fill
from .layout import VIEWS, Layout, flipped, permute, reshape, row_major, split_parts
from .products import bias_of, is_product, matrices_of
from .reductions import has_reduction, reduced_dims

# A constant of more elements than this is computed by each step instead of being kept.
LARGEST_CONSTANT = 1 << 22
REPEATS_FROM = 1 << 12  # bytes of a constant that is looked at for repetition
ROW_MAJOR = frozenset({Kind.COMPOSITE, Kind.OPAQUE})


@dataclass(eq=False, slots=True)
class Base:
    """A tensor in row-major storage."""

    index: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    label: str
    value: Value | None = None
    node: Node | None = None
    param: int | None = None
    constant: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def number(self) -> bool | int | float | None:
        """The only element of a constant without dimensions; None for other bases."""
        if self.constant is None or self.shape or not is_plain(self.dtype):
            return None
        number: bool | int | float = self.constant.item()
        return number


@dataclass(frozen=True, slots=True)
class Ref:
    """A view of a base.

    Attributes:
        base, layout: where its elements are.
        wide: the type that they are read as, if not the base's: a half widened to f32, or f32
            rounded to bf16 while it is packed.
    """

    base: Base
    layout: Layout
    wide: torch.dtype | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape

    @property
    def dtype(self) -> torch.dtype:
        """The type of the elements that a reader sees."""
        return self.wide or self.base.dtype

    @property
    def is_rounded(self) -> bool:
        """Whether its elements become bf16 only where they are packed."""
        return self.wide is torch.bfloat16


NodeOperand = Ref | Number | None | tuple[Ref | None, ...]


class Work(Enum):
    """How a node can be carried out."""

    POINTWISE = "pointwise"
    REDUCTION = "reduction"
    PRODUCT = "product"
    LIBRARY = "library"


@dataclass(eq=False, slots=True, repr=False)
class Node:
    """One piece of work.

    Attributes:
        index: position in program order.
        name: the op's name; decides the expression of a pointwise node.
        operands: as in the op, with views resolved.
        outs: the bases that it makes; one a result, unless several share one.
        results: where each result is, if that is not all of its base in row-major order.
        orders: how the dimensions of each of these are stored, outermost first.
        refs: everything that it reads.
    """

    index: int
    work: Work
    name: str
    op: Op
    operands: tuple[NodeOperand, ...]
    outs: tuple[Base, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict[str, Any])
    results: tuple[Ref, ...] = ()
    orders: Orders = ()
    refs: list[Ref] = field(init=False)

    def __post_init__(self) -> None:
        self.refs = operand_refs(self.operands)

    def __repr__(self) -> str:
        """Short: what it reads leads to all that came before."""
        return f"Node({self.index}, {self.work.value} {self.name})"

    @property
    def loc(self) -> Loc:
        return self.op.loc


def operand_refs(operands: tuple[NodeOperand, ...]) -> list[Ref]:
    """The views among operands, lists included."""
    found: list[Ref] = []
    for o in operands:
        if isinstance(o, Ref):
            found.append(o)
        elif isinstance(o, tuple):
            found.extend(r for r in o if r is not None)
    return found


@dataclass
class WorkList:
    """What `normalize` makes of a function."""

    function: Function
    nodes: list[Node] = field(default_factory=list[Node])
    bases: list[Base] = field(default_factory=list[Base])
    refs: dict[Value, Ref] = field(default_factory=dict[Value, Ref])
    known: dict[Value, torch.Tensor] = field(default_factory=dict[Value, torch.Tensor])

    nexts: dict[Value, Ref] = field(default_factory=dict[Value, Ref])
    refused: Mapping[Op, str] = field(default_factory=dict[Op, str])
    constants: dict[object, Base] = field(default_factory=dict[object, Base])
    shared: set[Value] = field(default_factory=set[Value])
    packed: dict[Value, Ref] = field(default_factory=dict[Value, Ref])
    users: dict[Value, list[Op]] = field(init=False)
    ends: set[Value] = field(init=False)

    def __post_init__(self) -> None:
        self.users = self.function.users()
        nexts = (p.next for p in self.function.params if p.next is not None)
        self.ends = {*(o.value for o in self.function.outputs), *nexts}

    def close(self) -> None:
        """Drops what only the next op would have needed: a long program has much of it."""
        ends = [p.value for p in self.function.params] + [o.value for o in self.function.outputs]
        self.refs = {v: self.refs[v] for v in ends}
        self.users.clear()
        self.known.clear()
        self.packed.clear()
        self.constants.clear()

    def forget(self) -> None:
        """Unties nodes from what they make, so that memory is free without a search for cycles."""
        for base in self.bases:
            base.node = None

    # -- making things -------------------------------------------------------------------------

    def base(self, dtype: torch.dtype, shape: tuple[int, ...], label: str, **more: Any) -> Base:
        base = Base(len(self.bases), dtype, shape, label, **more)
        self.bases.append(base)
        return base

    def add(
        self, work: Work, name: str, op: Op, operands: tuple[NodeOperand, ...], outs: list[Base],
        attrs: Mapping[str, Any] | None = None,
    ) -> Node:  # fmt: skip
        node = Node(
            len(self.nodes),
            work,
            name,
            op,
            operands,
            tuple(outs),
            op.attrs if attrs is None else attrs,
        )
        for out in outs:
            out.node = node
        self.nodes.append(node)
        return node

    def bind(self, operand: Any) -> NodeOperand:
        if isinstance(operand, Value):
            return self.refs[operand]
        if isinstance(operand, tuple):
            return tuple(None if v is None else self.refs[v] for v in operand)
        number: NodeOperand = operand
        return number

    # -- one op --------------------------------------------------------------------------------

    def visit(self, op: Op) -> None:
        if self.view(op) or self.fold(op) or self.widen(op) or self.narrow(op) or self.regular(op):
            return
        if is_product(op) and op not in self.refused:
            self.product(op)
            self.begin_sum(op)
            return
        work = classify(op)
        if work is Work.POINTWISE and self.uniform(op) or self.flip(op):
            return
        operands = tuple(self.bind(o) for o in op.operands)
        if work is Work.REDUCTION and self.trivial(op):
            return
        if work is Work.LIBRARY:
            operands = tuple(
                o if i in op.opdef.sizes_only else self.materialized(o, op)
                for i, o in enumerate(operands)
            )
        orders = result_orders(op, operands) if work is Work.LIBRARY else None
        if orders is not None:
            self.add_ordered(op, operands, orders)
            return
        outs = [
            self.base(r.type.dtype, r.type.static_shape, describe(r, op), value=r)
            for r in op.results
        ]
        self.add(work, op.name, op, operands, outs)
        for r, out in zip(op.results, outs, strict=True):
            self.refs[r] = Ref(out, row_major(out.shape))

    def add_ordered(self, op: Op, operands: tuple[NodeOperand, ...], orders: Orders) -> None:
        """A node whose results are stored in another order than row-major."""
        outs: list[Base] = []
        for r, order in zip(op.results, orders, strict=True):
            shape = tuple(r.type.static_shape[d] for d in order)
            outs.append(self.base(r.type.dtype, shape, describe(r, op), value=r))
            self.refs[r] = Ref(outs[-1], reordered(row_major(shape), order))
        node = self.add(Work.LIBRARY, op.name, op, operands, outs)
        node.results, node.orders = tuple(self.refs[r] for r in op.results), orders

    def view(self, op: Op) -> bool:
        """Resolves a view; a view that strides cannot express copies first. False for other ops."""
        if not op.inputs:
            return False
        source = self.refs[op.inputs[0]]
        parts = split_parts(op, source.layout)
        if parts is None and op.name not in VIEWS:
            return False
        if parts is None:
            rule = VIEWS[op.name]
            layout = rule(op, source.layout)
            if layout is None:
                copy = self.contiguous(Ref(source.base, source.layout), op)
                source = Ref(copy.base, copy.layout, source.wide)
                layout = rule(op, source.layout)
            if layout is None:
                return False
            parts = [layout]
        for r, layout in zip(op.results, parts, strict=True):
            self.refs[r] = Ref(source.base, layout, source.wide)
        self.learn(op)
        return True

    def product(self, op: Op) -> None:
        """A matrix product; a bias is added by a node of its own, before the result is rounded."""
        r, bias = op.result, bias_of(op)
        if bias is not None:
            label = f"product of {describe(r, op)}"
            made = self.base(torch.float32, r.type.static_shape, label)
        else:
            made = self.base(r.type.dtype, r.type.static_shape, describe(r, op), value=r)
        values = matrices_of(op)
        sides = [self.refs[v] for v in values]
        if packing.takes_packed(op):
            sides[1] = self.right_side(values[1], op)
        matrices = tuple(s if s.is_rounded else self.materialized(s, op) for s in sides)
        self.add(Work.PRODUCT, op.name, op, matrices, [made])
        whole = Ref(made, row_major(made.shape))
        if bias is not None:
            out = self.base(r.type.dtype, made.shape, describe(r, op), value=r)
            added = self.refs[bias]
            if role_of(op) is not None:  # one number a channel
                added = Ref(added.base, _per_channel(added.layout, len(made.shape)), added.wide)
            self.add(Work.POINTWISE, "aten.add.Tensor", op, (whole, added), [out], {})
            whole = Ref(out, row_major(out.shape))
        self.refs[r] = whole

    def right_side(self, v: Value, op: Op) -> Ref:
        """The right one of two matrices, packed if many products share it."""
        ref = self.refs[v]
        if v not in self.shared or ref.wide is not None:
            return ref
        if v not in self.packed:
            label = f"packed {ref.base.label}"
            out = self.base(torch.float32, (packing.packed_floats(ref.shape),), label)
            self.add(Work.LIBRARY, packing.NAME, _clone((v,), op.loc), (ref,), [out])
            self.packed[v] = Ref(out, row_major(ref.shape))
        return self.packed[v]

    def widen(self, op: Op) -> bool:
        """A half as f32, without code; False for other ops."""
        if op.name != "aten._to_copy.default" or op.result.type.dtype is not torch.float32:
            return False
        if op.result in self.refs:
            return True  # by the product that it widens
        source = self.refs[op.inputs[0]]
        if source.dtype not in HALVES or source.layout.numel == 0:
            return False
        self.refs[op.result] = Ref(source.base, source.layout, torch.float32)
        return True

    def narrow(self, op: Op) -> bool:
        """Weights as bf16 where only convolutions that pack them read them; False for other ops.

        Rounding them beforehand costs a pass over memory. Matrices are packed faster from bf16.
        """
        if op.name != "aten._to_copy.default" or op.result.type.dtype is not torch.bfloat16:
            return False
        source, readers = self.refs[op.inputs[0]], self.users[op.result]
        if source.base.param is None or source.dtype is not torch.float32:
            return False
        if any(stride < 0 for stride in source.layout.strides):
            return False  # no packing reads backwards
        if op.result in self.ends or any(r in self.refused for r in readers):
            return False
        times = [packing.weights_read(r, op.result) for r in readers]
        known = [n for n in times if n is not None]
        if len(known) < len(times) or sum(known) > packing.MOST_ROUNDINGS:
            return False
        self.refs[op.result] = Ref(source.base, source.layout, torch.bfloat16)
        return True

    def regular(self, op: Op) -> bool:
        """Elements at known positions that strides express: a view. False for other ops.

        So it is with masks that a model reads by the numbers of its rows and columns.
        """
        if op.name != "aten.index.Tensor" or op.result.type.numel == 0:
            return False
        source, shape = self.refs[op.inputs[0]], op.result.type.static_shape
        places = op.operands[1]
        assert isinstance(places, tuple), "a list of positions"
        rank = max((v.type.rank for v in places if v is not None), default=0)
        strides, offset = [0] * rank, source.layout.offset
        for v, size, stride in zip(places, source.shape, source.layout.strides, strict=False):
            known = None if v is None else self.known.get(v)
            steps = None if known is None else _steps(known, size)
            if steps is None:
                return False
            offset += steps[0] * stride
            for d, step in enumerate(steps[1:], rank - len(steps) + 1):
                strides[d] += step * stride
        behind = source.layout.strides[len(places) :]
        if len(strides) + len(behind) != len(shape):
            return False  # PyTorch's rule errs where the last positions have no dimension
        layout = Layout(shape, (*strides, *behind), offset)
        self.refs[op.result] = Ref(source.base, layout, source.wide)
        return True

    def flip(self, op: Op) -> bool:
        """Reversed dimensions that only generated code reads: a view. False for other ops."""
        if op.name != "aten.flip.default" or op.result.type.numel == 0 or op.result in self.ends:
            return False
        source = self.refs[op.inputs[0]]
        readers = self.users[op.result]
        if any(classify(r) is not Work.POINTWISE for r in readers):
            return False
        self.refs[op.result] = Ref(source.base, flipped(op, source.layout), source.wide)
        return True

    def begin_sum(self, product: Op) -> None:
        """Widens a product in memory where another is added to it: the sum can be where it is."""
        users = self.users[product.result]
        if len(users) != 1 or users[0].name != "aten._to_copy.default":
            return
        wide = users[0].result
        readers = self.users[wide]
        if wide.type.dtype is not torch.float32 or len(readers) != 1:
            return
        first, *others = readers[0].inputs
        added = readers[0].name == "aten.add.Tensor" and first is wide
        if added and any(map(self.comes_from_product, others)):
            out = self.base(
                torch.float32, wide.type.static_shape, describe(wide, users[0]), value=wide
            )
            self.refs[wide] = Ref(out, row_major(out.shape))
            source = self.refs[product.result]
            self.add(Work.POINTWISE, users[0].name, users[0], (source,), [out])

    def comes_from_product(self, v: Value) -> bool:
        """Whether a product makes a value, be it widened."""
        op = self.function.producer(v)
        if op is not None and op.name == "aten._to_copy.default":
            op = self.function.producer(op.inputs[0])
        return op is not None and is_product(op) and op not in self.refused

    def materialized(self, operand: NodeOperand, op: Op) -> NodeOperand:
        """An operand that a library reads: widened in memory, for this reader alone."""
        if isinstance(operand, tuple):
            return tuple(None if r is None else self.in_memory(r, op) for r in operand)
        return self.in_memory(operand, op) if isinstance(operand, Ref) else operand

    def in_memory(self, ref: Ref, op: Op) -> Ref:
        """Kernels of larger ops may take some operands to be in row-major order unasked."""
        ordered = op.opdef.kind in ROW_MAJOR and ref.layout.strides != row_major(ref.shape).strides
        if not ordered and ref.wide is None:
            return ref
        held, at = ref.base.constant, ref.layout
        if held is None or not held.dim() or at.numel > LARGEST_CONSTANT:
            return self.contiguous(ref, op)
        view = held.as_strided(at.shape, at.strides, at.offset).to(ref.dtype)
        return self.constant(view.contiguous(), f"copy of {ref.base.label}")

    def trivial(self, op: Op) -> bool:
        """A reduction over dimensions of size one is a conversion."""
        source, r = self.refs[op.inputs[0]], op.result
        if any(source.shape[d] != 1 for d in reduced_dims(op)):
            return False
        out = self.base(r.type.dtype, source.shape, describe(r, op), value=r)
        self.add(Work.POINTWISE, "aten._to_copy.default", op, (source,), [out], {})
        self.refs[r] = Ref(out, row_major(r.type.static_shape))
        return True

    def settle(self) -> None:
        """Gives each next value a base of its own, in row-major order, made by a node.

        Outputs need one only where they are widened.
        """
        taken: set[Base] = set()
        for o in self.function.outputs:
            self.refs[o.value] = self.in_memory(self.refs[o.value], _clone((o.value,), Loc()))
        for p in self.function.params:
            if p.next is None or p.next is p.value:
                continue
            ref = self.refs[p.next]
            if (
                ref.base.node is None
                or ref.wide is not None
                or ref.base in taken
                or ref.layout != row_major(ref.base.shape)
            ):
                ref = self.contiguous(ref, _clone((p.next,), Loc()))
                ref.base.label = f"new {p.path}"
            taken.add(ref.base)
            self.nexts[p.value] = ref

    def contiguous(self, source: Ref, op: Op) -> Ref:
        out = self.base(source.dtype, source.shape, f"copy of {source.base.label}")
        work = Work.POINTWISE if is_plain(source.dtype) and source.layout.numel else Work.LIBRARY
        clone = _clone(op.operands[:1], op.loc)
        self.add(work, clone.name, clone, (source,), [out])
        return Ref(out, row_major(out.shape))

    # -- constants -----------------------------------------------------------------------------

    def uniform(self, op: Op) -> bool:
        """A result that is one number throughout: an expanded constant, without code."""
        fill = scalar_fill(op)
        if fill is None:
            return False
        t = op.result.type
        number = torch.tensor(fill, dtype=t.dtype)
        base = self.base(t.dtype, (), describe(op.result, op), constant=number)
        self.refs[op.result] = Ref(base, Layout(t.static_shape, (0,) * len(t.shape)))
        return True

    def learn(self, op: Op) -> None:
        """Views of known tensors are known."""
        if op.inputs[0] in self.known:
            self.known.update(zip(op.results, run_op(op, self.known), strict=True))

    def fold(self, op: Op) -> bool:
        """Computes an op that depends on nothing."""
        if op.opdef.kind is Kind.RANDOM or any(v not in self.known for v in op.inputs):
            return False
        if any(r.type.numel > LARGEST_CONSTANT for r in op.results):
            return False
        if not op.opdef.name.startswith(("aten.", "ir.")) or _is_random(op):
            return False
        fill = scalar_fill(op)
        if fill is not None:
            r = op.result
            self.known[r] = torch.tensor(fill, dtype=r.type.dtype).expand(r.type.static_shape)
            return False
        with torch.no_grad():
            outcome = run_op(op, self.known)
        for r, t in zip(op.results, outcome, strict=True):
            self.known[r] = t
            self.refs[r] = self.constant(_once(t), describe(r, op))
        return True

    def constant(self, known: torch.Tensor, label: str) -> Ref:
        """A view of what is known: equal elements are kept once, however often they are made."""
        repeated = [s == 0 and n > 1 for n, s in zip(known.shape, known.stride(), strict=True)]
        held = known
        for d in (d for d, again in enumerate(repeated) if again):
            held = held.narrow(d, 0, 1)
        held = held.detach().clone(memory_format=torch.contiguous_format)
        shape = tuple(held.shape)
        content = held.reshape(-1).view(torch.uint8).numpy().tobytes()
        key = (held.dtype, shape, blake2b(content).digest())
        if key not in self.constants:
            self.constants[key] = self.base(held.dtype, shape, label, constant=held)
        walked = zip(row_major(shape).strides, repeated, strict=True)
        strides = tuple(0 if again else s for s, again in walked)
        return Ref(self.constants[key], Layout(tuple(known.shape), strides))


def _steps(places: torch.Tensor, size: int) -> list[int] | None:
    """The first of some positions, and how far it is to the next along each dimension.

    None where steps differ or go back, and where one is outside of `size` or is no number.
    """
    if places.dtype not in (torch.int64, torch.int32):
        return None
    first = int(places.flatten()[0])
    grid = torch.full((), first, dtype=places.dtype)
    steps: list[int] = []
    for d, n in enumerate(places.shape):
        steps.append(int(places.diff(dim=d).flatten()[0]) if n > 1 else 0)
        behind = (1,) * (places.dim() - d - 1)
        grid = grid + (torch.arange(n, dtype=places.dtype) * steps[-1]).view(n, *behind)
    last = first + sum(step * (n - 1) for step, n in zip(steps, places.shape, strict=True))
    even = min(first, *steps, 0) >= 0 and last < size and torch.equal(grid, places)
    return [first, *steps] if even else None


def _once(t: torch.Tensor) -> torch.Tensor:
    """A large tensor without repetition: dimensions along which nothing changes have stride 0."""
    shape = t.shape
    if t.numel() * t.element_size() >= REPEATS_FROM and not t.is_complex():
        for d in range(t.dim()):
            first = t.narrow(d, 0, 1)
            if t.shape[d] > 1 and _same_bits(first.expand_as(t), t):
                t = first
    return t.expand(shape)


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the last bit: NaN too, and the sign of zero."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.view(integer), b.view(integer))


def _clone(operands: tuple[Operand, ...], loc: Loc) -> Op:
    """The op of work that the program does not name: a copy."""
    return Op(lookup("aten.clone.default"), operands, {}, (), loc)


def _per_channel(x: Layout, rank: int) -> Layout:
    """A vector that the second of `rank` dimensions walks."""
    behind = (1,) * (rank - 2)
    return Layout((*x.shape, *behind), (*x.strides, *(0 for _ in behind)), x.offset)


def reordered(stored: Layout, order: tuple[int, ...]) -> Layout:
    """The layout of a value whose dimension `order[i]` is stored as dimension i."""
    return permute(stored, [order.index(d) for d in range(len(order))])


def _is_random(op: Op) -> bool:
    """Whether PyTorch says that the op draws random numbers."""
    from shoestring.ir.ops import find_overload

    if op.name.startswith("ir."):
        return False
    return torch.Tag.nondeterministic_seeded in find_overload(op.name).tags


def normalize(function: Function, refused: Mapping[Op, str] | None = None) -> WorkList:
    """The function as nodes over bases.

    Args:
        function: with static shapes.
        refused: products that are left to the library, and why.
    """
    work = WorkList(function, refused=refused or {}, shared=packing.shared_sides(function))
    for index, p in enumerate(function.params):
        t = p.value.type
        label = f"{p.role.value} {p.path}"
        base = work.base(t.dtype, t.static_shape, label, value=p.value, param=index)
        work.refs[p.value] = Ref(base, row_major(base.shape))
    for op in function.ops:
        work.visit(op)
    work.settle()
    _write_in_place(work)
    work.close()
    return work


def _write_in_place(work: WorkList) -> None:
    """Removes concatenations of what one node makes: its results are written where they belong."""
    ends = [*(work.refs[o.value] for o in work.function.outputs), *work.nexts.values()]
    readers = Counter(r.base for r in (*ends, *(r for n in work.nodes for r in n.refs)))
    for node in [n for n in work.nodes if n.name == "aten.cat.default"]:
        parts = _parts(node, readers)
        if parts is None:
            continue
        (out,), maker = node.outs, parts[0][0].node
        assert maker is not None
        slices = dict(parts)
        maker.results = tuple(
            Ref(out, reordered(slices[r.base], order)) if r.base in slices else r
            for r, order in zip(maker.results, maker.orders, strict=True)
        )
        work.refs.update(zip(maker.op.results, maker.results, strict=True))
        maker.outs = (*(b for b in maker.outs if b not in slices), out)
        out.node = maker
        work.nodes.remove(node)


def _parts(node: Node, readers: Counter[Base]) -> list[tuple[Base, Layout]] | None:
    """The bases that a concatenation joins, and where in its result each belongs.

    None unless all are made by one node that can write anywhere, and read by nobody else.
    """
    (out,), at = node.outs, 0
    dim = node.op.attr("dim") % max(len(out.shape), 1)
    parts: list[tuple[Base, Layout]] = []
    for ref in node.refs:
        maker = ref.base.node
        whole = ref.layout == row_major(ref.shape) and ref.layout.numel * ref.dtype.itemsize
        if maker is None or not maker.results or ref.dtype is not out.dtype:
            return None
        if readers[ref.base] != 1 or whole != ref.base.nbytes or len(ref.shape) != len(out.shape):
            return None
        strides = row_major(out.shape).strides
        place = reshape(Layout(ref.shape, strides, at * strides[dim]), ref.base.shape)
        if place is None:
            return None
        parts.append((ref.base, place))
        at += ref.shape[dim]
    return parts if len({base.node for base, _ in parts}) == 1 else None


PLAIN_DTYPES = frozenset({
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.bool,
})  # fmt: skip


def is_plain(dtype: torch.dtype) -> bool:
    """Whether generated code can hold such an element."""
    return dtype in PLAIN_DTYPES


def classify(op: Op) -> Work:
    """Generated code where there is an expression for the op, else a PyTorch kernel."""
    types = [v.type for v in (*operand_values(op.operands), *op.results)]
    if any(not is_plain(t.dtype) or t.numel == 0 for t in types):
        return Work.LIBRARY
    if any(isinstance(o, complex) for o in op.operands):
        return Work.LIBRARY
    if has_expression(op):
        return Work.POINTWISE
    return Work.REDUCTION if has_reduction(op) else Work.LIBRARY


def describe(value: Value, op: Op) -> str:
    """What a value is, in the user's terms."""
    name = op.name.removeprefix("aten.").split(".")[0]
    place = op.loc.module or (f"{op.loc.file}:{op.loc.line}" if op.loc.file else "")
    return f"%{value.name} ({name}{', ' + place if place else ''})"


def with_operands(node: Node, operands: tuple[NodeOperand, ...]) -> Node:
    """The same work on other operands."""
    return replace(node, operands=operands)
