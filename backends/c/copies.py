"""Ops that only move elements: concatenations, padding and the gradient of a slice, as C.

Each piece of the result is filled by loops over dimensions that are merged where both sides of the
copy allow it; many pieces in a row are one loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from shoestring.ir import Op

from .claims import Claim, comment_of, fork
from .expressions import MEMORY, number, store
from .layout import Layout, first_of_slice, row_major
from .nodes import Node, Ref

PAD = "aten.constant_pad_nd.default"
PARALLEL = 1 << 16  # elements below which one thread is faster
MANY = 8  # pieces that are a loop


@dataclass(frozen=True)
class Piece:
    """A part of the result: elements of pointer `source`, or `fill` throughout."""

    target: Layout
    source: int | None
    layout: Layout
    fill: bool | int | float = 0


def claim(node: Node) -> Claim | str | None:
    """The kernel for an op that moves elements."""
    writer = PIECES.get(node.op.name)
    if writer is None:
        return None
    (out,), refs = node.outs, node.refs
    if out.dtype not in MEMORY or any(r.dtype is not out.dtype for r in refs):
        return "elements of several types, or of one that C lacks"
    if not all(out.shape):
        return "nothing to move"
    if node.op.name == PAD and min(node.op.attr("pad"), default=0) < 0:
        return "a part is cut off"
    if node.op.name == PAD and not _holds(out.dtype, _padding(node.op)):
        return "padding that the type of the elements does not hold"
    pieces = [p for p in writer(node.op, refs, row_major(out.shape)) if p.target.numel]
    used = sorted({p.source for p in pieces if p.source is not None})
    pointers = (*(refs[i] for i in used), Ref(out, row_major(out.shape)))
    kind = MEMORY[out.dtype]
    lines = [f"{kind} *restrict out = b[{len(used)}];"]
    for run in _runs(pieces):
        at = used.index(run[0].source) if run[0].source is not None else 0
        lines += _run(run, at, out.dtype) if len(run) > 1 else _single(run[0], at, out.dtype)
    stem = node.op.name.split(".")[1]
    comment = comment_of(stem, node)
    return Claim(stem, comment, "\n".join(f"    {x}" for x in lines), pointers, (len(used),))


def _runs(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Pieces one by one, and as one list where many follow each other that differ in their place
    alone: of a stack of a thousand, C for each takes a compiler minutes."""
    start = 0
    while start < len(pieces):
        end = start + 1
        step = _step(pieces[start], pieces[end]) if end < len(pieces) else None
        while step is not None and end < len(pieces) and _step(*pieces[end - 1 : end + 1]) == step:
            end += 1
        if end - start >= MANY:
            yield pieces[start:end]
        else:
            yield from ([p] for p in pieces[start:end])
        start = end


def _step(piece: Piece, other: Piece) -> int | None:
    """How far behind a piece the next operand's is, where they are alike."""
    if piece.source is None or other.source != piece.source + 1:
        return None
    return other.target.offset - piece.target.offset if _merged(piece) == _merged(other) else None


def _single(piece: Piece, at: int, dtype: torch.dtype) -> Iterator[str]:
    """The copy of one piece, from pointer `at`."""
    if piece.source is not None:
        yield f"const {MEMORY[dtype]} *restrict p{piece.source} = b[{at}];"
    yield from _loops(piece, f"p{piece.source}", str(piece.target.offset or ""), dtype)


def _run(run: list[Piece], at: int, dtype: torch.dtype) -> Iterator[str]:
    """The copies of many pieces, from pointer `at` on."""
    first, step = run[0].target.offset, run[1].target.offset - run[0].target.offset
    numel = run[0].target.numel
    if numel <= PARALLEL:  # of larger ones, threads share each
        yield from fork(numel * len(run), PARALLEL).splitlines()
    yield f"for (int64_t n = 0; n < {len(run)}; n++) {{"
    yield f"    const {MEMORY[dtype]} *restrict p = b[{f'{at} + ' if at else ''}n];"
    begin = f"{f'{first} + ' if first else ''}{step} * n"
    yield from (f"    {line}" for line in _loops(run[0], "p", begin, dtype))
    yield "}"


def _loops(piece: Piece, source: str, begin: str, dtype: torch.dtype) -> Iterator[str]:
    """The loops of a copy, the innermost contiguous in the result; `begin` is where that begins."""
    dims = _merged(piece)
    yield from fork(piece.target.numel, PARALLEL).splitlines()
    for i, (size, _, _) in enumerate(dims):
        yield f"{'    ' * i}for (int64_t i{i} = 0; i{i} < {size}; i{i}++)"
    target = _place([(t, i) for i, (_, t, _) in enumerate(dims)], begin)
    value = f"{source}[{_place([(s, i) for i, (_, _, s) in enumerate(dims)], '')}]"
    if piece.source is None:
        value = store(number(piece.fill, dtype), dtype)
    yield f"{'    ' * len(dims)}out[{target}] = {value};"


