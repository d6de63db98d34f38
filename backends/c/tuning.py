"""Kernel of ours or PyTorch's, decided by measuring both on this machine, once.

For a product of f32 or bf16 matrices ours is the choice: what follows it costs nothing more, and
alone it is about as fast. For a convolution the library knows other ways, and for int8 packing
weighs more, so each of those that is large enough to matter is tried both ways when it is met
first; the times stay in the cache of kernels.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from shoestring.ir import Builder, Function, Op, TensorType, Value
from shoestring.ir import Role as ParamRole
from shoestring.ir.inference import attrs_key

from ..cache import cache_folder, keep
from .build import build, machine_key
from .calls import Pool
from .convolutions import Role, role_of, target_of
from .library import bind_call, way_of
from .nodes import Node, Work, normalize
from .openmp import considerate
from .packing import packed_bytes
from .pages import fresh_pages
from .products import FACTORS, INTEGERS, is_product, matrices_of, sides_of
from .sides import DIGITS, Digits, Sides, Target, Windows, count_of, stride_of, written_out

PERMUTE = "aten.permute.default"
TURNING = frozenset({PERMUTE, "aten.t.default", "aten.transpose.int"})
WORTH = 1 << 25  # FLOPs below which nothing is measured
ROUNDS = 2  # that nobody disturbs
MOST_ROUNDS = 8
# The library's share of our time from which on it is taken. In a step ours saves what follows, a
# change of threads and the library's workspace: 0.75 of our time alone is no faster there.
MARGIN = 0.7


Turned = tuple[bool, ...]


@dataclass(frozen=True)
class Times:
    """Seconds of one op, each way the best of a few runs."""

    own: float
    library: float

    @property
    def refusal(self) -> str:
        """Why the library does it; empty where it does not."""
        if self.library >= MARGIN * self.own:
            return ""
        return f"measured here: {1e3 * self.library:.2f} ms, ours {1e3 * self.own:.2f} ms"


def slower_products(function: Function) -> dict[Op, str]:
    """The products that PyTorch makes faster on this machine, and why one knows."""
    found: dict[Op, str] = {}
    for op in function.ops:
        if not _is_tried(op) or op.opdef.cost(op).flops < WORTH:
            continue
        why = times_of(op, turned_of(function, op)).refusal
        if why:
            found[op] = why
    return found


def _is_tried(op: Op) -> bool:
    return is_product(op) and (role_of(op) is not None or op.name == INTEGERS)


def turned_of(function: Function, op: Op) -> Turned:
    """Which operands are matrices that lie turned in memory."""
    makers = (function.producer(v) if v.type.rank == 2 else None for v in op.inputs)
    return tuple(m is not None and m.name in TURNING for m in makers)


def times_of(op: Op, turned: Turned = ()) -> Times:
    """From the cache, or measured now."""
    key = _key(op, turned)
    known = _KNOWN.get(key) or _stored(key)
    if known is None:
        known = _measured(op, turned)
        _store(key, known)
    _KNOWN[key] = known
    return known


_KNOWN: dict[str, Times] = {}


def _key(op: Op, turned: Turned) -> str:
    """All that the times depend on."""
    types = [str(v.type) for v in (*op.inputs, *op.results)]
    parts = [op.name, *types, attrs_key(op), str(torch.get_num_threads()), torch.__version__]
    parts += [f"turned {i}" for i, t in enumerate(turned) if t]
    return hashlib.sha256("\n".join([machine_key(), *parts]).encode()).hexdigest()


def _stored_in() -> Path:
    return cache_folder() / "times"


def _path(key: str) -> Path:
    return _stored_in() / f"{key}.json"


def _stored(key: str) -> Times | None:
    """None where there is nothing, or nothing that makes sense."""
    try:
        numbers = json.loads(_path(key).read_text())
        times = Times(float(numbers["own"]), float(numbers["library"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return times if min(times.own, times.library) > 0 else None


def _store(key: str, times: Times) -> None:
    """Best effort: what is not kept is measured again."""
    with suppress(OSError):
        keep(_path(key), json.dumps(asdict(times)).encode())


def _measured(op: Op, turned: Turned) -> Times:
    ways = both_ways(op, turned)
    assert ways is not None, "only products are measured"
    return measure(*ways, ROUNDS)


@dataclass(frozen=True)
class Way:
    """A call that computes `out`."""

    call: Callable[[], object]
    out: torch.Tensor


def both_ways(op: Op, turned: Turned = ()) -> tuple[Way, Way] | None:
    """An op on random numbers, by our kernel and by PyTorch's; None where ours is not tried."""
    if not _is_tried(op):
        return None
    scale = 1.0 if op.inputs[0].type.dtype.is_floating_point else 40.0
    operands = [(torch.randn(v.type.static_shape) * scale).to(v.type.dtype) for v in op.inputs]
    for i, is_turned in enumerate(turned):
        if is_turned:
            operands[i] = operands[i].t().contiguous().t()
    result = op.results[0].type
    outs = [torch.empty(result.static_shape, dtype=result.dtype) for _ in range(2)]
    inputs = iter(operands)
    bound = [next(inputs) if isinstance(o, Value) else o for o in op.operands]
    library = considerate(bind_call(op, way_of(op), bound, outs[1:]), small=False)
    return Way(Trial(op, operands, outs[0]), outs[0]), Way(library, outs[1])


