"""Sections 2.2, 5.1 and 9 on bytes: LSTMs and mixers with experts, SparseFF, sparse QKV, tokens that leave early."""

from __future__ import annotations

from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ..analysis.pages.style import PAPER
from ..hf.early_exit import early_exit, smallest_safe_threshold
from ..hf.sparsifying import sparsify
from ..layers.recurrent import ExpertLSTM
from ..layers.sparse_mixer import SparseMixer
from ..layers.terraformer import SparseFF, SparseQKV
from .results import Result, Row, judge
from .small_text import LENGTH, VOCABULARY, dense_model, held_out_loss, step, windows

__all__ = ["draw_early_exit", "draw_other_layers", "early", "other_layers"]

RATE = 3e-3
MASKED = 256  # the end of a document, which stands for a hidden byte too
HIDDEN = 0.15


class _Masked(nn.Module):
    """An encoder and a linear map from its states to bytes."""

    def __init__(self, encoder: SparseMixer, dim: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(dim, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits (B, S, V)."""
        logits: Tensor = self.head(self.encoder(ids))
        return logits


def _masked_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Nats a hidden byte: the same bytes of a window are hidden each time."""
    generator = torch.Generator().manual_seed(int(ids.sum()))
    hidden = torch.rand(ids.shape, generator=generator) < HIDDEN
    return F.cross_entropy(model(ids.masked_fill(hidden, MASKED))[hidden], ids[hidden])


def _lstm(experts: int) -> ExpertLSTM:
    """With 4 of so many experts of a token, and as many parameters in use whatever their number."""
    torch.manual_seed(0)
    if experts == 1:
        return ExpertLSTM(VOCABULARY, 64, 128, 1, router="topk", top_k=1, dropout=0.0)
    losses: dict[str, Any] = {"importance_loss": 0.1, "load_loss": 0.1}
    return ExpertLSTM(VOCABULARY, 64, 32, experts, num_groups=experts // 4, dropout=0.0, **losses)


def _mixer(sparse: bool, mixing: Any = "fourier") -> _Masked:
    torch.manual_seed(0)
    options: dict[str, Any] = {"mixing": mixing, "num_heads": 4, "dropout": 0.0}
    options |= {"attention": [3], "experts": [1, 2] if sparse else []}
    options |= {"num_experts": 8, "router": "expert_choice", "capacity_factor": 1.0}
    return _Masked(SparseMixer(VOCABULARY, 64, 128, 4, LENGTH, **options), 64)


def _terraformer(block: int) -> nn.Module:
    """The decoder with ReLU networks of width 256, whole, or of which one unit in each block is left."""
    model = dense_model()
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.mlp = (
            SparseFF(64, 256, block=block, rank=16)
            if block > 1
            else nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
        )
    return model


class _SparseAttention(nn.Module):
    """A decoder's attention whose queries, keys and values are sparse projections; it keeps none of them for later."""

    def __init__(self, attention: Any, modules: int) -> None:
        super().__init__()
        self.width, self.o_proj = attention.head_dim, attention.o_proj
        self.qkv = SparseQKV(self.o_proj.in_features, modules)

    def forward(self, hidden_states: Tensor, position_embeddings: Any, **_: Any) -> tuple[Tensor, None]:
        """(B, S, d) to (B, S, d)."""
        q, k, v = (part.unflatten(-1, (-1, self.width)).transpose(1, 2) for part in self.qkv(hidden_states)[:3])
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


def _sparse_qkv(modules: int) -> nn.Module:
    """The decoder, its projections to queries, keys and values with an eighth of the weights and convolutions."""
    model = dense_model()
    for layer in model.model.layers:
        layer.self_attn = _SparseAttention(layer.self_attn, modules)
    return model


def other_layers(steps: int = 250) -> Result:
    """Each kind of layer beside the same model without experts, on the same batches."""
    torch.set_num_threads(1)
    batches, held_out = windows(steps)
    made: dict[str, tuple[nn.Module, Any]] = {
        "LSTM, one network": (_lstm(1), None),
        "LSTM, 16 experts, hierarchical": (_lstm(16), None),
        "LSTM, 64 experts, hierarchical": (_lstm(64), None),
        "mixer, dense": (_mixer(False), _masked_loss),
        "mixer, experts": (_mixer(True), _masked_loss),
        "mixer, experts, linear mixing": (_mixer(True, "linear"), _masked_loss),
        "decoder, ReLU": (_terraformer(1), None),
        "decoder, SparseFF of 16": (_terraformer(16), None),
        "decoder, dense projections": (dense_model(), None),
        "decoder, SparseQKV of 8": (_sparse_qkv(8), None),
    }
    found: dict[str, dict[str, float]] = {}
    for name, (model, loss) in made.items():
        more = {} if loss is None else {"loss": loss}
        optimizer = torch.optim.AdamW(model.parameters(), RATE)
        for ids in batches:
            step(model, optimizer, ids, **more)
        found[name] = {
            "loss": held_out_loss(model, held_out, **more),
            "parameters": sum(p.numel() for p in model.parameters()),
        }
    notes = [
        f"Models of bytes of width 64, {steps} steps of the same batches; encoders guess 15 of 100 hidden bytes. "
        "Experts of the LSTM are a quarter as wide as its one network, and a token takes four of them; those of the "
        "mixer are as wide as the dense block, and a token takes one in the mean. One seed."
    ]
    return Result("other-layers", _claims(found), {"models": found}, notes=notes)


_COMPARED = (
    # what, what the paper says, the model with, the one without, how much better it has to be
    (
        "experts between LSTM layers are better than one network as dear",
        "they are (Shazeer et al. 2017)",
        "LSTM, 16 experts, hierarchical",
        "LSTM, one network",
        0.01,
    ),
    (
        "and more of them better still",
        "more experts, lower perplexity",
        "LSTM, 64 experts, hierarchical",
        "LSTM, 16 experts, hierarchical",
        0.01,
    ),
    (
        "an encoder that mixes by Fourier transforms is better with experts",
        "it is (Lee-Thorp and Ainslie 2022)",
        "mixer, experts",
        "mixer, dense",
        0.01,
    ),
    (
        "one unit in sixteen loses little",
        "no loss of quality (Jaszczur et al. 2021)",
        "decoder, SparseFF of 16",
        "decoder, ReLU",
        -0.05,
    ),
    (
        "queries, keys and values by a multiplicative layer and convolutions lose little",
        "no loss of quality (Jaszczur et al. 2021)",
        "decoder, SparseQKV of 8",
        "decoder, dense projections",
        -0.05,
    ),
)


def _claims(found: dict[str, dict[str, float]]) -> list[Row]:
    rows = []
    for what, paper, sparse, dense, least in _COMPARED:
        with_it, without = found[sparse]["loss"], found[dense]["loss"]
        said = f"{with_it:.3f} nats a byte, {without:.3f} with {dense.split(', ', 1)[1]}"
        verdict = judge(without - with_it > least, direction=without - with_it > min(0.0, 2 * least))
        rows.append(Row(what, paper, said, verdict))
    return rows


def draw_other_layers(data: dict[str, Any]) -> Figure:
    """The held-out loss of each model as a bar."""
    names = list(data["models"])
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    values = [data["models"][name]["loss"] for name in names]
    plain = ("one network", "dense", "ReLU", "dense projections")
    axes.barh(names, values, color=[PAPER.of("dense" if name.endswith(plain) else "sparse") for name in names])
    for place, value in enumerate(values):
        axes.annotate(f" {value:.3f}", (value, place), va="center")
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("held-out loss (nats/byte, or hidden byte)")
    return figure


THRESHOLDS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.1)
TOLERANCE, EPSILON = 0.25, 0.1


def early(steps: int = 300) -> Result:
    """Texts continued by a sparse model whose tokens leave where they are sure, by threshold, and a calibrated one."""
    torch.set_num_threads(1)
    batches, held_out = windows(steps)
    model = sparsify(dense_model(layers=4), 4, "topk", top_k=2)
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    for ids in batches:
        step(model, optimizer, ids)
    model.eval()
    prompts = held_out[:, :24]
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    full = model.generate(prompts, **options)
    losses: dict[float, Tensor] = {}
    layers: dict[float, float] = {}
    for threshold in THRESHOLDS:
        with early_exit(model, threshold) as taken:
            out = model.generate(prompts, **options)
        losses[threshold] = (out != full)[:, prompts.shape[1] :].float().mean(1)
        layers[threshold] = taken.mean_layers
    half = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0)).chunk(2)
    chosen = smallest_safe_threshold({t: v[half[0]] for t, v in losses.items()}, TOLERANCE, EPSILON)
    means = {t: float(v.mean()) for t, v in losses.items()}
    monotone = all(layers[a] <= layers[b] + 1e-9 for a, b in zip(THRESHOLDS, THRESHOLDS[1:], strict=False))
    rows = [
        Row(
            "at threshold 0 a token takes one layer, above 1 all of them and the same text",
            "by definition",
            f"{layers[0.0]:.2f} and {layers[1.1]:.2f} of 4 layers; {means[1.1]:.1%} other bytes",
            judge(layers[0.0] == 1 and layers[1.1] == 4 and means[1.1] == 0),
        ),
        Row(
            "higher thresholds cost more layers",
            "they do",
            ", ".join(f"{layers[t]:.2f}" for t in THRESHOLDS),
            judge(monotone),
        ),
    ]
    if chosen is None:
        rows.append(
            Row("a calibrated threshold keeps its promise", "it does", "none is safe at this size", judge(False))
        )
    else:
        risk = float(losses[chosen][half[1]].mean())
        rows.append(
            Row(
                "a calibrated threshold keeps its promise",
                "it does, with probability 1 - epsilon (Schuster et al. 2022)",
                f"{risk:.1%} other bytes on prompts that it was not chosen by; promised are {TOLERANCE:.0%}",
                judge(risk <= TOLERANCE, direction=risk <= 1.2 * TOLERANCE),
            )
        )
        rows.append(
            Row(
                "and leaves layers out",
                "up to three times faster",
                f"{layers[chosen]:.2f} of 4 layers at threshold {chosen}",
                judge(layers[chosen] < 4 / 1.5, direction=layers[chosen] < 3.9),
            )
        )
    notes = [
        f"A sparse decoder of bytes with four layers, trained for {steps} steps on its last layer's loss alone, "
        f"continues {len(prompts)} held-out texts by 16 bytes; a text's loss is the share of bytes that differ from "
        "those of all layers. Half of the texts choose the threshold, the other half judge it."
    ]
    data = {"thresholds": THRESHOLDS, "layers": list(layers.values()), "differ": list(means.values()), "chosen": chosen}
    return Result("early-exit", rows, data, notes=notes)


def draw_early_exit(data: dict[str, Any]) -> Figure:
    """What differs against the layers that a token takes, by threshold."""
    figure = Figure(figsize=(5.4, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(data["layers"], data["differ"], "o-", color=PAPER.of("sparse"))
    for threshold, x, y in zip(data["thresholds"], data["layers"], data["differ"], strict=True):
        axes.annotate(f"{threshold:g}", (x, y), xytext=(4, 4), textcoords="offset points")
    axes.set_xlabel("layers of a token, of 4 (numbers: thresholds)")
    axes.set_ylabel("share of bytes that differ")
    return figure