def _place(strides: list[tuple[int, int]], begin: str) -> str:
    terms = [f"{s} * i{i}" if s != 1 else f"i{i}" for s, i in strides if s]
    return " + ".join([*([begin] if begin else []), *terms]) or "0"


def _merged(piece: Piece) -> list[tuple[int, int, int]]:
    """(size, stride of the result, stride of the source) of each loop, outermost first."""
    found: list[tuple[int, int, int]] = []
    given = zip(piece.target.shape, piece.target.strides, piece.layout.strides, strict=True)
    for size, t, s in given:
        if size == 1:
            continue
        if found and found[-1][1] == t * size and found[-1][2] == s * size:
            found[-1] = (found[-1][0] * size, t, s)
        else:
            found.append((size, t, s))
    return found or [(1, 1, 0)]


def _part(out: Layout, dim: int, start: int, size: int) -> Layout:
    shape = (*out.shape[:dim], size, *out.shape[dim + 1 :])
    return Layout(shape, out.strides, out.offset + start * out.strides[dim])


def _filled(target: Layout, fill: bool | int | float = 0) -> Piece:
    return Piece(target, None, Layout(target.shape, (0,) * len(target.shape)), fill)


def _cat(op: Op, refs: list[Ref], out: Layout) -> Iterator[Piece]:
    dim, at = op.attr("dim") % len(out.shape), 0
    for i, ref in enumerate(refs):
        if len(ref.shape) != len(out.shape):
            continue  # an empty vector may join anything
        yield Piece(_part(out, dim, at, ref.shape[dim]), i, ref.layout)
        at += ref.shape[dim]


def _stack(op: Op, refs: list[Ref], out: Layout) -> Iterator[Piece]:
    dim = op.attr("dim") % len(out.shape)
    for i, ref in enumerate(refs):
        shape, strides = list(ref.shape), list(ref.layout.strides)
        shape.insert(dim, 1)
        strides.insert(dim, 0)
        yield Piece(_part(out, dim, i, 1), i, Layout(tuple(shape), tuple(strides)))


def _slice_backward(op: Op, refs: list[Ref], out: Layout) -> Iterator[Piece]:
    (grad,), dim, step = refs, op.attr("dim") % len(out.shape), op.attr("step")
    size, count = out.shape[dim], grad.shape[dim]
    start = first_of_slice(op, size)
    if step != 1:
        yield _filled(out)
        strides = list(out.strides)
        offset = out.offset + start * strides[dim]
        strides[dim] *= step
        yield Piece(Layout(grad.shape, tuple(strides), offset), 0, grad.layout)
        return
    yield _filled(_part(out, dim, 0, start))
    yield Piece(_part(out, dim, start, count), 0, grad.layout)
    yield _filled(_part(out, dim, start + count, size - start - count))


def _padding(op: Op) -> bool | int | float:
    """What is put around: zeros where nothing is given, and -0.0 where that is."""
    given: bool | int | float | None = op.attr("value")
    return 0 if given is None else given


def _holds(dtype: torch.dtype, number: complex) -> bool:
    """Whether a number is one of a type's, be it after rounding."""
    if isinstance(number, complex):
        return False
    if dtype.is_floating_point or dtype is torch.bool:
        return True
    limits = torch.iinfo(dtype)
    return math.isfinite(number) and limits.min <= int(number) <= limits.max


def _pad(op: Op, refs: list[Ref], out: Layout) -> Iterator[Piece]:
    """Slab by slab, the last dimension first, as `pad` has them."""
    (x,), pad, fill = refs, op.attr("pad"), _padding(op)
    rank = len(out.shape)
    for i in range(0, len(pad), 2):
        dim, before = rank - 1 - i // 2, pad[i]
        size = x.shape[dim]
        yield _filled(_part(out, dim, 0, before), fill)
        yield _filled(_part(out, dim, before + size, pad[i + 1]), fill)
        out = _part(out, dim, before, size)
    yield Piece(out, 0, x.layout)


PIECES: dict[str, Callable[[Op, list[Ref], Layout], Iterator[Piece]]] = {
    "aten.cat.default": _cat,
    "aten.stack.default": _stack,
    "aten.slice_backward.default": _slice_backward,
    PAD: _pad,
}
