"""Writes `docs/core-ops.md` from the registry; `--check` only says whether it is up to date.

python docs/generate.py [--check]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from shoestring.ir import OpDef, core_set
from shoestring.ir.opdef import CostRule
from shoestring.ir.ops import REGISTRY
from shoestring.ir.ops.aten import (
    default_cost,
    infer_by_running,
    pointwise_cost,
    replicate,
    view_cost,
)

TARGET = Path(__file__).with_name("core-ops.md")
HEAD = """# The core set

The {count} ops that every code generator implements; every other op is a composition of these, or
is run by a library. This page is written by `docs/generate.py` from `ir/ops`.

* **Operands** are tensors, **attributes** all else; an attribute's default is PyTorch's.
* **Types**: where the types of results come from: PyTorch's own rule for tensors without data
  (`PyTorch`), or ours (`own`).
* **Cost**: floating-point operations; bytes are those of operands and results, unless it is a view.
* **Sharding**: whether there is a rule that says how the op is split over devices. {ruled} of all
  {known} ops that have a definition of their own have one. Each is checked by brute force in
  `tests/ir/test_sharding.py`.
"""
COSTS: dict[CostRule, str] = {
    default_cost: "0",
    pointwise_cost: "1 a result element",
    view_cost: "0, nothing moves",
}


def page() -> str:
    """The whole document."""
    ruled = sum(op.factors is not replicate for op in REGISTRY.values())
    parts = [HEAD.format(count=len(core_set()), ruled=ruled, known=len(REGISTRY))]
    for kind in sorted({op.kind for op in core_set()}, key=lambda k: k.value):
        parts.append(section(kind.value, [op for op in core_set() if op.kind is kind]))
    return "\n".join(parts)


def section(title: str, ops: list[OpDef]) -> str:
    """A table of the ops of one kind."""
    lines = [f"## {title.capitalize()}", ""]
    lines.append("| op | meaning | operands | attributes | types | cost | sharding |")
    lines.append("|---|---|---|---|---|---|---|")
    lines += [row(op) for op in ops]
    return "\n".join(lines) + "\n"


def row(op: OpDef) -> str:
    types = "PyTorch" if op.infer is infer_by_running else "own"
    cells = [
        f"`{op.name}`",
        op.doc,
        ", ".join(op.operand_names),
        ", ".join(op.attr_defaults),
        types,
        COSTS.get(op.cost) or (op.cost.__doc__ or "multiply-adds, two each").split(".")[0].strip(),
        "no" if op.factors is replicate else "yes",
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    given = parser.parse_args()
    text = page()
    if given.check:
        if TARGET.exists() and TARGET.read_text() == text:
            return 0
        print("docs/core-ops.md is out of date: run `python docs/generate.py`", file=sys.stderr)
        return 1
    TARGET.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
