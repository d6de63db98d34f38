"""Modules of PyTorch that read a tensor's value in Python, or call a vendor's library.

While a model is traced they run in a form that gives the same results and does not. The forms stand
in PyTorch's classes for as long as a capture takes; they are right for tensors with data as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.nn import functional
from torch.nn.modules import transformer
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from .recurrence import layers_as_ops


@contextmanager
def traceable_library() -> Iterator[None]:
    """Puts the forms below in the place of PyTorch's."""
    with ExitStack() as stack:
        stack.enter_context(plain_recurrence())
        stack.enter_context(layers_as_ops())
        for owner, name, make in (
            (_BatchNorm, "forward", _batch_norm),
            (transformer, "_detect_is_causal_mask", _detect_is_causal_mask),
            (transformer.TransformerEncoder, "forward", _encoder),
        ):
            stack.enter_context(patch.object(owner, name, make(getattr(owner, name))))
        yield


@contextmanager
def plain_recurrence() -> Iterator[None]:
    """An LSTM becomes matrix products and pointwise ops, not one op of a vendor's library."""
    before = torch._C._get_mkldnn_enabled()  # pyright: ignore[reportPrivateUsage]
    torch._C._set_mkldnn_enabled(False)  # pyright: ignore[reportPrivateUsage]
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)  # pyright: ignore[reportPrivateUsage]


def _batch_norm(original: Any) -> Any:
    """`momentum=None` averages over all batches; PyTorch reads their number to get the weight."""

    def forward(self: Any, input: torch.Tensor) -> Any:
        tracks = self.training and self.track_running_stats and self.num_batches_tracked is not None
        if self.momentum is not None or not tracks:
            return original(self, input)
        self._check_input_dim(input)
        mean, var = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_var)
        result = functional.batch_norm(
            input, mean, var, self.weight, self.bias, True, 1.0, self.eps
        )
        with torch.no_grad():
            share = 1.0 / self.num_batches_tracked.add_(1).double()
            for running, new in ((self.running_mean, mean), (self.running_var, var)):
                running.copy_(share * new.double() + (1.0 - share) * running.double())
        return result

    return forward


def _detect_is_causal_mask(_: Any) -> Any:
    """Whether a mask is the causal one chooses a kernel: the mask itself is right for each."""

    def detect(mask: Any, is_causal: bool | None = None, size: int | None = None) -> bool:
        return is_causal is True

    return detect


def _encoder(original: Any) -> Any:
    """With a padding mask the fast path looks at its values before it asks if it can be taken."""

    def forward(self: Any, src: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        trained = src.requires_grad or any(p.requires_grad for p in self.layers[0].parameters())
        if not (torch.is_grad_enabled() and trained):
            return original(self, src, *args, **kwargs)
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return original(self, src, *args, **kwargs)
        finally:
            torch.backends.mha.set_fastpath_enabled(before)

    return forward
