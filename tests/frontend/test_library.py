"""Modules of PyTorch that are traced in another form give eager's results."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

import shoestring

from .test_capture import trains_like_eager


@pytest.mark.parametrize("affine", [True, False])
def test_cumulative_batch_norm(affine: bool) -> None:
    norm = torch.nn.BatchNorm1d(3, momentum=None, affine=affine)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), norm, torch.nn.Linear(3, 2))
    trains_like_eager(model, (torch.randn(5, 4) + 1,))
    assert norm.num_batches_tracked == 3


def test_cumulative_batch_norm_in_evaluation() -> None:
    norm = torch.nn.BatchNorm1d(3, momentum=None).eval()
    x = torch.randn(5, 3)
    infer = shoestring.compile(norm, example_inputs=(x,), backend="reference")
    torch.testing.assert_close(infer(x), norm(x).detach())
    assert norm.num_batches_tracked == 0


class Encoder(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = torch.nn.TransformerEncoder(layer, 2)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor, padding: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.encoder(x, mask, padding)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_transformer_encoder_with_a_mask_of_the_batch(causal: bool, train: bool) -> None:
    mask = torch.nn.Transformer.generate_square_subsequent_mask(5)
    mask = mask if causal else mask.T.contiguous()
    trains_like_eager(Encoder().train(train), (torch.randn(2, 5, 8), mask))


class Masked(Encoder):
    """The mask is a buffer, as it is in many models."""

    def __init__(self) -> None:
        super().__init__()
        mask = torch.nn.Transformer.generate_square_subsequent_mask(5)
        self.register_buffer("causal", mask)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        padding: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.encoder(x, self.causal, padding)


def test_transformer_encoder_with_a_mask_of_its_own() -> None:
    trains_like_eager(Masked(), (torch.randn(2, 5, 8),))


def test_cumulative_batch_norm_of_a_parameter() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(3, momentum=None)
            self.given = torch.nn.Parameter(torch.randn(4, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.given) * x

    trains_like_eager(Model(), (torch.randn(3),))


def test_transformer_encoder_evaluated_with_padding() -> None:
    mask = torch.zeros(5, 5, dtype=torch.bool).triu(1)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    trains_like_eager(Encoder().eval(), (torch.randn(2, 5, 8), mask, padding))


def test_pytorch_is_as_before() -> None:
    forward = torch.nn.BatchNorm1d.forward
    detect = functional.batch_norm, torch.nn.modules.transformer._detect_is_causal_mask
    x = torch.randn(4, 3)
    shoestring.compile(torch.nn.BatchNorm1d(3), example_inputs=(x,), backend="reference")
    assert torch.nn.BatchNorm1d.forward is forward
    assert detect == (functional.batch_norm, torch.nn.modules.transformer._detect_is_causal_mask)
    assert torch.backends.mha.get_fastpath_enabled()
