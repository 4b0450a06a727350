#!/usr/bin/env bash
# peft 0.21.2 (transformers 5.24.0, torch 2.13.0): layers_to_transform and exclude_modules do not hold for experts.
#
# The experts of transformers 5 are stacks of matrices, parameters that belong to no Linear; LoRA reaches them by
# target_parameters, which "behaves similarly to target_modules", or by their old names (w1, w2, w3), which peft turns
# into it. LoraConfig(layers_to_transform=[0]) adapts layer 0 alone, exclude_modules leaves out what it matches.
#
# Seen: in one adapter the attention heeds both options and the experts none: they are adapted, trained and saved in every
# layer. The adapter of one layer is as large as that of all of them. No warning says so.
# Expected: the layers that were asked for, or an error, as for dropout, bias and DoRA.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 peft==0.21.2
"$folder/venv/bin/python" - <<'PYTHON'
import re

import peft
import torch
import transformers
from transformers import MixtralConfig, MixtralForCausalLM

sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
sizes |= {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 50}
stack = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj"]}
asked = {
    "layers_to_transform=[0]": {**stack, "layers_to_transform": [0]},
    "the same, by the old names": {"target_modules": ["q_proj", "w1", "w2", "w3"], "layers_to_transform": [0]},
    "exclude_modules layer 1": {**stack, "exclude_modules": r".*layers\.1\..*"},
}
print(f"peft {peft.__version__}, transformers {transformers.__version__}, torch {torch.__version__}")
found = {}
for name, options in asked.items():
    model = peft.get_peft_model(MixtralForCausalLM(MixtralConfig(**sizes)), peft.LoraConfig(r=2, **options))
    trained = [key for key, value in model.named_parameters() if value.requires_grad]
    found[name] = [
        sorted({int(re.search(r"layers\.(\d+)", key)[1]) for key in trained if part in key})
        for part in ("self_attn", "experts")
    ]
    print(f"{name}: attention is adapted in layers {found[name][0]}, experts in {found[name][1]}")
assert list(found.values()) == [[[0], [0, 1, 2]], [[0], [0, 1, 2]], [[0, 2], [0, 1, 2]]], "the behaviour has changed"
PYTHON
