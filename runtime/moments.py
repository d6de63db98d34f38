"""The optimizer's state, as the optimizer itself would keep it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shoestring.frontend.capture import Binding, CountBinding, MomentBinding, StateBinding
from shoestring.frontend.optimizers import rule_of
from shoestring.ir.errors import RuntimeFault


class Moments:
    """Reads `optimizer.state` at each call, and makes what is missing as the first step does.

    Nothing of the state is kept here: between two calls `optimizer.load_state_dict` may replace it,
    and an eager `optimizer.step()` may change it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        # Entries made since the last update; compared by identity, so a loaded one is not new.
        self._new: dict[tuple[int, str], Any] = {}

    def entry(self, binding: StateBinding) -> Any:
        """`optimizer.state[param][key]`.

        Raises:
            RuntimeFault: SS5012 where other entries are there but not this one.
        """
        state = self.optimizer.state[binding.param]
        if state.get(binding.key) is None:
            self._make(binding.group, binding.param)
        return state[binding.key]

    def is_new(self, binding: StateBinding) -> bool:
        """Whether no update has used the entry yet."""
        entry = self.entry(binding)
        return self._new.get((id(binding.param), binding.key)) is entry

    def make(self, trained: Sequence[tuple[int, torch.Tensor]]) -> None:
        """Makes the missing state of these (group, parameter)."""
        rule = rule_of(self.optimizer)
        for group, p in trained:
            wanted = rule.init(
                torch.empty_like(p, device="meta"), self.optimizer.param_groups[group]
            )
            if any(self.optimizer.state[p].get(key) is None for key in wanted):
                self._make(group, p)

    def _make(self, group: int, p: torch.Tensor) -> None:
        state = self.optimizer.state[p]
        made = rule_of(self.optimizer).init(p.detach(), self.optimizer.param_groups[group])
        present = [key for key in made if state.get(key) is not None]
        if present:
            missing = ", ".join(key for key in made if key not in present)
            raise RuntimeFault(
                "SS5012",
                f"the optimizer's state of a parameter has {', '.join(present)} but not {missing}",
                hint="load a state that was saved with the same options of the optimizer",
            )
        state.update(made)
        self._new.update({(id(p), key): value for key, value in made.items()})

    def missing_bytes(self, bindings: Sequence[Binding]) -> int:
        """Bytes of the entries that the next step will make."""
        return sum(b.nbytes for b in bindings if isinstance(b, MomentBinding) and self._lacks(b))

    def _lacks(self, binding: MomentBinding) -> bool:
        state = self.optimizer.state.get(binding.param, {})
        return state.get(binding.key) is None

    def have_types_of(self, bindings: Sequence[Binding]) -> bool:
        """Whether the state's types are those that a program was compiled for."""
        state = self.optimizer.state
        for b in bindings:
            if isinstance(b, MomentBinding):
                entry = state.get(b.param, {}).get(b.key)
                if entry is not None and entry.dtype != b.dtype:
                    return False
        return True

    def updated(self, bindings: Sequence[Binding]) -> None:
        """To be called after a program ran: counts go up where it updated."""
        counts = [b for b in bindings if isinstance(b, CountBinding)]
        for b in counts:
            self.optimizer.state[b.param][b.key] += 1
        if not bindings or any(isinstance(b, MomentBinding) for b in bindings):
            self._new.clear()

    def counts(self) -> list[list[Any]]:
        """Entries that are plain numbers: [group, position in it, key, value]."""
        return [
            [i, j, key, value]
            for i, group in enumerate(self.optimizer.param_groups)
            for j, p in enumerate(group["params"])
            for key, value in self.optimizer.state.get(p, {}).items()
            if isinstance(value, int)
        ]

    def load_counts(self, counts: Sequence[Sequence[Any]]) -> None:
        """Takes back what `counts` gave."""
        for i, j, key, value in counts:
            self.optimizer.state[self.optimizer.param_groups[i]["params"][j]][key] = value
