"""Tiny random models of transformers' own mixture-of-experts families, built from their configurations' names."""

import importlib
import inspect

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from shunter.hf.observe.listening import listening

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
_FULL = {"layer_types": ["full_attention"] * 3}
_SPARSE = {"mlp_layer_types": ["dense", "sparse", "sparse"]}


def _positions(*sections):
    """Rotary positions in sections, as of time, height and width."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)}}


# By model_type.
_EXTRA = {
    "bailing_hybrid": _FULL,
    "beam": {**_FULL, **_SPARSE},
    "dbrx": {
        "d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 4, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "deepseek_ocr2_text": {**_MLA, **_SPARSE},
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [16, 16], **_positions(1, 1, 2)},
    "gemma4_text": {"enable_moe_block": True},
    "glm4_moe_lite": _MLA,
    "glm4v_moe_text": _positions(1, 0, 1),
    "glm5_next_text": {"qk_rope_head_dim": 0, **_FULL, **_SPARSE},
    "granitemoehybrid": {
        "layer_types": ["attention"] * 3, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    "hy_v4_vl_text": _positions(1, 1, 0),
    "jamba": {"attn_layer_period": 1, "attn_layer_offset": 0, "expert_layer_period": 1, "expert_layer_offset": 0},
    "kimi_linear": _FULL,
    "laguna": {"num_attention_heads_per_layer": [4] * 3},
    "lfm2_moe": {**_FULL, "num_dense_layers": 1},
    "mimo_v2_flash": {**_FULL, "num_key_value_heads": 2},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "chunk_size": 8, "n_groups": 1},
    "qwen3_5_moe_text": _FULL,
    "qwen3_next": _FULL,
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 16},  # read, and of no default
    "qwen4_exp_text": {
        **_FULL, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2, "ngram_vocab_size_base": 50,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

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
    return AutoModelForCausalLM.from_config(_tiny(CONFIG_MAPPING[family], **changes)).eval()


def build_around(experts):
    """A tiny model with modules of an experts class, in evaluation: the first of its family that takes token ids."""
    module = importlib.import_module(experts.__module__)
    kinds = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, PreTrainedModel)]
    kinds = [c for c in kinds if c.__module__ == module.__name__ and inspect.isclass(c.config_class)]
    for kind in sorted(kinds, key=lambda c: (not c.__name__.endswith("ForCausalLM"), len(c.__name__))):
        if _takes(kind.config_class) & {"num_experts_per_tok", "moe_topk", "top_k_experts"}:
            model = kind(_tiny(kind.config_class)).eval()
            found = [part for part in model.modules() if isinstance(part, experts)]
            for parameter in (parameter for part in found for parameter in part.parameters()):
                nn.init.normal_(parameter, std=0.1)  # transformers leaves those of a talker uninitialised
            if found:
                return model
    raise LookupError(f"no model in {module.__name__} holds {experts.__name__}")


def steady(model, draw, runs=20):
    """Inputs by name, as draw() makes them, for which the experts that the model takes do not hang on rounding.

    They stay the same where the embeddings move by 1e-4 of their size. That a choice as near to another as rounding is
    does so in all of the runs has a chance of 2 ** -20, and that there is one a chance of about 1e-5.
    """
    model.eval()
    for _ in range(100):
        inputs = draw()
        expected = _chosen(model, inputs)
        move = model.get_input_embeddings().register_forward_hook(
            lambda module, args, out: out + 1e-4 * out.std() * torch.randn_like(out)
        )
        try:
            if all(_chosen(model, inputs) == expected for _ in range(runs)):
                return inputs
        finally:
            move.remove()
    raise AssertionError("of 100 inputs each has a choice that hangs on rounding")


def _chosen(model, inputs):
    chosen = []
    with torch.no_grad(), listening(model, lambda name, seen: chosen.append(seen.index.tolist())):
        model(**inputs)
    return chosen


def _takes(kind):
    return {*inspect.signature(kind.__init__).parameters, *getattr(kind, "attribute_map", {})}


def _tiny(kind, **changes):
    extra = {**_EXTRA.get(kind.model_type, {}), **changes}
    sizes = {**_SIZES, **extra}
    sizes["vocab_size_per_layer_input"] = sizes["vocab_size"]  # Gemma 4 looks tokens up in a second table
    takes = _takes(kind)
    return kind(**{key: value for key, value in sizes.items() if key in takes or key in extra})
