"""A dozen Hugging Face families train like eager PyTorch; the sweep does all of them."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import transformers

from .families import Family
from .training import refused_list, train

EQUAL = [
    Family("causal", "gpt2"),
    Family("causal", "llama"),
    Family("causal", "mixtral"),
    Family("causal", "qwen3_moe"),
    Family("causal", "deepseek_v3"),
    Family("causal", "gpt_oss"),
    Family("causal", "mamba2"),
    Family("masked", "bert"),
    Family("seq2seq", "t5"),
    Family("image", "vit"),
    Family("image", "resnet"),
    Family("audio", "wav2vec2"),
]
REFUSED = [Family("causal", "xlm"), Family("causal", "longcat_flash"), Family("ctc", "wav2vec2")]

# transformers warns of its own defaults; what it says has nothing to do with this project.
pytestmark = pytest.mark.filterwarnings("ignore:::transformers")


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.logging.set_verbosity_error()


@pytest.mark.parametrize("family", EQUAL, ids=str)
def test_trains_like_eager(family: Family) -> None:
    outcome = train(family)
    assert outcome.kind == "equal", f"{outcome.kind}: {outcome.detail}"


@pytest.mark.parametrize("family", EQUAL[:2], ids=str)
def test_trains_like_eager_in_double(family: Family) -> None:
    outcome = train(family, double=True)
    assert outcome.kind == "equal", f"{outcome.kind}: {outcome.detail}"


@pytest.mark.parametrize("family", REFUSED, ids=str)
def test_refused(family: Family) -> None:
    outcome = train(family)
    assert outcome.kind == "refused", f"{outcome.kind}: {outcome.detail}"
    assert refused_list()[str(family)] in outcome.detail and ".py:" in outcome.detail
