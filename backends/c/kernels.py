"""Writing a unit as one C function.

A kernel reads and writes through an array of pointers. Its loops come in three shapes:

* flat: every loop is inner; used where nothing, or everything, is reduced;
* row: parallel over the outer loops, one inner nest a stage;
* column: as row, for outer loops that are contiguous in memory: a block of lanes of the innermost
  outer loop goes through the inner loops together.

A stage is one pass over the inner loops: it ends where a reduction must be complete. Pointwise
values are computed anew in each stage that needs them; only what is read outside is stored. In a
row kernel, one that costs much (an exponential) waits for later stages in a buffer of one row.

The innermost loop of a pass is several where its arithmetic is a long chain (`chains.py`), and what
is read much later is stored past the caches (`distance.py`), strip by strip.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from shoestring.ir import DTYPE_NAMES

from ..instructions import Buffer, contiguous_strides
from .accumulators import Accumulators
from .atoms import Atoms, strides_of
from .chains import STRIP, cut
from .expressions import (
    EXACT_NUMBER,
    EXPENSIVE,
    EXPRESSIONS,
    HALVES,
    MEMORY,
    REGISTER,
    Use,
    arithmetic_type,
    cast,
    literal,
    load,
    number,
    rounded,
    store,
    widened,
)
from .groups import KEYED, Placed, Unit, reads_whole, reduced_dims_of
from .nodes import Base, Node, Ref, Work
from .text import Text

PARALLEL_WORK = 1 << 16  # below this many element operations a thread costs more than it saves
BLOCK = 1024  # elements that one single-precision partial sum takes in
PARTIALS = 1024  # most partial results of a reduction of everything
LANES = 64
LONGEST_ROW = 16384  # elements of a row that are kept from one stage to the next


@dataclass(frozen=True)
class Kernel:
    """A C function.

    Attributes:
        body: its text without name and comment; equal bodies are one function.
        comment: what it computes, in the user's terms.
        buffers: what each pointer must point into, in order, from which element on, and its type.
        written: positions in `buffers` that it writes.
        ops: the IR ops that it carries out.
        helper: functions that the body calls; `@` stands for the kernel's name, here and there.
        scratch: bytes that it needs, behind the last of its pointers.
    """

    body: str
    comment: str
    buffers: tuple[tuple[Buffer, int, torch.dtype], ...]
    written: tuple[int, ...]
    ops: tuple[str, ...]
    stem: str
    helper: str = ""
    scratch: int = 0

    @property
    def text(self) -> str:
        """What makes two kernels one function."""
        return f"{self.helper}void @(void *const *b) {{\n{self.body}\n}}\n"


@dataclass(frozen=True)
class Loop:
    """One loop of a kernel: the atoms that it runs over, outermost first."""

    name: str
    size: int
    atoms: tuple[int, ...]


@dataclass
class Access:
    """A view of memory, by atom."""

    strides: dict[int, int]
    offset: int
    weight: int

    def of(self, *atoms: int) -> tuple[int, ...]:
        """How far apart the elements of neighbouring steps are, whichever way."""
        return tuple(abs(self.strides.get(a, 0)) for a in atoms)


@dataclass
class _Ahead:
    """What is loaded before an innermost loop, which reads the same element all along.

    Inside the loop a compiler may put a load behind a condition, and then has no vectors for the
    loop.

    Attributes:
        loop: the loop.
        at, depth: where the loads are written.
        names: load -> the name of what it gave.
    """

    loop: Loop
    at: int
    depth: int
    names: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Span:
    """The elements that an innermost loop goes through.

    Attributes:
        name: of the loop's variable.
        low, high: as C.
        most: how many there may be, if that is known.
        parallel: how threads share them, as a pragma says it; or nothing.
        clauses: of the pragma: what is summed up.
        begins: `name = value` of what each element declares, if it uses any of it.
    """

    name: str
    low: str
    high: str
    most: int | None
    parallel: str = ""
    clauses: str = ""
    begins: tuple[str, ...] = ()

    def first(self, text: str) -> str:
        """What an expression of an element's is for the first."""
        for name, value in (begin.split(" = ") for begin in self.begins):
            text = re.sub(rf"\b{name}\b", f"({value})", text)
        return re.sub(rf"\b{self.name}\b", self.low, text)


Level = str  # "none", "outer", "columns" or "full"


