"""The ledger against what PyTorch counts while the model runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import shunter
from shunter.analysis.ledger import ledger

LENGTH = 16
BUILD = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attn_implementation="eager",
        )  # fmt: skip
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=4, attn_implementation="eager")
    ),
}


@pytest.mark.parametrize("architecture", list(BUILD))
@pytest.mark.parametrize(
    "options",
    [
        None,
        {"router": "topk", "top_k": 2},
        {"router": "topk", "top_k": 3, "num_shared_experts": 2, "every": 2},
        {"router": "hash"},
        {"router": "expert_choice", "capacity_factor": 2.0, "allow_leak": True},
        {"router": "soft_moe", "slots_per_expert": 3, "allow_leak": True},
    ],
)
def test_flops_equal_the_counted_ones(architecture, options):
    model = BUILD[architecture]().eval()
    if options is not None:
        shunter.sparsify(model, 4, backend="reference", **options)
    ids = torch.randint(50, (2, LENGTH))
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(ids)
    assert ledger(model, LENGTH).flops_per_token == counted.get_total_flops() / ids.numel()


def test_parameters_equal_a_count_by_hand():
    model = shunter.sparsify(BUILD["llama"](), 4, "topk", top_k=2)
    account = ledger(model, LENGTH)
    expert = 3 * 32 * 48
    assert account.params_total == sum(p.numel() for p in model.parameters())
    assert account.params_active == account.params_total - 2 * 2 * expert


def test_two_lengths_are_refused():
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=9, d_model=8, d_ff=8, num_layers=1, num_heads=2, d_kv=4, decoder_start_token_id=0)
    )
    with pytest.raises(ValueError, match="encoder-decoder"):
        ledger(model, LENGTH)
