"""Tiny random models of transformers' own mixture-of-experts families, built from their configurations' names."""

import inspect

from transformers import CONFIG_MAPPING, AutoModelForCausalLM

VOCAB = 64
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_layer_start_index": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "max_position_embeddings": 64,
    "sliding_window": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MLA = {"head_dim": 4}
_EXTRA = {
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    "glm4_moe_lite": _MLA,
    "gemma4_text": {"enable_moe_block": True},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "chunk_size": 8, "n_groups": 1},
    "jamba": {"attn_layer_period": 1, "attn_layer_offset": 0, "expert_layer_period": 1, "expert_layer_offset": 0},
    "qwen3_next": {"layer_types": ["full_attention"] * 3},
    "qwen3_5_moe_text": {"layer_types": ["full_attention"] * 3},
    "lfm2_moe": {"layer_types": ["full_attention"] * 3, "num_dense_layers": 1},
    "laguna": {"num_attention_heads_per_layer": [4] * 3},
}

SOFTMAX = (
    "aria_text cohere2_moe deepseek_v2 ernie4_5_moe flex_olmo gemma4_text gpt_oss granitemoe granitemoeshared "
    "hunyuan_v1_moe jamba jetmoe mellum minimax mixtral olmoe qwen2_moe qwen3_5_moe_text qwen3_moe qwen3_next"
).split()
SIGMOID = (
    "deepseek_v3 dots1 exaone_moe flint glm4_moe glm4_moe_lite hy_v3 hy_v4 inkling_text kolibri1 laguna lfm2_moe "
    "llama4_text minimax_m2 nemotron_h solar_open"
).split()
FAMILIES = [*SOFTMAX, *SIGMOID]
# The families with a selection bias that transformers loads and never updates, among them.
BIASED = (
    "deepseek_v3 dots1 ernie4_5_moe exaone_moe glm4_moe glm4_moe_lite hy_v3 hy_v4 inkling_text kolibri1 laguna "
    "lfm2_moe minimax_m2 nemotron_h solar_open"
).split()


def build(family, **changes):
    """A tiny model of a family, in evaluation, without dropout; changes are of its configuration."""
    kind = CONFIG_MAPPING[family]
    takes = {*inspect.signature(kind.__init__).parameters, *getattr(kind, "attribute_map", {})}
    sizes = {**_SIZES, **_EXTRA.get(family, {}), **changes}
    sizes["vocab_size_per_layer_input"] = sizes["vocab_size"]  # Gemma 4 looks tokens up in a second table
    sizes = {key: value for key, value in sizes.items() if key in takes}
    return AutoModelForCausalLM.from_config(kind(**sizes)).eval()
