"""Plain values survive JSON exactly; everything else is refused by name."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoestring.ir.errors import CheckpointError
from shoestring.runtime.plain import decode, encode

_keys = st.one_of(st.text(), st.integers(), st.booleans(), st.none())
_leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text())
_values = st.recursive(
    _leaves,
    lambda inner: st.one_of(
        st.lists(inner), st.lists(inner).map(tuple), st.dictionaries(_keys, inner)
    ),
    max_leaves=20,
)


def round_trip(value: Any) -> Any:
    return decode(json.loads(json.dumps(encode(value, "x"), allow_nan=False)))


@given(_values)
def test_round_trip(value: Any) -> None:
    assert repr(round_trip(value)) == repr(value)


@pytest.mark.parametrize("value", [math.inf, -math.inf, -0.0, 5e-324, 0.1, 1e300])
def test_floats_keep_their_bits(value: float) -> None:
    assert repr(round_trip(value)) == repr(value)


def test_nan_stays_nan() -> None:
    assert math.isnan(round_trip(math.nan))


def test_counter_and_scalar_tensor() -> None:
    value = {"milestones": Counter({80: 1}), "lr": torch.tensor(0.1)}
    back = round_trip(value)
    assert back["milestones"] == Counter({80: 1})
    assert isinstance(back["milestones"], Counter)
    assert back["lr"].dtype is torch.float32 and back["lr"].equal(value["lr"])


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.lr_scheduler.OneCycleLR(p, 0.1, total_steps=10),
        lambda p: torch.optim.lr_scheduler.MultiStepLR(p, [2, 2, 5]),
        lambda p: torch.optim.lr_scheduler.CosineAnnealingLR(p, 10),
        lambda p: torch.optim.lr_scheduler.ReduceLROnPlateau(p),
        lambda p: torch.optim.lr_scheduler.LambdaLR(p, lambda step: 1 / (1 + step)),
    ],
)
def test_scheduler_states(make: Any) -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    scheduler = make(optimizer)
    assert round_trip(scheduler.state_dict()) == scheduler.state_dict()


def test_others_are_refused_by_name() -> None:
    with pytest.raises(CheckpointError) as caught:
        encode({"a": [1, {"hook": print}]}, "scheduler")
    assert str(caught.value) == (
        "[SS6011] saving scheduler.a[1].hook: a plain value is required (None, bool, int, float,"
        " str, list, tuple, dict), found builtin_function_or_method\n"
        "  help: keep it out of the saved state, or turn it into numbers and text"
    )


@pytest.mark.parametrize("value", [{"$float": "print"}, {"$code": 1}, {"$scalar": ["f99", 1]}])
def test_unknown_tags_are_refused(value: Any) -> None:
    with pytest.raises(CheckpointError, match="SS6006"):
        decode(value)
