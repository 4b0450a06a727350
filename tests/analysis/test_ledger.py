"""The ledger against what PyTorch counts while the model runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
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


PAIRS = {
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=50, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_decoder_layers=3, num_heads=2,
                 feed_forward_proj="gated-gelu", decoder_start_token_id=0, attn_implementation="eager")
    ),
    "bart": lambda: BartForConditionalGeneration(
        BartConfig(vocab_size=50, d_model=32, encoder_layers=2, decoder_layers=1, encoder_ffn_dim=48,
                   decoder_ffn_dim=48, encoder_attention_heads=4, decoder_attention_heads=4,
                   attn_implementation="eager")
    ),
}  # fmt: skip


@pytest.mark.parametrize("architecture", list(PAIRS))
@pytest.mark.parametrize("router", [None, "topk", "hash"])
def test_flops_of_two_lengths_equal_the_counted_ones(architecture, router):
    model = PAIRS[architecture]().eval()
    if router is not None:
        shunter.sparsify(model, 4, router, backend="reference")
    source, target = torch.randint(3, 50, (2, LENGTH)), torch.randint(3, 50, (2, 5))
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(input_ids=source, decoder_input_ids=target)
    account = ledger(model, LENGTH, target_length=5)
    assert account.flops_per_token == pytest.approx(counted.get_total_flops() / (2 * (LENGTH + 5)), rel=1e-12)


def test_a_pair_without_its_second_length_is_refused():
    with pytest.raises(ValueError, match="give target_length too"):
        ledger(PAIRS["t5"](), LENGTH)
