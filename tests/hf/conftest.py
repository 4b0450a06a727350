"""Tiny random dense models of every architecture that sparsify promises."""

import pytest
import torch
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaPreLayerNormConfig,
    RobertaPreLayerNormForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

VOCAB = 50
_LM = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 8,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "dropout_rate": 0.0,
}
_BART = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "dropout": 0.0,
}
_OPT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "dropout": 0.0,
}
_IMAGE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}

BUILD = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_LM, num_key_value_heads=2)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_LM, num_key_value_heads=2)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_LM, num_key_value_heads=2, head_dim=8)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4)),
    "bert": lambda: BertForMaskedLM(BertConfig(**_LM)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**_T5)),
    "t5_gated": lambda: T5ForConditionalGeneration(T5Config(**_T5, feed_forward_proj="gated-gelu")),
    # Maps up and down that are a layer's own; the first of them behind a norm inside of its module.
    "opt": lambda: OPTForCausalLM(OPTConfig(**_OPT)),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**_BART)),
    "roberta-prelayernorm": lambda: RobertaPreLayerNormForMaskedLM(RobertaPreLayerNormConfig(**_LM)),
    # A residual added within the block; one map that is gate and up; layers that are one.
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**_LM, num_key_value_heads=2, pad_token_id=0)),
    "modernbert": lambda: ModernBertForMaskedLM(ModernBertConfig(**_LM, pad_token_id=0)),
    "albert": lambda: AlbertForMaskedLM(AlbertConfig(**_LM, embedding_size=16)),
    "vit": lambda: ViTForImageClassification(ViTConfig(**_IMAGE, image_size=32, patch_size=8, num_labels=3)),
}


BLOCKS = {"t5": 4, "t5_gated": 4, "bart": 4, "albert": 1}
"""How many blocks they have, where not two."""


@pytest.fixture(params=list(BUILD))
def architecture(request):
    return request.param


@pytest.fixture
def build():
    """name -> a fresh dense model without dropout."""

    def make(name):
        model = BUILD[name]()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model.eval()

    return make


@pytest.fixture
def inputs():
    """name -> keyword arguments of a forward with labels; the second sequence is padded at the end."""

    def make(name, batch=2, length=7):
        if name == "vit":
            return {"pixel_values": torch.randn(batch, 3, 32, 32), "labels": torch.randint(3, (batch,))}
        ids = torch.randint(1, VOCAB, (batch, length))
        mask = torch.ones_like(ids)
        mask[1:, -2:] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}

    return make
