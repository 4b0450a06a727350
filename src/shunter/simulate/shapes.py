"""The shape of a model, as published or in a config.json, to its parameters and to the operations of a token.

Counted are the matrices: attention, feed-forward blocks, experts, routers and embeddings; norms and biases are not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import UserError
from .files import described, read

__all__ = ["ModelShape", "load_model"]


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a Transformer with experts.

    Args:
        name, source: what it is, and where the sizes come from.
        dim: d.
        decoder_layers: of a decoder, or all of a decoder-only model.
        encoder_layers: of an encoder; a decoder beside one has cross-attention.
        heads, kv_heads, head_dim: of attention; kv_heads 0: as many as heads.
        value_dim: of a head's values; 0: head_dim.
        q_rank, kv_rank, rope_dim: of multi-head latent attention (arXiv 2405.04434), whose head_dim is without
            rope_dim; kv_rank 0: ordinary attention.
        hidden: f of the dense feed-forward blocks.
        expert_hidden: f of an expert.
        experts, top_k: E and k; experts 0: a dense model.
        sparse_layers: how many layers have experts, in place of their dense block.
        shared_hidden: width of what every token takes beside its experts, in all.
        beside_sparse: whether a sparse layer has a dense block too.
        gated: whether feed-forward blocks and experts have three matrices; else two.
        dense_gated: of the dense blocks where they differ.
        vocab: rows of the embedding; tied: whether the output shares it.
        sequence_length: of training.
        capacity_factor: 0: dropless.
        group_limit: to how many groups (nodes) of experts a token may go; 0: any.
        groups: how many there are.
    """

    name: str
    dim: int
    decoder_layers: int
    heads: int
    head_dim: int
    source: str = ""
    encoder_layers: int = 0
    kv_heads: int = 0
    value_dim: int = 0
    q_rank: int = 0
    kv_rank: int = 0
    rope_dim: int = 0
    hidden: int = 0
    expert_hidden: int = 0
    experts: int = 0
    top_k: int = 1
    sparse_layers: int = 0
    shared_hidden: int = 0
    beside_sparse: bool = False
    gated: bool = True
    dense_gated: bool | None = None
    vocab: int = 0
    tied: bool = False
    sequence_length: int = 4096
    capacity_factor: float = 0.0
    group_limit: int = 0
    groups: int = 0

    @property
    def layers(self) -> int:
        """Of encoder and decoder."""
        return self.encoder_layers + self.decoder_layers

    @property
    def attentions(self) -> int:
        """How often there is attention: twice in a decoder layer beside an encoder."""
        return self.layers + (self.decoder_layers if self.encoder_layers else 0)

    @property
    def attention_matrices(self) -> int:
        """The parameters of one attention."""
        d, h = self.dim, self.heads
        value = self.value_dim or self.head_dim
        if self.kv_rank:
            query = self.head_dim + self.rope_dim
            queries = d * self.q_rank + self.q_rank * h * query if self.q_rank else d * h * query
            keys = d * (self.kv_rank + self.rope_dim) + self.kv_rank * h * (self.head_dim + value)
            return queries + keys + h * value * d
        kv = self.kv_heads or h
        return d * h * self.head_dim + d * kv * (self.head_dim + value) + h * value * d

    @property
    def expert_matrices(self) -> int:
        """The parameters of one expert."""
        return (3 if self.gated else 2) * self.dim * self.expert_hidden

    @property
    def dense_matrices(self) -> int:
        """The parameters of one dense feed-forward block."""
        gated = self.gated if self.dense_gated is None else self.dense_gated
        return (3 if gated else 2) * self.dim * self.hidden

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Of each part."""
        dense = self.layers if self.beside_sparse else self.layers - self.sparse_layers
        shared = (3 if self.gated else 2) * self.dim * self.shared_hidden
        return {
            "attention": self.attentions * self.attention_matrices,
            "dense blocks": dense * self.dense_matrices,
            "experts": self.sparse_layers * self.experts * self.expert_matrices,
            "shared experts": self.sparse_layers * shared,
            "routers": self.sparse_layers * self.experts * self.dim,
            "embeddings": self.vocab * self.dim * (1 if self.tied else 2),
        }

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.parameters.values())

    @property
    def active(self) -> int:
        """Those that a token uses; of embeddings the output's alone, which multiplies."""
        unused = self.sparse_layers * (self.experts - min(self.top_k, self.experts)) * self.expert_matrices
        return self.total - unused - (0 if self.tied else self.vocab * self.dim)

    def flops(self, sequence_length: int | None = None, top_k: float | None = None) -> dict[str, float]:
        """Forward floating-point operations of one token by part, a multiply-add as 2; scores over half the sequence.

        Args:
            sequence_length: which scores are taken over; None: the model's own.
            top_k: how many expert rows a token is computed as (with capacity: k times its factor); None: k.
        """
        length, k = sequence_length or self.sequence_length, self.top_k if top_k is None else top_k
        value = self.value_dim or self.head_dim
        scores = self.attentions * 2 * (length / 2) * self.heads * (self.head_dim + self.rope_dim + value)
        parts = self.parameters
        return {
            "projections": 2.0 * (parts["attention"] + parts["dense blocks"] + parts["shared experts"]),
            "attention": scores,
            "experts": 2.0 * self.sparse_layers * k * self.expert_matrices,
            "routers": 2.0 * parts["routers"],
            "output": 2.0 * self.vocab * self.dim,
        }

    def without_experts(self) -> ModelShape:
        """The dense model of equal operations a token: blocks as wide as a token's experts."""
        if not self.sparse_layers:
            return self
        dense, sparse = self.layers - self.sparse_layers, self.sparse_layers
        wide = self.top_k * self.expert_hidden + self.shared_hidden + (self.hidden if self.beside_sparse else 0)
        mean = (dense * self.hidden + sparse * wide) // self.layers
        return replace(self, name=f"{self.name}, dense", hidden=mean, experts=0, sparse_layers=0, shared_hidden=0)


