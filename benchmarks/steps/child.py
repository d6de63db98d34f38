"""The child of `processes`: one contender, told over a pipe when to run steps.

    python -m benchmarks.steps.child '{"workload": "gpt", "contender": "eager", ...}'

While it waits for a message it reads a pipe, and its thread pools sleep.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from typing import IO, Any

from benchmarks.steps.runners import Runner, Unavailable, make_runner
from benchmarks.workloads import build, shake
from shoestring.runtime.memory import current_rss, measure_peak, release


@dataclass(frozen=True)
class Order:
    """What a child is.

    Attributes:
        workload: a name of `ALL`.
        contender: a name of `CONTENDERS`.
        precision: fp32 or bf16.
        tiny: the test's sizes.
        first_steps: run at once: they compile, warm up, and give the losses to compare.
        shaken: whether each weight is at most one unit in the last place away from the others'.
    """

    workload: str
    contender: str
    precision: str
    tiny: bool
    first_steps: int
    shaken: bool = False

    def text(self) -> str:
        return json.dumps(asdict(self))


def run_steps(runner: Runner, count: int) -> dict[str, Any]:
    """Losses and seconds of `count` steps, and the most resident bytes during them."""
    losses: list[float] = []
    seconds: list[float] = []
    with measure_peak() as use:
        for _ in range(count):
            start = time.perf_counter()
            losses.append(runner.step())
            seconds.append(time.perf_counter() - start)
    return {"losses": losses, "seconds": seconds, "peak": use.peak}


def _start(runner: Runner, order: Order) -> dict[str, Any]:
    import transformers  # noqa: F401  a library: no part of a step's memory

    runner.imports()
    build(order.workload, tiny=True)  # transformers loads the code of a model when it is asked for
    release()
    baseline = current_rss()
    workload = build(order.workload, tiny=order.tiny)
    if order.shaken:
        shake(workload.model)
    start = time.perf_counter()
    runner.setup(workload)
    setup = time.perf_counter() - start
    parameters, drops = workload.parameters, workload.drops
    del workload
    release()
    predicted = runner.predict()
    first = run_steps(runner, order.first_steps)
    release()
    return {
        **first,
        "predicted": predicted,
        "setup": setup,
        "baseline": baseline,
        "parameters": parameters,
        "drops": drops,
        **runner.facts(),
    }


def _answer(runner: Runner, message: dict[str, Any]) -> dict[str, Any]:
    if "profile" in message:
        profile: Any = getattr(runner, "profile", None)
        return {"profile": profile(message["profile"]) if profile else []}
    return run_steps(runner, message["run"])


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of its text."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip() if lines else ''}"[:200]


def _serve(order: Order, out: IO[str]) -> None:
    def send(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=out, flush=True)

    try:
        runner = make_runner(order.contender, order.precision)
        send(_start(runner, order))
        for line in sys.stdin:
            send(_answer(runner, json.loads(line)))
    except Unavailable as error:
        send({"unavailable": str(error)})
    except Exception as error:
        send({"error": first_line(error)})
        raise


def main() -> None:
    """Answers go to the standard output that the process began with; all else to the error's."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _serve(Order(**json.loads(sys.argv[1])), out)


if __name__ == "__main__":
    main()
