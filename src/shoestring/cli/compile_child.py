"""Compiles the default step in a fresh process and prints the seconds that it took.

So a compile is cold or warm by the kernel cache alone, and not by what else the process has done.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time

import torch

import shoestring
from shoestring.ir.errors import RuntimeFault

from .workload import WorkloadOptions, build, import_transformers, options_from, options_text


def measure_compile(options: WorkloadOptions, backend: str) -> tuple[float, float]:
    """Seconds of a compile with an empty kernel cache, and again with the cache that it filled.

    Raises:
        RuntimeFault: SS5103 where the process failed.
    """
    with tempfile.TemporaryDirectory() as cache:
        return _one(options, backend, cache), _one(options, backend, cache)


def _one(options: WorkloadOptions, backend: str, cache: str) -> float:
    command = [sys.executable, "-c", "from shoestring.cli import compile_child as c; c.main()"]
    done = subprocess.run(
        [*command, str(torch.get_num_threads()), backend, options_text(options)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "SHOESTRING_CACHE": cache},
    )
    if done.returncode:
        raise RuntimeFault("SS5103", f"the compiling process ended with {done.returncode}")
    return float(json.loads(done.stdout)["seconds"])


def main() -> None:
    """The child: `THREADS BACKEND OPTIONS` are the arguments."""
    threads, backend, text = sys.argv[1:]
    _serve(int(threads), backend, options_from(text))


def _serve(threads: int, backend: str, options: WorkloadOptions) -> None:
    torch.set_num_threads(threads)
    import_transformers()
    with (work := build(options)).loader:
        begin = time.perf_counter()
        seed = options.data.seed
        shoestring.compile(
            work.model,
            work.loss_fn,
            work.optimizer,
            work.example_batch,
            backend=backend,
            precision=options.model.precision,
            seed=seed,
        )
        print(json.dumps({"seconds": time.perf_counter() - begin}))
