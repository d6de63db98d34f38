"""Calls of generated kernels, bound to addresses: a stretch of a program in one foreign call."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence

from ..instructions import CallKernel, Instruction


class _Call(ctypes.Structure):
    """`ss_call` of run.h."""

    _fields_ = [("kernel", ctypes.c_void_p), ("buffers", ctypes.c_void_p)]


class Pool:
    """The threads of all libraries of this process: those of the library that came first."""

    first: ctypes.CDLL | None = None
    size = 0

    @classmethod
    def join(cls, library: ctypes.CDLL) -> None:
        """Makes a library use the pool."""
        if cls.first is None:
            cls.first = library
            return
        cls.first.ss_pool_own.restype = ctypes.c_void_p
        library.ss_pool_adopt(ctypes.c_void_p(cls.first.ss_pool_own()))

    @classmethod
    def resize(cls, threads: int) -> None:
        """Sets how many threads work, the caller among them."""
        if threads != cls.size and cls.first is not None:
            cls.first.ss_pool_resize(ctypes.c_int64(threads))
            cls.size = threads

    @classmethod
    def rest(cls) -> None:
        """Sends waiting workers to sleep, so that their cores are free for other threads."""
        if cls.first is not None:
            cls.first.ss_pool_rest()


class KernelCalls:
    """The table of calls that `ss_run` walks over, in the order of the instructions.

    Args:
        library: the built kernels.
        instructions: of the program; those that are no kernels have no place in the table.
        declined: does an instruction whose kernel declined.
    """

    def __init__(
        self,
        library: ctypes.CDLL | None,
        instructions: Sequence[Instruction],
        declined: Callable[[int], None],
    ) -> None:
        kernels = [(i, k) for i, k in enumerate(instructions) if isinstance(k, CallKernel)]
        self._place = {index: at for at, (index, _) in enumerate(kernels)}
        self._pointers = [(ctypes.c_void_p * len(k.pointers))() for _, k in kernels]
        self._table = (_Call * len(kernels))()
        self._library = library
        self._declined = declined
        if library is None:
            return
        Pool.join(library)
        library.ss_run.restype = ctypes.c_int64
        library.ss_run.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        for call, pointers, (_, kernel) in zip(self._table, self._pointers, kernels, strict=True):
            call.kernel = ctypes.cast(getattr(library, kernel.kernel), ctypes.c_void_p)
            call.buffers = ctypes.addressof(pointers)

    def bind(self, index: int, addresses: Mapping[int, int]) -> None:
        """Sets some pointers of instruction `index`: position -> address."""
        pointers = self._pointers[self._place[index]]
        for position, address in addresses.items():
            pointers[position] = address

    def stretch(self, first: int, count: int) -> Callable[[], None]:
        """The call of `count` kernels from instruction `first` on."""
        assert self._library is not None, "a program with kernels has a library"
        run, size = self._library.ss_run, ctypes.sizeof(_Call)
        start = ctypes.addressof(self._table) + self._place[first] * size

        def call() -> None:
            done = run(start, count)
            while done < count:
                self._declined(first + done)
                done += 1
                done += run(start + done * size, count - done)

        return call
