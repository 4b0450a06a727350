"""Experts' parameters in layers of several kinds: found, compared, removed and put back."""

import copy

import pytest
import torch
from torch import nn

from shunter import MoE
from shunter.analysis.expert_weights import cosine_similarity, expert_parameters, gram_similarity, moved, removed


class Listed(nn.Module):
    """Experts in a ModuleList, as in transformers 4 and remote code."""

    def __init__(self, experts=4, dim=8, hidden=6):
        super().__init__()
        self.gate = nn.Linear(dim, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim)) for _ in range(experts)
        )
        self.experts.append(nn.Dropout())  # NLLB-MoE keeps one among its experts


def test_stacked_experts_are_found_with_their_biases_and_without_the_router():
    moe = MoE(8, 6, 4, "topk", bias=True, num_shared_experts=1)
    found = expert_parameters(moe, 4)
    assert sorted(found[0]) == [f"experts.{n}" for n in sorted(dict(moe.experts.named_parameters()))]
    for e in range(4):
        for name, value in found[e].items():
            assert torch.equal(value, moe.get_parameter(name)[e])


def test_listed_experts_are_found():
    layer = Listed()
    found = expert_parameters(layer, 4)
    assert [sorted(one) for one in found] == [["0.bias", "0.weight", "2.bias", "2.weight"]] * 4
    assert torch.equal(found[3]["2.weight"], layer.experts[3][2].weight)


def test_unknown_experts_are_said_to_be_none():
    assert expert_parameters(nn.Linear(8, 4), 4) == [{}, {}, {}, {}]


def test_removed_gives_zeros_and_is_put_back_bit_for_bit():
    moe = MoE(8, 6, 4, "topk", top_k=2, bias=True).eval()
    before = copy.deepcopy(moe.state_dict())
    x = torch.randn(50, 8)
    whole = moe(x)
    routing = moe.routing
    for e in range(4):
        with removed(expert_parameters(moe, 4)[e]):
            without = moe(x)
        kept = routing.select(routing.expert != e)
        assert torch.allclose(without, moe.experts(x, kept), atol=1e-5)
        assert not torch.allclose(without, whole) or not bool((routing.expert == e).any())
        assert all(torch.equal(before[name], value) for name, value in moe.state_dict().items())
    with pytest.raises(KeyboardInterrupt), removed(expert_parameters(moe, 4)[0]):
        raise KeyboardInterrupt
    assert all(torch.equal(before[name], value) for name, value in moe.state_dict().items())


def test_cosine_against_flat_vectors(monkeypatch):
    monkeypatch.setattr("shunter.analysis.expert_weights.COLUMNS", 17)
    found = expert_parameters(MoE(8, 6, 4, "topk", bias=True), 4)
    flat = torch.stack([torch.cat([value.flatten() for value in expert.values()]) for expert in found]).double()
    expected = nn.functional.cosine_similarity(flat[:, None], flat[None], dim=-1)
    assert torch.allclose(cosine_similarity(found), expected, atol=1e-5)


@pytest.mark.parametrize(("dim", "hidden"), [(24, 10), (16, 16), (300, 5)])
def test_hidden_units_in_another_order_are_seen_as_the_same_expert(dim, hidden):
    moe = MoE(dim, hidden, 3, "topk", activation="gelu")
    with torch.no_grad():
        order = torch.arange(hidden).roll(1)
        moe.experts.up_proj[1] = moe.experts.up_proj[0, order]
        moe.experts.down_proj[1] = moe.experts.down_proj[0][:, order]
    found = expert_parameters(moe, 3)
    alike = gram_similarity(found, dim)
    assert float(alike[0, 1]) == pytest.approx(1, abs=1e-4)
    assert abs(float(alike[0, 2])) < 0.5
    assert abs(float(cosine_similarity(found)[0, 1])) < 0.9


def test_gram_of_transposed_square_weights():
    up, down = torch.randn(2, 12, 12)
    order = torch.randperm(12)
    experts = [
        {"up_proj": up.T, "down_proj": down.T},
        {"up_proj": up[order].T, "down_proj": down[:, order].T},
    ]
    assert float(gram_similarity(experts, 12, transposed=True)[0, 1]) == pytest.approx(1, abs=1e-4)


def test_moved_is_relative_to_the_size_before():
    before = {"a": torch.randn(4, 3), "b": torch.randn(5)}
    after = {name: value * 1.5 for name, value in before.items()}
    assert moved(before, after) == pytest.approx(0.5, rel=1e-5)
    assert moved(before, before) == 0
    assert moved(before, {"a": before["a"]}) != moved(before, {"a": before["a"]})  # NaN: not the same parameters
