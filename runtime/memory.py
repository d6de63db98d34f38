"""Measured memory of this process: what the kernel counts, not what we believe."""

from __future__ import annotations

import ctypes
import gc
import linecache
import resource
import threading
from collections.abc import Callable, Generator
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
def collecting_by_phase() -> Generator[Callable[[], None]]:
    """Gives a function that frees what a phase of the work inside has left behind.

    For work that makes many objects which stay. Python's garbage collector would look through all
    that there are again and again; it is off, and the function looks only through those made
    inside. Where somebody froze objects before, which must stay frozen, it drops sources only.
    """
    was_enabled, may_freeze = gc.isenabled(), gc.get_freeze_count() == 0
    gc.disable()
    forget_sources()
    if may_freeze:
        gc.freeze()
    try:
        yield _end_phase if may_freeze else forget_sources
    finally:
        if may_freeze:
            gc.unfreeze()
        if was_enabled:
            gc.enable()


def _end_phase() -> None:
    forget_sources()
    gc.collect()


def forget_sources() -> None:
    """Drops the lines of source files that Python keeps for tracebacks: it reads them again.

    Imports of PyTorch look into many files and leave 3 MB of them. Code that is in no file, typed
    in or generated, stays.
    """
    for name, entry in list(linecache.cache.items()):
        if len(entry) > 1 and entry[1] is not None:  # the time of the file
            linecache.cache.pop(name, None)


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
