"""JAX's jit on the GPT and the MLP: the same weights, losses and AdamW, written as JAX users would.

Weights stay fp32. For bf16 the factors of products are cast, as autocast does; norms, softmax,
residuals and the loss are fp32.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from torch import nn

from benchmarks.workloads import Workload

from .runners import Unavailable

BETA1, BETA2, EPSILON, DECAY = 0.9, 0.999, 1e-8, 0.01
Parameters = dict[str, Any]
Loss = Callable[..., Any]


@dataclass
class JaxRunner:
    """One jitted function for the whole step; parameters and moments are donated."""

    precision: str

    def imports(self) -> None:
        jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

    def setup(self, workload: Workload) -> None:
        dtype = jnp.bfloat16 if self.precision == "bf16" else jnp.float32
        loss = _loss_of(workload.model, dtype)
        self.batch = tuple(jnp.asarray(t.numpy()) for t in workload.batch)
        self.parameters = {
            name: jnp.array(p.detach().numpy()) for name, p in workload.model.named_parameters()
        }
        self.moments = [{n: jnp.zeros_like(p) for n, p in self.parameters.items()} for _ in "mv"]
        self.count = jnp.zeros((), jnp.float32)
        self.update = jax.jit(_step(loss, workload.learning_rate), donate_argnums=(0, 1, 2))
        for p in workload.model.parameters():
            p.data = p.data.new_empty(0)

    def step(self) -> float:
        loss, self.parameters, self.moments, self.count = self.update(
            self.parameters, self.moments, self.count, *self.batch
        )
        return float(loss)

    def predict(self) -> int | None:
        return None

    def facts(self) -> dict[str, Any]:
        return {}


def _step(loss: Loss, learning_rate: float) -> Callable[..., Any]:
    """AdamW as torch.optim defines it."""

    def step(parameters: Parameters, moments: Any, count: Any, *batch: Any) -> Any:
        value, gradients = jax.value_and_grad(loss)(parameters, *batch)
        count = count + 1
        scale1, scale2 = 1 - BETA1**count, 1 - BETA2**count
        tree = jax.tree.map
        first = tree(lambda m, g: BETA1 * m + (1 - BETA1) * g, moments[0], gradients)
        second = tree(lambda v, g: BETA2 * v + (1 - BETA2) * g * g, moments[1], gradients)

        def updated(p: Any, m: Any, v: Any) -> Any:
            ratio = (m / scale1) / (jnp.sqrt(v / scale2) + EPSILON)
            return p * (1 - learning_rate * DECAY) - learning_rate * ratio

        return value, tree(updated, parameters, first, second), [first, second], count

    return step


def _loss_of(model: nn.Module, dtype: Any) -> Loss:
    if isinstance(model, nn.Sequential):
        return _mlp_loss([n for n, m in model.named_children() if isinstance(m, nn.Linear)], dtype)
    if type(model).__name__ == "GPT2LMHeadModel":
        return _gpt_loss(model.config, dtype)
    raise Unavailable("written in JAX for gpt and mlp only")


def _product(x: Any, w: Any, dtype: Any) -> Any:
    return x.astype(dtype) @ w.astype(dtype)


def _cross_entropy(logits: Any, labels: Any) -> Any:
    scores = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.mean(jnp.take_along_axis(scores, labels[..., None], axis=-1))


def _mlp_loss(layers: list[str], dtype: Any) -> Loss:
    def loss(p: Parameters, x: Any, labels: Any) -> Any:
        for name in layers:
            x = _product(x, p[f"{name}.weight"].T, dtype) + p[f"{name}.bias"].astype(dtype)
            x = jax.nn.relu(x) if name != layers[-1] else x
        return _cross_entropy(x, labels)

    return loss


def _gpt_loss(config: Any, dtype: Any) -> Loss:
    def norm(p: Parameters, name: str, x: Any) -> Any:
        mean = jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True)
        normal = (x - mean) * jax.lax.rsqrt(variance + config.layer_norm_epsilon)
        return normal * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(p: Parameters, name: str, x: Any) -> Any:
        return _product(x, p[f"{name}.weight"], dtype) + p[f"{name}.bias"].astype(dtype)

    def attention(p: Parameters, name: str, x: Any) -> Any:
        batch, length, width = x.shape
        split = (batch, length, config.n_head, width // config.n_head)
        q, k, v = (t.reshape(split) for t in jnp.split(linear(p, f"{name}.c_attn", x), 3, axis=-1))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / split[-1] ** 0.5
        causal = jnp.tril(jnp.ones((length, length), bool))
        weights = jax.nn.softmax(jnp.where(causal, scores.astype(jnp.float32), -jnp.inf))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(dtype), v)
        return linear(p, f"{name}.c_proj", mixed.reshape(x.shape))

    def block(p: Parameters, name: str, x: Any) -> Any:
        x = x + attention(p, f"{name}.attn", norm(p, f"{name}.ln_1", x))
        hidden = linear(p, f"{name}.mlp.c_fc", norm(p, f"{name}.ln_2", x))
        return x + linear(p, f"{name}.mlp.c_proj", jax.nn.gelu(hidden, approximate=True))

    def loss(p: Parameters, ids: Any) -> Any:
        embedding = p["transformer.wte.weight"]
        x = embedding[ids] + p["transformer.wpe.weight"][: ids.shape[1]]
        for layer in range(config.n_layer):
            x = block(p, f"transformer.h.{layer}", x)
        x = norm(p, "transformer.ln_f", x)
        return _cross_entropy(_product(x[:, :-1], embedding.T, dtype), ids[:, 1:])

    return loss
