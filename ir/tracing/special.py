"""ATen calls that the tracer cannot take as they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch._prims_common import suggest_memory_format

from ..ops import find_overload
from ..ops.networks import TYPED_BY_INPUT
from .sparse import coo_tensor, embedding_bag_backward

if TYPE_CHECKING:
    from .tracer import Tracer

aten = torch.ops.aten


def native_batch_norm(
    tracer: Tracer,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """Writes running statistics without saying so in its schema: the functional form says it."""
    if mean is None or var is None:
        return aten._native_batch_norm_legit.no_stats(x, weight, bias, training, momentum, eps)
    if not training:
        return aten._native_batch_norm_legit_no_training(x, weight, bias, mean, var, momentum, eps)
    out = aten._native_batch_norm_legit_functional(
        x, weight, bias, mean, var, training, momentum, eps
    )
    mean.copy_(out[3])
    var.copy_(out[4])
    scale = [t for t in (weight, bias) if t is not None]
    if any(tracer.share_storage(a, b) for a in (mean, var) for b in scale):
        # PyTorch updates the statistics first: what shares memory with them is read as updated.
        return aten._native_batch_norm_legit.no_stats(x, weight, bias, training, momentum, eps)
    return out[:3]


def native_batch_norm_backward(
    tracer: Tracer,
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    save_mean: torch.Tensor | None,
    save_invstd: torch.Tensor | None,
    train: bool,
    eps: float,
    output_mask: Sequence[bool],
) -> Any:
    """Always asks for the gradient of `x`: PyTorch's rule for sizes has it, its kernel not."""
    operands = (grad, x, weight, mean, var, save_mean, save_invstd)
    args = (*operands, train, eps, [True, *output_mask[1:]])
    func = aten.native_batch_norm_backward.default
    with tracer.untraced():
        return tracer._pure(  # pyright: ignore[reportPrivateUsage]
            "aten.native_batch_norm_backward.default", func, args, {}
        )


def lift_fresh(tracer: Tracer, x: torch.Tensor) -> torch.Tensor:
    return tracer.lift(x)


