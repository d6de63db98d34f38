"""The default workload of the command line: a small GPT-2 on text, or a model of the user's."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from shoestring.ir.errors import UsageError
from shoestring.passes.registry import check_precision
from shoestring.runtime.data import ResumableLoader, TokenDataset, read_text, split
from shoestring.runtime.plain import is_tuple

LossFn = Callable[..., Any]
_BYTES = 256  # tokens are bytes
_VALIDATION_BATCHES = 8


@dataclass(frozen=True)
class ModelOptions:
    """The model: GPT-2 over bytes, randomly initialized.

    Attributes:
        layers: transformer blocks.
        width: features of the residual stream; a multiple of --heads.
        heads: attention heads of a block.
        dropout: probability, of embeddings, attention and residuals.
        precision: `fp32`, or `bf16` for the operands and results of products.
    """

    layers: int = 6
    width: int = 384
    heads: int = 6
    dropout: float = 0.0
    precision: str = "fp32"

    def __post_init__(self) -> None:
        positive("layers", self.layers)
        positive("width", self.width)
        positive("heads", self.heads)
        if self.width % self.heads:
            raise UsageError(
                "SS7005",
                f"--width must be a multiple of --heads, found {self.width} and {self.heads}",
            )
        if not 0 <= self.dropout < 1:
            raise UsageError("SS7005", f"--dropout must lie in [0, 1), found {self.dropout}")
        check_precision(self.precision)

    def autocast(self) -> torch.autocast:
        """What plain PyTorch does for that precision, as a context."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16")


@dataclass(frozen=True)
class DataOptions:
    """The data: windows of a text, in an order that the seed decides.

    Attributes:
        text: a file, read as bytes; by default the manual pages that come with Python.
        batch: windows in a batch.
        seq: bytes in a window.
        seed: of the initial weights, the order of the data and the step's random numbers.
    """

    text: Path | None = None
    batch: int = 8
    seq: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        positive("batch", self.batch)
        positive("seq", self.seq)


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW with a linear warm-up and a cosine decay.

    Attributes:
        lr: the highest learning rate.
        warmup: steps of the warm-up.
        weight_decay: decoupled, as in AdamW.
    """

    lr: float = 1e-3
    warmup: int = 20
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise UsageError("SS7005", f"--lr must be greater than 0, found {self.lr}")
        if self.warmup < 0:
            raise UsageError("SS7005", f"--warmup must be 0 or more, found {self.warmup}")


def positive(name: str, value: int) -> None:
    """Raises UsageError SS7005 where an option is below 1."""
    if value < 1:
        raise UsageError("SS7005", f"--{name} must be 1 or more, found {value}")


@dataclass(frozen=True)
class WorkloadOptions:
    """Everything that decides a run's numbers.

    Attributes:
        model: the model.
        data: the data.
        optimizer: the optimizer.
        steps: in total; the learning rate decays over them.
    """

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    steps: int = 200


def options_text(options: WorkloadOptions) -> str:
    """The options as JSON, for another process."""
    return json.dumps(asdict(options), default=str)


def options_from(text: str) -> WorkloadOptions:
    """The options that `options_text` wrote."""
    settings = json.loads(text)
    data = dict(settings["data"])
    data["text"] = Path(data["text"]) if data["text"] else None
    return WorkloadOptions(
        ModelOptions(**settings["model"]),
        DataOptions(**data),
        OptimizerOptions(**settings["optimizer"]),
        settings["steps"],
    )


@dataclass
class Workload:
    """A model with all that is needed to train it.

    Attributes:
        model: in training mode.
        loss_fn: `loss_fn(model, *batch)`.
        optimizer: over the model's parameters.
        scheduler: stepped once a step.
        loader: endless batches.
        example_batch: of the shapes of all batches.
        validation: the batches of the validation loss; may be empty.
    """

    model: torch.nn.Module
    loss_fn: LossFn
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    loader: ResumableLoader
    example_batch: tuple[torch.Tensor, ...]
    validation: list[torch.Tensor]

    def validation_loss(self) -> float:
        """The mean loss over the validation batches, without dropout."""
        was_training = self.model.training
        self.model.eval()
        with torch.no_grad():
            losses = [float(self.loss_fn(self.model, batch)) for batch in self.validation]
        self.model.train(was_training)
        return sum(losses) / len(losses)


def language_model_loss(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of each next byte."""
    return cast(torch.Tensor, model(input_ids=tokens, labels=tokens, use_cache=False).loss)


