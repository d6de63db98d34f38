"""Trains every tiny Hugging Face family ten steps, eager and compiled, and prints a table.

    python tests/sweeps/huggingface.py [kind, type or kind:type ...] [--double] [--backend c]

What the outcomes mean is said in `tests/corpora/training.py`.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
LIMIT = 240
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*")
    parser.add_argument("--double", action="store_true")
    parser.add_argument("--backend", default="c")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--part", type=int)
    options = parser.parse_args()
    if options.jobs > 1 and options.part is None:
        return _in_parts(options.jobs)
    _quiet()
    signal.signal(signal.SIGALRM, _too_long)
    from tests.corpora.families import families
    from tests.corpora.training import Outcome, refused_list, train

    chosen = [
        f for f in families() if not options.only or {f.kind, f.type, str(f)} & {*options.only}
    ]
    counts: Counter[str] = Counter()
    listed, unlisted = refused_list(), list[str]()
    for family in chosen[options.part or 0 :: options.jobs if options.part is not None else 1]:
        signal.alarm(LIMIT)
        try:
            outcome = train(family, double=options.double, backend=options.backend)
        except TooLong:
            outcome = Outcome("timeout", f"more than {LIMIT} s")
        signal.alarm(0)
        if (outcome.kind == "refused") != (str(family) in listed):
            unlisted.append(str(family))
        counts[outcome.kind] += 1
        print(f"{outcome.kind:12} {family!s:40} {outcome.detail}", flush=True)
    print(dict(counts))
    if unlisted:
        print("not as tests/corpora/refused.txt says:", *unlisted)
    return 1 if counts["MISMATCH"] or counts["crash"] or unlisted else 0


def _in_parts(jobs: int) -> int:
    command = [sys.executable, __file__, *sys.argv[1:], "--part"]
    running = [subprocess.Popen([*command, str(i)]) for i in range(jobs)]
    return max(p.wait() for p in running)


class TooLong(BaseException):
    """Not an Exception: what the user's code raises is turned into a refusal."""


def _too_long(number: int, frame: Any) -> None:
    raise TooLong


def _quiet() -> None:
    import warnings

    import torch
    import transformers

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()


if __name__ == "__main__":
    raise SystemExit(main())
