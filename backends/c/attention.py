"""Attention and its gradients as calls of the blocked kernels in attention.h.

B: batch, H: heads of queries, G: heads of keys and values, T: queries, S: keys, D: size of a head
of queries and keys, E: of values.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from shoestring.ir import DTYPE_NAMES, Op

from .claims import Claim, Orders
from .nodes import Node, NodeOperand, Ref

FORWARD = "aten._scaled_dot_product_flash_attention_for_cpu.default"
BACKWARD = "aten._scaled_dot_product_flash_attention_for_cpu_backward.default"
OWN, OWN_BACKWARD = "attention.softmax.default", "attention.softmax_backward.default"
FORWARD_OPERANDS = ("q", "k", "v", "mask", "key")
BACKWARD_OPERANDS = ("grad", "q", "k", "v", "out", "lse", "mask", "key")
OWN_ATTRS = ("keep", "site", "fill", "safe")
HEADER = Path(__file__).with_name("attention.h")

KINDS = {
    torch.float32: "SS_ELEM_F32", torch.bfloat16: "SS_ELEM_BF16", torch.float16: "SS_ELEM_F16",
    torch.float64: "SS_ELEM_F64",
}  # fmt: skip
MASKS = {**KINDS, torch.bool: "SS_ELEM_BOOL"}
UNLIKE = frozenset({"lse", "mask", "key"})  # of another type than the others
PARALLEL_WORK = 1 << 19  # multiplications below which a second thread costs more than it saves

HEADS_INSIDE = (0, 2, 1, 3)  # stored as [B, T, H, D]: the permutation after attention is free


@dataclass(frozen=True)
class Case:
    """One call: its operands by name, and sizes.

    Where there is a `key` of random numbers, weights whose number is not less than `keep` are
    dropped; `site` is the draw's. Scores that a mask of bools hides are `fill`; a query all of
    whose scores are -inf gets 0 where it is `safe`, else NaN.
    """

    backward: bool
    refs: dict[str, Ref]
    causal: bool
    scale: float
    keep: float = 1.0
    site: int = 0
    fill: float = -math.inf
    safe: bool = True

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int, int]:
        """B, H, G, T, S, D, E."""
        q, k, v = (self.refs[n].shape for n in ("q", "k", "v"))
        return q[0], q[1], k[1], q[2], k[2], q[3], v[3]

    @property
    def hides(self) -> bool:
        """Whether the mask chooses scores, and is not added to them."""
        return "mask" in self.refs and self.refs["mask"].dtype is torch.bool

    @property
    def dtype(self) -> torch.dtype:
        return self.refs["q"].dtype


def _case(op: Op, operands: tuple[NodeOperand, ...]) -> Case | str | None:
    if op.name not in (FORWARD, BACKWARD, OWN, OWN_BACKWARD):
        return None
    backward = op.name in (BACKWARD, OWN_BACKWARD)
    names = BACKWARD_OPERANDS if backward else FORWARD_OPERANDS
    refs = {n: o for n, o in zip(names, operands, strict=False) if isinstance(o, Ref)}
    scale = op.attrs.get("scale")
    width = refs["q"].shape[-1]
    factor = float(scale) if scale is not None else 1 / math.sqrt(max(width, 1))
    more = {name: op.attr(name) for name in OWN_ATTRS} if _is_own(op) else {}
    case = Case(backward, refs, bool(op.attrs.get("is_causal", False)), factor, **more)
    return _refusal(op, case) or case


def _is_own(op: Op) -> bool:
    return op.name in (OWN, OWN_BACKWARD)


def _refusal(op: Op, case: Case) -> str:
    """Why generated code cannot do it; empty where it can."""
    batch, heads, groups, _, keys, width, high = case.sizes
    mask = case.refs.get("mask")
    if op.attrs.get("dropout_p", 0.0):
        return "dropout inside the op"
    if not case.scale > 0:
        return f"a scale of {case.scale}"
    if case.dtype not in KINDS:
        return f"elements of {DTYPE_NAMES.get(case.dtype, case.dtype)}"
    if any(r.dtype is not case.dtype for n, r in case.refs.items() if n not in UNLIKE):
        return "operands of several types"
    kinds = MASKS if _is_own(op) else KINDS
    if mask is not None and (mask.dtype not in kinds or len(mask.shape) not in (2, 4)):
        return f"a mask of {DTYPE_NAMES.get(mask.dtype, mask.dtype)}{list(mask.shape)}"
    if "key" in case.refs and (case.refs["key"].layout.strides != (1,) or not case.keep > 0):
        return "random numbers whose key lies apart, or nothing to keep"
    if not batch * heads * groups * width * high:
        return "no elements"
    if heads % groups or case.refs["v"].shape[:3] != (batch, groups, keys):
        return "heads of keys and values that do not divide those of queries"
    return ""


def result_orders(op: Op, operands: tuple[NodeOperand, ...]) -> Orders | None:
    """How the results of attention are stored; None for other ops, or where it is refused."""
    case = _case(op, operands)
    if not isinstance(case, Case):
        return None
    if case.backward:
        return (HEADS_INSIDE,) * 3
    return HEADS_INSIDE, tuple(range(op.results[1].type.rank))


def claim(node: Node) -> Claim | str | None:
    """The kernel call for attention or its gradients."""
    case = _case(node.op, node.operands)
    if not isinstance(case, Case):
        return case
    results = ("dq", "dk", "dv") if case.backward else ("out", "lse")
    named = {**case.refs, **dict(zip(results, node.results, strict=True))}
    pointers = tuple(named.values())
    written = tuple(range(len(pointers) - len(results), len(pointers)))
    slots, scratch = _slots(case), _scratch_bytes(case)
    stem = "attention_backward" if case.backward else "attention"
    body = _body(case, named, slots, scratch)
    return Claim(stem, _comment(node, case), body, pointers, written, slots * scratch)


# -- text --------------------------------------------------------------------------------------


def _comment(node: Node, case: Case) -> str:
    shape = ",".join(map(str, case.refs["q"].shape))
    scores = "where(mask, scale q k^T, fill)" if case.hides else "scale q k^T + mask"
    weights = f"softmax({scores})"
    if "key" in case.refs:
        weights = f"dropout({weights})"
    what = f"gradients of {weights} v" if case.backward else (
        f"{weights} v and the log-sum-exp of each row"
    )  # fmt: skip
    value = node.op.results[0].name
    place = f", {node.loc.module}" if node.loc.module else ""
    return f"// {what}: {DTYPE_NAMES[case.dtype]}[{shape}] %{value}{place}"


def _body(case: Case, named: dict[str, Ref], slots: int, scratch: int) -> str:
    batch, heads, groups, queries, keys, width, high = case.sizes
    mask = named.get("mask")
    mask_kind = MASKS[mask.dtype] if mask is not None else "-1"
    fill = repr(case.fill) if math.isfinite(case.fill) else "-INFINITY"
    strided = [(n, r) for n, r in named.items() if n != "key"]
    lines = [
        "static const ss_attention s = {",
        f"    .batch = {batch}, .heads = {heads}, .kv_heads = {groups},",
        f"    .queries = {queries}, .keys = {keys}, .depth = {width}, .value_depth = {high},",
        f"    .scale = {case.scale!r}, .causal = {int(case.causal)},",
        f"    .kind = {KINDS[case.dtype]}, .mask_kind = {mask_kind},",
        f"    .fill = {fill}, .safe = {int(case.safe)},",
        *_dropping(case),
        *(f"    .{n} = {{{', '.join(map(str, _strides(n, r)))}}}," for n, r in strided),
        f"    .scratch = {scratch},",
        "};",
    ]
    way = "backward" if case.backward else "forward"
    way += "_f64" if case.dtype == torch.float64 else ""
    lines.append(f"ss_attention_{way}(&s, b, b[{len(named)}], {slots});")
    return "\n".join("    " + x for x in lines)


def _dropping(case: Case) -> list[str]:
    """Which weights are kept: those whose 24 bits are less than a number."""
    if "key" not in case.refs:
        return []
    keep = torch.tensor(case.keep, dtype=torch.float32).item()  # as random numbers are compared
    limit, site = math.ceil(min(keep, 1.0) * 2**24), case.site & 0xFFFFFFFF
    return [f"    .drops = 1, .limit = {limit}, .site = {site}u, .keep = {case.keep!r},"]


def _strides(name: str, ref: Ref) -> tuple[int, ...]:
    """Of the four dimensions of the kernel; a mask is broadcast."""
    if name == "lse":
        return (*ref.layout.strides, 0)[:4]
    if name != "mask":
        return ref.layout.strides
    steps = [0 if n == 1 else s for n, s in zip(ref.shape, ref.layout.strides, strict=True)]
    return (0,) * (4 - len(steps)) + tuple(steps)


# -- sizes -------------------------------------------------------------------------------------


@cache
def _constant(name: str) -> int:
    """A number that the header defines."""
    found = re.search(rf"^#define {name} (\d+)\b", HEADER.read_text(), re.MULTILINE)
    assert found is not None, f"{HEADER.name} defines {name}"
    return int(found.group(1))


def _slots(case: Case) -> int:
    """The most threads that can take part; each has scratch of its own."""
    batch, heads, groups, queries, keys, width, high = case.sizes
    blocks = -(-queries // _constant("SS_FORWARD_QUERIES"))
    tasks = batch * groups if case.backward else batch * heads * blocks
    work = batch * heads * queries * keys * (width + high)
    machine = max(os.cpu_count() or 1, torch.get_num_threads())
    return max(1, min(tasks, machine, work // PARALLEL_WORK))


def _scratch_bytes(case: Case) -> int:
    """What one thread takes; as the kernels count it, for arithmetic without pairs."""
    *_, keys, width, high = case.sizes
    size = max(case.dtype.itemsize, 4)
    panel = _constant("SS_PANEL")
    rows, width, high = _up(keys, panel), _up(width, 16), _up(high, 16)
    packed = panel * max(width, high)
    if not case.backward:
        queries, block = _constant("SS_FORWARD_QUERIES"), _constant("SS_FORWARD_KEYS")
        counts = [size * side for size in (rows, queries) for side in (width, high)]
        counts += [max(queries * block, packed), 2 * queries]
    else:
        queries, block = _constant("SS_BACKWARD_QUERIES"), _constant("SS_BACKWARD_KEYS")
        square = queries * block
        counts = [rows * width] * 3 + [rows * high] * 2 + [queries * width] * 3
        counts += [queries * high] * 2 + [queries] * 3
        counts += [max(square, packed), square] + [square // 2] * 3
    return sum(_up(n * size, 64) for n in counts)


def _up(n: int, step: int) -> int:
    return -(-n // step) * step
