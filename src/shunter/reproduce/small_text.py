"""Tiny language models of bytes: windows of the built-in text in, a plain loop that trains on them, their loss out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from ..moe import aux_loss, update_routers
from ..recipes.text import RECIPE, TextConfig

__all__ = [
    "BATCH",
    "LENGTH",
    "VOCABULARY",
    "dense_model",
    "held_out_loss",
    "logits_of",
    "next_byte_loss",
    "step",
    "windows",
]

LENGTH, BATCH, VOCABULARY = 64, 16, 257


def windows(steps: int, domains: Sequence[str] | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Batches (steps, BATCH, LENGTH) of the built-in text as bytes, and held-out windows (N, LENGTH)."""
    config = TextConfig.model_validate(
        {
            "seed": seed,
            "data": {
                "tokenizer": "bytes",
                "sequence_length": LENGTH,
                "max_bytes": 400_000,
                "eval_windows": 24,
                "domains": None if domains is None else list(domains),
            },
            "training": {"steps": steps, "batch_tokens": BATCH * LENGTH},
        }
    )
    data = RECIPE.prepare(config)
    items = [data.train[i]["input_ids"] for i in range(steps * BATCH)]
    return torch.stack(items).view(steps, BATCH, LENGTH), torch.cat([domain.input_ids for domain in data.eval])


def dense_model(dim: int = 64, hidden: int = 128, layers: int = 2, seed: int = 0) -> LlamaForCausalLM:
    """A decoder of bytes."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=dim,
            intermediate_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2 * LENGTH,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """The logits (B, S, V) of a model of transformers, or of one that gives them, alone or first."""
    out: Any = model(ids)
    logits: Any = out.logits if hasattr(out, "logits") else out[0] if isinstance(out, tuple) else out
    assert isinstance(logits, Tensor)
    return logits


def next_byte_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Nats a byte of windows (B, S)."""
    return F.cross_entropy(logits_of(model, ids)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


Loss = Callable[[nn.Module, Tensor], Tensor]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, loss: Loss = next_byte_loss) -> float:
    """An update by a batch (B, S), the losses of routers included; the loss without them."""
    model.train()
    found = loss(model, ids)
    optimizer.zero_grad()
    (found + aux_loss(model)).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    update_routers(model)
    return float(found.detach())


@torch.no_grad()
def held_out_loss(model: nn.Module, ids: Tensor, loss: Loss = next_byte_loss) -> float:
    """Nats a byte of held-out windows (N, S), in evaluation."""
    model.eval()
    return math.fsum(float(loss(model, some)) * len(some) for some in ids.split(BATCH)) / len(ids)
