"""Several routers in one model: the blocks take them in turn, each with its options and its experts' width."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import shunter
from shunter.errors import UserError
from shunter.hf import sparsify
from shunter.hf.tokens import takes_cache
from shunter.moe import moe_layers


def _llama(layers=5):
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
            num_key_value_heads=2,
        )
    )  # fmt: skip


def test_blocks_take_routers_in_turn_and_load_so(tmp_path):
    model = sparsify(
        _llama(), 4, ["bigram_hash", "hash", "topk"], hidden=[24, 12, 8], options=[{}, {"num_hashes": 2}, {"top_k": 3}]
    )
    layers = [layer for _, layer in moe_layers(model).items()]
    kinds = [type(layer.decider).__name__ for layer in layers]
    assert kinds == ["BigramHash", "Hash", "TopK", "BigramHash", "Hash"]
    assert [layer.decider.top_k for layer in layers] == [1, 2, 3, 1, 2]
    assert [layer.experts.hidden for layer in layers] == [24, 12, 8, 24, 12]
    ids = torch.randint(40, (2, 9))
    expected = model.eval()(ids).logits
    model.save_pretrained(tmp_path)
    again = shunter.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, expected)
    assert not takes_cache(model) and takes_cache(sparsify(_llama(1), 4, ["hash", "topk"]))
    assert again.generate(ids, max_new_tokens=3, use_cache=False, do_sample=False).shape == (2, 12)


@pytest.mark.parametrize("more", [{"hidden": [8]}, {"options": [{}]}, {"hidden": [8, 8, 8]}])
def test_as_many_widths_and_options_as_routers(more):
    with pytest.raises(UserError, match="as many of the others"):
        sparsify(_llama(2), 4, ["hash", "topk"], **more)
    with pytest.raises(UserError, match="give one router or several"):
        sparsify(_llama(2), 4, [])
