"""All samples of all OpInfo ops (or modules) through the IR and a backend, against eager PyTorch.

python tests/sweeps/opinfo.py --backend reference --shard 0/2
python tests/sweeps/opinfo.py --op nn.functional.conv2d
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from shoestring.backends.registry import get_backend
from shoestring.ir import Function
from tests.corpora.modules import check_module, modules
from tests.corpora.opinfo import EXACT, REASSOCIATED, Runner, Verdict, check_op, ops


def runner(name: str) -> Runner:
    """Compiles with the backend of that name and runs."""
    backend = get_backend(name)

    def run(function: Function, arguments: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return backend.compile(function).run(arguments)

    return run


def selected(infos: list[Any], name: str | None, shard: str) -> list[Any]:
    index, count = (int(n) for n in shard.split("/"))
    everything = [o for o in infos if name is None or name in (o.name, o.formatted_name)]
    return everything[index::count]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="reference")
    parser.add_argument("--op", help="one op, by OpInfo's name")
    parser.add_argument("--limit", type=int, help="samples of each op")
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th op from the i-th")
    parser.add_argument("--modules", action="store_true", help="ModuleInfo in place of OpInfo")
    parser.add_argument("--no-text", action="store_true", help="leave out printing and parsing")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    run = runner(given.backend)
    tolerance = EXACT if given.backend == "reference" else REASSOCIATED
    verdicts: list[Verdict] = []
    for info in selected(modules() if given.modules else ops(), given.op, given.shard):
        start = time.perf_counter()
        if given.modules:
            v = check_module(info, run, given.limit, tolerance, text=not given.no_text)
        else:
            v = check_op(info, run, given.limit, tolerance=tolerance, text=not given.no_text)
        verdicts.append(v)
        show(v, time.perf_counter() - start)
    summarize(verdicts, "modules" if given.modules else "ops")
    return any(v.mismatches for v in verdicts)


def show(v: Verdict, seconds: float) -> None:
    print(
        f"{v.name:50} {v.passed:5}/{v.samples:<5} random {v.random:4} refused {len(v.refused):4} "
        f"wrong {len(v.mismatches):4} {seconds:6.1f} s",
        flush=True,
    )
    for line in v.mismatches[:3]:
        print(f"    WRONG   {line}")
    for line in v.refused[:2]:
        print(f"    refused {line}")


def summarize(verdicts: list[Verdict], what: str) -> None:
    total = sum(v.samples for v in verdicts)
    passed = sum(v.passed for v in verdicts)
    random = sum(v.random for v in verdicts)
    skipped = sum(v.skipped for v in verdicts)
    refused = sum(bool(v.refused) for v in verdicts)
    refusals = sum(len(v.refused) for v in verdicts)
    wrong = sum(bool(v.mismatches) for v in verdicts)
    print(
        f"{len(verdicts)} {what}, {total} samples: {passed} right ({random} of them random), "
        f"{skipped} that eager refuses, {refusals} refused in {refused}, "
        f"{wrong} with mismatches; {sum(v.texts for v in verdicts)} functions as text"
    )


if __name__ == "__main__":
    sys.exit(main())
