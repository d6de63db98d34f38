"""Plain values as JSON and back, exactly: what a checkpoint may hold beside tensors.

JSON has no tuples, infinities or keys other than text, and optimizers and schedulers use all three
(`betas`, `best=inf`, the `Counter` of `MultiStepLR`). Those are written as one-key objects:

    (0.9, 0.95)      {"$tuple": [0.9, 0.95]}
    inf              {"$float": "inf"}
    {80: 1}          {"$dict": [[80, 1]]}
    Counter({80: 1}) {"$counter": [[80, 1]]}
    0-d tensor       {"$scalar": ["f32", 0.5]}

Nothing else is accepted: a checkpoint never needs code to be read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeGuard

import torch

from shoestring.ir import DTYPE_NAMES
from shoestring.ir.errors import CheckpointError

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


# Narrow `Any` to elements of type Any: `isinstance` alone leaves them unknown to type checkers.


def is_list(value: Any) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def is_tuple(value: Any) -> TypeGuard[tuple[Any, ...]]:
    return type(value) is tuple  # a named tuple would come back as a plain one


def is_dict(value: Any) -> TypeGuard[dict[Any, Any]]:
    return isinstance(value, dict)


def encode(value: Any, name: str) -> Any:
    """The value as JSON.

    Args:
        value: None, bool, int, float, str, a 0-d tensor, or lists, tuples and dicts of these.
        name: where the value belongs, for the error.

    Raises:
        CheckpointError: SS6011, naming the entry that is not plain.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if is_list(value):
        return [encode(v, f"{name}[{i}]") for i, v in enumerate(value)]
    if is_tuple(value):
        return {"$tuple": encode(list(value), name)}
    if is_dict(value):
        return _encode_dict(value, name)
    if isinstance(value, torch.Tensor) and value.ndim == 0 and not value.is_complex():
        return {"$scalar": [DTYPE_NAMES[value.dtype], encode(value.item(), name)]}
    raise CheckpointError(
        "SS6011",
        f"saving {name}: a plain value is required (None, bool, int, float, str, list, tuple,"
        f" dict), found {type(value).__name__}",
        hint="keep it out of the saved state, or turn it into numbers and text",
    )


def _encode_dict(value: dict[Any, Any], name: str) -> Any:
    if not isinstance(value, Counter) and all(_is_text_key(k) for k in value):
        return {k: encode(v, f"{name}.{k}") for k, v in value.items()}
    tag = "$counter" if isinstance(value, Counter) else "$dict"
    pairs = [[encode(k, f"{name} (a key)"), encode(v, f"{name}[{k!r}]")] for k, v in value.items()]
    return {tag: pairs}


def _is_text_key(key: Any) -> bool:
    return type(key) is str and not key.startswith("$")


def decode(value: Any) -> Any:
    """The value that `encode` wrote.

    Raises:
        CheckpointError: SS6006 where it was not written by `encode`.
    """
    if is_list(value):
        return [decode(v) for v in value]
    if not is_dict(value):
        return value
    tag = next(iter(value), "")
    if not tag.startswith("$"):
        return {k: decode(v) for k, v in value.items()}
    try:
        return _DECODERS[tag](decode(value[tag]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            "SS6006", f"reading a checkpoint: {tag} holds something else: {error}"
        ) from None


def _scalar(parts: Any) -> torch.Tensor:
    dtype, number = parts
    return torch.tensor(number, dtype=_DTYPES[dtype])


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "$float": float,
    "$tuple": tuple,
    "$dict": lambda pairs: dict(pairs),
    "$counter": lambda pairs: Counter(dict(pairs)),
    "$scalar": _scalar,
}
