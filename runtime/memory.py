"""Measured memory of this process: what the kernel counts, not what we believe."""

from __future__ import annotations

import ctypes
import gc
import resource
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
_SAMPLE_SECONDS = 0.005
_M_MMAP_THRESHOLD = -3  # of malloc.h


@dataclass(slots=True)
class MemoryUse:
    """Resident bytes of a piece of work.

    Attributes:
        before: when it began.
        peak: the most at any time in it; 0 until it has ended.
        sampled: the peak is from samples, so it may be missed; the kernel's own counter is exact.
    """

    before: int
    peak: int = 0
    sampled: bool = False

    @property
    def growth(self) -> int:
        return max(0, self.peak - self.before)


def current_rss() -> int:
    """Resident bytes of this process now."""
    return _field("VmRSS") or _maximum()


def peak_rss() -> int:
    """The most resident bytes since the start, or since the last `measure_peak`."""
    return _field("VmHWM") or _maximum()


def _maximum() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _field(name: str) -> int:
    """A field of the kernel's status file, in bytes; 0 where there is none."""
    try:
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def release() -> None:
    """Returns unused memory to the system, so that the next peak is of the work alone."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def return_freed_memory() -> None:
    """From now on blocks of 1 MiB and more go back to the system as soon as they are freed.

    By default the C library keeps ever larger ones in its heap, where small ones between them hold
    them: the memory of a process then grows beyond what is used.
    """
    option = getattr(ctypes.CDLL(None), "mallopt", None)
    if option is not None:
        option(_M_MMAP_THRESHOLD, 1 << 20)


@contextmanager
def collector_paused() -> Generator[None]:
    """Python's garbage collector does not look for cycles in between, if it did before.

    For work that makes many objects which stay: each search would visit all that there are.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def measure_peak() -> Generator[MemoryUse]:
    """Measures the peak of the work inside; not to be nested.

    Example:
        >>> with measure_peak() as use:
        ...     work = bytearray(64 << 20)
        >>> use.growth > 60 << 20
        True
    """
    use = MemoryUse(current_rss())
    if _reset_peak():
        try:
            yield use
        finally:
            use.peak = max(peak_rss(), use.before)
        return
    stop = threading.Event()
    sampler = threading.Thread(target=_sample, args=(use, stop), daemon=True)
    use.peak, use.sampled = use.before, True
    sampler.start()
    try:
        yield use
    finally:
        stop.set()
        sampler.join()


def _reset_peak() -> bool:
    """Sets the kernel's high-water mark to the present; False where that is not allowed."""
    try:
        _CLEAR.write_text(_RESET_PEAK)
    except OSError:
        return False
    return _field("VmHWM") > 0


def _sample(use: MemoryUse, stop: threading.Event) -> None:
    while True:
        use.peak = max(use.peak, current_rss())
        if stop.wait(_SAMPLE_SECONDS):
            return
