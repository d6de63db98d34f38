"""Randomness: Philox's published vectors, keys and sites, and the shape of the distributions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from shoestring.ir import Builder, Function, Role, TensorType, Tracer, interpret, parse_type
from shoestring.ir.ops.random import philox

# Random123's `kat_vectors`, philox4x32 with ten rounds: counter, key, result.
VECTORS = [
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (
        [0xFFFFFFFF] * 4,
        [0xFFFFFFFF] * 2,
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
    ),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
SAMPLES = 40_000


def signed(low: int, high: int) -> int:
    """Two words as one i64."""
    value = low | high << 32
    return value - 2**64 if value >= 2**63 else value


@pytest.mark.parametrize(("counter", "key", "wanted"), [VECTORS[0]])
def test_known_answer(counter: list[int], key: list[int], wanted: list[int]) -> None:
    seed = torch.tensor([signed(*key), signed(counter[2], counter[3])])
    assert philox(seed, counter[1], 4).tolist() == wanted


@pytest.mark.parametrize(("counter", "key", "wanted"), VECTORS[1:])
def test_known_answer_far_from_the_first_block(
    counter: list[int], key: list[int], wanted: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block number is the first word of the counter: start the count there."""
    blocks = torch.tensor([counter[0]])
    monkeypatch.setattr(torch, "arange", lambda *_, **__: blocks)
    seed = torch.tensor([signed(*key), signed(counter[2], counter[3])])
    assert philox(seed, counter[1], 4).tolist() == wanted


def test_elements_are_words_of_consecutive_blocks() -> None:
    key = torch.tensor([7, 3])
    assert torch.equal(philox(key, 1, 10), philox(key, 1, 100)[:10])
    assert philox(key, 1, 0).shape == (0,)


def drawn(
    name: str, count: int = SAMPLES, key: tuple[int, int] = (5, 0), site: int = 0
) -> torch.Tensor:
    b = Builder("draw")
    k = b.param(parse_type("i64[2]"), Role.RNG, "#rng")
    dtype: dict[str, Any] = {} if name == "bits" else {"dtype": torch.float32}
    b.output("x", b.emit(f"rng.{name}.default", k, site=site, shape=(count,), **dtype))
    return interpret(b.build(), [torch.tensor(key)])[0][0]


def test_uniform_is_in_range_and_even() -> None:
    x = drawn("uniform").double()
    assert 0 <= float(x.min()) and float(x.max()) < 1
    assert torch.equal(x * 2**24, (x * 2**24).round()), "multiples of 2^-24"
    assert kolmogorov(x) < 1.95 / math.sqrt(SAMPLES)  # fails once in a thousand keys
    assert abs(float(torch.corrcoef(torch.stack([x[:-1], x[1:]]))[0, 1])) < 4 / math.sqrt(SAMPLES)


def kolmogorov(x: torch.Tensor) -> float:
    """The largest distance from the uniform distribution."""
    ordered = x.sort().values
    steps = torch.arange(len(x) + 1, dtype=torch.float64) / len(x)
    return float(torch.maximum(steps[1:] - ordered, ordered - steps[:-1]).max())


@pytest.mark.parametrize("other", [{"key": (6, 0)}, {"key": (5, 1)}, {"site": 1}])
def test_keys_steps_and_sites_are_apart(other: dict[str, object]) -> None:
    assert torch.equal(drawn("bits"), drawn("bits"))
    a, b = drawn("bits"), drawn("bits", **other)  # type: ignore[arg-type]
    assert int((a == b).sum()) < 3


def test_advance() -> None:
    b = Builder("advance")
    k = b.param(parse_type("i64[2]"), Role.RNG, "#rng")
    b.output("next", b.emit("rng.advance.default", k))
    assert interpret(b.build(), [torch.tensor([5, 2**40])])[0][0].tolist() == [5, 2**40 + 1]


def traced(make: object) -> Function:
    tracer = Tracer("draw")
    with torch.random.fork_rng(devices=[]), tracer:
        x = tracer.input(TensorType(torch.float32, (SAMPLES,)), Role.BATCH, "x")
        return tracer.finish([("y", make(x))])  # type: ignore[operator]


def sampled(make: object) -> torch.Tensor:
    function = traced(make)
    arguments = [
        torch.tensor([3, 0]) if p.role is Role.RNG else torch.ones(SAMPLES) for p in function.params
    ]
    return interpret(function, arguments)[0][0].double()


# What is drawn, its mean and its standard deviation.
DISTRIBUTIONS = {
    "rand": (lambda x: torch.rand_like(x), 0.5, math.sqrt(1 / 12)),
    "randn": (lambda x: torch.randn_like(x), 0.0, 1.0),
    "normal": (lambda x: torch.normal(2.0, 3.0, x.shape), 2.0, 3.0),
    "normal_": (lambda x: x.clone().normal_(1, 2), 1.0, 2.0),
    "uniform_": (lambda x: x.clone().uniform_(-1, 3), 1.0, 4 / math.sqrt(12)),
    "exponential_": (lambda x: x.clone().exponential_(2.0), 0.5, 0.5),
    "geometric_": (lambda x: x.clone().geometric_(0.25), 4.0, math.sqrt(0.75) / 0.25),
    "log_normal_": (lambda x: x.clone().log_normal_(0, 0.5), math.exp(0.125), 0.6039),
    "bernoulli": (lambda x: torch.bernoulli(x * 0.3), 0.3, math.sqrt(0.21)),
    "bernoulli_": (lambda x: x.clone().bernoulli_(0.7), 0.7, math.sqrt(0.21)),
    "randint": (lambda x: torch.randint(0, 10, x.shape), 4.5, math.sqrt(8.25)),
    "dropout": (lambda x: torch.nn.functional.dropout(x, 0.2), 1.0, 0.5),
    "rrelu": (lambda x: -torch.rrelu(-x, 0.1, 0.5, True), 0.3, 0.4 / math.sqrt(12)),
    "multinomial": (
        lambda x: torch.multinomial(x[:3], SAMPLES, replacement=True),
        1.0,
        math.sqrt(2 / 3),
    ),
    "randperm": (
        lambda x: torch.randperm(len(x)),
        (SAMPLES - 1) / 2,
        math.sqrt((SAMPLES**2 - 1) / 12),
    ),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distribution(name: str) -> None:
    make, mean, std = DISTRIBUTIONS[name]
    x = sampled(make)
    assert abs(float(x.mean()) - mean) < 5 * std / math.sqrt(SAMPLES)
    assert abs(float(x.std()) / std - 1) < 0.05


def test_cauchy_has_its_quartiles() -> None:
    x = sampled(lambda x: x.clone().cauchy_(1.0, 2.0))
    low, middle, high = (float(q) for q in x.quantile(torch.tensor([0.25, 0.5, 0.75]).double()))
    assert abs(low + 1) < 0.15 and abs(middle - 1) < 0.15 and abs(high - 3) < 0.15


def test_dropout_keeps_or_scales_and_differentiates_the_same() -> None:
    def both(x: torch.Tensor) -> torch.Tensor:
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            y = torch.nn.functional.dropout(leaf, 0.25)
            (grad,) = torch.autograd.grad(y.sum(), leaf)
        return torch.stack([y.detach(), grad])

    y, grad = sampled(both)
    assert set(y.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.75, dtype=torch.float32))}
    assert torch.equal(y, grad)


def test_a_random_operator_without_a_rule_is_refused() -> None:
    from shoestring.ir.errors import CaptureError

    with pytest.raises(CaptureError, match="SS1003.*the random operator aten.poisson.default"):
        traced(torch.poisson)
