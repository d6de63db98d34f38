"""PyTorch's random operators, written with the functional `rng.*` ops.

`draw(shape, dtype)` gives uniform numbers in [0, 1); `bits(shape)` gives 32 random bits as i64.
Each entry returns what the operator returns; in-place forms are written back by the tracer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch import dtype as Dtype


class Source(Protocol):
    """Where random tensors come from while tracing."""

    def draw(self, shape: Sequence[int], dtype: Dtype) -> Tensor: ...

    def bits(self, shape: Sequence[int]) -> Tensor: ...


Sampler = Callable[..., Tensor | tuple[Tensor, ...]]


def _float(dtype: Dtype | None) -> torch.dtype:
    return dtype if dtype is not None else torch.get_default_dtype()


def _open_unit(source: Source, shape: Sequence[int]) -> Tensor:
    """Uniform in (0, 1): the logarithm of neither end is infinite."""
    return source.draw(shape, torch.float64) + 2.0**-25


def _normal(source: Source, shape: Sequence[int], dtype: Dtype) -> Tensor:
    """Box and Muller's transform of two uniform numbers."""
    u = _open_unit(source, (2, *shape))
    return ((-2.0 * u[0].log()).sqrt() * (2.0 * math.pi * u[1]).cos()).to(dtype)


def rand(s: Source, size: Sequence[int], *, dtype: Dtype | None = None, **_: Any) -> Tensor:
    return s.draw(size, _float(dtype))


def rand_like(s: Source, x: Tensor, *, dtype: Dtype | None = None, **_: Any) -> Tensor:
    return s.draw(x.shape, dtype or x.dtype)


def randn(s: Source, size: Sequence[int], *, dtype: Dtype | None = None, **_: Any) -> Tensor:
    return _normal(s, size, _float(dtype))


def randn_like(s: Source, x: Tensor, *, dtype: Dtype | None = None, **_: Any) -> Tensor:
    return _normal(s, x.shape, dtype or x.dtype)


def randint_low(
    s: Source, low: int, high: int, size: Sequence[int], *, dtype: Dtype | None = None, **_: Any
) -> Tensor:
    return (low + s.bits(size) % max(high - low, 1)).to(dtype or torch.int64)


def randint(
    s: Source, high: int, size: Sequence[int], *, dtype: Dtype | None = None, **_: Any
) -> Tensor:
    return randint_low(s, 0, high, size, dtype=dtype)


def randint_like(
    s: Source, x: Tensor, high: int, *, dtype: Dtype | None = None, **_: Any
) -> Tensor:
    return randint_low(s, 0, high, x.shape, dtype=dtype or x.dtype)


def randint_like_low(
    s: Source, x: Tensor, low: int, high: int, *, dtype: Dtype | None = None, **_: Any
) -> Tensor:
    return randint_low(s, low, high, x.shape, dtype=dtype or x.dtype)


def randperm(s: Source, n: int, *, dtype: Dtype | None = None, **_: Any) -> Tensor:
    return torch.argsort(s.bits((n,)), stable=True).to(dtype or torch.int64)


def bernoulli(s: Source, p: Tensor, **_: Any) -> Tensor:
    return (s.draw(p.shape, torch.float32) < p).to(p.dtype)


def bernoulli_p(s: Source, x: Tensor, p: float = 0.5, **_: Any) -> Tensor:
    return (s.draw(x.shape, torch.float32) < p).to(x.dtype)


def bernoulli_tensor(s: Source, x: Tensor, p: Tensor, **_: Any) -> Tensor:
    return (s.draw(x.shape, torch.float32) < p).to(x.dtype)


def uniform(s: Source, x: Tensor, low: float = 0.0, high: float = 1.0, **_: Any) -> Tensor:
    return s.draw(x.shape, x.dtype) * (high - low) + low


def normal(s: Source, x: Tensor, mean: float = 0.0, std: float = 1.0, **_: Any) -> Tensor:
    return _normal(s, x.shape, x.dtype) * std + mean


def normal_tensor_float(s: Source, mean: Tensor, std: float = 1.0, **_: Any) -> Tensor:
    return _normal(s, mean.shape, mean.dtype) * std + mean


def normal_float_tensor(s: Source, mean: float, std: Tensor, **_: Any) -> Tensor:
    return _normal(s, std.shape, std.dtype) * std + mean


def normal_tensor_tensor(s: Source, mean: Tensor, std: Tensor, **_: Any) -> Tensor:
    shape = torch.broadcast_shapes(mean.shape, std.shape)
    return _normal(s, shape, mean.dtype) * std + mean


