"""The host CPU backend: fused kernels in C, everything else PyTorch kernels, planned memory."""

from __future__ import annotations

import ctypes
import os
import time
from dataclasses import dataclass

import torch

from shoestring.ir import Function

from .build import build, build_runtime_ahead, machine_key
from .executable import CExecutable, CompileInfo, Fallback
from .lower import KernelInfo, Lowered, lower


@dataclass(frozen=True)
class CBackend:
    """Compiles functions for this machine's CPU.

    Attributes:
        fuse: whether nodes share kernels; off for debugging.
        measure: whether large convolutions are made by kernels of ours or of PyTorch's as measured
            on this machine (once; the times are kept in the cache); off, by ours wherever there is
            one, so that equal programs are equal on equal machines.
    """

    name: str = "c"
    fuse: bool = True
    measure: bool = True

    def prepare(self) -> None:
        """Begins to build, beside the capture, what every program is linked with."""
        build_runtime_ahead()

    def compile(self, function: Function) -> CExecutable:
        """The function, with its kernels built (or taken from the cache) and memory planned.

        Raises:
            BackendError: SS4101, SS4102 for what is refused, SS42xx where C does not build.
        """
        return self.load(self.lower(function))

    def identity(self) -> str:
        """The settings, the machine, its C compiler and the threads.

        Raises:
            BackendError: SS4201 without a compiler.
        """
        return f"{self} {machine_key()} {torch.get_num_threads()} of {os.cpu_count()} threads"

    def lower(self, function: Function) -> Lowered:
        """Instructions over planned memory, and the C that they call.

        Raises:
            BackendError: SS4101, SS4102 for what is refused.
        """
        return lower(function, fuse=self.fuse, measure=self.measure)

    def load(self, lowered: Lowered) -> CExecutable:
        """Builds the C, unless the cache has it, and binds it.

        Raises:
            BackendError: SS42xx where C does not build.
        """
        start = time.perf_counter()
        library, built = None, None
        if lowered.sources:
            built = build(lowered.sources)
            library = ctypes.CDLL(str(built.path))
        info = CompileInfo(
            time.perf_counter() - start,
            built.cache_hit if built else True,
            built.source if built else None,
        )
        return CExecutable(lowered.program, lowered.kernels, library, lowered.sources, info)


__all__ = ["CBackend", "CExecutable", "CompileInfo", "Fallback", "KernelInfo"]