_FIELDS = {
    "dim": ("hidden_size", "d_model", "n_embd"),
    "decoder_layers": ("num_hidden_layers", "n_layer"),
    "heads": ("num_attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads",),
    "hidden": ("intermediate_size",),
    "expert_hidden": ("moe_intermediate_size", "intermediate_size"),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "top_k": ("num_experts_per_tok", "moe_topk", "top_k_experts"),
    "vocab": ("vocab_size",),
}
_NEEDED = ("dim", "decoder_layers", "heads")


def load_model(name: str) -> ModelShape:
    """A model's shape by its name in the package, as a YAML file of `ModelShape`'s fields, or as a config.json of a
    decoder-only model of transformers.

    Raises:
        UserError: for a file that is none of these, and for sizes that do not fit together.
    """
    path, values = read("models", name)
    values = values.get("text_config", values) if isinstance(values.get("text_config"), dict) else values
    if "model_type" in values or "architectures" in values:
        shape = _of_config(values, path)
    else:
        shape = described(ModelShape, values, path)
    if min(shape.dim, shape.layers, shape.heads, shape.head_dim) < 1:
        raise UserError(f"{path}: a model has at least one layer, one head and a width")
    if shape.sparse_layers > shape.layers:
        raise UserError(f"{path}: sparse_layers {shape.sparse_layers} are more than the {shape.layers} layers")
    if shape.sparse_layers and not 1 <= shape.top_k <= shape.experts:
        raise UserError(f"{path}: a token takes {shape.top_k} of {shape.experts} experts; give 1 to all of them")
    return shape


_STEP, _FIRST, _ONLY = "decoder_sparse_step", "first_k_dense_replace", "mlp_only_layers"
_KNOWN_LAYOUTS = (_STEP, _FIRST, _ONLY, "mlp_layer_types", "moe_layer_freq")
_MOST_LAYERS = 100_000


