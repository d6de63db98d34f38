"""Memory straight from the system."""

from __future__ import annotations

import contextlib
import mmap
import sys

import torch

ADVICE = (14, 18)  # MADV_HUGEPAGE and MADV_WIPEONFORK of Linux; Python's mmap lacks the latter


def fresh_pages(count: int) -> torch.Tensor:
    """Zeroed pages, huge ones where they are to be had; a tensor that no kernel can resize.

    Private pages: those shared between processes are never huge as most kernels are set up. A child
    process, such as one that loads data, gets zeros instead of a copy of each page written after it
    was forked; a step reads nothing that it has not written.
    """
    if count == 0:
        return torch.empty(0, dtype=torch.uint8)
    pages = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in ADVICE if sys.platform == "linux" else ():
        with contextlib.suppress(OSError):  # a kernel without it
            pages.madvise(advice)
    return torch.frombuffer(pages, dtype=torch.uint8)
