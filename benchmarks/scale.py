"""Llama-3-8B's training step without its weights: captured, verified, simplified, printed, costed.

    python benchmarks/scale.py

Prints the time of each part, peak memory of the process, and the FLOPs beside the textbook's count.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM

from shoestring.frontend.capture import capture_step
from shoestring.ir import parse, print_function, same_structure, verify
from shoestring.passes.pipeline import Pipeline
from shoestring.passes.registry import default_pipeline
from shoestring.runtime.report import total_cost

LLAMA_3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    rope_theta=500000.0,
)
BATCH, LENGTH = 1, 2048


def textbook_flops(config: LlamaConfig, tokens: int, length: int) -> float:
    """Forward and backward: 6 per weight of a product and token, and attention's products.

    Source: Kaplan et al., "Scaling laws for neural language models", 2020, section 2.1. Attention
    has two products forward and four backward. The captured kernel recomputes one of them, which
    the cost of the program counts and the textbook does not.
    """
    head = config.hidden_size // config.num_attention_heads
    qkvo = config.hidden_size * head * 2 * (config.num_attention_heads + config.num_key_value_heads)
    mlp = 3 * config.hidden_size * config.intermediate_size
    weights = config.num_hidden_layers * (qkvo + mlp) + config.vocab_size * config.hidden_size
    attention = 6 * 2 * config.num_hidden_layers * length * config.hidden_size
    return tokens * (6 * weights + attention)


def timed(name: str, work: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    result = work()
    print(f"{name:<12} {time.perf_counter() - start:6.1f} s", flush=True)
    return result


def build() -> tuple[Any, Any]:
    with FakeTensorMode():
        model = LlamaForCausalLM(LLAMA_3_8B)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-4)


def main() -> None:
    start = time.perf_counter()
    model, optimizer = timed("build", build)
    batch = torch.zeros(BATCH, LENGTH, dtype=torch.int64)

    def loss_fn(model: Any, ids: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
        return loss

    captured = timed("capture", lambda: capture_step(model, loss_fn, optimizer, (batch,)))
    function = captured.function
    timed("verify", lambda: verify(function))
    simplified, records = timed("passes", lambda: Pipeline(default_pipeline()).run(function))
    text = timed("print", lambda: print_function(simplified))
    parsed = timed("parse", lambda: parse(text))
    assert same_structure(parsed, simplified)
    cost = timed("cost", lambda: total_cost(simplified))
    total = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    book = textbook_flops(LLAMA_3_8B, BATCH * LENGTH, LENGTH)
    print(f"total        {total:6.1f} s; peak memory {peak / 1e9:.2f} GB")
    print(f"operations   {len(function.ops)} captured, {len(simplified.ops)} after the passes")
    for record in records:
        print(f"  {record.name:<24} {record.seconds:6.2f} s")
    print(
        f"FLOPs        {cost.flops / 1e12:.2f} T; textbook {book / 1e12:.2f} T; "
        f"ratio {cost.flops / book:.4f}"
    )


if __name__ == "__main__":
    main()
