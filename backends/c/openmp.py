"""PyTorch's own threads, kept out of the way of ours.

The threads of GNU OpenMP, with which PyTorch is built for Linux, spin for some milliseconds after
each piece of work, on cores that our own pool needs meanwhile. So a small call of PyTorch runs on
one thread, and after a large one its threads are let go: new ones are started in 0.1 ms. They need
an idle core: where a worker of the pool still spins on it, the system may put them on the caller's,
where they wait until its turn ends. So workers sleep before a large call.
With another OpenMP, nothing is done.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from shoestring.ir import Kind

from ..instructions import CallTorch
from .calls import Pool

Call = Callable[[], object]
SOFT = 1  # omp_pause_soft of omp.h
SMALL = 1 << 20  # bytes below which a call is as fast on one thread,
FEW = 1 << 22  # and FLOPs of a product


@cache
def _runtime() -> ctypes.CDLL | None:
    """GNU OpenMP as PyTorch has loaded it."""
    if not hasattr(os, "RTLD_NOLOAD"):
        return None
    folder = Path(torch.__file__).parent / "lib"
    for name in (*map(str, folder.glob("libgomp*.so*")), "libgomp.so.1"):
        try:
            library = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        except OSError:
            continue
        if hasattr(library, "omp_pause_resource_all"):
            return library
    return None


def let_go() -> None:
    """Ends the threads of this thread's last parallel region, if there are any."""
    library = _runtime()
    if library is not None:
        library.omp_pause_resource_all(SOFT)


def is_small(call: CallTorch) -> bool:
    """Whether one thread is enough for it."""
    op = call.op
    flops = op.opdef.cost(op).flops if op.opdef.kind is Kind.CONTRACTION else 0
    return flops < FEW and sum(r.nbytes for r in call.regions) < SMALL


def considerate(call: Call, small: bool) -> Call:
    """A call of PyTorch that leaves no spinning threads behind."""
    library = _runtime()
    if library is None:
        return call

    def alone() -> None:
        threads = torch.get_num_threads()
        library.omp_set_num_threads(1)
        try:
            call()
        finally:
            library.omp_set_num_threads(threads)
            library.omp_pause_resource_all(SOFT)  # of MKL, where `torch.set_num_threads` was called

    def released() -> None:
        Pool.rest()
        call()
        library.omp_pause_resource_all(SOFT)

    return alone if small else released
