"""Compiled programs that stay for the next process."""

from __future__ import annotations

import hashlib
import logging
import pickle
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import shoestring
from shoestring.backends.c import CBackend, CExecutable
from shoestring.ir import Function
from shoestring.passes.base import Numerics, Pass, PassReport
from shoestring.passes.pipeline import Pipeline
from shoestring.passes.registry import default_pipeline
from shoestring.runtime import kept
from shoestring.runtime.executor import find_mismatches
from shoestring.runtime.kept import Keeper
from shoestring.runtime.step import Program, Step


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs are kept, in an empty folder. Kernels come from where they always do."""
    monkeypatch.setattr(kept, "cache_folder", lambda: tmp_path)
    monkeypatch.delenv(kept.SWITCH)
    return tmp_path / "programs"


class Tied(nn.Module):
    """A head that is the embedding, dropout, norms, a buffer; sizes that no block divides."""

    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(17, 10)
        self.layer = nn.TransformerEncoderLayer(10, 2, 14, dropout=0.2, batch_first=True)
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.layer(self.embedding(tokens))
        self.seen.add_(1)
        return x @ self.embedding.weight.t()


def loss_fn(model: nn.Module, tokens: torch.Tensor) -> Any:
    logits = model(tokens[:, :-1])
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    return loss, {"largest": logits.max()}


def compiled(length: int = 8, loss: Callable[..., Any] = loss_fn, **options: Any) -> Step:
    torch.manual_seed(1)
    model = Tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    step = shoestring.compile(model, loss, optimizer, (tokens(length),), **options)
    assert isinstance(step, Step)
    return step


def tokens(length: int = 8) -> torch.Tensor:
    return torch.randint(0, 17, (3, length), generator=torch.Generator().manual_seed(2))


def program_of(step: Step) -> Program:
    (program,) = step.programs.values()
    return program


def trained(step: Step) -> list[torch.Tensor]:
    """Losses, metrics and state of three steps."""
    seen: list[torch.Tensor] = []
    for _ in range(3):
        loss, metrics = step(tokens())
        seen += [loss, *metrics.values()]
    return [*seen, *(t.clone() for t in step.state_tensors().values())]


def test_the_second_is_the_first(folder: Path) -> None:
    first, second = compiled(), compiled()
    one, two = program_of(first), program_of(second)
    assert (one.kept, two.kept) == (False, True)
    assert list(two.seconds) == ["capture", "lookup", "load"]
    assert all(map(torch.equal, trained(second), trained(first)))
    assert isinstance(one.executable, CExecutable) and isinstance(two.executable, CExecutable)
    assert two.executable.source == one.executable.source
    assert two.executable.kernels == one.executable.kernels
    assert len(list(folder.iterdir())) == 1
    story = str(second.report()).splitlines()
    assert "those of an earlier compilation" in story[1]
    assert story[2:5] == str(first.report()).splitlines()[2:5]
    assert [str(r) for r in two.records] == [str(r) for r in one.records]


def test_a_program_that_was_kept_can_be_looked_into() -> None:
    compiled()
    step = compiled()
    program = program_of(step)
    assert program.records[0].before is program.captured.function
    assert program.records[-1].after is program.function
    arguments = [t.clone() for t in step.bind(program.captured, [tokens()])]
    assert isinstance(program.executable, CExecutable)
    assert find_mismatches(program.executable, arguments) == []


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.runtime import test_kept as t
t.kept.cache_folder = lambda: Path({folder!r})
step = t.compiled()
print(t.program_of(step).kept, [float(step(t.tokens())[0]) for _ in range(3)])
"""


def test_the_next_process_has_it(tmp_path: Path) -> None:
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", SCRIPT.format(root=root, folder=str(tmp_path))]
    first, second = (
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.split(" ", 1)
        for _ in range(2)
    )
    assert (first[0], second[0]) == ("False", "True")
    assert first[1] == second[1]


def _doubled(model: nn.Module, tokens: torch.Tensor) -> Any:
    loss, metrics = loss_fn(model, tokens)
    return 2 * loss, metrics


