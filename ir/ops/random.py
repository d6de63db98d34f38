"""Randomness as a function: the same key gives the same bits on every backend.

A key is i64[2] = (seed, step). An element of a draw is word `i mod 4` of
Philox4x32-10(key=(seed low, seed high), counter=(i div 4, site, step low, step high)),
where `i` is its row-major index and `site` tells the program's draws apart.
Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC11.
"""

from __future__ import annotations

import math

import torch

from ..function import Op
from ..opdef import Cost, Kind, OpDef
from ..types import TensorType
from .aten import replicate

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF


def _mulhilo(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low words of a 32 x 32 bit product, within signed 64-bit arithmetic."""
    low = (b & 0xFFFF) * a
    high = (b >> 16) * a + (low >> 16)
    return (high >> 16) & _MASK, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(key: torch.Tensor, site: int, count: int) -> torch.Tensor:
    """`count` words of 32 random bits, as i64[count]."""
    blocks = torch.arange((count + 3) // 4, dtype=torch.int64)
    seed, step = key[0], key[1]
    c0, c1 = blocks & _MASK, torch.full_like(blocks, site & _MASK)
    c2, c3 = (step & _MASK).expand_as(blocks), ((step >> 32) & _MASK).expand_as(blocks)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        hi0, lo0 = _mulhilo(_M0, c0)
        hi1, lo1 = _mulhilo(_M1, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return torch.stack([c0, c1, c2, c3], dim=1).reshape(-1)[:count]


def _bits(key: torch.Tensor, *, site: int, shape: tuple[int, ...]) -> torch.Tensor:
    return philox(key, site, math.prod(shape)).reshape(shape)


def uniform(
    key: torch.Tensor, *, site: int, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """Multiples of 2^-24 in [0, 1): exact in f32, so every backend agrees to the bit."""
    bits = philox(key, site, math.prod(shape)) >> 8
    return (bits.to(torch.float32) * 2.0**-24).to(dtype).reshape(shape)


def _advance(key: torch.Tensor) -> torch.Tensor:
    return key + torch.tensor([0, 1], dtype=torch.int64)


def _infer_bits(op: Op) -> tuple[TensorType, ...]:
    return (TensorType(torch.int64, op.attrs["shape"]),)


def _infer_uniform(op: Op) -> tuple[TensorType, ...]:
    return (TensorType(op.attrs["dtype"], op.attrs["shape"]),)


def _cost(op: Op) -> Cost:
    return Cost(0, op.result.type.nbytes)


BITS = OpDef(
    "rng.bits.default", Kind.RANDOM, _bits, ("key",), {}, _infer_bits, _cost, replicate, core=True,
    doc="32 random bits an element, as i64.",
)  # fmt: skip
UNIFORM = OpDef(
    "rng.uniform.default", Kind.RANDOM, uniform, ("key",), {}, _infer_uniform, _cost, replicate,
    core=True, doc="Uniform in [0, 1) with 24 bits.",
)  # fmt: skip
ADVANCE = OpDef(
    "rng.advance.default", Kind.RANDOM, _advance, ("key",), {},
    lambda op: (op.inputs[0].type,), _cost, replicate, core=True, doc="The key of the next step.",
)  # fmt: skip

OPS = (BITS, UNIFORM, ADVANCE)
