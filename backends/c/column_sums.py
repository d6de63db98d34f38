"""Kernels that sum over rows while they work within rows.

    for each block of rows        in parallel; its length depends on the number of rows alone
        for each row: the row kernel; each column is added to the block's own sums
    for each column
        add the blocks' sums in order, then what is computed from the column

So the gradient of a bias costs no pass over memory of its own, and every number of threads gives
the same sums.
"""

from __future__ import annotations

import torch

from .expressions import widened
from .groups import Placed
from .kernels import LANES, PARALLEL_WORK, Kernel, KernelWriter, Level, Loop, Span
from .levels import block_rows
from .nodes import Node, Work

COLUMNS = "columns"


class ColumnSumWriter(KernelWriter):
    """Writes a unit with a level of columns. Rows are its outer loops, columns its inner ones."""

    def _resolve_levels(self) -> None:
        assert self.unit.columns is not None, "a unit without columns has a writer of its own"
        self.columns = set(self.atoms.resolve(self.unit.columns))
        super()._resolve_levels()
        self.outer = tuple(a for a in self.full if a not in self.columns)

    def _level_of(self, loops: tuple[int, ...]) -> Level:
        if loops and set(loops) == self.columns:
            return COLUMNS
        rows = self.unit.outer is not None and set(loops) == set(self.full) - self.columns
        return "none" if not loops else "outer" if rows else "full"

    def _is_by_column(self, inner: set[int]) -> bool:
        return False

    def _sums(self) -> list[Placed]:
        """The sums over rows."""
        return [
            p for p in self.unit.nodes
            if p.node.work is Work.REDUCTION and self.level[p.node] == COLUMNS
        ]  # fmt: skip

    # -- the whole -----------------------------------------------------------------------------

    def write(self) -> Kernel:
        self.scalars: list[str] = []
        self.rows, self.count = self.atoms.size(self.outer), self.atoms.size(self.inner)
        self.block = block_rows(self.rows)
        self.blocks = -(-self.rows // self.block)
        self.adding: list[Placed] = []
        self._none_level(0)
        self._row_blocks()
        self._combine()
        for p in self.stores:
            if self.level[p.node] == "none":
                self._store(p)
        head = f"    char *const sums = b[{len(self.pointers)}];"
        return self._finish(f"{head}\n{self._body_text()}", scratch=self._scratch())

    def _row_blocks(self) -> None:
        if self._is_parallel() and self.blocks > 1:
            self.text.put("#pragma omp parallel for schedule(static)")
        self.text.open(f"for (int64_t q = 0; q < {self.blocks}; q++)")
        for p in self._sums():
            self.text.put(f"{self._sums_of(p.node)} + q * {self.count};")
            name = f"s{self.number[p.node]}"
            self.text.put(f"for (int64_t j = 0; j < {self.count}; j++) {name}[j] = 0;")
        low, high = f"q * {self.block}", f"(q + 1) * {self.block}"
        if self.rows % self.block:
            high = f"({high} < {self.rows} ? {high} : {self.rows})"
        self._open_rows(low, high)
        self._row_passes()
        self.text.close(2)

    def _open_rows(self, low: str, high: str) -> None:
        """Opens the loop over a block's rows; several outer loops are counted as one."""
        if len(self.outer_loops) == 1:
            name = self.outer_loops[0].name
            self.text.open(f"for (int64_t {name} = {low}; {name} < {high}; {name}++)")
            return
        self.text.open(f"for (int64_t i = {low}; i < {high}; i++)")
        step = 1
        for loop in reversed(self.outer_loops):
            index = "i" if step == 1 else f"i / {step}"
            self.text.put(f"const int64_t {loop.name} = {index} % {loop.size};")
            step *= loop.size

    def _sums_of(self, node: Node, const: str = "") -> str:
        """Declares the pointer to a column's sums in the scratch memory."""
        index = [p.node for p in self._sums()].index(node)
        kind, offset = self._sum_type(node), index * self._bytes_of_one()
        at = f" + {offset}" if offset else ""
        return f"{const}{kind} *restrict s{self.number[node]} = ({const}{kind} *)(sums{at})"

    def _sum_type(self, node: Node) -> str:
        return "double" if node.outs[0].dtype is torch.float64 else "float"

    def _bytes_of_one(self) -> int:
        size = max((8 if self._sum_type(p.node) == "double" else 4) for p in self._sums())
        return -(-size * self.blocks * self.count // 64) * 64

    def _scratch(self) -> int:
        return self._bytes_of_one() * len(self._sums())

    # -- within rows ---------------------------------------------------------------------------

    def _row_pass(self, reduced: list[Placed], stored: list[Placed]) -> None:
        self.adding = [p for p in reduced if self.level[p.node] == COLUMNS]
        super()._row_pass([p for p in reduced if p not in self.adding], stored)

    def _elements(self, span: Span, reduced: list[Placed], stored: list[Placed]) -> None:
        super()._elements(span, [*reduced, *self.adding], stored)

    def _accumulate(self, p: Placed) -> None:
        if p not in self.adding:
            super()._accumulate(p)
            return
        source = p.node.refs[0]
        dtype = self._acc(p).dtype
        value = widened(self._operand(p, source), source.dtype, dtype)
        self.text.put(f"s{self.number[p.node]}[{self._row_index()}] += {value};")

    # -- columns -------------------------------------------------------------------------------

    def _combine(self) -> None:
        *outside, last = self.inner_loops
        if self.blocks * self.count * len(self._sums()) >= PARALLEL_WORK:
            many = f" collapse({len(outside) + 1})" if outside else ""
            self.text.put(f"#pragma omp parallel for{many} schedule(static)")
        for loop in outside:
            self._for(loop)
        lanes = min(LANES, last.size)
        self.text.open(f"for (int64_t c = 0; c < {last.size}; c += {lanes})")
        short = f"{last.size} - c < {lanes} ? {last.size} - c : {lanes}"
        self.text.put(f"const int64_t w = {lanes if last.size % lanes == 0 else short};")
        for p in self._sums():
            self._add_blocks(p, lanes, outside)
        self.text.put("#pragma omp simd")
        self.text.open("for (int64_t l = 0; l < w; l++)")
        self.text.put(f"const int64_t {last.name} = c + l;")
        self._column_values()
        self.text.close(2 + len(outside))

    def _add_blocks(self, p: Placed, lanes: int, outside: list[Loop]) -> None:
        number = self.number[p.node]
        self.text.put(f"{self._sums_of(p.node, 'const ')};")
        self.text.put(f"double u{number}[{lanes}] = {{0}};")
        self.text.put(f"for (int64_t q = 0; q < {self.blocks}; q++)")
        column = self._row_index().rsplit(" + ", 1)[0] + " + c" if outside else "c"
        self.text.put(
            f"    for (int64_t l = 0; l < w; l++) u{number}[l] +="
            f" s{number}[q * {self.count} + {column} + l];"
        )

    def _column_values(self) -> None:
        nodes = [p for p in self.unit.nodes if self.level[p.node] == COLUMNS]
        for p in nodes:
            if p.node.work is Work.REDUCTION:
                number = self.number[p.node]
                self.text.put(f"const double t{number} = u{number}[l];")
                self._complete(p)
            else:
                self._define(p)
        for p in self.stores:
            if self.level[p.node] == COLUMNS:
                self._store(p)
