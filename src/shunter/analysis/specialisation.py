"""Which domains and which tokens each expert serves, read off the routings of held-out text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..moe import moe_layers

__all__ = ["characteristic", "specialisation", "token_text"]


TOP_TOKENS = 8


MIN_COUNT = 5


@torch.no_grad()
def specialisation(
    model: PreTrainedModel, domains: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerBase, batch_size: int = 32
) -> dict[str, Any]:
    """Count, for each `MoE` layer, what its experts are sent.

    Args:
        model: a sparsified language model; evaluated as it is, its mode restored.
        domains: name -> (windows, sequence length) token ids.
        tokenizer: for the tokens' text.
        batch_size: windows a forward.

    Returns:
        {"domains": names, "layers": {layer: {"load": (E,) shares of all assignments, "domains": {name: (E,) shares of
        that domain's assignments}, "tokens": for each expert its most characteristic tokens (the largest terms of the
        divergence of what it is sent from the text) as [text, share of what the expert is sent, lift = that share over
        the token's share of the text]}}}. Tokens seen fewer than 5 times by an expert are left out.
    """
    was_training = model.training
    model.eval()
    layers = moe_layers(model)
    vocab = len(tokenizer)
    by_domain = {n: torch.zeros(len(domains), m.num_experts, dtype=torch.int64) for n, m in layers.items()}
    by_token = {n: torch.zeros(m.num_experts, vocab, dtype=torch.int64) for n, m in layers.items()}
    text = torch.zeros(vocab, dtype=torch.int64)
    for row, windows in enumerate(domains.values()):
        for start in range(0, len(windows), batch_size):
            ids = windows[start : start + batch_size]
            model(input_ids=ids)
            flat = ids.reshape(-1)
            text += torch.bincount(flat, minlength=vocab)
            for name, layer in layers.items():
                routing = layer.routing
                assert routing is not None
                by_domain[name][row] += routing.counts
                cell = routing.expert * vocab + flat[routing.token]
                by_token[name] += torch.bincount(cell, minlength=layer.num_experts * vocab).reshape(-1, vocab)
    model.train(was_training)
    found = {}
    for name in layers:
        tokens = [
            [[token_text(tokenizer, t), share, lift] for t, share, lift in rows]
            for rows in characteristic(by_token[name], text)
        ]
        domain = by_domain[name]
        found[name] = {
            "load": (domain.sum(0) / domain.sum()).tolist(),
            "domains": {d: (domain[i] / domain[i].sum().clamp_min(1)).tolist() for i, d in enumerate(domains)},
            "tokens": tokens,
        }
    return {"domains": list(domains), "layers": found}


def characteristic(counts: Tensor, text: Tensor, top: int = TOP_TOKENS) -> list[list[tuple[int, float, float]]]:
    """The labels that are most each expert's own: the largest terms of the divergence of what it is sent from the text.

    Args:
        counts: (E, V) int64, how often each expert was sent each of V labels.
        text: (V,) int64, how often each label is in the text.
        top: how many labels of an expert at most.

    Returns:
        For each expert (label, share of what the expert is sent, lift = that share over the label's share of the text),
        the first the most characteristic. Labels that an expert saw fewer than 5 times, or not above their share of the
        text, are left out.
    """
    expected = text / text.sum().clamp_min(1)
    share = counts / counts.sum(1, keepdim=True).clamp_min(1)
    lift = torch.where(counts >= MIN_COUNT, share / expected.clamp_min(1e-12), 0)
    terms = share * lift.clamp_min(1).log()
    found = []
    for e in range(counts.shape[0]):
        best = terms[e].argsort(descending=True, stable=True)[:top].tolist()
        found.append([(t, float(share[e, t]), float(lift[e, t])) for t in best if terms[e, t] > 0])
    return found


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token as a person reads it; a piece of a character as its bytes."""
    text, piece = str(tokenizer.decode([token])), str(tokenizer.convert_ids_to_tokens(token))
    if piece.startswith("\u2581") and not text.startswith(" "):
        text = " " + text  # SentencePiece leaves the space of a text's first word out
    if "\ufffd" not in text:
        return text
    # Byte-level tokens spell bytes as letters: printable Latin-1 as itself, the others counted up from U+0100.
    itself = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(itself)]
    byte_of = {chr(b): b for b in itself} | {chr(256 + i): b for i, b in enumerate(others)}
    return "".join(f"\\x{byte_of[c]:02x}" for c in piece) if set(piece) <= set(byte_of) else text
