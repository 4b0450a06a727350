"""Tiny dense models that can be upcycled, in folders, and what is read of the results."""

import json

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    PreTrainedTokenizerFast,
)

import shunter
from tests.hf.conftest import _LM, BUILD, VOCAB

BUILD = {
    **BUILD,
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_LM, num_key_value_heads=2, sliding_window=4)),
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**_LM, num_key_value_heads=2, eos_token_id=2)),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **_LM,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_rope_head_dim=4,
            v_head_dim=8,
            qk_nope_head_dim=4,
            first_k_dense_replace=2,
        )  # fmt: skip
    ),
}
NATIVE = {
    "llama": "mixtral",
    "mistral": "mixtral",
    "qwen3": "qwen3_moe",
    "olmo2": "flex_olmo",
    "deepseek_v3": "deepseek_v3",
}


def lively(name, **config):
    """A dense model in which every tensor matters: no zeros, no ones, feed-forward blocks as strong as attention."""
    model = LlamaForCausalLM(LlamaConfig(**_LM, num_key_value_heads=2, **config)) if config else BUILD[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.eval()


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def batch_for(inputs, name):
    """Arguments of a forward without padding."""
    batch = inputs("llama" if name in NATIVE else name)
    if "input_ids" in batch:
        batch["labels"] = batch["input_ids"]
    return {key: value for key, value in batch.items() if key != "attention_mask"}


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def load(folder):
    config = json.loads((folder / "config.json").read_text())
    loaded = (
        shunter.from_pretrained(str(folder)) if "shunter" in config else AutoModelForCausalLM.from_pretrained(folder)
    )
    return loaded.eval()


def experts_of(folder, layer=0):
    """(gate, up, down) of each expert of a Mixtral's layer."""
    tensors = load_file(folder / "model.safetensors")
    count = len({name for name in tensors if f"layers.{layer}." in name and "w1" in name})
    path = f"model.layers.{layer}.block_sparse_moe"
    return [[tensors[f"{path}.experts.{e}.{w}.weight"] for w in ("w1", "w3", "w2")] for e in range(count)], tensors


def block_of(model, layer=0):
    mlp = model.model.layers[layer].mlp
    return [linear.weight.detach() for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]


def save_tokenizer(folder):
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