def _of_config(values: dict[str, Any], path: Path) -> ModelShape:
    if values.get("is_encoder_decoder"):
        raise UserError(f"{path}: is of an encoder-decoder model; describe it in a YAML file of ModelShape's fields")

    def whole(name: str, least: int = 0) -> int:
        """The value of a name, 0 where there is none."""
        value = values.get(name)
        if value is None:
            return 0
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 10**12:
            raise UserError(f"{path}: {name} must be a whole number of at least {least}; it is {value!r}")
        return value

    found: dict[str, Any] = {"name": str(values.get("model_type", path.stem)), "source": str(path)}
    for ours, theirs in _FIELDS.items():
        given = next((name for name in theirs if values.get(name) is not None), None)
        if given is not None:
            found[ours] = whole(given, 1 if ours in _NEEDED else 0)
        elif ours in _NEEDED:
            raise UserError(f"{path}: lacks {theirs[0]}; a config.json of a decoder-only language model has it")
    if found["decoder_layers"] > _MOST_LAYERS:
        raise UserError(f"{path}: {found['decoder_layers']:,} layers are more than any model has")
    found["head_dim"] = whole("head_dim") or found["dim"] // found["heads"]
    if whole("kv_lora_rank") and whole("qk_nope_head_dim"):
        found |= {
            "kv_rank": whole("kv_lora_rank"),
            "q_rank": whole("q_lora_rank"),
            "rope_dim": whole("qk_rope_head_dim"),
            "head_dim": whole("qk_nope_head_dim"),
            "value_dim": whole("v_head_dim"),
        }
        found.pop("kv_heads", None)
    sparse = len(_sparse_layers(values, found["decoder_layers"], path)) if found.get("experts") else 0
    found["sparse_layers"] = sparse
    shared = whole("shared_expert_intermediate_size") or whole("n_shared_experts") * found.get("expert_hidden", 0)
    found["shared_hidden"] = shared if sparse else 0
    found["tied"] = values.get("tie_word_embeddings") is True
    if whole("topk_group") and whole("n_group") > 1:
        found |= {"group_limit": whole("topk_group"), "groups": whole("n_group")}
    found["sequence_length"] = min(whole("max_position_embeddings", 1) or 4096, 4096)
    return described(ModelShape, found, path)


def _sparse_layers(values: dict[str, Any], layers: int, path: Path) -> list[int]:
    """Which layers of a config.json have experts.

    Raises:
        UserError: where it says so by names that are not known here, or in values that say nothing.
    """
    for name, value in values.items():
        if value and re.search(r"(?=.*(moe|expert|sparse))(?=.*layer)", name) and name not in _KNOWN_LAYOUTS:
            raise UserError(
                f"{path}: which layers have experts is in {name}, which is not read; describe the model in a YAML file "
                "of ModelShape's fields"
            )
    kinds, frequency = values.get("mlp_layer_types"), values.get("moe_layer_freq")
    step, first, only = (values.get(name) for name in (_STEP, _FIRST, _ONLY))
    if isinstance(kinds, list) or isinstance(frequency, list):
        marks = [kind == "sparse" for kind in kinds] if isinstance(kinds, list) else [bool(f) for f in frequency or []]
        if len(marks) != layers:
            raise UserError(f"{path}: says of {len(marks)} layers whether they have experts; it has {layers}")
        return [i for i, mark in enumerate(marks) if mark]
    for name, value in ((_STEP, step), ("moe_layer_freq", frequency), (_FIRST, first)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            raise UserError(f"{path}: {name} must be a whole number of at least 0; it is {value!r}")
    if only is not None and not (isinstance(only, list) and all(isinstance(i, int) for i in only)):
        raise UserError(f"{path}: {_ONLY} must be a list of layers; it is {only!r}")
    if step is not None:
        return [i for i in range(layers) if step and (i + 1) % step == 0 and i not in (only or [])]
    return [i for i in range(layers) if i >= (first or 0) and i % (frequency or 1) == 0 and i not in (only or [])]
