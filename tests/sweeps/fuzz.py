"""Random training programs in numbers: `python tests/sweeps/fuzz.py --count 5000 --seed 0`.

Prints each failure as a minimized, runnable program, then counts and times.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from tests.fuzz.repro import examine_seed  # noqa: E402
from tests.fuzz.run import Options  # noqa: E402

Outcome = tuple[int, str, str]


def examine(task: tuple[int, str | None, int, float]) -> Outcome:
    """(seed, layer of the failure or nothing, report) of one program."""
    seed, backend, passes, seconds = task
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    options = Options(backend, passes, seed)
    try:
        failed = examine_seed(seed, options, shrink_seconds=seconds)
    except Exception as error:  # a bug of the fuzzer itself must not end the sweep
        return seed, "fuzzer", f"seed {seed}: {type(error).__name__}: {error}"
    return (seed, "", "") if failed is None else (seed, failed[0].layer, failed[1])


def outcomes(tasks: list[tuple[int, str | None, int, float]], jobs: int) -> Iterator[Outcome]:
    if jobs == 1:
        yield from map(examine, tasks)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=500) as pool:
        yield from pool.imap_unordered(examine, tasks, chunksize=4)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000, help="programs")
    parser.add_argument("--seed", type=int, default=0, help="of the first program")
    parser.add_argument("--backend", default="c", help="of the compiled run; 'none' for none")
    parser.add_argument("--passes", type=int, default=2, help="random pass orders a program")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--shrink", type=float, default=60.0, help="seconds a failure is shrunk")
    parser.add_argument("--limit", type=int, default=50, help="failures after which to stop")
    given = parser.parse_args()
    backend = None if given.backend == "none" else given.backend
    start = time.monotonic()
    counts: Counter[str] = Counter()
    tasks = [
        (s, backend, given.passes, given.shrink)
        for s in range(given.seed, given.seed + given.count)
    ]
    for _seed, layer, text in outcomes(tasks, given.jobs):
        counts[layer or "agree"] += 1
        if layer:
            print(text, "\n" + "-" * 80, flush=True)
        done = counts.total()
        if done % 250 == 0:
            print(f"{done} programs, {time.monotonic() - start:.0f} s, {dict(counts)}", flush=True)
        if done - counts["agree"] >= given.limit:
            print(f"stopped after {given.limit} failures")
            break
    seconds = time.monotonic() - start
    failures = counts.total() - counts["agree"]
    table = dict(sorted(counts.items()))
    print(f"{counts.total()} programs, {failures} failures, {seconds:.1f} s, {table}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
