"""Training steps to measure: unmodified models of transformers and torch, random weights and data.

Dropout is 0, so that every contender computes the same losses, but where a workload is about it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from shoestring.frontend.library import plain_recurrence

LossFn = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Workload:
    """What a contender trains.

    Attributes:
        model: in training mode.
        loss_fn: `loss_fn(model, *batch)` gives a scalar.
        batch: the same tensors at every step.
        learning_rate: of AdamW.
    """

    model: nn.Module
    loss_fn: LossFn
    batch: tuple[torch.Tensor, ...]
    learning_rate: float = 3e-4

    @property
    def drops(self) -> bool:
        """Whether losses depend on random numbers, which each contender has of its own."""
        return any(isinstance(m, nn.Dropout) and m.p > 0 for m in self.model.modules())

    @property
    def parameters(self) -> int:
        """Elements of all parameters; tied ones once."""
        return sum(p.numel() for p in self.model.parameters())


@contextmanager
def autocast(enabled: bool = True) -> Iterator[None]:
    """PyTorch's bf16. Without bf16 products oneDNN's LSTM errs: then kernels of PyTorch's own."""
    replaced = enabled and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    recurrence = plain_recurrence() if replaced else nullcontext()
    with recurrence, torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        yield


def _language_loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
    return loss


def _ids(vocabulary: int, batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, vocabulary, (batch, length))


def _images(batch: int, size: int, labels: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 3, size, size), torch.randint(0, labels, (batch,))