def import_transformers() -> None:
    """Imports the library of the default model: its memory is then no part of what follows.

    Raises:
        UsageError: SS7007 where it is not installed.
    """
    try:
        import transformers.models.gpt2.modeling_gpt2  # noqa: F401  # pyright: ignore
    except ImportError:
        raise UsageError(
            "SS7007",
            "the default model comes from the package transformers, which is not installed",
            hint="pip install 'shoestring[train]'",
        ) from None


def build_model(options: ModelOptions, seq: int, seed: int) -> torch.nn.Module:
    """A randomly initialized GPT-2.

    Raises:
        UsageError: SS7007 where transformers is not installed.
    """
    import_transformers()
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=options.layers,
        n_embd=options.width,
        n_head=options.heads,
        vocab_size=_BYTES,
        n_positions=seq,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=options.dropout,
        embd_pdrop=options.dropout,
        attn_pdrop=options.dropout,
    )
    torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]
    model = GPT2LMHeadModel(config)
    model.loss_type = "ForCausalLM"  # its class name does not tell, and transformers would warn
    return cast(torch.nn.Module, model).train()


def build(options: WorkloadOptions) -> Workload:
    """The default workload.

    Raises:
        UsageError: SS7002, SS7003, SS7007, SS7009.
    """
    data, adamw = options.data, options.optimizer
    train, held_out = split(read_text(data.text))
    loader = ResumableLoader(TokenDataset(train, data.seq), data.batch, seed=data.seed)
    model = build_model(options.model, data.seq, data.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=adamw.lr, betas=(0.9, 0.95), weight_decay=adamw.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, warmup_cosine(adamw.warmup, options.steps)
    )
    example = (torch.zeros(data.batch, data.seq, dtype=torch.int64),)
    validation = _validation(held_out, data)
    return Workload(model, language_model_loss, optimizer, scheduler, loader, example, validation)


def _validation(tokens: torch.Tensor, data: DataOptions) -> list[torch.Tensor]:
    if tokens.numel() < data.seq:
        return []
    windows = TokenDataset(tokens, data.seq)
    items = [windows[i] for i in range(min(len(windows), _VALIDATION_BATCHES * data.batch))]
    return list(torch.split(torch.stack(items), data.batch))


def warmup_cosine(warmup: int, steps: int) -> Callable[[int], float]:
    """Factor of the learning rate: up linearly over `warmup` steps, down to 0.1 as a cosine."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min(1.0, (step - warmup) / max(1, steps - warmup))
        return 0.1 + 0.45 * (1 + math.cos(math.pi * done))

    return factor


Program = tuple[torch.nn.Module, LossFn, torch.optim.Optimizer, tuple[Any, ...]]


def load_program(spec: str) -> Program:
    """What `module:factory` gives: (model, loss_fn, optimizer, example_batch).

    Raises:
        UsageError: SS7004 where the spec does not lead to such a function.
    """
    module_name, _, factory_name = spec.partition(":")
    if not module_name or not factory_name:
        raise UsageError("SS7004", f"--model must be module:factory, found {spec!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the user's own module lies where the command is run
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except (ImportError, AttributeError) as error:
        raise UsageError("SS7004", f"--model {spec}: {error}") from None
    made: Any = factory()
    if not is_tuple(made) or len(made) != 4:
        raise UsageError(
            "SS7004",
            f"--model {spec}: (model, loss_fn, optimizer, example_batch) is required, found"
            f" {type(made).__name__}",
        )
    return cast(Program, made)
