#!/usr/bin/env bash
# transformers 5.24.0 (torch 2.13.0): under reentrant activation checkpointing the load-balancing loss of a mixture of
# experts teaches the router nothing.
#
# With output_router_logits=True the loss of a Mixtral (Qwen-MoE, OLMoE, …) has router_aux_loss_coef times a
# load-balancing loss. Activation checkpointing computes a layer twice and is meant to change no gradient; many recipes
# pass {"use_reentrant": True}, which was the default for years.
#
# Seen: loss and aux_loss are the same to the last digit, but the router logits are picked up by hooks inside of the
# layers, and reentrant checkpointing runs these without a graph: aux_loss requires no gradient, and only the language
# model's reaches the router. With use_reentrant=False it is as without checkpointing. No warning.
# Expected: the same gradients, or an error.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import MixtralConfig, MixtralForCausalLM

sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
sizes |= {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 50}
config = MixtralConfig(**sizes, output_router_logits=True, router_aux_loss_coef=10.0)
ids = torch.randint(1, 50, (2, 9), generator=torch.Generator().manual_seed(0))
found = {}
print(f"transformers {transformers.__version__}, torch {torch.__version__}")
ways = {"none": None, "not reentrant": {"use_reentrant": False}, "reentrant": {"use_reentrant": True}}
for name, options in ways.items():
    torch.manual_seed(0)
    model = MixtralForCausalLM(config).train()
    if options is not None:
        model.activation_checkpointing_enable(options)
    output = model(input_ids=ids, labels=ids, use_cache=False)
    output.loss.backward()
    router = float(torch.stack([layer.mlp.gate.weight.grad.norm() for layer in model.model.layers]).norm())
    found[name] = output.loss.item(), output.aux_loss.item(), router
    print(f"checkpointing {name}: loss {output.loss:.6f}, aux_loss {output.aux_loss:.6f}, router's gradient {router:.6f}")
assert found["none"][:2] == found["reentrant"][:2], "the behaviour has changed"
assert abs(found["not reentrant"][2] / found["none"][2] - 1) < 1e-3, "the behaviour has changed"
assert found["reentrant"][2] < found["none"][2] / 100, "the behaviour has changed"
PYTHON
