"""Figures 1, 2, 6 and 7: what real routers decide on a few tokens, checked against the review's equations and words."""

from __future__ import annotations

import math
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from ..moe import MoE
from ..routers import Context, create
from ..routing import Routing
from .results import Result, Row, judge

__all__ = ["figure_1", "figure_2", "figure_6", "figure_7"]

DIM, HIDDEN = 16, 64
_EXACT = 1e-5


def _seed(seed: int) -> None:
    torch.manual_seed(seed)


def _triples(routing: Routing) -> list[list[float]]:
    """[token, expert, weight] of each."""
    return [
        [int(token), int(expert), float(weight.detach())]
        for token, expert, weight in zip(routing.token, routing.expert, routing.weight, strict=True)
    ]


def figure_1() -> Result:
    """A dense block and a sparse one: as much computing for a token, and several times the parameters."""
    _seed(3)
    moe = MoE(DIM, HIDDEN, 4, "switch", eval_capacity_factor="dropless").eval()
    moe(torch.randn(2, DIM))
    assert moe.routing is not None
    expert = sum(p[0].numel() for p in moe.experts.parameters())
    routing, router = _triples(moe.routing), moe.flops_per_token(2)["routers"]
    flops = {"dense": 2.0 * expert, "sparse": sum(moe.flops_per_token(2).values())}
    total = sum(p.numel() for p in moe.parameters())
    rows = [
        Row(
            "computing for a token, sparse over dense",
            "similar",
            f"{flops['sparse'] / flops['dense']:.3f}, of which the router {router / flops['dense']:.3f}",
            judge(math.isclose(flops["sparse"] - router, flops["dense"]) and router < 0.1 * flops["dense"]),
        ),
        Row(
            "parameters, sparse over dense",
            "more: 4 feed-forward networks",
            f"{total / expert:.2f}",
            judge(total >= 4 * expert),
        ),
        Row(
            "experts that a token passes",
            "1 of 4",
            ", ".join(f"token {t}: expert {e}" for t, e, _ in routing),
            judge([t for t, _, _ in sorted(routing)] == [0, 1]),
        ),
    ]
    return Result("figure-1", rows, {"experts": 4, "routing": routing, "flops": flops, "parameters": [expert, total]})


def figure_2() -> Result:
    """Top-k routing by equations 1 and 2, on three tokens and five experts."""
    _seed(1)
    k, moe = 2, MoE(DIM, HIDDEN, 5, "topk", top_k=2, renormalize="no").double().eval()
    router: Any = moe.decider
    with torch.no_grad():
        router.weight.normal_(std=DIM**-0.5)
        x = 2 * torch.randn(3, DIM, dtype=torch.float64)
        y = moe(x)
        h = x @ router.weight.T
        p = torch.exp(h) / torch.exp(h).sum(-1, keepdim=True)
        best = p.topk(k, -1).indices
        by_hand = torch.stack([(p[t, best[t]] @ _experts(moe, best[t], x[t])) for t in range(3)])
    assert moe.routing is not None
    routing = _triples(moe.routing)
    weights = max(abs(weight - float(p[int(t), int(e)])) for t, e, weight in routing)
    error = float((y - by_hand).abs().max() / by_hand.abs().max())
    chosen = {(int(t), int(e)) for t, e, _ in routing} == {(t, int(e)) for t in range(3) for e in best[t]}
    rows = [
        Row(
            "equation 1: the weights are the softmax over all experts",
            "p(x)",
            f"they differ by {weights:.1e}",
            judge(weights < _EXACT),
        ),
        Row("the k experts of largest p are taken", f"k of 5, here {k}", f"{len(routing)} of 15 pairs", judge(chosen)),
        Row(
            "equation 2: the output is their sum weighted by p",
            "y",
            f"it differs by {error:.1e}",
            judge(error < _EXACT),
        ),
    ]
    return Result("figure-2", rows, {"h": h.tolist(), "p": p.tolist(), "routing": routing})


def _experts(moe: MoE, chosen: Tensor, x: Tensor) -> Tensor:
    """What experts give for a token by their formula, down (silu(gate) * up), a row each."""
    experts: Any = moe.experts
    rows = []
    for expert in chosen:
        gate, up = (experts.gate_up_proj[expert] @ x).chunk(2)
        rows.append(experts.down_proj[expert] @ (F.silu(gate) * up))
    return torch.stack(rows)