def squeeze(tracer: Tracer, x: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """With the dimensions that go by name, so that a part of the tensor loses the same ones."""
    asked = range(x.dim()) if dim is None else [dim % x.dim()] if x.dim() else []
    squeezed: torch.Tensor = aten.squeeze.dims(x, [i for i in asked if x.shape[i] == 1])
    return squeezed


def index_put(
    tracer: Tracer,
    x: torch.Tensor,
    indices: Sequence[torch.Tensor | None],
    values: torch.Tensor,
    accumulate: bool = False,
) -> Any:
    """`x[mask] = number`: a choice, where PyTorch would first count the mask's elements."""
    given = [(i, t) for i, t in enumerate(indices) if t is not None]
    if len(given) != 1 or given[0][1].dtype is not torch.bool or values.numel() != 1:
        return NotImplemented
    first, mask = given[0]
    trailing = x.dim() - first - mask.dim()
    mask = mask.reshape((*mask.shape, *(1,) * trailing))
    value = values.reshape(()).to(x.dtype)
    return aten.where.self(mask, x + value if accumulate else value, x)


def resize(
    tracer: Tracer, x: torch.Tensor, size: Sequence[int] | torch.Tensor, **_: Any
) -> torch.Tensor:
    """Only where nothing changes: a value has no memory beyond its elements."""
    wanted = tuple(size.shape if isinstance(size, torch.Tensor) else size)
    if wanted != tuple(x.shape):
        raise tracer.refusal("SS1003", f"resizing a tensor in place to {wanted} is not supported")
    return x


def set_data(tracer: Tracer, x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    raise tracer.refusal("SS1003", "replacing a tensor's storage (`.data = ...`) is not supported")


# Called in place of the op; NotImplemented leaves it as it is.
REWRITES: dict[str, Callable[..., Any]] = {
    "aten.native_batch_norm.default": native_batch_norm,
    "aten.native_batch_norm_backward.default": native_batch_norm_backward,
    "aten.lift_fresh.default": lift_fresh,
    "aten.lift_fresh_copy.default": lift_fresh,
    "aten.index_put.default": index_put,
    "aten.squeeze.default": squeeze,
    "aten.squeeze.dim": squeeze,
    "aten.resize_.default": resize,
    "aten.resize_as_.default": resize,
    "aten.set_.source_Tensor": set_data,
    "aten._sparse_coo_tensor_with_dims_and_tensors.default": coo_tensor,
    "aten._embedding_bag_backward.default": embedding_bag_backward,
}


def grouped_mm(
    x: torch.Tensor,
    y: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Sizes of `_grouped_mm`; PyTorch's own rule refuses fp32, which its CPU kernel takes."""
    dtype = out_dtype or x.dtype
    if x.dim() == 2 and y.dim() == 2:
        assert offs is not None
        return x.new_empty((offs.shape[0], x.shape[0], y.shape[1]), dtype=dtype)
    if x.dim() == 3 and y.dim() == 2:
        return x.new_empty((x.shape[1], y.shape[1]), dtype=dtype)
    if x.dim() == 2:
        return x.new_empty((x.shape[0], y.shape[2]), dtype=dtype)
    return x.new_empty((x.shape[0], x.shape[1], y.shape[2]), dtype=dtype)


def like_input(name: str) -> Callable[..., torch.Tensor]:
    """PyTorch's rule with the element type of `self`, as its kernel has it.

    The rules for gradients divide by the number of elements, which may be zero.
    """
    overload = find_overload(name)
    names = [a.name for a in overload._schema.arguments]  # pyright: ignore[reportPrivateUsage]
    place = names.index("self")

    def fake(*args: Any, **kwargs: Any) -> torch.Tensor:
        given: torch.Tensor = args[place]
        if place and not given.numel():
            return torch.empty_like(given)
        outcome: torch.Tensor = overload(*args, **kwargs)
        return outcome.to(given.dtype)

    return fake


def like_kernel(name: str, place: int = 0, *, keeps: bool = True) -> Callable[..., Any]:
    """PyTorch's rule with its first result laid out as by the CPU kernel.

    User code may take a view of it that other strides do not allow.

    Args:
        name: of the op.
        place: of the operand that the layout follows.
        keeps: whether channels that come last stay there.
    """
    overload = find_overload(name)

    def fake(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        y, *rest = overload(*args, **kwargs)
        form = suggest_memory_format(args[place]) if keeps else torch.contiguous_format
        return (y.contiguous(memory_format=form), *rest)

    return fake


def group_norm_backward(
    grad: torch.Tensor, x: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor,
    weight: torch.Tensor | None, n: int, channels: int, size: int, groups: int,
    mask: Sequence[bool],
) -> Any:  # fmt: skip
    """PyTorch's rule, which divides by the size of a group where that is not zero."""
    if x.numel():
        op = aten.native_group_norm_backward.default
        return op(grad, x, mean, rstd, weight, n, channels, size, groups, mask)
    results = (torch.empty_like(x), x.new_empty(channels), x.new_empty(channels))
    return tuple(r if wanted else None for r, wanted in zip(results, mask, strict=True))


# Run in place of PyTorch's rule for sizes and types.
FAKE_RESULTS: dict[str, Callable[..., Any]] = {
    "aten._grouped_mm.default": grouped_mm,
    **{name: like_input(name) for name in TYPED_BY_INPUT},
    **{
        name: like_kernel(name)
        for name in (
            "aten._native_batch_norm_legit.no_stats",
            "aten._native_batch_norm_legit_functional.default",
            "aten._native_batch_norm_legit_no_training.default",
        )
    },
    "aten.native_group_norm_backward.default": group_norm_backward,
    "aten.native_batch_norm_backward.default": like_kernel(
        "aten.native_batch_norm_backward.default", 1
    ),
    "aten.log_sigmoid_forward.default": like_kernel(
        "aten.log_sigmoid_forward.default", keeps=False
    ),
}
