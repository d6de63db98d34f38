"""Time of each pass of the whole pipeline on steps of 12,500 to 100,000 operations.

    python benchmarks/pass_scaling.py

Linear time shows as a constant number of microseconds an operation along each row.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.passes.test_scaling import layered

from shoestring.ir import verify
from shoestring.passes import Pipeline, default_pipeline

SIZES = (12_500, 25_000, 50_000, 100_000)
OPS_PER_LAYER = 50


def main() -> None:
    columns: list[dict[str, float]] = []
    counts: list[int] = []
    for size in SIZES:
        function = layered(size // OPS_PER_LAYER)
        _, records = Pipeline(default_pipeline(frozenset())).run(function, check_ir=False)
        start = time.perf_counter()
        verify(function)
        column = {r.name: r.seconds for r in records}
        column["verify"] = time.perf_counter() - start
        counts.append(len(function.ops))
        columns.append(column)
    print(f"{'operations':<24}" + "".join(f"{n:>16,}" for n in counts))
    for name in columns[0]:
        cells = [
            f"{c[name]:7.2f} s {1e6 * c[name] / n:5.1f} us"
            for c, n in zip(columns, counts, strict=True)
        ]
        print(f"{name:<24}" + "".join(f"{cell:>18}" for cell in cells))


if __name__ == "__main__":
    main()
