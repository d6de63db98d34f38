"""Writing a matrix product and its epilogue as one C function.

`gemm.c` computes the product and hands over blocks of it while they are in the cache; the generated
part stores them, with everything else of the kernel done to each element on the way.
"""

from __future__ import annotations

import math
from textwrap import indent

import torch

from .expressions import rounded
from .groups import Placed
from .kernels import Kernel, KernelWriter, Loop, Span
from .nodes import Node, Ref
from .packing import is_packed, packed_once
from .products import AXES, COLUMNS, FACTORS, PHASES, axes_of, grouping_of, sides_of
from .room import Extent, this_machine, thread_bytes
from .sides import Digits, Frame, Numbers, Side, Sides, Windows, count_of, stride_of, written_out

GIVEN = "b, batch, r0, c0, rows, cols, tile, stride"  # to an `ss_finish`
PARAMETERS = (
    "void *const *b, int64_t batch, int64_t r0, int64_t c0, int64_t rows,\n"
    "                     int64_t cols, const float *tile, int64_t stride"
)


class ProductWriter(KernelWriter):
    """Writes a unit that has a product."""

    def _loops(self) -> None:
        product = self.unit.product
        assert product is not None, "a unit without a product has a writer of its own"
        self.product = product
        axes = axes_of(self.atoms, product.node, product.domain)
        self.sizes = {axis: self.atoms.size(axes.get(axis, ())) for axis in AXES}
        self.sides = sides_of(product.node)
        self.by_column = False
        self.outer_loops = []
        self.inner_loops = [
            Loop(name, self.sizes[name], axes[name]) for name in AXES if axes.get(name)
        ]
        self.index_of = {a: loop for loop in self.inner_loops for a in loop.atoms}

    def _value(self, placed: Placed) -> str:
        if placed is not self.product:
            return super()._value(placed)
        dtype = placed.node.outs[0].dtype
        text = "tile[i * stride + j]"
        return f"(int32_t)ss_bits({text})" if dtype is torch.int32 else rounded(text, dtype)

    def _needed(self, roots: list[Placed], stage: int = 0) -> list[Placed]:
        """Everything but what was computed before the loops: all leads to a store."""
        found: set[Node] = set()
        stack = list(roots)
        while stack:
            p = stack.pop()
            if p.node in found:
                continue
            found.add(p.node)
            if p is not self.product:
                stack.extend(self.members[r.base] for r in p.node.refs if r.base in self.members)
        return [p for p in self.unit.nodes if p.node in found]

    def write(self) -> Kernel:
        self.scalars: list[str] = []
        self._epilogue()
        frame, images = self.sides[0].frame, self.sides[0].images.ref
        first, second = (self._start(ref) for ref in self.product.node.refs[:2])
        _, _, *ends = self.product.node.refs
        groups = f"(const int32_t *)({self._start(ends[0])})" if ends else "0"
        scratch = f"b[{len(self.pointers)}]"
        lines, used = list[str](), 0
        if frame is not None:
            used = frame.nbytes(images)
            how = "ss_frame_by_place" if frame.by_place else "ss_frame_run"
            lines += [_frame(frame, images), f"    {how}(&frame, {second}, {scratch});"]
            second = f"(const char *){scratch}"
        packed = max(map(self._packed, self.sides))
        threads = torch.get_num_threads()
        for sides in self.sides:
            left, right = (first, second) if sides.windows is None else (second, first)
            left += _plus(sides.a.offset, sides.a.ref)
            right += _plus(sides.b.offset, sides.b.ref)
            call = self._shape(sides)
            if self._packed(sides):
                to = f"(char *){scratch} + {used}"
                call += f"\n    ss_gemm_pack(&g, {right}, {to});"
                right = to
            room = f"(char *){scratch} + {used + packed}" if used + packed else scratch
            call += f"\n    ss_gemm_run(&g, {left}, {right}, {groups}, b, {room}, {threads});"
            if len(self.sides) > 1:
                call = f"    {{\n{indent(call, '    ')}\n    }}"
            lines.append(call)
        machine = this_machine()
        most = max(thread_bytes(machine, sides, self._extent(sides)) for sides in self.sides)
        return self._finish("\n".join(lines), self._helper(), used + packed + threads * most)

    def _extent(self, sides: Sides) -> Extent:
        packed = self._packed(sides) > 0 or is_packed(sides.b.ref)
        if sides.windows is not None:
            return Extent(1, count_of(sides.a.rows), count_of(sides.b.cols), packed=packed)
        rows, order = self.sizes["row"], sides.order
        if order is not None:
            return Extent(order.matrices, rows, count_of(sides.b.cols))
        grouping, _ = grouping_of(self.product.node.op)
        return Extent(self.sizes["batch"], rows, self._columns, grouping, packed)

    def _packed(self, sides: Sides) -> int:
        """Room for a right side that is packed once for this product."""
        return packed_once(self.product.node.op, sides, self.sizes["row"])

    @property
    def _columns(self) -> int:
        return math.prod(self.sizes[axis] for axis in COLUMNS)

    def _phase(self, sides: Sides) -> dict[str, int]:
        """What a phase adds to positions, by name; nothing where there is one product."""
        phases = dict(zip(PHASES, sides.phase, strict=False))
        return {name: at for name, at in phases.items() if self.sizes[name] > 1}

    def _store_of(self, sides: Sides) -> str:
        """The function that stores a product."""
        return "_".join(["@_finish", *map(str, self._phase(sides).values())])

    def _helper(self) -> str:
        """The epilogue; of several products, one that is told the phase, and what tells it."""
        body = f" {{\n{self._body_text()}\n}}\n"
        phases = [self._phase(sides) for sides in self.sides]
        if len(phases) == 1:
            return f"static void @_finish({PARAMETERS}){body}"
        added = ", ".join(f"const int64_t {name}" for name in phases[0])
        text = f"SS_INLINE void @_store({PARAMETERS},\n                      {added}){body}"
        for sides, phase in zip(self.sides, phases, strict=True):
            given = ", ".join([GIVEN, *map(str, phase.values())])
            opened = f"static void {self._store_of(sides)}({PARAMETERS}) {{\n"
            text += f"{opened}    @_store({given});\n}}\n"
        return text

    def _epilogue(self) -> None:
        text = self.text
        text.open("for (int64_t i = 0; i < rows; i++)")
        text.put("const int64_t row = r0 + i;")
        columns = [name for name in COLUMNS if self.sizes[name] > 1] or ["col"]
        inner = self._columns
        digits = list[str]()
        for name in columns:
            size = self.sizes[name]
            inner //= size
            over = f"(c0 + j) / {inner}" if inner > 1 else "c0 + j"
            if name is not columns[0]:
                over = f"({over}) % {size}" if inner == 1 else f"{over} % {size}"
            digits.append(f"{name} = {over}")
        self._elements(Span("j", "0", "cols", None, begins=tuple(digits)), [], self.stores)
        text.close()

    def _elements_loop(self) -> Loop | None:
        others = any(self.sizes[name] > 1 for name in (*COLUMNS, *PHASES) if name != "col")
        loops = [loop for loop in self.inner_loops if loop.name == "col"]
        return None if others or not loops else loops[0]

    # -- the product itself --------------------------------------------------------------------

    def _start(self, ref: Ref) -> str:
        """The address of the first element of an operand."""
        pointer, left = self._pointer(ref.base, ref.layout.offset)
        return f"(const char *)b[{pointer.removeprefix('p')}]{_plus(left, ref)}"

    def _shape(self, sides: Sides) -> str:
        if sides.windows is not None:
            return self._windows(sides, sides.windows)
        grouping, count = grouping_of(self.product.node.op)
        groups = f"        {grouping}, {count},\n" if count else ""
        extent = self._extent(sides)
        a, b, order = sides.a, sides.b, sides.order
        lists, named = "", ""
        for name, digits in sides.lists().items():
            lists += f"    static const ss_digits {name} = {_digits(digits)};  // sizes, strides\n"
            named += f"        .{name} = &{name},\n"
        if order is not None:
            lists += (
                f"    static const ss_order order = {{{_digits(order.at)},"
                f" {count_of(order.at)}, {order.count}}};  // of columns\n"
            )
            named += "        .order = &order,\n"
        if extent.packed:
            named += "        .b_packed = 1,  // by ss_gemm_pack\n"
        return (
            f"{lists}    static const ss_gemm g = {{\n"
            f"        {extent.matrices}, {extent.rows}, {extent.cols}, {sides.summed},"
            f" {FACTORS[a.ref.dtype]},  // matrices, rows, columns, summed\n"
            f"        {_strides(a)},  // A\n"
            f"        {_strides(b)},  // B\n"
            f"        {self._store_of(sides)},\n{groups}{named}"
            f"    }};"
        )

    def _windows(self, sides: Sides, windows: Windows) -> str:
        extent = self._extent(sides)
        packed = "        .b_packed = 1,\n" if extent.packed else ""
        if sides.b.ref.is_rounded:
            packed += "        .b_rounded = 1,  // from f32, while they are packed\n"
        a_taps, b_taps = (", ".join(map(str, t)) or "0" for t in (windows.a_taps, windows.b_taps))
        kind = FACTORS[sides.a.ref.dtype]
        return (
            f"    static const int64_t a_taps[] = {{{a_taps}}}, b_taps[] = {{{b_taps}}};\n"
            f"    static const ss_windows windows = {{\n"
            f"        {windows.channels}, {len(windows.a_taps)}, a_taps, b_taps,"
            f"  // channels, taps of a window\n"
            f"        {_digits(windows.rows)}, {windows.places},"
            f"  // where windows begin, how many make a row of the result\n"
            f"    }};\n"
            f"    static const ss_gemm g = {{\n"
            f"        1, {extent.rows}, {extent.cols}, {sides.summed},"
            f" {kind},  // matrices, windows, columns, summed\n"
            f"        0, 0, 1,  // A\n"
            f"        {_strides(sides.b)},  // B\n"
            f"        {self._store_of(sides)},\n"
            f"        .windows = &windows,\n{packed}"
            f"    }};"
        )


def _plus(elements: int, ref: Ref) -> str:
    return f" + {elements * ref.base.dtype.itemsize}" if elements else ""


def _strides(side: Side) -> str:
    along = (stride_of(side.rows) or 0, stride_of(side.cols) or 0)
    return ", ".join(map(str, (side.batch, *along)))


def _digits(digits: Digits) -> str:
    """The initializer of an `ss_digits`."""
    return "{" + ", ".join(map(_numbers, written_out(digits))) + "}"


def _frame(frame: Frame, ref: Ref) -> str:
    numbers = ", ".join(map(_numbers, frame.numbers(ref)))
    return f"    static const ss_frame frame = {{{ref.dtype.itemsize}, {numbers}}};"


def _numbers(numbers: Numbers) -> str:
    return "{" + ", ".join(map(str, numbers)) + "}"