def measure(own: Way, library: Way, rounds: int) -> Times:
    """The best of some turns, of more where other work has taken a core meanwhile."""
    best = [math.inf, math.inf]
    calm = 0
    for _ in range(max(rounds, MOST_ROUNDS)):
        before = interruptions()
        for i, way in enumerate((own, library)):
            way.call()  # brings its threads back
            start = time.perf_counter()
            way.call()
            best[i] = min(best[i], time.perf_counter() - start)
        calm += interruptions() == before
        if calm == rounds:
            break
    return Times(*best)


def interruptions() -> int:
    """Grows whenever another process or another machine on this host takes a core from us."""
    stolen = 0
    with suppress(OSError, ValueError, IndexError):
        stolen = int(Path("/proc/stat").read_text().split()[8])
    return stolen + resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


# -- our way, without code generation ------------------------------------------------------------


class _Digits(ctypes.Structure):
    _fields_ = [("size", ctypes.c_int64 * DIGITS), ("stride", ctypes.c_int64 * DIGITS)]


def _digits(digits: Digits) -> _Digits:
    return _Digits(*written_out(digits))


class _Windows(ctypes.Structure):
    """`ss_windows` of gemm.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("channels", "taps")),
        *((name, ctypes.POINTER(ctypes.c_int64)) for name in ("a_tap", "b_tap")),
        ("rows", _Digits),
        ("places", ctypes.c_int64),
    ]


class _Order(ctypes.Structure):
    """`ss_order` of gemm.h."""

    _fields_ = [("at", _Digits), *((name, ctypes.c_int64) for name in ("each", "all"))]


class _Gemm(ctypes.Structure):
    """`ss_gemm` of gemm.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "m", "n", "k")),
        ("type", ctypes.c_int),
        *((f"{side}_{name}", ctypes.c_int64) for side in "ab" for name in ("batch", "row", "col")),
        ("finish", ctypes.c_void_p),
        ("grouping", ctypes.c_int),
        ("groups", ctypes.c_int64),
        *((name, ctypes.POINTER(_Digits)) for name in ("a_sum", "b_sum", "b_cols")),
        ("windows", ctypes.POINTER(_Windows)),
        ("order", ctypes.POINTER(_Order)),
        ("b_packed", ctypes.c_int),
        ("b_rounded", ctypes.c_int),
    ]


class _Target(ctypes.Structure):
    """`ss_target` of trial.h."""

    _fields_ = [
        ("type", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("batch", "row", "offset")),
        ("cols", _Digits),
    ]


class _Frame(ctypes.Structure):
    """`ss_frame` of gemm.h."""

    _fields_ = [
        ("itemsize", ctypes.c_int64),
        ("size", ctypes.c_int64 * 5),
        ("stride", ctypes.c_int64 * 5),
        ("before", ctypes.c_int64 * 3),
        ("framed", ctypes.c_int64 * 3),
    ]


@cache
def _runtime() -> ctypes.CDLL:
    """The hand-written kernels, without any generated ones."""
    library = ctypes.CDLL(str(build([]).path))
    library.ss_gemm_scratch.restype = ctypes.c_int64
    library.ss_try_product.restype = library.ss_gemm_pack.restype = None
    library.ss_frame_run.restype = library.ss_frame_by_place.restype = None
    Pool.join(library)
    return library


