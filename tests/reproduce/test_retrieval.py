"""Retrieval against experts: states against a forward written out, losses against brute force, bytes and computing."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("faiss")
pytest.importorskip("matplotlib")
pytest.importorskip("pydantic")
pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM

import shunter
from shunter.analysis.ledger import ledger
from shunter.analysis.neighbours import Datastore
from shunter.errors import UserError
from shunter.recipes.text import RECIPE, TextConfig
from shunter.reproduce import retrieval

VOCABULARY = 40


def decoder(sparse):
    shape = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(shape)
    return (shunter.sparsify(model, 4, "topk", hidden=24) if sparse else model).eval()


@pytest.mark.parametrize("sparse", [False, True])
@torch.no_grad()
def test_states_are_what_the_last_block_receives(sparse, seed):
    torch.manual_seed(seed)
    model, windows = decoder(sparse), torch.randint(VOCABULARY, (35, 7))
    found = retrieval.states(model, windows)
    assert found.keys.shape == (35 * 6, 16)
    assert torch.equal(found.targets, windows[:, 1:].flatten())
    assert torch.equal(found.window, torch.arange(35).repeat_interleave(6))
    out = model(input_ids=windows, output_hidden_states=True)
    expected = out.logits[:, :-1].double().softmax(-1).gather(-1, windows[:, 1:, None]).flatten()
    torch.testing.assert_close(found.probability, expected, atol=1e-6, rtol=1e-5)
    # What the block makes of its input is what the last layer adds to what its attention left.
    last = model.model.layers[-1]
    before = out.hidden_states[-2]
    attended, _ = last.self_attn(
        hidden_states=last.input_layernorm(before),
        position_embeddings=model.model.rotary_emb(before, torch.arange(7)[None]),
        attention_mask=torch.full((7, 7), -math.inf).triu(1)[None, None],
    )
    keys = last.post_attention_layernorm(before + attended)[:, :-1].flatten(0, 1)
    torch.testing.assert_close(found.keys, keys, atol=1e-5, rtol=1e-4)


def test_losses_are_those_of_brute_force(monkeypatch, seed):
    """Nearest keys, their softmax and the mixture in plain numpy, at the share and temperature that were chosen."""
    monkeypatch.setattr(retrieval, "_store", Datastore)
    monkeypatch.setattr(retrieval, "NEIGHBOURS", 5)
    rng = np.random.default_rng(seed)

    def some(count):
        targets = torch.from_numpy(rng.integers(3, size=count))
        keys = torch.from_numpy(rng.normal(size=(count, 4))).float() + targets[:, None]
        return retrieval.States(keys, targets, torch.from_numpy(rng.uniform(0.1, 0.9, count)), torch.arange(count) // 4)

    learned, choose, report = some(50), some(40), some(12)
    alone, stored = retrieval.measure(learned, choose, report, [30], 1000, 500.0)
    assert alone.flops == 500 and alone.num_bytes == 1000 and alone.entries == 0
    assert stored.flops == 500 + 2 * 4 * 30 and stored.num_bytes > 1000 + 30 * (4 * 4 + 8)
    assert torch.allclose(alone.losses, -report.probability.log().reshape(3, 4).mean(1))
    keys, tokens = learned.keys[:30].double().numpy(), learned.targets[:30].numpy()
    losses = []
    for query, target, lm in zip(report.keys.double().numpy(), report.targets, report.probability, strict=True):
        squared = ((keys - query) ** 2).sum(1)
        nearest = np.argsort(squared)[:5]
        weight = np.exp(-(squared[nearest] - squared.min()) / stored.temperature)
        neighbours = weight[tokens[nearest] == int(target)].sum() / weight.sum()
        losses.append(-np.log(stored.share * neighbours + (1 - stored.share) * float(lm)))
    np.testing.assert_allclose(stored.losses.numpy(), np.reshape(losses, (3, 4)).mean(1), atol=1e-4)


def test_a_store_takes_the_bytes_that_there_are(monkeypatch, seed):
    torch.manual_seed(seed)
    monkeypatch.setattr(retrieval, "CELLS", 32)
    monkeypatch.setattr(retrieval, "PROBES", 2)
    monkeypatch.setattr(retrieval, "CODE_BYTES", 4)
    entries = int(torch.randint(300, 2000, ()))
    room = retrieval._store(torch.randn(entries, 8), torch.zeros(entries, dtype=torch.int64)).num_bytes
    spared = (16 * 32 + 1024) / (4 + 8)  # for lists of cells and headers
    assert entries - spared - 1 <= retrieval._entries(room, 8) <= entries
    assert retrieval._entries(100, 8) == 0


def test_wider_models_compute_as_much_as_is_asked_for():
    config = TextConfig()
    broad = retrieval.wider(config, 500_000.0)
    costs = [ledger(RECIPE.build_model(one, 1024, False), 128).flops_per_token for one in (config, broad)]
    assert abs(costs[1] - costs[0] - 500_000) <= 3 * config.model.dim * config.model.layers


def test_claims_follow_the_losses():
    def one(loss):
        return retrieval._Measured(0, 10, 10.0, 0.0, 1.0, torch.tensor([loss, loss + 0.1, loss - 0.1]))

    noisy = retrieval._Measured(0, 10, 10.0, 0.0, 1.0, torch.tensor([2.5, 1.7, 1.7]))
    assert retrieval._claim("", "", one(1.0), one(2.0)).verdict == "reproduced"
    assert retrieval._claim("", "", noisy, one(2.0)).verdict == "same direction"
    assert retrieval._claim("", "", one(2.0), one(1.0)).verdict == "not reproduced"
    assert retrieval._adds({0: one(3.0), 9: one(2.5)}, {0: one(2.0), 9: one(1.5)}, 9).verdict == "reproduced"
    assert retrieval._adds({0: one(3.0), 9: one(2.5)}, {0: one(2.0), 9: one(1.9)}, 9).verdict == "same direction"
    assert retrieval._adds({0: one(3.0), 9: one(2.5)}, {0: one(2.0), 9: one(2.2)}, 9).verdict == "not reproduced"


@pytest.mark.slow
def test_it_runs_and_trains_nothing_twice(tmp_path, monkeypatch):
    for name, value in {"CELLS": 64, "PROBES": 4, "CODE_BYTES": 8}.items():
        monkeypatch.setattr(retrieval, name, value)
    config = TextConfig.model_validate(
        {
            "data": {"max_bytes": 60_000, "vocab_size": 300, "eval_windows": 8, "sequence_length": 64},
            "model": {"dim": 32, "layers": 1, "heads": 2, "hidden": 64},
            "sparse": {"num_experts": 8},
            "training": {"steps": 12, "batch_tokens": 2048, "eval_every": 12, "save_every": 12, "warmup": 2},
        }
    )
    first = retrieval.retrieval(tmp_path, config)
    models = first.data["models"]
    assert set(models) == {"dense", "sparse", "wider dense", "wider sparse"} and len(first.rows) == 8
    dense, sparse = models["dense"], models["sparse"]
    assert dense[-1]["loss"] < dense[0]["loss"], "a model of a dozen steps knows less than its neighbours"
    for wide in ("wider dense", "wider sparse"):
        assert abs(models[wide][0]["flops"] / dense[-1]["flops"] - 1) < 0.1
    [equal] = [row for row in first.rows if row.what.startswith("at equal bytes, experts are")]
    near = [one["num_bytes"] / sparse[0]["num_bytes"] for one in dense if one["entries"]]
    assert any(0.97 < ratio <= 1 for ratio in near), (near, equal)
    retrieval.draw_retrieval(first.data)
    kept = [path.stat().st_ino for path in sorted(tmp_path.rglob("model.safetensors"))]
    again = retrieval.retrieval(tmp_path, config)
    assert [path.stat().st_ino for path in sorted(tmp_path.rglob("model.safetensors"))] == kept and len(kept) == 4
    assert again.data["models"]["dense"][0] == dense[0]


def test_training_that_is_too_short_for_a_store_is_refused(monkeypatch, tmp_path):
    few = torch.zeros(3, 9, dtype=torch.int64)
    monkeypatch.setattr(retrieval, "_trained", lambda folder, config: ({}, SimpleNamespace(eval=[_Held(few)])))
    monkeypatch.setattr(retrieval, "_read_in_training", lambda data: few)
    with pytest.raises(UserError, match="at least 1,024 states, and training reads 24"):
        retrieval.retrieval(tmp_path)


class _Held:
    def __init__(self, windows):
        self.input_ids = windows