@pytest.mark.parametrize(
    "change",
    [{"length": 9}, {"loss": _doubled}, {"precision": "bf16"}, {"accumulate": 2},
     {"disable_passes": ["fuse_attention"]}, {"clip_grad_norm": 1.0}],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_another_program_is_compiled(change: dict[str, Any]) -> None:
    compiled()
    assert not program_of(compiled(**change)).kept


def _at_line(line: int) -> Callable[..., Any]:
    """The same loss, further down its file."""
    source = "\n" * line + "def loss(model, x):\n  return model(x).square().mean(), {}\n"
    names: dict[str, Any] = {}
    exec(compile(source, "user.py", "exec"), names)
    return names["loss"]


def test_lines_are_part_of_it() -> None:
    """They are in the comments of the C and in messages."""
    compiled(loss=_at_line(1))
    assert program_of(compiled(loss=_at_line(1))).kept
    assert not program_of(compiled(loss=_at_line(2))).kept


def test_the_seed_and_the_numbers_of_the_optimizer_are_no_part_of_it() -> None:
    compiled()
    step = compiled(seed=5)
    step.optimizer.param_groups[0]["lr"] = 0.5
    step(tokens())
    assert program_of(step).kept


def keeper(**options: Any) -> Keeper | None:
    function = program_of(compiled()).captured.function
    return Keeper.of(function, Pipeline(default_pipeline()), CBackend(**options))


def test_the_machine_and_the_code_are_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    places = [keeper(), keeper(fuse=False), keeper(measure=False)]
    with monkeypatch.context() as changed:
        changed.setattr(kept, "_code", lambda: "edited")
        places.append(keeper())
    with monkeypatch.context() as changed:
        changed.setenv("SHOESTRING_ISA", "generic")
        places.append(keeper())
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    places.append(keeper())
    torch.set_num_threads(threads)
    assert len({k.path for k in places if k is not None}) == len(places)
    again = keeper()
    assert again is not None and places[0] is not None and again.path == places[0].path


@dataclass(frozen=True)
class Idle(Pass):
    """Does nothing, but who knows."""

    numerics: ClassVar[Numerics] = Numerics.EXACT

    def run(self, function: Function) -> tuple[Function, PassReport]:
        return function, PassReport()


@pytest.mark.parametrize(
    "options",
    [{"passes": [Idle()]}, {"verify": True}, {"backend": "reference"}],
    ids=["pass", "verify", "reference"],
)
def test_what_is_never_kept(options: dict[str, Any], folder: Path) -> None:
    for _ in range(2):
        assert not program_of(compiled(**options)).kept
    assert not folder.exists()


def test_the_switch(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv(kept.SWITCH, "0")
    compiled()
    assert not folder.exists()


def _with_hash(data: bytes) -> bytes:
    packed = zlib.compress(data)
    return hashlib.sha256(packed).digest() + packed


@pytest.mark.parametrize(
    "damage",
    [lambda b: b"", lambda b: b[:40], lambda b: b[:-1], lambda b: b[:99] + b"\0" + b[100:],
     lambda b: hashlib.sha256(b"x").digest() + b"x", lambda b: _with_hash(pickle.dumps(eval)),
     lambda b: _with_hash(pickle.dumps(3))],
    ids=["empty", "head", "tail", "middle", "packed", "code", "other"],
)  # fmt: skip
def test_a_damaged_file_is_made_anew(
    damage: Callable[[bytes], bytes], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiled()
    (path,) = folder.iterdir()
    good = path.read_bytes()
    path.write_bytes(damage(good))
    with caplog.at_level(logging.WARNING, "shoestring"):
        assert not program_of(compiled()).kept
    assert "is damaged" in caplog.text and str(path) in caplog.text
    assert program_of(compiled()).kept


def test_a_folder_that_cannot_be_written_costs_nothing_but_time(folder: Path) -> None:
    folder.write_text("a file where the folder would be")
    assert not program_of(compiled()).kept
    assert folder.is_file()


def test_kernels_that_are_gone_are_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = trained(compiled())
    monkeypatch.setenv("SHOESTRING_CACHE", str(tmp_path / "other"))
    step = compiled()
    executable = program_of(step).executable
    assert program_of(step).kept and isinstance(executable, CExecutable)
    assert not executable.info.cache_hit
    assert all(map(torch.equal, trained(step), wanted))
