"""What experts serve, against planted routings."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import shunter
from shunter.analysis.specialisation import specialisation, token_text
from shunter.data.windows import _tokenizer
from shunter.recipes.sections import DataConfig


def test_hash_routing_shows_each_expert_its_own_tokens():
    tokenizer = _tokenizer(DataConfig(tokenizer="bytes"), [])
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=257,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
        )  # fmt: skip
    )
    shunter.sparsify(model, 4, "hash")
    ids = {"a": torch.randint(0, 20, (6, 32)), "b": torch.randint(20, 40, (6, 32))}
    found = specialisation(model, ids, tokenizer, batch_size=4)
    assert found["domains"] == ["a", "b"]
    for name, layer in shunter.moe_layers(model).items():
        table, seen = layer.router.table, found["layers"][name]
        for domain, windows in ids.items():
            expected = torch.bincount(table[windows.flatten()], minlength=4) / windows.numel()
            assert torch.allclose(torch.tensor(seen["domains"][domain]), expected)
        assert abs(sum(seen["load"]) - 1) < 1e-6
        for expert, tokens in enumerate(seen["tokens"]):
            assert tokens
            for text, share, lift in tokens:
                [i] = [i for i in range(257) if tokenizer.decode([i]) == text]
                assert table[i] == expert
                everything = torch.cat(list(ids.values())).flatten()
                mine = everything[table[everything] == expert]
                assert abs(share - float((mine == i).float().mean())) < 1e-6
                assert abs(lift - share / float((everything == i).float().mean())) < 1e-4


def test_pieces_of_characters_are_shown_as_their_bytes():
    tokenizer = _tokenizer(DataConfig(tokenizer="bytes"), [])
    for text in ("é", "語", "a", "\n"):
        ids = tokenizer.backend_tokenizer.encode(text).ids
        shown = "".join(token_text(tokenizer, i) for i in ids)
        assert shown == (text if len(ids) == 1 else "".join(f"\\x{b:02x}" for b in text.encode()))
