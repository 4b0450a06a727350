"""What new experts and routers are made of: parts, noise, units drawn anew, siblings, prompts."""

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

import shunter
from tests.hf.checkpoints.models import block_of, experts_of, logits, save_tokenizer
from tests.hf.conftest import VOCAB


def test_split_parts_make_up_the_block(dense, tmp_path):
    folder, model = dense()
    shunter.upcycle(folder, tmp_path / "out", 6, 3, method="split", granularity=3)
    experts, tensors = experts_of(tmp_path / "out")
    gate, up, down = block_of(model)
    for copy in (0, 3):
        parts = experts[copy : copy + 3]
        assert torch.equal(torch.cat([part[0] for part in parts]), gate)
        assert torch.equal(torch.cat([part[1] for part in parts]), up)
        assert torch.equal(torch.cat([part[2] for part in parts], 1), down * 3)
    rows = tensors["model.layers.0.block_sparse_moe.gate.weight"]
    assert torch.equal(rows[0], rows[2]) and torch.equal(rows[3], rows[5]) and not torch.equal(rows[0], rows[3])


def test_dropped_units_are_drawn_anew_and_the_others_kept(tmp_path):
    config = LlamaConfig(
        vocab_size=9, hidden_size=64, intermediate_size=400, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 0.05  # a mean that must come back
    model.save_pretrained(tmp_path / "dense")
    receipt = shunter.upcycle(tmp_path / "dense", tmp_path / "out", 3, method="drop", drop=0.25)
    assert receipt["check"]["rms_difference"] > receipt["check"]["rms_rounding"]
    dense_parts = block_of(model)
    dropped = []
    for expert in experts_of(tmp_path / "out")[0]:
        changed = [(new != old).any(axis) for new, old, axis in zip(expert, dense_parts, (1, 1, 0), strict=True)]
        assert changed[0].sum() == 100 and torch.equal(changed[0], changed[1]) and torch.equal(changed[0], changed[2])
        dropped.append(changed[0])
        for new, old, units in zip(expert, dense_parts, (0, 0, 1), strict=True):
            new, old = (
                new.index_select(units, changed[0].nonzero()[:, 0]),
                old.index_select(units, changed[0].nonzero()[:, 0]),
            )
            # 6,400 draws: six standard errors of the mean and of the spread.
            assert abs(new.mean() - old.mean()) < 6 * old.std() / 80
            assert abs(new.std() / old.std() - 1) < 6 / (2 * 6400) ** 0.5
    assert not torch.equal(dropped[0], dropped[1])


def test_noise_has_the_spread_asked_for(dense, tmp_path):
    folder, model = dense()
    shunter.upcycle(folder, tmp_path / "out", 4, method="noise", noise=0.1)
    experts, _ = experts_of(tmp_path / "out")
    for expert in experts:
        for new, old in zip(expert, block_of(model), strict=True):
            assert abs((new - old).std() / (0.1 * old.std()) - 1) < 6 / (2 * new.numel()) ** 0.5
    assert not torch.equal(experts[0][0], experts[1][0])


def test_what_is_drawn_depends_on_the_seed_alone(dense, tmp_path):
    folder, _ = dense()
    for number, seed in enumerate((3, 3, 4)):
        shunter.upcycle(folder, tmp_path / str(number), 4, method="drop", seed=seed, check=False)
    first, again, other = [(tmp_path / str(n) / "model.safetensors").read_bytes() for n in range(3)]
    assert first == again != other


def test_siblings_become_the_experts_and_the_rest_their_mean(dense, tmp_path):
    base, _ = dense()
    folders, siblings = zip(*(dense(folder=f"s{i}") for i in range(3)), strict=True)
    receipt = shunter.upcycle(base, tmp_path / "out", method="siblings", siblings=folders)
    assert receipt["options"]["num_experts"] == 3
    experts, tensors = experts_of(tmp_path / "out", layer=1)
    for expert, sibling in zip(experts, siblings, strict=True):
        assert all(torch.equal(new, old) for new, old in zip(expert, block_of(sibling, 1), strict=True))
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight", "model.norm.weight"):
        mean = sum(sibling.state_dict()[name].double() for sibling in siblings) / 3
        assert torch.equal(tensors[name], mean.float())


@pytest.mark.parametrize("apart", [False, True])
def test_prompts_make_gates_that_find_the_sibling(apart, dense, tmp_path):
    """The gate's rows are the directions of hidden states, recomputed here.

    Where prompts are apart their tokens go to their own sibling: with embeddings 100 e_i + n of prompt i, |n| < 1, that
    no layer changes, hidden states are within 0.02 of sqrt(d) e_i in direction, and a gate's row is within 0.1 of the
    direction of e_i less the mean, which is (1, -1/2, -1/2) times 0.8 to those of the three prompts.
    """
    base, model = dense()
    if apart:
        with torch.no_grad():
            embeddings = torch.nn.functional.normalize(torch.randn(VOCAB, 32))
            embeddings[1:46] += 100 * torch.eye(32)[torch.arange(45) // 15]
            model.model.embed_tokens.weight.copy_(embeddings)
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
                layer.post_attention_layernorm.weight.fill_(1)
        model.save_pretrained(base)
    save_tokenizer(base)
    folders = [dense(folder=f"s{i}")[0] for i in range(3)]
    ids = torch.arange(3)[:, None] * 15 + torch.arange(1, 16)
    prompts = [
        [" ".join(f"w{i}" for i in row[:8].tolist()), " ".join(f"w{i}" for i in row[8:].tolist())] for row in ids
    ]
    shunter.upcycle(base, tmp_path / "out", method="siblings", siblings=folders, prompts=prompts, check=False)
    _, tensors = experts_of(tmp_path / "out")
    seen = {}
    model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: seen.update(x=args[0][0]))
    means = []
    for row in ids:
        states = []
        for part in (row[:8], row[8:]):
            logits(model, {"input_ids": part[None]})
            states.append(seen["x"])
        means.append(torch.cat(states).double().mean(0))
    expected = torch.stack(means) - torch.stack(means).mean(0)
    expected = expected / expected.norm(dim=1, keepdim=True)
    gate = tensors["model.layers.1.block_sparse_moe.gate.weight"]
    assert torch.allclose(gate.double(), expected, atol=1e-5)
    if apart:
        assert torch.equal((torch.stack(means) @ gate.double().T).argmax(1), torch.arange(3))
