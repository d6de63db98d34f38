"""Kills a training process with SIGKILL at random instants and resumes it, again and again.

The run that was killed must end with the very bits of a run that was not: weights, moments, random
key, losses. Half of the kills are aimed at a checkpoint that is being written.

    python tests/sweeps/kill_resume.py --kills 50
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path

import torch

import shoestring
from shoestring.runtime.checkpoint import Checkpoint
from shoestring.runtime.data import ResumableLoader, TokenDataset, read_text
from shoestring.runtime.store import Store
from shoestring.runtime.trainer import Trainer, TrainOptions

STEPS, EVERY, WIDTH = 40, 2, 96


class Model(torch.nn.Module):
    """Small, with dropout, tied weights and a buffer that changes at each step."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(256, WIDTH)
        self.norm = torch.nn.BatchNorm1d(WIDTH)
        self.drop = torch.nn.Dropout(0.1)
        self.mix = torch.nn.Linear(WIDTH, WIDTH)
        self.head = torch.nn.Linear(WIDTH, 256, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embed(tokens).flatten(0, 1))
        logits: torch.Tensor = self.head(self.drop(torch.relu(self.mix(x))))
        return logits


def loss_fn(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(tokens[:, :-1])
    return torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())


def child(folder: Path, backend: str, ready: Connection) -> None:
    """Trains to the end, from the newest checkpoint where there is one."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 10))
    loader = ResumableLoader(TokenDataset(read_text()[:20000], 17), 16, seed=3)
    batch = (torch.zeros(16, 17, dtype=torch.int64),)
    step = shoestring.compile(model, loss_fn, optimizer, batch, backend=backend, seed=7)
    options = TrainOptions(
        STEPS,
        folder,
        EVERY,
        keep=2,
        resume=bool(Store(folder).steps()),
        metrics=folder / "metrics.jsonl",
    )
    ready.send(True)
    Trainer(step, optimizer, loader, options, scheduler).run()


@dataclass
class Outcome:
    """What a sweep saw."""

    kills: int = 0
    in_save: int = 0
    runs: int = 0
    wrong: list[str] = field(default_factory=list[str])

    def __str__(self) -> str:
        verdict = "all equal to the last bit" if not self.wrong else f"WRONG: {self.wrong}"
        return (
            f"{self.kills} kills, {self.in_save} inside a save, {self.runs} runs ended: {verdict}"
        )


def start(folder: Path, backend: str) -> ForkProcess:
    """A child that has compiled and is about to train."""
    context = multiprocessing.get_context("fork")  # spares each child the import of torch
    ready, theirs = context.Pipe()
    process = context.Process(target=child, args=(folder, backend, theirs))
    process.start()
    theirs.close()
    try:
        ready.recv()
    except EOFError:
        raise RuntimeError(f"the child ended with {end(process)} before it trained") from None
    return process


def end(process: ForkProcess) -> int:
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def saving(folder: Path) -> bool:
    return any(folder.glob(".tmp-*"))


def kill(process: ForkProcess, folder: Path, seconds: float, aim: bool) -> bool:
    """Kills after some time, or within the next save; False where the child ended before."""
    begin = time.perf_counter()
    while process.is_alive():
        late = time.perf_counter() - begin >= seconds
        if late and (not aim or saving(folder)):
            process.kill()
            return end(process) == -signal.SIGKILL
    end(process)
    return False


def state(folder: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The final tensors, and the losses of the metrics file."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    losses = [(json.loads(line)["step"], json.loads(line)["loss"]) for line in lines]
    assert [s for s, _ in losses] == list(range(1, STEPS + 1)), [s for s, _ in losses]
    return Checkpoint.open(Store(folder).path(STEPS)).read(), [loss for _, loss in losses]


def differences(folder: Path, good: Path) -> list[str]:
    """Names of what differs between two finished runs."""
    (a, losses_a), (b, losses_b) = state(folder), state(good)
    names = [n for n in b if not torch.equal(a[n], b[n])]
    return names + (["losses"] if losses_a != losses_b else [])


def sweep(root: Path, kills: int, seed: int, backend: str) -> Outcome:
    """Kills and resumes until `kills` are reached and the last run has ended."""
    draw, outcome = random.Random(seed), Outcome()
    good = root / "uninterrupted"
    begin = time.perf_counter()
    process = start(good, backend)
    trained = time.perf_counter()
    if end(process):
        raise RuntimeError("the uninterrupted run failed")
    length = time.perf_counter() - trained
    print(f"a run takes {trained - begin:.1f} s to start and {length:.2f} s to train", flush=True)
    folder = root / "killed"
    while True:
        process = start(folder, backend)
        if outcome.kills < kills:
            aim = draw.random() < 0.5
            delay = draw.uniform(0, length / 3)
            if kill(process, folder, delay, aim):
                outcome.kills += 1
                outcome.in_save += saving(folder)
                continue
        elif end(process):
            raise RuntimeError("a resumed run failed")
        outcome.runs += 1
        outcome.wrong += differences(folder, good)
        shutil.rmtree(folder)
        if outcome.kills >= kills:
            return outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="c")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # a process with threads of its own must not be forked
    with tempfile.TemporaryDirectory() as root:
        outcome = sweep(Path(root), arguments.kills, arguments.seed, arguments.backend)
    print(outcome)
    return 1 if outcome.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