def _image_loss(model: nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(pixel_values=pixels, labels=labels).loss
    return loss


def gpt(tiny: bool, dropout: float = 0.0) -> Workload:
    """GPT-2 of 14 M parameters: tied head, 8 x 256 tokens."""
    from transformers import GPT2Config, GPT2LMHeadModel

    layers, width, heads, vocabulary = (2, 32, 2, 64) if tiny else (6, 384, 6, 8192)
    batch, length = (2, 16) if tiny else (8, 256)
    config = GPT2Config(
        n_layer=layers,
        n_embd=width,
        n_head=heads,
        vocab_size=vocabulary,
        n_positions=length,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return Workload(GPT2LMHeadModel(config), _language_loss, (_ids(vocabulary, batch, length),))


def gpt_dropout(tiny: bool) -> Workload:
    """GPT-2 of 14 M parameters with the dropout that it has unless told otherwise, 0.1."""
    return gpt(tiny, 0.1)


def llama(tiny: bool) -> Workload:
    """Llama-style, 6 query heads on 2 key-value heads, 15.7 M parameters, 8 x 256 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, width, heads, vocabulary = (2, 32, 4, 64) if tiny else (6, 384, 6, 8192)
    batch, length = (2, 16) if tiny else (8, 256)
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=88 if tiny else 1024,
        num_attention_heads=heads,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        max_position_embeddings=length,
        use_cache=False,
    )
    return Workload(LlamaForCausalLM(config), _language_loss, (_ids(vocabulary, batch, length),))


def qwen3moe(tiny: bool) -> Workload:
    """Qwen3-MoE-style: 4 layers of 8 experts, 2 of them active, 11 M parameters, 8 x 256 tokens."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    layers, width, vocabulary = (2, 32, 64) if tiny else (4, 256, 8192)
    batch, length = (2, 16) if tiny else (8, 256)
    config = Qwen3MoeConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        intermediate_size=2 * width,
        moe_intermediate_size=width,
        num_experts=4 if tiny else 8,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        vocab_size=vocabulary,
        max_position_embeddings=length,
        use_cache=False,
    )
    return Workload(Qwen3MoeForCausalLM(config), _language_loss, (_ids(vocabulary, batch, length),))


def bert(tiny: bool, dropout: float = 0.0) -> Workload:
    """Fine-tuning of a BERT of MiniLM's shape, 22.7 M parameters, 32 x 128 tokens with padding."""
    from transformers import BertConfig, BertForSequenceClassification

    layers, width, heads, vocabulary = (2, 32, 2, 64) if tiny else (6, 384, 12, 30522)
    batch, length = (4, 16) if tiny else (32, 128)
    config = BertConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        vocab_size=vocabulary,
        max_position_embeddings=length,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=2,
    )

    def loss_fn(
        model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        loss: torch.Tensor = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        return loss

    lengths = torch.randint(length // 2, length + 1, (batch, 1))
    mask = (torch.arange(length) < lengths).long()
    labels = torch.randint(0, 2, (batch,))
    return Workload(
        BertForSequenceClassification(config),
        loss_fn,
        (_ids(vocabulary, batch, length), mask, labels),
        1e-4,
    )


def bert_dropout(tiny: bool) -> Workload:
    """The same BERT with the dropout that it has unless told otherwise, 0.1."""
    return bert(tiny, 0.1)


def vit(tiny: bool) -> Workload:
    """A vision transformer of 10.8 M parameters on 32 images of 64 x 64: 65 tokens each."""
    from transformers import ViTConfig, ViTForImageClassification

    layers, width, heads, size = (2, 32, 2, 16) if tiny else (6, 384, 6, 64)
    labels, batch = (5, 4) if tiny else (100, 32)
    config = ViTConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=size,
        patch_size=8,
        num_labels=labels,
    )
    return Workload(ViTForImageClassification(config), _image_loss, _images(batch, size, labels))


def resnet18(tiny: bool) -> Workload:
    """ResNet-18 with batch norms, 11.2 M parameters, on 32 images of 64 x 64."""
    from transformers import ResNetConfig, ResNetForImageClassification

    labels, batch, size = (5, 8, 32) if tiny else (100, 32, 64)
    sizes = [8, 16] if tiny else [64, 128, 256, 512]
    config = ResNetConfig(
        embedding_size=sizes[0],
        hidden_sizes=sizes,
        depths=[2] * len(sizes),
        layer_type="basic",
        num_labels=labels,
    )
    return Workload(ResNetForImageClassification(config), _image_loss, _images(batch, size, labels))


def mlp(tiny: bool) -> Workload:
    """784-512-512-10 with ReLU on 256 rows, 0.67 M parameters."""
    inputs, hidden, batch = (12, 16, 8) if tiny else (784, 512, 256)
    model = nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, 10),
    )

    def loss_fn(model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(model(x), labels)

    return Workload(model, loss_fn, (torch.randn(batch, inputs), torch.randint(0, 10, (batch,))))


class LanguageLstm(nn.Module):
    """Embedding, a stacked `nn.LSTM`, and a linear head."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """[batch, length] -> [batch, length, vocabulary]."""
        hidden, _ = self.lstm(self.embedding(ids))
        logits: torch.Tensor = self.head(hidden)
        return logits


def lstm(tiny: bool, batch: int = 32, length: int = 64) -> Workload:
    """A two-layer LSTM language model of 1.6 M parameters, 32 x 64 tokens."""
    vocabulary, width = (20, 16) if tiny else (1000, 256)
    batch, length = (3, 6) if tiny else (batch, length)

    def loss_fn(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        logits = model(ids[:, :-1])
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    model = LanguageLstm(vocabulary, width)
    return Workload(model, loss_fn, (_ids(vocabulary, batch, length + 1),))


def lstm_long(tiny: bool) -> Workload:
    """The same LSTM and as many tokens, in 8 times as many steps: 4 x 512."""
    return lstm(tiny, 4, 512)


WORKLOADS: dict[str, Callable[[bool], Workload]] = {
    "gpt": gpt,
    "llama": llama,
    "qwen3moe": qwen3moe,
    "bert": bert,
    "vit": vit,
    "resnet18": resnet18,
    "mlp": mlp,
    "lstm": lstm,
}
MORE: dict[str, Callable[[bool], Workload]] = {
    "gpt-dropout": gpt_dropout,
    "bert-dropout": bert_dropout,
    "lstm-long": lstm_long,
}
"""Measured where they are named."""
ALL = WORKLOADS | MORE


def shake(model: nn.Module, seed: int = 0) -> None:
    """Moves each weight by one unit in the last place, up, down or not at all."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            way = torch.randint(-1, 2, p.shape, generator=generator)
            p.copy_(torch.where(way == 0, p, p.nextafter(p + way)))


def require_known(names: Iterable[str]) -> None:
    """Ends the program with a message where a name is not one of `ALL`."""
    unknown = set(names) - set(ALL)
    if unknown:
        sys.exit(f"unknown workloads {sorted(unknown)}; there are {', '.join(ALL)}")


def build(name: str, *, tiny: bool = False, seed: int = 0) -> Workload:
    """The workload `name`, equal at every call with the same seed.

    Args:
        name: one of `ALL`.
        tiny: a shape of the same kind that runs in milliseconds, for tests.
        seed: of weights and data.
    """
    torch.manual_seed(seed)
    workload = ALL[name](tiny)
    workload.model.train()
    return workload
