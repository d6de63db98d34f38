"""The 18 small `test_*` models of timm train like eager PyTorch.

In double precision: on images this small a batch norm sees two or three numbers a channel, and
fp32 rounding grows tenfold a step.
"""

from __future__ import annotations

import copy
from importlib.util import find_spec

import pytest
import torch

from .families import Batch, no_dropout
from .no_torchvision import import_timm
from .training import Wide, compare, eager_losses

if find_spec("timm") is None:
    pytest.skip("timm installs with --no-deps only: .ci/run does", allow_module_level=True)

timm = import_timm()
FIXED = ("vit", "coatnet")  # positions, and so the size of images, are part of the model
NAMES = sorted(timm.list_models("test_*"))


def loss_fn(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    with Wide():
        return torch.nn.functional.cross_entropy(model(batch["x"]), batch["y"])


def test_there_are_eighteen() -> None:
    assert len(NAMES) == 18


@pytest.mark.parametrize("name", NAMES)
def test_trains_like_eager(name: str) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).double()
    no_dropout(model)
    native = model.pretrained_cfg["input_size"][-1]
    side = native if any(kind in name for kind in FIXED) else 64
    batch = {"x": torch.randn(2, 3, side, side).double(), "y": torch.tensor([0, 3])}
    wanted = eager_losses(copy.deepcopy(model), batch, loss_fn)
    outcome = compare(model, batch, wanted, loss_fn)
    assert outcome.kind == "equal", f"{outcome.kind}: {outcome.detail}"
