"""The child of `peer`: plain PyTorch, as users write it; `python -m shoestring.cli.peer_child`."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch

from shoestring.runtime.memory import current_rss, measure_peak, release

from .peer import weights_hash
from .workload import (
    ModelOptions,
    Workload,
    WorkloadOptions,
    build,
    import_transformers,
    options_from,
)


def eager_step(work: Workload, model: ModelOptions) -> tuple[float, float]:
    """One step as users write it; its loss and seconds."""
    (tokens,) = next(work.loader)
    begin = time.perf_counter()
    work.optimizer.zero_grad(set_to_none=True)
    with model.autocast():
        loss = work.loss_fn(work.model, tokens)
    loss.backward()
    work.optimizer.step()
    value = float(loss.detach())
    seconds = time.perf_counter() - begin
    work.scheduler.step()
    return value, seconds


def _answer(
    work: Workload, model: ModelOptions, message: dict[str, Any], done: int
) -> tuple[dict[str, Any], int]:
    if "validate" in message:
        return {"validation": work.validation_loss() if work.validation else None}, done
    with measure_peak() as use:
        steps = [eager_step(work, model) for _ in range(done, message["until"])]
    losses, seconds = [s[0] for s in steps], [s[1] for s in steps]
    return {"losses": losses, "seconds": seconds, "peak": use.peak}, done + len(steps)


def _serve(threads: int, options: WorkloadOptions) -> None:
    torch.set_num_threads(threads)
    import_transformers()
    release()
    baseline = current_rss()
    with (work := build(options)).loader:
        print(json.dumps({"weights": weights_hash(work.model), "baseline": baseline}), flush=True)
        done = 0
        for line in sys.stdin:
            answer, done = _answer(work, options.model, json.loads(line), done)
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve(int(sys.argv[1]), options_from(sys.argv[2]))
