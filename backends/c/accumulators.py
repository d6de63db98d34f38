"""The C variables of reductions."""

from __future__ import annotations

import torch

from .expressions import FLOATS, REGISTER, cast, literal, opmath, rounded
from .groups import Placed
from .reductions import REDUCTIONS, Reduction, accumulator
from .text import Text


class Accumulators:
    """The C variables of one reduction: `t` over everything, `a` over one block.

    Sums of f32 take in a block in f32, as SIMD does, and add blocks in f64.
    """

    def __init__(self, placed: Placed, number: int) -> None:
        node = placed.node
        self.kind: Reduction = REDUCTIONS[node.name]
        self.out = node.outs[0].dtype
        self.dtype = accumulator(self.kind.how, self.out)
        self.id = number
        self.block_type = REGISTER[self.dtype]
        wide = self.kind.how in ("sum", "prod") and self.dtype is torch.float32
        self.total_type = "double" if wide else self.block_type
        self.tracks_nan = self.kind.how in ("max", "min") and self.dtype in FLOATS

    @property
    def start(self) -> str:
        how = self.kind.how
        if how in ("sum", "any"):
            return "0"
        if how in ("prod", "all"):
            return "1"
        if self.dtype in FLOATS:
            return "-INFINITY" if how == "max" else "INFINITY"
        if self.dtype is torch.bool:
            return "0" if how == "max" else "1"
        info = torch.iinfo(self.dtype)
        return literal(info.min if how == "max" else info.max, self.dtype)

    @property
    def sign(self) -> str:
        return {"sum": "+", "prod": "*", "any": "|", "all": "&", "max": "max", "min": "min"}[
            self.kind.how
        ]

    @property
    def partials(self) -> list[tuple[str, str]]:
        """Type and name of everything that a block leaves behind."""
        own = [(self.total_type, f"t{self.id}")]
        return [*own, ("int", f"n{self.id}")] if self.tracks_nan else own

    @property
    def clauses(self) -> list[str]:
        own = [f"{self.sign} : a{self.id}"]
        return [*own, f"| : m{self.id}"] if self.tracks_nan else own

    def declare(self, text: Text) -> None:
        nan = f" int n{self.id} = 0;" if self.tracks_nan else ""
        text.put(f"{self.total_type} t{self.id} = {self.start};{nan}")

    def declare_block(self, text: Text) -> None:
        nan = f" int m{self.id} = 0;" if self.tracks_nan else ""
        text.put(f"{self.block_type} a{self.id} = {self.start};{nan}")

    def declare_lanes(self, text: Text, width: int) -> None:
        for kind, name in self.partials:
            start = "0" if name.startswith("n") else self.start
            text.put(f"{kind} {name}[{width}];")
            text.put(f"for (int64_t l = 0; l < {width}; l++) {name}[l] = {start};")

    def declare_block_lanes(self, text: Text, width: int) -> None:
        names = [(self.block_type, f"a{self.id}", self.start)]
        if self.tracks_nan:
            names.append(("int", f"m{self.id}", "0"))
        for kind, name, start in names:
            text.put(f"{kind} {name}[{width}];")
            text.put(f"for (int64_t l = 0; l < {width}; l++) {name}[l] = {start};")

    def _into(self, target: str, value: str) -> str:
        if self.kind.how in ("max", "min"):
            sign = ">" if self.kind.how == "max" else "<"
            return f"{target} = {value} {sign} {target} ? {value} : {target};"
        return f"{target} {self.sign}= {value};"

    def update(self, value: str, lane: str = "") -> str:
        nan = f" m{self.id}{lane} |= {value} != {value};" if self.tracks_nan else ""
        return self._into(f"a{self.id}{lane}", value) + nan

    def flush(self, text: Text, lane: str = "") -> None:
        nan = f" n{self.id}{lane} |= m{self.id}{lane};" if self.tracks_nan else ""
        text.put(self._into(f"t{self.id}{lane}", f"a{self.id}{lane}") + nan)

    def combine(self) -> str:
        nan = f" n{self.id} |= n{self.id}s[q];" if self.tracks_nan else ""
        return self._into(f"t{self.id}", f"t{self.id}s[q]") + nan

    def result(self, count: int, lane: str = "") -> str:
        total = f"t{self.id}{lane}"
        if self.tracks_nan:
            return f"n{self.id}{lane} ? NAN : {total}"
        if self.kind.mean:
            total = f"{total} / {count}"
        if self.dtype is torch.bool:
            return cast(total, torch.bool, self.out) if self.out is not torch.bool else total
        return rounded(f"({REGISTER[opmath(self.out)]})({total})", self.out)
