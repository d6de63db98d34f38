"""PyTorch's own examples of what is hard to export: each equals eager, or has a coded refusal."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch._export.db.examples import all_examples

import shoestring
from shoestring.ir.errors import CaptureError

from .training import check_text, refused_list

EXAMPLES = all_examples()
REFUSED = {n.removeprefix("export:"): c for n, c in refused_list().items() if "export:" in n}


@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_example(name: str) -> None:
    case = EXAMPLES[name]
    if name in REFUSED:
        with pytest.raises(CaptureError) as caught:
            run(case)
        assert caught.value.code == REFUSED[name], str(caught.value)
        assert ".py:" in caught.value.where, "the user's line is named"
    else:
        run(case)


def run(case: Any) -> None:
    """Forward, compiled and eager, on the example's inputs."""
    torch.manual_seed(0)
    model, args, kwargs = case.model, tuple(case.example_args), dict(case.example_kwargs)
    called = WithKeywords(model)
    infer = shoestring.compile(
        called, example_inputs=(args, kwargs), backend="reference", passes=()
    )
    check_text(next(iter(infer.programs.values())).captured.function)
    given = copy.deepcopy((args, kwargs))
    got = infer(*copy.deepcopy(given))
    with torch.no_grad():
        wanted = called(*given)
    torch.testing.assert_close(got, wanted)


class WithKeywords(torch.nn.Module):
    """A model called with a tuple and a dict."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.model(*args, **kwargs)
