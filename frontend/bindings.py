"""Where each parameter of a captured function comes from, call after call."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class HyperBinding:
    """A hyper-parameter read at each call: `optimizer.param_groups[group][name]`."""

    group: int
    name: str


@dataclass(frozen=True, eq=False)
class MomentBinding:
    """An entry of the optimizer's state, read at each call: `optimizer.state[param][key]`.

    Attributes:
        param: whose state.
        group: the number of its parameter group, by which missing state is made.
        key: the entry's name.
        dtype: the entry's type; `optimizer.load_state_dict` may change it.
        nbytes: its size.
    """

    param: torch.Tensor
    group: int
    key: str
    dtype: torch.dtype
    nbytes: int


@dataclass(frozen=True, eq=False)
class CountBinding:
    """An entry of the optimizer's state that is a Python int; one more after each update."""

    param: torch.Tensor
    group: int
    key: str


@dataclass(frozen=True, eq=False)
class FirstBinding:
    """1.0 where an entry of the optimizer's state was made for this very call, else 0.0."""

    param: torch.Tensor
    group: int
    key: str


@dataclass(frozen=True)
class BatchBinding:
    """The n-th tensor of the batch."""

    index: int


StateBinding = MomentBinding | CountBinding | FirstBinding
Binding = torch.Tensor | HyperBinding | StateBinding | BatchBinding
