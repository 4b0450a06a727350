"""Facts: a block of experts and its dense twin learn which value belongs to each of many keys, common and rare ones.

A key is a fixed random vector, so that what the model knows is in its feed-forward block. Keys are drawn by Zipf's law.
This is recall without language: how far experts add room for facts, in seconds of training on a CPU.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import PretrainedConfig, PreTrainedModel, set_seed
from transformers.modeling_outputs import ModelOutput

from ..analysis.ledger import Ledger
from ..analysis.runs import Words
from ..durable import verify
from ..moe import MoE, aux_loss, give_reward, tell
from . import run
from .recipe import Recipe
from .sections import RunConfig, RunName, Section, TrainingConfig

__all__ = ["RECIPE", "Facts", "FactsConfig", "FactsData", "FactsRecipe"]


_FACTS = 7919_000_000  # the seed of the first facts


class FactsDataConfig(Section):
    """Which facts there are, and how they are drawn."""

    keys: int = Field(8192, ge=2, le=1_000_000, description="facts to be learned")
    values: int = Field(64, ge=2, le=4096, description="of which each key has one")
    exponent: float = Field(1.0, ge=0, le=4, description="of Zipf's law; 0 draws all keys alike")
    sequence_length: int = Field(256, ge=1, le=8192, description="draws of a window")
    eval_windows: int = Field(64, ge=1, description="held-out windows")
    seed: int = Field(0, ge=0, lt=2**31, description="of the facts themselves")


class FactsModelConfig(Section):
    """The dense model: one gated block on fixed vectors of the keys, and a linear map to the values."""

    dim: int = Field(32, ge=2, le=4096, description="d, width of the hidden states")
    hidden: int = Field(64, ge=1, description="width of the dense feed-forward block")


class FactsTraining(TrainingConfig):
    """As of every recipe, shorter."""

    steps: int = Field(1000, ge=1)
    batch_tokens: int = Field(1024, ge=1, description="draws of one optimizer step")
    learning_rate: float = Field(1e-2, gt=0, le=1)
    warmup: int = Field(50, ge=0)
    weight_decay: float = Field(0.0, ge=0, le=1)
    eval_every: int = Field(250, ge=1)
    log_every: int = Field(50, ge=1)
    save_every: int = Field(500, ge=1)


class FactsConfig(RunConfig):
    """The configuration of `shunter train facts`."""

    name: RunName = "facts"
    data: FactsDataConfig = FactsDataConfig()
    model: FactsModelConfig = FactsModelConfig()
    training: FactsTraining = FactsTraining()

    @model_validator(mode="after")
    def _fits(self) -> FactsConfig:
        t, d = self.training, self.data
        if t.batch_tokens % d.sequence_length:
            raise ValueError(
                f"training.batch_tokens {t.batch_tokens} must be a multiple of data.sequence_length {d.sequence_length}"
            )
        self.sparse.leave_room(3, self.model.hidden)
        return self


class _Draws(Dataset[dict[str, Tensor]]):
    """Windows of keys drawn by their probabilities, and the values that belong to them; the i-th is always the same."""

    def __init__(self, values: Tensor, probabilities: Tensor, windows: int, length: int, seed: int) -> None:
        self.values, self.bounds = values, probabilities.cumsum(0)
        self.windows, self.length, self.seed = windows, length, seed

    def __len__(self) -> int:
        return self.windows

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + i)
        point = torch.rand(self.length, generator=generator, dtype=torch.float64) * self.bounds[-1]
        keys = torch.searchsorted(self.bounds, point).clamp_max(len(self.values) - 1)
        return {"keys": keys, "labels": self.values[keys], "token_ids": keys}


@dataclass(frozen=True)
class FactsData:
    """The facts, `values` (keys,) int64, what is trained on, and held-out draws by name: keys (windows, length)."""

    values: Tensor
    train: Dataset[dict[str, Tensor]]
    eval: dict[str, Tensor]
    domains: list[dict[str, Any]]
    fingerprint: str

    def describe(self) -> dict[str, Any]:
        """What data.json holds."""
        return {
            "domains": self.domains,
            "fingerprint": self.fingerprint,
            "vocab_size": len(self.values),
            "tokenizer": "none",
        }

    def save_pretrained(self, folder: Path) -> None:
        """Nothing: the keys are numbers."""


class FactsModelShape(PretrainedConfig):
    """The shape of a `Facts` model; without experts it is dense."""

    model_type = "shunter-facts"

    def __init__(
        self,
        keys: int = 2,
        values: int = 2,
        dim: int = 2,
        hidden: int = 1,
        experts: dict[str, Any] | None = None,
        **rest: Any,
    ) -> None:
        super().__init__(**rest)
        self.keys, self.values, self.dim, self.hidden, self.experts = keys, values, dim, hidden, experts


class _Dense(nn.Module):
    """SwiGLU, as one expert is."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, 2 * hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Facts(PreTrainedModel):
    """Keys (B, S) to logits of their values (B, S, V)."""

    config_class = FactsModelShape
    main_input_name = "keys"

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.vectors: Tensor
        self.register_buffer(
            "vectors", torch.randn(config.keys, config.dim, generator=torch.Generator().manual_seed(0))
        )
        if config.experts is None:
            self.block: nn.Module = _Dense(config.dim, config.hidden)
        else:
            self.block = MoE(config.dim, config.hidden, **config.experts)
        self.head = nn.Linear(config.dim, config.values)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Each part has drawn its own."""

    def forward(self, keys: Tensor, labels: Tensor | None = None) -> ModelOutput:
        """The logits, and with labels (B, S) the mean cross-entropy, in training with the losses of the router."""
        x = F.embedding(keys, self.vectors)
        with tell(self, token_ids=keys):
            logits = self.head(x + self.block(x))
        if labels is None:
            return ModelOutput(logits=logits)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        if self.training and isinstance(self.block, MoE) and self.block.decider.learns_by_reward:
            give_reward(self, -losses.detach().reshape(labels.shape))
        return ModelOutput(loss=losses.mean() + aux_loss(self), logits=logits)


class FactsRecipe(Recipe[FactsConfig, FactsData]):
    """Recall of facts: the loss is the cross-entropy of the value in nats."""

    name = "facts"
    config = FactsConfig
    words = Words(
        "facts",
        "Two models see the same keys in the same order, some often and most rarely, learning each key's value.",
        "nats/fact",
        "the right value",
        {"recalled": "% of facts recalled"},
    )
    knows = ("mask", "token_ids")

    def prepare(self, config: FactsConfig) -> FactsData:
        """Facts, and draws of them: `drawn` by Zipf's law as in training, `even` of all keys alike."""
        d = config.data
        # Not by the plain seed: a hash router draws experts in the same way, and would be told the values.
        generator = torch.Generator().manual_seed(_FACTS + d.seed)
        values = torch.randint(d.values, (d.keys,), generator=generator)
        zipf = torch.arange(1, d.keys + 1, dtype=torch.float64) ** -d.exponent
        windows = config.training.steps * self.items_per_step(config)
        train = _Draws(values, zipf, windows, d.sequence_length, 2 * config.seed + 1)
        even = torch.ones(d.keys, dtype=torch.float64)
        held_out = {
            name: _Draws(values, weights, d.eval_windows, d.sequence_length, 0)
            for name, weights in (("drawn", zipf), ("even", even))
        }
        keys = {name: torch.stack([draws[i]["keys"] for i in range(len(draws))]) for name, draws in held_out.items()}
        known = json.dumps([d.model_dump(), config.seed, windows]).encode() + values.numpy().tobytes()
        records = [
            {
                "name": name,
                "license": "none",
                "source": "drawn at random",
                "train_bytes": 8 * windows * d.sequence_length if name == "drawn" else 0,
                "eval_bytes": 8 * drawn.numel(),
                "train_tokens": windows * d.sequence_length if name == "drawn" else 0,
                "eval_tokens": drawn.numel(),
            }
            for name, drawn in keys.items()
        ]
        return FactsData(values, train, keys, records, hashlib.sha256(known).hexdigest())

    def build(self, config: FactsConfig, data: FactsData, sparse: bool) -> Facts:
        """The model of the configuration's width."""
        m, s, d = config.model, config.sparse, config.data
        shape: dict[str, Any] = {"keys": d.keys, "values": d.values, "dim": m.dim, "hidden": m.hidden}
        if sparse:
            router = s.build_router(m.dim, {"token_ids": d.keys})
            shape["hidden"] = s.hidden or run.expert_width(m.hidden, router, d.sequence_length)
            shape["experts"] = {
                "num_experts": s.num_experts,
                "router": s.router,
                "backend": s.backend,
                **s.router_options({"token_ids": d.keys}),
            }
        set_seed(config.seed)
        return Facts(FactsModelShape(**shape))

    def load(self, folder: Path) -> Facts:
        """A model that a run left."""
        verify(folder)
        return Facts.from_pretrained(folder).eval()

    def evaluate(self, model: PreTrainedModel, data: FactsData) -> dict[str, Any]:
        """Nats per fact and how many of 100 draws are recalled, of draws as in training; by domain of others too."""
        was_training = model.training
        model.eval()
        found = {
            name: {
                "loss": float(F.cross_entropy(logits, values)),
                "recalled": 100 * float((logits.argmax(-1) == values).double().mean()),
            }
            for name, logits, values in self.predictions(model, data)
        }
        model.train(was_training)
        return found["drawn"] | {"domains": found}

    @torch.no_grad()
    def predictions(self, model: PreTrainedModel, data: FactsData) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Of the value of each held-out draw."""
        for name, keys in data.eval.items():
            yield name, model(keys.to(model.device)).logits.float().flatten(0, 1).cpu(), data.values[keys].flatten()

    def ledger(self, model: PreTrainedModel, config: FactsConfig) -> Ledger:
        """Of a fact; the fixed vectors of the keys are no parameters."""
        total = sum(p.numel() for p in model.parameters())
        flops = {"head": 2.0 * config.model.dim * config.data.values}
        if isinstance(model.block, MoE):
            flops |= model.block.flops_per_token(config.data.sequence_length)
            return Ledger(total, total - model.block.inactive_parameters(config.data.sequence_length), flops)
        return Ledger(total, total, flops | {"block": 6.0 * config.model.dim * config.model.hidden})

    def items_per_step(self, config: FactsConfig) -> int:
        """Windows of draws."""
        return config.training.batch_tokens // config.data.sequence_length

    def tokens_per_step(self, config: FactsConfig) -> int:
        """Draws."""
        return config.training.batch_tokens


RECIPE = FactsRecipe()