def figure_6() -> Result:
    """One score matrix of experts and tokens, decided in three ways: along experts, along tokens, for all at once."""
    _seed(2)
    tokens, experts = 8, 4
    logits = 1.5 * torch.randn(tokens, experts)
    probability = logits.softmax(-1)
    ways = {
        "each token chooses": create("topk", DIM, experts, top_k=1),
        "each expert chooses": create("expert_choice", DIM, experts, capacity_factor=1.0),
        "one assignment of all": create("base", DIM, experts),
    }
    routings = {name: router.train().assign(logits) for name, router in ways.items()}
    cells = {name: [[int(t), int(e)] for t, e, _ in _triples(routing)] for name, routing in routings.items()}
    loads = {name: routing.counts.tolist() for name, routing in routings.items()}
    takes = {name: [sum(t == token for t, _ in some) for token in range(tokens)] for name, some in cells.items()}
    slots = logits.double().repeat_interleave(tokens // experts, 1).numpy()
    best = float(slots[linear_sum_assignment(slots, maximize=True)].sum())
    reached = sum(float(logits[t, e]) for t, e in cells["one assignment of all"])
    rows = [
        Row(
            "each token chooses: experts of a token",
            "k of each",
            _spread(takes["each token chooses"]),
            judge(set(takes["each token chooses"]) == {1}),
        ),
        Row(
            "each token chooses: tokens of an expert",
            "any number",
            _spread(loads["each token chooses"]),
            judge(len(set(loads["each token chooses"])) > 1),
        ),
        Row(
            "each expert chooses: tokens of an expert",
            "k of each",
            _spread(loads["each expert chooses"]),
            judge(set(loads["each expert chooses"]) == {2}),
        ),
        Row(
            "each expert chooses: experts of a token",
            "any number",
            _spread(takes["each expert chooses"]),
            judge(len(set(takes["each expert chooses"])) > 1),
        ),
        Row(
            "one assignment: both",
            "balanced by construction",
            f"tokens of an expert {_spread(loads['one assignment of all'])}, experts of a token "
            f"{_spread(takes['one assignment of all'])}",
            judge(set(loads["one assignment of all"]) == {2} and set(takes["one assignment of all"]) == {1}),
        ),
        Row(
            "one assignment: its total score",
            f"the largest of all: {best:.4f}",
            f"{reached:.4f}",
            judge(math.isclose(best, reached, rel_tol=1e-6)),
        ),
    ]
    return Result("figure-6", rows, {"probability": probability.tolist(), "cells": cells})


def _spread(counts: list[int]) -> str:
    return f"{min(counts)}" if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"


TOKENS = ("The", "Dog")


def figure_7() -> Result:
    """Six algorithms on two tokens and four experts, by name: the review's are in this order."""
    _seed(4)
    experts, x = 4, torch.randn(2, DIM)
    ways: dict[str, tuple[str, dict[str, Any]]] = {
        "top-1": ("switch", {"capacity_factor": 4.0, "jitter": 0.0}),
        "top-2": ("topk", {"top_k": 2, "renormalize": "no"}),
        "reinforcement learning": ("reinforce", {}),
        "BASE (linear assignment)": ("base", {}),
        "expert choice (experts take the top-k tokens)": ("expert_choice", {"capacity_factor": 2.0}),
        "hash (fixed)": ("hash", {"vocab_size": 2}),
    }
    weight = torch.randn(experts, DIM) * DIM**-0.5
    context = Context(token_ids=torch.arange(2))
    routings, decided = {}, {}
    for label, (name, options) in ways.items():
        router: Any = create(name, DIM, experts, **options).train()
        if hasattr(router, "weight"):
            with torch.no_grad():
                router.weight.copy_(weight)
        found = [router.assign(router.score(x, context), context) for _ in range(2)]
        routings[label], decided[label] = found[0], found
    triples = {label: _triples(routing) for label, routing in routings.items()}
    p = (x @ weight.T).softmax(-1)
    first = {int(t): int(e) for t, e in enumerate(p.argmax(-1))}
    unweighted = all(abs(w - 1) < _EXACT for _, _, w in triples["reinforcement learning"])
    loads = {label: sorted(routing.counts.tolist(), reverse=True) for label, routing in routings.items()}
    hashed = _triples(decided["hash (fixed)"][1]) == triples["hash (fixed)"]
    per_expert = loads["expert choice (experts take the top-k tokens)"]
    rows = [
        Row(
            "top-1: each token's best expert",
            "1 each",
            _said(triples["top-1"]),
            judge({int(t): int(e) for t, e, _ in triples["top-1"]} == first),
        ),
        Row("top-2: each token's two best", "2 each", _said(triples["top-2"]), judge(len(triples["top-2"]) == 4)),
        Row(
            "reinforcement learning: an expert is drawn, and its output not scaled",
            "1 each, weight 1",
            _said(triples["reinforcement learning"]),
            judge(unweighted and len(triples["reinforcement learning"]) == 2),
        ),
        Row(
            "BASE: no two tokens on one expert while others are free",
            "balanced",
            _said(triples["BASE (linear assignment)"]),
            judge(loads["BASE (linear assignment)"] == [1, 1, 0, 0]),
        ),
        Row(
            "expert choice: every expert takes its top tokens",
            "every expert equally many",
            _said(triples["expert choice (experts take the top-k tokens)"]),
            judge(len(set(per_expert)) == 1),
        ),
        Row(
            "hash: by the word alone, the same again",
            "fixed",
            _said(triples["hash (fixed)"]),
            judge(hashed and len(triples["hash (fixed)"]) == 2),
        ),
    ]
    return Result("figure-7", rows, {"tokens": list(TOKENS), "experts": experts, "routings": triples})


def _said(triples: list[list[float]]) -> str:
    by_token: dict[int, list[int]] = {}
    for t, e, _ in sorted(triples):
        by_token.setdefault(int(t), []).append(int(e) + 1)
    return "; ".join(f"{TOKENS[t]}: {', '.join(f'FFN {e}' for e in taken)}" for t, taken in by_token.items())