class Trial:
    """A convolution, a gradient of it or a product of matrices by gemm.c's kernels, as a call."""

    def __init__(self, op: Op, operands: list[torch.Tensor], out: torch.Tensor) -> None:
        node, role = _node_of(op, [not t.is_contiguous() for t in operands]), role_of(op)
        products = sides_of(node)
        each, factor = out.numel() // len(products), operands[0].dtype
        self.products = [_Product(s, _target(node, role, s), factor, each) for s in products]
        frame, images = products[0].frame, products[0].images.ref
        self.frame, self.room, self.by_place = None, 0, False
        if frame is not None:
            self.frame = _Frame(images.dtype.itemsize, *frame.numbers(images))
            self.room = frame.nbytes(images)
            self.by_place = frame.by_place
        self.packed = max(map(packed_bytes, products))
        self.library, self.threads = _runtime(), torch.get_num_threads()
        share = max(self.library.ss_gemm_scratch(ctypes.byref(p.gemm)) for p in self.products)
        # Of huge pages, as in a step: scattered small ones compete for their places in the cache.
        self.scratch = fresh_pages(self.room + self.packed + share * self.threads)
        tensors = dict(zip(op.inputs, operands, strict=True))
        self.a, self.x = (tensors[v] for v in matrices_of(op)[:2])
        self.out = out

    def __call__(self) -> None:
        Pool.resize(self.threads)
        images = _address(self.x)
        if self.frame is not None:
            images = _address(self.scratch)
            way = self.library.ss_frame_by_place if self.by_place else self.library.ss_frame_run
            way(ctypes.byref(self.frame), _address(self.x), images)
        packed, scratch = (_address(self.scratch, self.room + n) for n in (0, self.packed))
        for p in self.products:
            sides = (images, _address(self.a)) if p.swapped else (_address(self.a), images)
            left, right = (_plus(x, n) for x, n in zip(sides, p.offsets, strict=True))
            gemm = ctypes.byref(p.gemm)
            if p.gemm.b_packed:
                self.library.ss_gemm_pack(gemm, right, packed)
                right = packed
            target, threads = ctypes.byref(p.target), ctypes.c_int64(self.threads)
            self.library.ss_try_product(
                gemm, left, right, _address(self.out), target, scratch, threads
            )


class _Product:
    """What gemm.c is told of one product, and at which byte its left and its right side begin."""

    def __init__(self, sides: Sides, to: Target, dtype: torch.dtype, count: int) -> None:
        a, b = sides.a, sides.b
        rows, cols, kind = count_of(a.rows), count_of(b.cols), list(FACTORS).index(dtype)
        words = 0 if dtype is torch.int8 else kind  # of i32 the bits are stored, as f32's are
        g = _Gemm(batch=count // (rows * cols), m=rows, n=cols, k=sides.summed, type=kind)
        g.a_batch, g.a_row, g.a_col = a.batch, stride_of(a.rows) or 0, stride_of(a.cols) or 0
        if sides.order is not None:
            order, each = sides.order, count_of(sides.order.at)
            g.batch, self.order = order.matrices, _Order(_digits(order.at), each, order.count)
            g.order = ctypes.pointer(self.order)
        self.sides = sides
        self.swapped = sides.windows is not None
        if sides.windows is not None:
            g.batch, self.windows = 1, _windows(sides.windows)
            g.windows, g.b_packed = ctypes.pointer(self.windows), packed_bytes(sides) > 0
        g.b_batch, g.b_row, g.b_col = b.batch, stride_of(b.rows) or 0, stride_of(b.cols) or 0
        for name, digits in sides.lists().items():
            setattr(g, name, ctypes.pointer(_digits(digits)))
        self.gemm = g
        self.target = _Target(words, to.batch, to.row, to.offset, _digits(to.cols))
        self.offsets = [side.offset * dtype.itemsize for side in (a, b)]


def _windows(windows: Windows) -> _Windows:
    taps = [(ctypes.c_int64 * len(t))(*t) for t in (windows.a_taps, windows.b_taps)]
    rows = _digits(windows.rows)
    return _Windows(windows.channels, len(windows.a_taps), *taps, rows, windows.places)


def _plus(start: ctypes.c_void_p, offset: int) -> ctypes.c_void_p:
    return ctypes.c_void_p((start.value or 0) + offset)


def _target(node: Node, role: Role | None, sides: Sides) -> Target:
    if role is not None:
        return target_of(node, role, sides.phase)
    return Target(0, count_of(sides.b.cols), ((count_of(sides.b.cols), 1),))


def _address(tensor: torch.Tensor, offset: int = 0) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr() + offset)


def _node_of(op: Op, turned: Sequence[bool]) -> Node:
    """The op's product, alone, of operands that lie in memory as they are or turned."""
    b = Builder("trial")
    params = dict[Value, Value]()
    for i, (v, is_turned) in enumerate(zip(op.inputs, turned, strict=True)):
        shape = v.type.static_shape[::-1] if is_turned else v.type.static_shape
        param = b.param(TensorType(v.type.dtype, shape), ParamRole.BATCH, f"x{i}")
        params[v] = b.emit(PERMUTE, param, dims=(1, 0)) if is_turned else param
    alone = op.map_operands(params.__getitem__)
    b.output("out", b.emit(op.name, *alone.operands, **op.attrs))
    return next(n for n in normalize(b.build()).nodes if n.work is Work.PRODUCT)
