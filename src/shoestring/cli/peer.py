"""Plain PyTorch in a process of its own, as the yardstick of `shoestring train --compare eager`.

The child (`peer_child`) builds the same workload from the same options and runs steps on request,
so that parent and child take turns and neither disturbs the other's timing. They talk JSON lines:

    child  -> {"weights": sha256, "baseline": bytes}
    parent -> {"until": 20}
    child  -> {"losses": [...], "seconds": [...], "peak": bytes}
    parent -> {"validate": true}
    child  -> {"validation": 2.5}
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch

from shoestring.ir.errors import RuntimeFault

from .workload import WorkloadOptions, options_text


def weights_hash(model: torch.nn.Module) -> str:
    """A hash of all parameters and buffers, by name and bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass
class PeerResult:
    """What the peer measured.

    Attributes:
        losses: one a step.
        seconds: one a step: forward, backward, update.
        peak: most resident bytes while stepping.
        baseline: resident bytes before the model was built.
        validation: the validation loss at the end; None without validation text.
    """

    losses: list[float] = field(default_factory=list[float])
    seconds: list[float] = field(default_factory=list[float])
    peak: int = 0
    baseline: int = 0
    validation: float | None = None


class Peer:
    """The parent's end: starts the child, gives it turns, collects what it measured."""

    def __init__(self, options: WorkloadOptions) -> None:
        self.result = PeerResult()
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        program = [sys.executable, "-m", "shoestring.cli.peer_child"]
        self._child = subprocess.Popen(
            [*program, str(torch.get_num_threads()), options_text(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the parent, which then ends the child
        )
        hello = self._receive()
        self.weights: str = hello["weights"]
        self.result.baseline = hello["baseline"]

    def run_until(self, step: int) -> None:
        """Lets the child train up to `step`; returns when it has.

        Raises:
            RuntimeFault: SS5103 where the child died.
        """
        self._send({"until": step})
        answer = self._receive()
        self.result.losses += answer["losses"]
        self.result.seconds += answer["seconds"]
        self.result.peak = max(self.result.peak, answer["peak"])

    def finish(self) -> PeerResult:
        """The child's validation loss, and its end."""
        self._send({"validate": True})
        self.result.validation = self._receive()["validation"]
        return self.result

    def _send(self, message: dict[str, Any]) -> None:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(message) + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None

    def _receive(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise self._died()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _died(self) -> RuntimeFault:
        code = self._child.wait(timeout=10)
        return RuntimeFault("SS5103", f"the eager peer process ended early (exit code {code})")

    def close(self) -> None:
        if self._child.poll() is None:
            self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()