def normal_float_float(
    s: Source, mean: float, std: float, size: Sequence[int], *, dtype: Dtype | None = None, **_: Any
) -> Tensor:
    return _normal(s, size, _float(dtype)) * std + mean


def exponential(s: Source, x: Tensor, lambd: float = 1.0, **_: Any) -> Tensor:
    return (-_open_unit(s, x.shape).log() / lambd).to(x.dtype)


def log_normal(s: Source, x: Tensor, mean: float = 1.0, std: float = 2.0, **_: Any) -> Tensor:
    return (_normal(s, x.shape, torch.float64) * std + mean).exp().to(x.dtype)


def cauchy(s: Source, x: Tensor, median: float = 0.0, sigma: float = 1.0, **_: Any) -> Tensor:
    return (median + sigma * (math.pi * (_open_unit(s, x.shape) - 0.5)).tan()).to(x.dtype)


def geometric(s: Source, x: Tensor, p: float, **_: Any) -> Tensor:
    return (_open_unit(s, x.shape).log() / math.log1p(-p)).ceil().to(x.dtype)


def random_range(s: Source, x: Tensor, low: int = 0, high: int | None = None, **_: Any) -> Tensor:
    top = high if high is not None else 2**24
    return (low + s.bits(x.shape) % max(top - low, 1)).to(x.dtype)


def random_to(s: Source, x: Tensor, high: int, **_: Any) -> Tensor:
    return random_range(s, x, 0, high)


def multinomial(
    s: Source, weights: Tensor, samples: int, replacement: bool = False, **_: Any
) -> Tensor:
    """Without replacement: the largest of w / e with exponential e. With: one race a sample."""
    if not replacement:
        race = weights.double() / -_open_unit(s, weights.shape).log()
        return race.topk(samples, dim=-1).indices
    shape = (*weights.shape[:-1], samples, weights.shape[-1])
    race = weights.double().unsqueeze(-2) / -_open_unit(s, shape).log()
    return race.argmax(-1)


def native_dropout(
    s: Source, x: Tensor, p: float, train: bool | None = True
) -> tuple[Tensor, Tensor]:
    if not train:
        return x.clone(), torch.ones_like(x, dtype=torch.bool)
    if p == 1:
        return torch.zeros_like(x), torch.zeros_like(x, dtype=torch.bool)
    keep = s.draw(x.shape, torch.float32) < 1.0 - p
    return x * keep * (1.0 / (1.0 - p)), keep


def rrelu(
    s: Source,
    x: Tensor,
    noise: Tensor,
    lower: float = 0.125,
    upper: float = 1.0 / 3.0,
    training: bool = False,
    generator: Any = None,
) -> tuple[Tensor, Tensor]:
    """The result and the noise, which the backward formula reads."""
    if not training:
        return torch.nn.functional.leaky_relu(x, (lower + upper) / 2), noise
    slope = s.draw(x.shape, x.dtype) * (upper - lower) + lower
    new = torch.where(x <= 0, slope, torch.ones_like(x))
    return x * new, new


SAMPLERS: dict[str, Sampler] = {
    "aten.rand.default": rand,
    "aten.rand.generator": rand,
    "aten.rand_like.default": rand_like,
    "aten.randn.default": randn,
    "aten.randn.generator": randn,
    "aten.randn_like.default": randn_like,
    "aten.randint.default": randint,
    "aten.randint.low": randint_low,
    "aten.randint.generator": randint,
    "aten.randint.low_generator": randint_low,
    "aten.randint_like.default": randint_like,
    "aten.randint_like.low_dtype": randint_like_low,
    "aten.randperm.default": randperm,
    "aten.randperm.generator": randperm,
    "aten.bernoulli.default": bernoulli,
    "aten.bernoulli.p": bernoulli_p,
    "aten.bernoulli_.float": bernoulli_p,
    "aten.bernoulli_.Tensor": bernoulli_tensor,
    "aten.uniform_.default": uniform,
    "aten.normal_.default": normal,
    "aten.normal.Tensor_float": normal_tensor_float,
    "aten.normal.float_Tensor": normal_float_tensor,
    "aten.normal.float_float": normal_float_float,
    "aten.normal.Tensor_Tensor": normal_tensor_tensor,
    "aten.exponential_.default": exponential,
    "aten.log_normal_.default": log_normal,
    "aten.cauchy_.default": cauchy,
    "aten.geometric_.default": geometric,
    "aten.random_.default": random_range,
    "aten.random_.from": random_range,
    "aten.random_.to": random_to,
    "aten.multinomial.default": multinomial,
    "aten.native_dropout.default": native_dropout,
    "aten.rrelu_with_noise.default": rrelu,
    "aten.rrelu_with_noise_.default": rrelu,
}
