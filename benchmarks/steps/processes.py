"""Contenders in processes of their own, and turns: the parent's end of `child`."""

from __future__ import annotations

import ctypes.util
import json
import os
import select
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from .child import Order
from .roofline import travel
from .runners import PEERS

ROOT = Path(__file__).resolve().parents[2]
PAUSE_SECONDS = 0.1  # before a turn: longer than thread pools spin before they sleep
MALLOCS = ("tcmalloc_minimal", "jemalloc")
# What PyTorch's performance guide sets for jemalloc.
MALLOC_CONF = (
    "oversize_threshold:1,background_thread:true,metadata_thp:auto,"
    "dirty_decay_ms:9000000000,muzzy_decay_ms:9000000000"
)


class Failed(Exception):
    """A contender that cannot be measured; the text is what its row says."""


def find_malloc() -> str | None:
    """The library of a faster malloc, if this machine has one: for LD_PRELOAD."""
    return next((found for name in MALLOCS if (found := ctypes.util.find_library(name))), None)


def child_environment(threads: int, caches: Path, malloc: str | None) -> dict[str, str]:
    """Our own package first, a number of threads, caches of its own, and maybe another malloc."""
    given = os.environ.get("PYTHONPATH", "")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src"), given]),
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "SHOESTRING_CACHE": str(caches / "shoestring"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "JAX_COMPILATION_CACHE_DIR": str(caches / "jax"),
    }
    if malloc is not None:
        environment |= {"LD_PRELOAD": malloc, "MALLOC_CONF": MALLOC_CONF}
    return environment


@dataclass(eq=False)
class Child:
    """One running contender.

    Attributes:
        order: what it runs.
        hello: its first answer.
    """

    order: Order
    environment: dict[str, str]
    log: Path
    timeout: float
    hello: dict[str, Any] = field(default_factory=dict[str, Any])

    def start(self) -> None:
        """Starts it and waits for its first steps.

        Raises:
            Failed: with what it said, or how it died.
        """
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.steps.child", self.order.text()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self.environment,
                cwd=ROOT,
            )
        self.hello = self._receive()

    def ask(self, **message: Any) -> dict[str, Any]:
        """Its answer to one message."""
        stdin = _pipe(self._process.stdin)
        try:
            stdin.write(json.dumps(message) + "\n")
            stdin.flush()
        except BrokenPipeError:
            raise Failed(self._death()) from None
        return self._receive()

    def cpu_seconds(self) -> float:
        """What it has used of the processor so far, all threads."""
        text = Path(f"/proc/{self._process.pid}/stat").read_text()
        user, system = text.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Ends it."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            _pipe(pipe).close()

    def _receive(self) -> dict[str, Any]:
        stdout = _pipe(self._process.stdout)
        ready, _, _ = select.select([stdout], [], [], self.timeout)
        if not ready:
            raise Failed(f"no answer within {self.timeout:.0f} s")
        line = stdout.readline()
        if not line:
            raise Failed(self._death())
        answer: dict[str, Any] = json.loads(line)
        for kind in ("unavailable", "error"):
            if kind in answer:
                raise Failed(answer[kind])
        return answer

    def _death(self) -> str:
        code = self._process.wait()
        lines = [line for line in self.log.read_text().splitlines() if line.strip()]
        return f"ended with code {code}: {lines[-1].strip() if lines else 'no output'}"[:200]


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe


@dataclass(frozen=True)
class Starter:
    """Starts contenders, twice each: with empty caches, then with those that this filled.

    Attributes:
        folder: for caches and logs.
        threads: of each contender.
        malloc: preloaded for the peers where they are timed.
        timeout: seconds that a contender may take to answer.
    """

    folder: Path
    threads: int
    malloc: str | None
    timeout: float

    def start(self, order: Order) -> tuple[Child, dict[str, Any]]:
        """A child that is ready for its turns, and what was measured of the two starts.

        The first start of a peer has the system's malloc: its memory is what that one needs, if
        this is less. The first start of eager has shaken weights: how far its losses are from those
        of the second is how far rounding alone carries.

        Raises:
            Failed: where it does not run.
        """
        caches = self.folder / f"{order.workload}-{order.contender}-{order.precision}"
        malloc = self.malloc if order.contender in PEERS else None
        cold = self._child(replace(order, shaken=order.contender == "eager"), caches, None)
        try:
            cold.start()
            peak = cold.ask(run=2)["peak"]
        finally:
            cold.close()
        warm = self._child(order, caches, malloc)
        try:
            warm.start()
        except Failed:
            warm.close()
            raise
        return warm, {
            "cold": compile_seconds(cold.hello),
            "warm": compile_seconds(warm.hello),
            "first_losses": cold.hello["losses"],
            "plain_growth": peak - cold.hello["baseline"],
            "plain_peak": peak,
        }

    def _child(self, order: Order, caches: Path, malloc: str | None) -> Child:
        environment = child_environment(self.threads, caches, malloc)
        log = self.folder / f"{order.workload}-{order.contender}-{order.precision}.log"
        return Child(order, environment, log, self.timeout)


def compile_seconds(hello: dict[str, Any]) -> float:
    """Setup and the first two steps, less two ordinary steps: some contenders compile lazily."""
    seconds: list[float] = hello["seconds"]
    setup: float = hello["setup"]
    return max(0.0, setup + sum(seconds[:2]) - 2 * statistics.median(seconds[2:]))


def take_turns(
    children: list[Child], rounds: int, turn_seconds: float
) -> tuple[dict[Child, list[dict[str, Any]]], float]:
    """Lets the children run in alternation; their answers, and the idle ones' use of a core.

    Each round begins with another child. A turn has as many steps as fit into `turn_seconds`, at
    least 3; its first one wakes threads and caches and is for the caller to drop. "travel" of an
    answer is how long a cache line took from core to core after the turn.
    """
    answers: dict[Child, list[dict[str, Any]]] = {child: [] for child in children}
    idle, total = 0.0, 0.0
    for number in range(rounds):
        shift = number % max(1, len(children))
        for child in children[shift:] + children[:shift]:
            others = [c for c in children if c is not child]
            time.sleep(PAUSE_SECONDS)
            before, start = sum(c.cpu_seconds() for c in others), time.perf_counter()
            answer = child.ask(run=steps_of_turn(child, turn_seconds))
            idle += sum(c.cpu_seconds() for c in others) - before
            total += time.perf_counter() - start
            answers[child].append({**answer, "travel": travel()})
    return answers, idle / total if total else 0.0


def steps_of_turn(child: Child, turn_seconds: float) -> int:
    """Steps that fill a turn, by the time of the first steps."""
    seconds: list[float] = child.hello["seconds"]
    usual = statistics.median(seconds[2:])
    return min(200, max(3, round(turn_seconds / max(usual, 1e-6))))
