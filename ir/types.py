"""Types of values: element type, shape, encoding and sharding."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch

from .errors import IRError

# Short names, as printed. The order is the order of documentation, nothing depends on it.
DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "f8e4m3",
    torch.float8_e5m2: "f8e5m2",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.uint16: "u16",
    torch.uint32: "u32",
    torch.uint64: "u64",
    torch.bool: "bool",
    torch.complex32: "c32",
    torch.complex64: "c64",
    torch.complex128: "c128",
}
DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True, slots=True)
class Symbol:
    """A dimension known only when the step runs, such as the batch size."""

    name: str

    def __str__(self) -> str:
        return self.name


Dim = int | Symbol


@dataclass(frozen=True, slots=True)
class Encoding:
    """How elements are stored.

    Attributes:
        kind: `dense`, `2:4` (two of four consecutive elements are zero), `block` or `quantized`.
        params: the kind's own numbers, e.g. `(16, 16)` for a block, `(32,)` for a scale group.
    """

    kind: str = "dense"
    params: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.kind if not self.params else f"{self.kind}({','.join(map(str, self.params))})"


@dataclass(frozen=True, slots=True)
class Sharding:
    """How a tensor is spread over a device mesh.

    Attributes:
        axes: one tuple of mesh axes per dimension, or nothing at all where replicated.
        partial: mesh axes over which the true value is the sum of the shards.
    """

    axes: tuple[tuple[str, ...], ...] = ()
    partial: tuple[str, ...] = ()

    def __str__(self) -> str:
        dims = ",".join("+".join(a) or "_" for a in self.axes)
        return dims + (f"|{','.join(self.partial)}" if self.partial else "")


DENSE = Encoding()
REPLICATED = Sharding()


@dataclass(frozen=True, slots=True)
class TensorType:
    """A tensor's element type, shape, encoding and sharding; `f32[8,256]` as text."""

    dtype: torch.dtype
    shape: tuple[Dim, ...]
    encoding: Encoding = DENSE
    sharding: Sharding = REPLICATED

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def is_static(self) -> bool:
        return all(isinstance(d, int) for d in self.shape)

    @property
    def static_shape(self) -> tuple[int, ...]:
        """The shape as integers.

        Raises:
            IRError: SS2001 where a dimension is symbolic.
        """
        for d in self.shape:  # asked for all the time
            if not isinstance(d, int):
                raise IRError("SS2001", f"a static shape is required, found {self}")
        return cast("tuple[int, ...]", self.shape)

    @property
    def numel(self) -> int:
        return math.prod(self.static_shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def with_shape(self, shape: tuple[Dim, ...]) -> TensorType:
        return TensorType(self.dtype, shape, self.encoding)

    def __str__(self) -> str:
        text = f"{DTYPE_NAMES[self.dtype]}[{','.join(map(str, self.shape))}]"
        if self.encoding != DENSE:
            text += f"<{self.encoding}>"
        if self.sharding != REPLICATED:
            text += f"@({self.sharding})"
        return text


_TYPE = re.compile(
    r"(?P<dtype>\w+)\[(?P<shape>[^\]]*)\]"
    r"(?:<(?P<kind>[\w:]+)(?:\((?P<params>[\d,]*)\))?>)?"
    r"(?:@\((?P<axes>[^)|]*)(?:\|(?P<partial>[^)]*))?\))?"
)


def match_type(text: str, start: int) -> tuple[TensorType, int] | None:
    """The type that begins at `text[start]` and where it ends, or None where there is none."""
    m = _TYPE.match(text, start)
    if m is None or m["dtype"] not in DTYPES:
        return None
    shape = tuple(_dim(d.strip()) for d in m["shape"].split(",") if d.strip())
    params = tuple(int(p) for p in (m["params"] or "").split(",") if p)
    axes = tuple(() if a == "_" else tuple(a.split("+")) for a in (m["axes"] or "").split(",") if a)
    partial = tuple(a for a in (m["partial"] or "").split(",") if a)
    encoding = Encoding(m["kind"], params) if m["kind"] else DENSE
    return TensorType(DTYPES[m["dtype"]], shape, encoding, Sharding(axes, partial)), m.end()


def parse_type(text: str) -> TensorType:
    """The type written as `text`.

    Raises:
        IRError: SS2002 where it is not a type.
    """
    found = match_type(text, 0)
    if found is None or found[1] != len(text):
        raise IRError("SS2002", f"a type such as f32[8,256] is required, found {text!r}")
    return found[0]


def _dim(text: str) -> Dim:
    return int(text) if text.lstrip("-").isdigit() else Symbol(text)


def type_of(tensor: torch.Tensor) -> TensorType:
    """The dense, replicated type of a tensor (real, fake or meta)."""
    return _dense(tensor.dtype, tuple([int(d) for d in tensor.shape]))


@lru_cache(4096)
def _dense(dtype: torch.dtype, shape: tuple[int, ...]) -> TensorType:
    """One object for equal types: a program has few."""
    return TensorType(dtype, shape)