class KernelWriter:
    """Writes one unit.

    Args:
        unit: what to write.
        atoms: the loops.
        buffer_of: where a stored base is.
        stored: the bases that are read outside the unit.
        in_place: the bases among them that overwrite a parameter.
    """

    def __init__(
        self,
        unit: Unit,
        atoms: Atoms,
        buffer_of: Callable[[Base], Buffer],
        stored: set[Base],
        in_place: Iterable[Base],
        far: Collection[Base] = (),
    ) -> None:
        self.far = far
        self.unit, self.atoms, self.buffer_of = unit, atoms, buffer_of
        self.members = {b: p for p in unit.nodes for b in p.node.outs}
        self.stores = [p for p in unit.nodes if p.node.outs[0] in stored]
        self.in_place = set(in_place)
        self.text = Text()
        self.pointers: dict[tuple[Buffer, int], tuple[torch.dtype, bool]] = {}
        self.changed = {buffer_of(p.node.outs[0]) for p in self.stores}
        self.now = 0
        self.away: dict[Node, str] = {}
        self.drawn: dict[Node, str] = {}
        self.kept: dict[Node, int] = {}
        self.ahead: _Ahead | None = None
        self.loaded = 0
        self.number = {p.node: i for i, p in enumerate(unit.nodes)}
        self._resolve_levels()
        self._stages()
        self._loops()
        self.kept = self._kept_values()

    # -- analysis ------------------------------------------------------------------------------

    def _resolve_levels(self) -> None:
        full = self.atoms.resolve(self.unit.full)
        outer = self.atoms.resolve(self.unit.outer) if self.unit.outer is not None else ()
        if set(outer) == set(full):
            outer = ()
        self.full, self.outer = full, outer
        self.domain = {p.node: self.atoms.resolve(p.loops) for p in self.unit.nodes}
        self.level: dict[Node, Level] = {}
        for p in self.unit.nodes:
            self.level[p.node] = self._level_of(self.atoms.resolve(p.result_loops))

    def _level_of(self, loops: tuple[int, ...]) -> Level:
        if not loops:
            return "none"
        return "outer" if self.outer and set(loops) == set(self.outer) else "full"

    def _stages(self) -> None:
        """The pass over the inner loops after which each value is there."""
        self.stage: dict[Node, int] = {}
        for p in self.unit.nodes:
            sources = [self.members[r.base].node for r in p.node.refs if r.base in self.members]
            stage = max((self.stage[n] for n in sources), default=0)
            self.stage[p.node] = stage + (p.node.work is Work.REDUCTION)
        reductions = [self.stage[p.node] for p in self.unit.nodes if p.node.work is Work.REDUCTION]
        self.reductions_end = max(reductions, default=0)
        # Results on other levels are stored when all passes are done.
        self.last_stage = max(
            [self.reductions_end - 1]
            + [self._store_stage(p, 0) for p in self.stores if self.level[p.node] == "full"]
        )

    def _store_stage(self, p: Placed, last: int) -> int:
        """In-place results wait for the last pass: earlier ones still read the old value."""
        if p.node.outs[0] in self.in_place:
            return max(last, self.stage[p.node])
        return self.stage[p.node]

    def _kept_values(self) -> dict[Node, int]:
        """Values of the full level that wait in a row buffer -> the stage that computes them.

        Of what several stages need: the last values of each stage's chain, if an expensive op is in
        that chain.
        """
        if not self.outer or self.by_column or self.atoms.size(self.inner) > LONGEST_ROW:
            return {}
        kept: dict[Node, int] = {}
        seen: dict[Node, int] = {}
        for stage in range(self.last_stage + 1):
            needed = {p.node for p in self._needed(self._stage_sources(stage))}
            again = {n for n in needed if n in seen}
            used = {r.base.node for n in needed - again for r in self._full_refs(n)}
            ends = (n for n in again if n in used or n in self._stage_ends(stage))
            kept.update((n, seen[n]) for n in ends if n not in kept and self._is_expensive(n))
            seen.update((n, stage) for n in needed if n not in seen)
        return kept

    def _stage_ends(self, stage: int) -> set[Node]:
        return {p.node for p in self._stage_sources(stage)}

    def _stage_sources(self, stage: int) -> list[Placed]:
        """The values that a stage reduces or stores."""
        reduced, stored = self._stage_roots(stage)
        bases = (p.node.refs[0].base for p in reduced)
        return [*(self.members[b] for b in bases if b in self.members), *stored]

    def _full_refs(self, node: Node) -> list[Ref]:
        return [
            r for r in node.refs
            if r.base in self.members and self.level[self.members[r.base].node] == "full"
        ]  # fmt: skip

    def _is_expensive(self, node: Node) -> bool:
        chain = self._needed([self.members[node.outs[0]]])
        return any(p.node.name in EXPENSIVE for p in chain)

    # -- loops ---------------------------------------------------------------------------------

    def _access(self, placed: Placed, ref: Ref) -> Access:
        extra = len(placed.domain) - len(ref.shape)
        dims = placed.domain[extra:]
        strides = strides_of(self.atoms, dims, ref.shape, ref.layout.strides)
        return Access(strides, ref.layout.offset, ref.layout.numel)

    def _result_access(self, placed: Placed) -> Access:
        shape = placed.node.outs[0].shape
        strides = strides_of(self.atoms, placed.result, shape, contiguous_strides(shape))
        return Access(strides, 0, math.prod(shape))

    def _loops(self) -> None:
        accesses: list[tuple[int, int, Access]] = []
        for p in self.unit.nodes:
            if p in self.stores or p.node.name in _INDEXED:
                accesses.append(
                    (0 if p in self.stores else 1, p.node.index, self._result_access(p))
                )
            for ref in p.node.refs:
                if ref.base not in self.members and not reads_whole(p.node):
                    accesses.append((1, p.node.index, self._access(p, ref)))
        accesses.sort(key=lambda a: (-len(a[2].strides), a[0], a[1]))
        self.accesses = [a for _, _, a in accesses]
        inner = [a for a in self.full if a not in self.outer]
        self.inner = tuple(inner)
        self.by_column = self._is_by_column(set(inner))
        self.outer_loops = self._merge(self._sorted(list(self.outer)), "i")
        self.inner_loops = self._merge(self._sorted(inner), "j")
        if self.by_column:
            *rest, self.lane = self.outer_loops
            self.outer_loops = rest
        self.index_of = {a: loop for loop in self._all_loops() for a in loop.atoms}

    def _all_loops(self) -> list[Loop]:
        lane = [self.lane] if self.by_column else []
        return [*self.outer_loops, *lane, *self.inner_loops]

    def _is_by_column(self, inner: set[int]) -> bool:
        return bool(self.outer) and self._contiguous_outer(inner)

    def _contiguous_outer(self, inner: set[int]) -> bool:
        """Whether most of the memory traffic of the full level is contiguous along outer loops."""
        votes = 0
        for access in self.accesses:
            if not inner & access.strides.keys():
                continue
            unit = [a for a, s in access.strides.items() if s == 1]
            votes += sum(-access.weight if a in inner else access.weight for a in unit)
        return votes > 0

    def _sorted(self, loops: list[int]) -> list[int]:
        """Outermost first: by the strides of the first access in which two loops differ.

        Where neither goes from neighbour to neighbour, most accesses decide: a core waits for what
        it reads here and there, but not for what it writes so.
        """

        def compare(a: int, b: int) -> int:
            strides = [access.of(a, b) for access in self.accesses]
            differing = [(x > y, i) for i, (x, y) in enumerate(strides) if x and y and x != y]
            if not differing:
                return self.full.index(a) - self.full.index(b)
            longer = differing[0][0]
            if all(1 not in pair for pair in strides):
                weights = [self.accesses[i].weight * (1 if up else -1) for up, i in differing]
                longer = sum(weights) > 0 or (sum(weights) == 0 and longer)
            return -1 if longer else 1

        return sorted(loops, key=functools.cmp_to_key(compare))

    def _merge(self, loops: list[int], letter: str) -> list[Loop]:
        """Joins neighbours that every access walks as one."""
        runs: list[list[int]] = []
        sizes = self.atoms.sizes
        for loop in loops:
            if runs and all(
                a.strides.get(runs[-1][-1], 0) == a.strides.get(loop, 0) * sizes[loop]
                for a in self.accesses
            ):
                runs[-1].append(loop)
            else:
                runs.append([loop])
        return [
            Loop(f"{letter}{i}", self.atoms.size(run), tuple(run)) for i, run in enumerate(runs)
        ]

    def _offset(self, access: Access, start: int | None = None) -> str:
        """The element's position as C, counted from `start`: by default the view's own."""
        start = access.offset if start is None else start
        parts = [str(start)] if start else []
        for loop in self._all_loops():
            stride = access.strides.get(loop.atoms[-1], 0)
            if stride:
                name = self._index_name(loop)
                parts.append(name if stride == 1 else f"{name} * {stride}")
        return " + ".join(parts) or "0"

    def _index_name(self, loop: Loop) -> str:
        return "(c + l)" if self.by_column and loop is self.lane else loop.name

    # -- pointers ------------------------------------------------------------------------------

    def _pointer(self, base: Base, offset: int = 0, write: bool = False) -> tuple[str, int]:
        """The pointer that leads to an offset, and what of the offset is left.

        Each offset into memory that the kernel only reads is a pointer of its own: kernels that
        differ in nothing else, as the steps of a recurrence do, are one function.
        """
        buffer = self.buffer_of(base)
        own = 0 if buffer in self.changed else offset
        _, written = self.pointers.get((buffer, own), (base.dtype, False))
        self.pointers[buffer, own] = (base.dtype, written or write)
        return f"p{list(self.pointers).index((buffer, own))}", offset - own

    def _element(self, base: Base, access: Access, write: bool = False) -> str:
        pointer, left = self._pointer(base, access.offset, write)
        return f"{pointer}[{self._offset(access, left)}]"

    # -- expressions ---------------------------------------------------------------------------

    def _name(self, node: Node) -> str:
        name = f"v{self.number[node]}"
        return f"{name}[l]" if self.by_column and self.level[node] == "outer" else name

    def _operand(self, placed: Placed, ref: Ref) -> str:
        if ref.base in self.members:
            return self._name(self.members[ref.base].node)
        if ref.base.number is not None:
            return literal(ref.base.number, ref.base.dtype)
        access = self._access(placed, ref)
        if not access.strides:
            return self._scalar(ref, access.offset)
        element = load(self._element(ref.base, access), ref.base.dtype)
        if self.ahead is None or access.strides.get(self.ahead.loop.atoms[-1]):
            return element
        return self._loaded_ahead(self.ahead, element, ref.base.dtype)

    def _loaded_ahead(self, ahead: _Ahead, element: str, dtype: torch.dtype) -> str:
        """The name of an element that is loaded before the innermost loop."""
        name = ahead.names.get(element)
        if name is None:
            name = ahead.names[element] = f"h{self.loaded}"
            line = f"const {REGISTER[dtype]} {name} = {element};"
            self.text.insert(ahead.at, line, ahead.depth)
            ahead.at, self.loaded = ahead.at + 1, self.loaded + 1
        return name

    def _scalar(self, ref: Ref, offset: int) -> str:
        """One element that every iteration reads: loaded once, before the loops."""
        pointer, left = self._pointer(ref.base, offset)
        name, dtype = f"{pointer}_{left}", ref.base.dtype
        line = f"const {REGISTER[dtype]} {name} = {load(f'{pointer}[{left}]', dtype)};"
        if line not in self.scalars:
            self.scalars.append(line)
        return name

    def _value(self, placed: Placed) -> str:
        """A pointwise node's value as C, rounded to its type."""
        node, out = placed.node, placed.node.outs[0].dtype
        expression = EXPRESSIONS[node.name]
        operands = self._raw_operands(placed)
        kinds = [(o[1], o[2]) if isinstance(o, tuple) else o for o in operands]
        attrs = dict(node.attrs)
        dtype = arithmetic_type(expression.rule, kinds, attrs, out)
        raw = tuple(_raw(o) for o in operands)
        if expression.rule == "result" and out in HALVES:
            operands = [self._promoted(node, i, o, out) for i, o in enumerate(operands)]
        args = tuple(self._arg(o, dtype) for o in operands)
        index = self._index(placed)
        text = expression.write(Use(args, dtype, attrs, index, out, raw))
        if expression.rule in ("operands", "first", "truth"):
            return text
        if expression.rule == "key":
            return cast(text, torch.float32 if "uniform" in node.name else torch.int64, out)
        if expression.rule == "index":
            return cast(text, dtype, out)
        return rounded(text, out)

    def _raw_operands(self, placed: Placed) -> list[tuple[str, torch.dtype, int] | object]:
        node = placed.node
        if node.name in KEYED:
            return [(text, torch.int64, 0) for text in self._key(node.refs[0])]
        return [
            (self._operand(placed, o), o.dtype, len(o.shape)) if isinstance(o, Ref) else o
            for o in node.operands
        ]

    def _key(self, key: Ref) -> list[str]:
        """The two words of a key of random numbers."""
        step = key.layout.strides[0]
        return [self._scalar(key, key.layout.offset + i * step) for i in (0, 1)]

    def _promoted(self, node: Node, i: int, operand: object, out: torch.dtype) -> object:
        """An operand as PyTorch promotes it: what meets halves, and makes one, is rounded first.

        The sum of a product and its bias is rounded but once: nodes that are not the op itself.
        """
        source = node.operands[i] if i < len(node.operands) else None
        if not isinstance(source, Ref) or not isinstance(operand, tuple):
            return operand
        exact = node.name in EXACT_NUMBER and i == 1 and source.layout.numel == 1
        exact = exact or node.name == "aten._to_copy.default"  # whose result is rounded
        if exact or node.name != node.op.name or source.dtype in (*HALVES, torch.bool):
            return operand
        text, old, rank = operand
        return cast(text, old, out), out, rank

    def _arg(self, operand: object, dtype: torch.dtype) -> str | None:
        if operand is None:
            return None
        if isinstance(operand, tuple):
            text, old, _ = operand
            exact = dtype is torch.bool or dtype in HALVES
            return cast(text, old, dtype) if exact else widened(text, old, dtype)
        assert isinstance(operand, (bool, int, float)), "an operand is a view, a number or nothing"
        return number(operand, dtype)

    def _index(self, placed: Placed) -> str:
        if placed.node.name not in _INDEXED:
            return ""
        return f"({self._offset(self._result_access(placed))})"

    def _define(self, placed: Placed) -> None:
        node = placed.node
        kind = REGISTER[node.outs[0].dtype]
        value = self.drawn.get(node) or self._value(placed)
        if self.by_column and self.level[node] == "outer":
            self.text.put(f"{self._name(node)} = {value};")
        else:
            self.text.put(f"const {kind} {self._name(node)} = {value};")

    def _store(self, placed: Placed) -> None:
        out = placed.node.outs[0]
        where = self._element(out, self._result_access(placed), write=True)
        where = self.away.get(placed.node, where)
        self.text.put(f"{where} = {store(self._name(placed.node), out.dtype)};")

    def _needed(self, roots: list[Placed], stage: int = 0) -> list[Placed]:
        """The pointwise nodes of the full level that the roots are made of, in order.

        Values that an earlier stage has kept are not followed further.
        """
        found: set[Node] = set()
        stack = list(roots)
        while stack:
            p = stack.pop()
            if p.node in found or p.node.work is Work.REDUCTION or self.level[p.node] != "full":
                continue
            found.add(p.node)
            if self._is_kept(p.node, stage):
                continue
            stack.extend(self.members[r.base] for r in p.node.refs if r.base in self.members)
        return [p for p in self.unit.nodes if p.node in found]

    # -- the whole -----------------------------------------------------------------------------

    def write(self) -> Kernel:
        self.scalars: list[str] = []
        self._none_level(0)
        if self.outer:
            self._outer_nest()
        else:
            for stage in range(self.last_stage + 1):
                self._flat_stage(stage)
                self._none_level(stage + 1)
        for p in self.stores:
            if self.level[p.node] == "none":
                self._store(p)
        return self._finish(self._body_text())

    def _body_text(self) -> str:
        head = [
            f"    {'' if written else 'const '}{MEMORY[dtype]} *restrict p{i} = b[{i}];"
            for i, (dtype, written) in enumerate(self.pointers.values())
        ]
        return "\n".join([*head, *(f"    {s}" for s in self.scalars), *self.text.lines])

    def _finish(self, body: str, helper: str = "", scratch: int = 0) -> Kernel:
        nodes = [p.node for p in self.unit.nodes]
        written = tuple(i for i, (_, w) in enumerate(self.pointers.values()) if w)
        comment = [
            f"v{i} = {n.name.removeprefix('aten.')}: {_described(n)}" for i, n in enumerate(nodes)
        ]
        return Kernel(
            body,
            "\n".join(f"// {line}" for line in comment),
            tuple((b, offset, dtype) for (b, offset), (dtype, _) in self.pointers.items()),
            written,
            tuple(n.op.name for n in nodes),
            _stem(nodes),
            helper,
            scratch,
        )

    def _none_level(self, stage: int) -> None:
        for p in self.unit.nodes:
            if self.level[p.node] == "none" and self.stage[p.node] == stage:
                if p.node.work is Work.POINTWISE:
                    self._define(p)

    def _is_parallel(self) -> bool:
        return self.atoms.size(self.full) * (1 + len(self.unit.nodes)) >= PARALLEL_WORK

    def _stage_roots(self, stage: int) -> tuple[list[Placed], list[Placed]]:
        """Reductions that this pass completes, and full-level results that it stores."""
        reduced = [
            p
            for p in self.unit.nodes
            if p.node.work is Work.REDUCTION and self.stage[p.node] == stage + 1
        ]
        stored = [
            p for p in self.stores
            if self.level[p.node] == "full" and self._store_stage(p, self.last_stage) == stage
        ]  # fmt: skip
        return reduced, stored

    # -- flat ----------------------------------------------------------------------------------

    def _flat_stage(self, stage: int) -> None:
        reduced, stored = self._stage_roots(stage)
        if not reduced and not stored:
            return
        if not self.inner_loops:
            self._body(reduced, stored)
            return
        if reduced:
            self._blocked(reduced, stored)
            return
        *outside, last = self.inner_loops
        parallel = "parallel for" if self._is_parallel() else ""
        if parallel and outside:
            many = f" collapse({len(outside)})" if len(outside) > 1 else ""
            self.text.put(f"#pragma omp parallel for{many} schedule(static)")
            parallel = ""
        for loop in outside:
            self._for(loop)
        with self._innermost(last):
            span = Span(last.name, "0", str(last.size), last.size, parallel)
            self._elements(span, reduced, stored)
        self.text.close(len(outside))

    @contextmanager
    def _innermost(self, loop: Loop) -> Iterator[None]:
        """Writes a loop before which its fixed elements are loaded."""
        self.ahead = _Ahead(loop, len(self.text.lines), self.text.depth)
        yield
        self.ahead = None

    def _for(self, loop: Loop) -> None:
        n = loop.name
        self.text.open(f"for (int64_t {n} = 0; {n} < {loop.size}; {n}++)")

    def _body(self, reduced: list[Placed], stored: list[Placed]) -> None:
        for p in self._needed(self._ends(reduced, stored), self.now):
            self._define_full(p)
        self._end(reduced, stored)

    def _ends(self, reduced: list[Placed], stored: list[Placed]) -> list[Placed]:
        """What the elements are computed for."""
        sources = (p.node.refs[0].base for p in reduced)
        return [*(self.members[b] for b in sources if b in self.members), *stored]

    def _end(self, reduced: list[Placed], stored: list[Placed]) -> None:
        for p in reduced:
            self._accumulate(p)
        for p in stored:
            self._store(p)

    # -- the innermost loop ----------------------------------------------------------------------

    def _elements(self, span: Span, reduced: list[Placed], stored: list[Placed]) -> None:
        """One loop over all elements, or several where a chain of arithmetic is long."""
        ends = self._ends(reduced, stored)
        needed = [p.node for p in self._needed(ends, self.now)]
        given = [n for n in needed if self._is_kept(n, self.now)]
        drawn = [n for n in needed if n not in given and self._is_draw(n)]
        pieces = cut(needed, [p.node for p in ends], [*given, *drawn])
        away = self._stored_away(stored)
        arrays = len(pieces) > 1 or bool(away) or bool(drawn)
        if arrays and (span.most is None or span.most > BLOCK or span.parallel):
            self._open_strip(span)
            span = replace(span, low="from", high="to", most=STRIP, parallel="")
        elif arrays:
            self.text.open()
        place = span.name if span.low == "0" else f"{span.name} - {span.low}"
        for n in (*drawn, *(n for piece in pieces for n in piece.leaves)):
            self.text.put(f"{REGISTER[n.outs[0].dtype]} w{self.number[n]}[{span.most}];")
        for p in away:
            kind = MEMORY[p.node.outs[0].dtype]
            self.text.put(f"{kind} f{self.number[p.node]}[{span.most}];")
        self.away = {p.node: f"f{self.number[p.node]}[{place}]" for p in away}
        for n in drawn:
            self._draw(self.members[n.outs[0]], span)
        self.drawn = {n: f"w{self.number[n]}[{place}]" for n in drawn}
        for piece in pieces:
            last = piece is pieces[-1]
            at = self._open_span(span, span.clauses if last else "")
            for n in piece.takes:
                kind = REGISTER[n.outs[0].dtype]
                self.text.put(f"const {kind} {self._name(n)} = w{self.number[n]}[{place}];")
            for n in piece.computes:
                self._define_full(self.members[n.outs[0]])
            for n in piece.leaves:
                self.text.put(f"w{self.number[n]}[{place}] = {self._name(n)};")
            if last:
                self._end(reduced, stored)
            self._begin_each(span, at)
            self.text.close()
        for p in away:
            self._store_away(p, span)
        self.away, self.drawn = {}, {}
        self.text.close(arrays)

    def _elements_loop(self) -> Loop | None:
        """The innermost loop, if its elements are those of one dimension."""
        return self.inner_loops[-1]

    def _stored_away(self, stored: list[Placed]) -> list[Placed]:
        """What is stored past the caches: of neighbours in memory, where nothing else waits."""
        loop = self._elements_loop()
        hosts = [self._host(self.members[n.outs[0]]) for n in self.kept]
        return [
            p for p in stored
            if loop is not None and p.node.outs[0] in self.far and p not in hosts
            and self._result_access(p).strides.get(loop.atoms[-1]) == 1
        ]  # fmt: skip

    def _store_away(self, placed: Placed, span: Span) -> None:
        """Copies a strip of results to where it belongs."""
        out = placed.node.outs[0]
        first = span.first(self._element(out, self._result_access(placed), write=True))
        count, size = f"({span.high} - {span.low})", out.dtype.itemsize
        self.text.put(f"ss_store_far(&{first}, f{self.number[placed.node]}, {count} * {size});")

    def _is_draw(self, node: Node) -> bool:
        """Whether a node draws random numbers of neighbours, which is cheaper for many at once."""
        loop = self._elements_loop()
        if node.name != "rng.uniform.default" or node.outs[0].dtype is not torch.float32:
            return False
        access = self._result_access(self.members[node.outs[0]])
        return loop is not None and access.strides.get(loop.atoms[-1]) == 1

    def _draw(self, placed: Placed, span: Span) -> None:
        """Draws a strip of random numbers."""
        key = ", ".join(self._key(placed.node.refs[0]))
        first = span.first(self._index(placed)).replace(" + 0)", ")")
        count = span.high if span.low == "0" else f"{span.high} - {span.low}"
        site, name = placed.node.attrs["site"] & 0xFFFFFFFF, f"w{self.number[placed.node]}"
        self.text.put(f"ss_uniform({key}, {site}u, {first}, {count}, {name});")

    def _open_span(self, span: Span, clauses: str) -> int:
        """Opens a loop over a span; the line with which its elements begin."""
        parallel, schedule = (
            (f"{span.parallel} ", " schedule(static)") if span.parallel else ("", "")
        )
        self.text.put(f"#pragma omp {parallel}simd{clauses}{schedule}")
        n = span.name
        self.text.open(f"for (int64_t {n} = {span.low}; {n} < {span.high}; {n}++)")
        return len(self.text.lines)

    def _begin_each(self, span: Span, at: int) -> None:
        """What each element begins with, where any of it is used."""
        names = "|".join(begin.split(" =")[0] for begin in span.begins)
        if names and re.search(rf"\b({names})\b", "\n".join(self.text.lines[at:])):
            line = f"const int64_t {', '.join(span.begins)};"
            self.text.insert(at, line, self.text.depth)

    def _open_strip(self, span: Span) -> None:
        """Opens a loop over strips of a span, [from, to)."""
        if span.parallel:
            self.text.put(f"#pragma omp {span.parallel} schedule(static)")
        self.text.open(f"for (int64_t from = {span.low}; from < {span.high}; from += {STRIP})")
        end = f"from + {STRIP}"
        self.text.put(f"const int64_t to = {end} < {span.high} ? {end} : {span.high};")

    def _is_kept(self, node: Node, stage: int) -> bool:
        return node in self.kept and self.kept[node] < stage

    def _define_full(self, p: Placed) -> None:
        """A value of the full level: computed, or taken from the row that an earlier stage kept."""
        if p.node not in self.kept:
            self._define(p)
            return
        row = self._row_element(p)
        if self._is_kept(p.node, self.now):
            kind = REGISTER[p.node.outs[0].dtype]
            self.text.put(f"const {kind} {self._name(p.node)} = {row};")
        else:
            self._define(p)
            self.text.put(f"{row} = {self._name(p.node)};")

    def _row_element(self, p: Placed) -> str:
        host = self._host(p)
        if host is None:
            return f"r{self.number[p.node]}[{self._row_index()}]"
        return self._element(host.node.outs[0], self._result_access(host), write=True)

    def _host(self, p: Placed) -> Placed | None:
        """A result of the last stage in whose place a kept value can wait."""
        dtype = p.node.outs[0].dtype
        if self._keeper(dtype) != p.node or MEMORY[dtype] != REGISTER[dtype]:
            return None
        last = self._stage_roots(self.last_stage)[1]
        fit = (s for s in last if s.node.outs[0].dtype is dtype and self._is_fresh(s))
        return next(fit, None)

    def _keeper(self, dtype: torch.dtype) -> Node | None:
        """The one kept value of a type that may use the place of a result."""
        return next((n for n in self.kept if n.outs[0].dtype is dtype), None)

    def _is_fresh(self, p: Placed) -> bool:
        """Whether its memory holds nothing yet when the kernel starts."""
        return p.node.outs[0] not in self.in_place

    def _row_index(self) -> str:
        """The position within a row, in the order of the inner loops."""
        parts: list[str] = []
        step = 1
        for loop in reversed(self.inner_loops):
            parts.append(loop.name if step == 1 else f"{loop.name} * {step}")
            step *= loop.size
        return " + ".join(reversed(parts))

    def _blocked(self, reduced: list[Placed], stored: list[Placed]) -> None:
        """Partial results of fixed blocks, combined in order: equal for every number of threads."""
        first, *rest = self.inner_loops
        block = -(-first.size // PARTIALS)
        if not rest:
            block = max(-(-block // 64) * 64, 4096)
        count = -(-first.size // block)
        for p in reduced:
            for kind, name in self._acc(p).partials:
                self.text.put(f"{kind} {name}s[{count}];")
        if self._is_parallel() and count > 1:
            self.text.put("#pragma omp parallel for schedule(static)")
        self.text.open(f"for (int64_t q = 0; q < {count}; q++)")
        high = f"(q + 1) * {block} < {first.size} ? (q + 1) * {block} : {first.size}"
        self.text.put(f"const int64_t low = q * {block}, high = {high};")
        for p in reduced:
            self._acc(p).declare(self.text)
        self._nest(
            reduced, stored, [(first, "low", "high"), *((r, "0", str(r.size)) for r in rest)]
        )
        for p in reduced:
            for _, name in self._acc(p).partials:
                self.text.put(f"{name}s[q] = {name};")
        self.text.close()
        for p in reduced:
            a = self._acc(p)
            a.declare(self.text)
            self.text.put(f"for (int64_t q = 0; q < {count}; q++) {{ {a.combine()} }}")
            self._complete(p)

    def _nest(
        self, reduced: list[Placed], stored: list[Placed], loops: list[tuple[Loop, str, str]]
    ) -> None:
        """The inner loops of one pass, the innermost in blocks where sums are long."""
        *outside, (last, low, high) = loops
        for loop, start, end in outside:
            n = loop.name
            self.text.open(f"for (int64_t {n} = {start}; {n} < {end}; {n}++)")
        inner = [self._acc(p) for p in reduced]
        long = last.size > BLOCK and bool(reduced)
        if long:
            self.text.open(f"for (int64_t k = {low}; k < {high}; k += {BLOCK})")
            self.text.put(f"const int64_t end = k + {BLOCK} < {high} ? k + {BLOCK} : {high};")
            low, high = "k", "end"
        for a in inner:
            a.declare_block(self.text)
        clauses = "".join(f" reduction({c})" for a in inner for c in a.clauses)
        most = BLOCK if long else last.size if low == "0" else None
        with self._innermost(last):
            span = Span(last.name, low, high, most, clauses=clauses)
            self._elements(span, reduced, stored)
        for a in inner:
            a.flush(self.text)
        self.text.close(len(outside) + long)

    def _acc(self, p: Placed) -> Accumulators:
        return Accumulators(p, self.number[p.node])

    def _accumulate(self, p: Placed) -> None:
        source = p.node.refs[0]
        text = self._operand(p, source)
        a = self._acc(p)
        value = (
            cast(text, source.dtype, a.dtype)
            if a.dtype is torch.bool
            else widened(text, source.dtype, a.dtype)
        )
        lane = "[l]" if self.by_column else ""
        self.text.put(a.update(value, lane))

    def _complete(self, p: Placed) -> None:
        """The reduction's result, as a value of its level."""
        node, a = p.node, self._acc(p)
        count = math.prod(node.refs[0].shape[i] for i in reduced_dims_of(node))
        lane = "[l]" if self.by_column else ""
        value = a.result(count, lane)
        out = node.outs[0].dtype
        declared = "" if self.by_column else f"const {REGISTER[out]} "
        self.text.put(f"{declared}{self._name(node)} = {value};")

    # -- rows and columns ----------------------------------------------------------------------

    def _outer_nest(self) -> None:
        loops = len(self.outer_loops) + self.by_column
        if self._is_parallel():
            many = f" collapse({loops})" if loops > 1 else ""
            self.text.put(f"#pragma omp parallel for{many} schedule(static)")
        for loop in self.outer_loops:
            self._for(loop)
        if self.by_column:
            self._open_lanes()
        self._row_passes()
        self.text.close(loops)

    def _row_passes(self) -> None:
        """Everything that is done for one outer index."""
        self._outer_level(0)
        for node in (n for n in self.kept if self._host(self.members[n.outs[0]]) is None):
            size = self.atoms.size(self.inner)
            self.text.put(f"{REGISTER[node.outs[0].dtype]} r{self.number[node]}[{size}];")
        for stage in range(self.last_stage + 1):
            self.now = stage
            reduced, stored = self._stage_roots(stage)
            if reduced or stored:
                (self._column_pass if self.by_column else self._row_pass)(reduced, stored)
            self._outer_level(stage + 1)
        self._store_outer()

    def _open_lanes(self) -> None:
        size = self.lane.size
        self.width = min(LANES, size)
        self.text.open(f"for (int64_t c = 0; c < {size}; c += {self.width})")
        short = f"{size} - c < {self.width} ? {size} - c : {self.width}"
        self.text.put(f"const int64_t w = {self.width if size % self.width == 0 else short};")
        for p in self.unit.nodes:
            if self.level[p.node] == "outer":
                kind = REGISTER[p.node.outs[0].dtype]
                self.text.put(f"{kind} v{self.number[p.node]}[{self.width}];")

    def _open_lane_loop(self) -> None:
        self.text.put("#pragma omp simd")
        self.text.open("for (int64_t l = 0; l < w; l++)")

    def _outer_level(self, stage: int) -> None:
        ready = [
            p for p in self.unit.nodes
            if self.level[p.node] == "outer" and self.stage[p.node] == stage
            and p.node.work is Work.POINTWISE
        ]  # fmt: skip
        if not ready:
            return
        if self.by_column:
            self._open_lane_loop()
        for p in ready:
            self._define(p)
        if self.by_column:
            self.text.close()

    def _store_outer(self) -> None:
        ready = [p for p in self.stores if self.level[p.node] == "outer"]
        if ready and self.by_column:
            self._open_lane_loop()
        for p in ready:
            self._store(p)
        if ready and self.by_column:
            self.text.close()

    def _row_pass(self, reduced: list[Placed], stored: list[Placed]) -> None:
        for p in reduced:
            self._acc(p).declare(self.text)
        self._nest(reduced, stored, [(j, "0", str(j.size)) for j in self.inner_loops])
        for p in reduced:
            self._complete(p)

    def _column_pass(self, reduced: list[Placed], stored: list[Placed]) -> None:
        for p in reduced:
            self._acc(p).declare_lanes(self.text, self.width)
        *outside, last = self.inner_loops
        for loop in outside:
            self._for(loop)
        block = BLOCK // 4
        long = last.size > block and bool(reduced)
        n = last.name
        if long:
            self.text.open(f"for (int64_t k = 0; k < {last.size}; k += {block})")
            self.text.put(
                f"const int64_t end = k + {block} < {last.size} ? k + {block} : {last.size};"
            )
        for p in reduced:
            self._acc(p).declare_block_lanes(self.text, self.width)
        start, end = ("k", "end") if long else ("0", str(last.size))
        self.text.open(f"for (int64_t {n} = {start}; {n} < {end}; {n}++)")
        self._open_lane_loop()
        self._body(reduced, stored)
        self.text.close(2)
        if reduced:
            self._open_lane_loop()
            for p in reduced:
                self._acc(p).flush(self.text, "[l]")
            self.text.close()
        self.text.close(len(outside) + long)
        if reduced:
            self._open_lane_loop()
            for p in reduced:
                self._complete(p)
            self.text.close()


# Ops that read their operand, a random key, as a whole: no loop walks it.
_INDEXED = frozenset({
    "aten.arange.start_step", "rng.uniform.default", "rng.bits.default", "rng.advance.default",
})  # fmt: skip


def _raw(operand: object) -> tuple[str, torch.dtype] | None:
    return (operand[0], operand[1]) if isinstance(operand, tuple) else None


def _described(node: Node) -> str:
    shape = ",".join(map(str, node.outs[0].shape))
    return f"{DTYPE_NAMES[node.outs[0].dtype]}[{shape}] {node.outs[0].label}"


def _stem(nodes: list[Node]) -> str:
    """A short name from the first and the last op."""
    names = [n.name.split(".")[1].strip("_") for n in nodes]
    return names[0] if len(names) == 1 else f"{names[0]}_{names[-1]}"
