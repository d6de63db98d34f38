"""Writing a matrix product and its epilogue as one C function.

`gemm.c` computes the product and hands over blocks of it while they are in the cache; the generated
part stores them, with everything else of the kernel done to each element on the way.
"""

from __future__ import annotations

import torch

from .expressions import rounded
from .groups import Placed
from .kernels import Kernel, KernelWriter, Loop
from .nodes import Node, Ref
from .packing import COLS, is_packed
from .products import AXES, TYPES, axes_of, grouping_of, sides_of
from .sides import Digits, Frame, Numbers, Side, stride_of, written_out

ROWS, KC, MC, GROUP, TILES = 32, 384, 264, 4, 512 << 10  # at least those of gemm.c


class ProductWriter(KernelWriter):
    """Writes a unit that has a product."""

    def _loops(self) -> None:
        product = self.unit.product
        assert product is not None, "a unit without a product has a writer of its own"
        self.product = product
        axes = axes_of(self.atoms, product.node, product.domain)
        sizes = [self.atoms.size(axis) for axis in axes]
        self.sizes = dict(zip(AXES, sizes, strict=True))
        self.sides = sides_of(product.node)
        self.by_column = False
        self.outer_loops = []
        self.inner_loops = [
            Loop(name, size, axis)
            for name, size, axis in zip(AXES, sizes, axes, strict=True)
            if axis
        ]
        self.index_of = {a: loop for loop in self.inner_loops for a in loop.atoms}

    def _value(self, placed: Placed) -> str:
        if placed is not self.product:
            return super()._value(placed)
        return rounded("tile[i * stride + j]", placed.node.outs[0].dtype)

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
        helper = (
            "static void @_finish(void *const *b, int64_t batch, int64_t r0, int64_t c0,"
            " int64_t rows,\n                     int64_t cols, const float *tile,"
            f" int64_t stride) {{\n{self._body_text()}\n}}\n"
        )
        a, b, frame = self.sides.a, self.sides.b, self.sides.frame
        _, _, *ends = self.product.node.refs
        groups = f"(const int32_t *)({self._start(ends[0])})" if ends else "0"
        left, right = self._start(a.ref, a.offset), self._start(b.ref, 0 if frame else b.offset)
        lines, framed = [self._shape()], 0
        scratch = f"b[{len(self.pointers)}]"
        if frame is not None:
            framed = frame.nbytes(b.ref)
            lines += [_frame(frame, b.ref), f"    ss_frame_run(&frame, {right}, {scratch});"]
            right = f"(const char *){scratch}{_plus(b.offset, b.ref)}"
            scratch = f"(char *){scratch} + {framed}"
        cols = self.sizes["batch"] * (self.sizes["image"] * self.sizes["col"] + COLS)
        threads = torch.get_num_threads()
        room = threads * scratch_of(self.sizes["row"], cols, self.sides.summed)
        lines.append(f"    ss_gemm_run(&g, {left}, {right}, {groups}, b, {scratch}, {threads});")
        return self._finish("\n".join(lines), helper, framed + room)

    def _epilogue(self) -> None:
        text = self.text
        text.open("for (int64_t i = 0; i < rows; i++)")
        text.put("const int64_t row = r0 + i;")
        text.put("#pragma omp simd")
        text.open("for (int64_t j = 0; j < cols; j++)")
        if self.sizes["image"] > 1:
            size = self.sizes["col"]
            text.put(f"const int64_t image = (c0 + j) / {size}, col = (c0 + j) % {size};")
        else:
            text.put("const int64_t col = c0 + j;")
        self._body([], self.stores)
        text.close(2)

    # -- the product itself --------------------------------------------------------------------

    def _start(self, ref: Ref, offset: int = 0) -> str:
        """The address of an element of an operand, `offset` elements from its first."""
        pointer, left = self._pointer(ref.base, ref.layout.offset)
        return f"(const char *)b[{pointer.removeprefix('p')}]{_plus(left + offset, ref)}"

    def _shape(self) -> str:
        grouping, count = grouping_of(self.product.node.op)
        groups = f"        {grouping}, {count},\n" if count else ""
        matrices, rows, images, cols = (self.sizes[axis] for axis in AXES)
        a, b = self.sides.a, self.sides.b
        lists, named = "", ""
        for name, digits in self.sides.lists().items():
            lists += f"    static const ss_digits {name} = {_digits(digits)};  // sizes, strides\n"
            named += f"        .{name} = &{name},\n"
        if is_packed(b.ref):
            named += "        .b_packed = 1,  // by ss_gemm_pack\n"
        return (
            f"{lists}    static const ss_gemm g = {{\n"
            f"        {matrices}, {rows}, {images * cols}, {self.sides.summed},"
            f" {TYPES[a.ref.dtype]},  // matrices, rows, columns, summed\n"
            f"        {_strides(a)},  // A\n"
            f"        {_strides(b)},  // B\n"
            f"        @_finish,\n{groups}{named}"
            f"    }};"
        )


def scratch_of(rows: int, cols: int, summed: int) -> int:
    """Bytes that one thread of `ss_gemm_run` needs at most, on any machine.

    Args:
        rows: of one product.
        cols: of all products that have one left side, each with its columns rounded up by `COLS`.
        summed: the size of the dimension that is summed up.
    """
    block = min(summed + ROWS, KC)
    rows = min(MC, rows + ROWS)
    fit = max(COLS, min(cols, TILES // (4 * rows)))
    wait = fit if summed + ROWS > KC else min(fit, GROUP * COLS)  # for the next block of K
    return 4 * (GROUP * COLS * block + rows * wait + rows * block) + 64


def _plus(elements: int, ref: Ref) -> str:
    return f" + {elements * ref.dtype.itemsize}" if elements else ""


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
