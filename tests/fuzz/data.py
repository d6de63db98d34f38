"""Tensors by description: the same numbers from the same seed, in any memory layout."""

from __future__ import annotations

import torch

DTYPES: dict[str, torch.dtype] = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "i32": torch.int32,
    "u8": torch.uint8,
    "bool": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SPECIAL = (float("nan"), float("inf"), float("-inf"), -0.0, 0.0)


def make(
    seed: int, dtype: str, shape: tuple[int, ...], fill: str = "unit", layout: str = "plain"
) -> torch.Tensor:
    """A tensor.

    Args:
        seed: of its numbers.
        dtype: a name of `DTYPES`.
        shape: its sizes.
        fill: `unit` (-1 to 1), `positive` (0.5 to 1.5), `special` (NaN, infinities and zeros among
            others), `zero`, `below:n` (integers of 0 to n - 1), or `coin`.
        layout: `plain`, `transposed`, `strided` (gaps between elements) or `offset`.
    """
    return arrange(_numbers(seed, shape, fill).to(DTYPES[dtype]), layout)


def _numbers(seed: int, shape: tuple[int, ...], fill: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if fill.startswith("below:"):
        high = int(fill.removeprefix("below:"))
        return torch.randint(0, high, shape, generator=generator)
    u = torch.rand(shape, generator=generator, dtype=torch.float64)
    if fill == "coin":
        return u < 0.5
    if fill == "zero":
        return torch.zeros(shape, dtype=torch.float64)
    if fill == "positive":
        return u + 0.5
    if fill == "special":
        which = torch.randint(0, 3 * len(SPECIAL), shape, generator=generator)
        x = u * 2 - 1
        for i, number in enumerate(SPECIAL):
            x = torch.where(which == i, number, x)
        return x
    return u * 2 - 1


def arrange(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same elements, laid out otherwise in memory."""
    if layout == "plain" or x.dim() == 0:
        return x.contiguous()
    if layout == "transposed":
        order = tuple(reversed(range(x.dim())))
        return x.permute(order).contiguous().permute(order)
    if layout == "strided":
        room = x.new_zeros((*x.shape[:-1], 2 * x.shape[-1] + 1))
        view = room[..., 1::2]
    else:
        view = x.new_zeros(x.numel() + 3)[3:].view(x.shape)
    view.copy_(x)
    return view
