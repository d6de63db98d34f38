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
from .products import axes_of, grouping_of

ROWS, COLS, KC, MC, PACKED_A = 32, 48, 384, 256, 2 << 20  # at least those of gemm.c
AXES = ("batch", "row", "col")
TYPES = {torch.float32: "SS_F32", torch.bfloat16: "SS_BF16"}


class ProductWriter(KernelWriter):
    """Writes a unit that has a product."""

    def _loops(self) -> None:
        product = self.unit.product
        assert product is not None, "a unit without a product has a writer of its own"
        self.product = product
        axes = axes_of(self.atoms, product.domain)
        sizes = [self.atoms.size(axis) for axis in axes]
        self.sizes = dict(zip(AXES, sizes, strict=True))
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
        a, b, *ends = self.product.node.refs
        scratch, threads = self._scratch()
        sides = f"{self._side(a)}, {self._side(b)}"
        groups = f"(const int32_t *)({self._side(ends[0])})" if ends else "0"
        call = f"    ss_gemm_run(&g, {sides}, {groups}, b, b[{len(self.pointers)}], {threads});"
        return self._finish(f"{self._shape(a, b)}\n{call}", helper, scratch)

    def _epilogue(self) -> None:
        text = self.text
        text.open("for (int64_t i = 0; i < rows; i++)")
        text.put("const int64_t row = r0 + i;")
        text.put("#pragma omp simd")
        text.open("for (int64_t j = 0; j < cols; j++)")
        text.put("const int64_t col = c0 + j;")
        self._body([], self.stores)
        text.close(2)

    # -- the product itself --------------------------------------------------------------------

    def _side(self, ref: Ref) -> str:
        pointer, left = self._pointer(ref.base, ref.layout.offset)
        offset = f" + {left * ref.dtype.itemsize}" if left else ""
        return f"(const char *)b[{pointer.removeprefix('p')}]{offset}"

    def _strides(self, ref: Ref) -> str:
        strides = (0, 0, 0, *ref.layout.strides)[-3:]
        return ", ".join(map(str, strides))

    def _shape(self, a: Ref, b: Ref) -> str:
        k = a.shape[-1]
        grouping, count = grouping_of(self.product.node.op)
        groups = f"        {grouping}, {count},\n" if count else ""
        sizes = ", ".join(str(self.sizes[axis]) for axis in AXES)
        return (
            f"    static const ss_gemm g = {{\n"
            f"        {sizes}, {k}, {TYPES[a.dtype]},  // matrices, rows, columns, summed\n"
            f"        {self._strides(a)},  // A\n"
            f"        {self._strides(b)},  // B\n"
            f"        @_finish,\n{groups}"
            f"    }};"
        )

    def _scratch(self) -> tuple[int, int]:
        """Bytes for all threads, and how many may take part."""
        k = self.product.node.refs[0].shape[-1]
        rows = min(MC, -(-self.sizes["row"] // ROWS) * ROWS)
        k += ROWS  # padding of K
        packed = min(rows * k * 4, max(PACKED_A, ROWS * k * 4))
        each = 4 * COLS * (min(k, KC) + rows) + packed + 64
        threads = torch.get_num_threads()
        return each * threads, threads
