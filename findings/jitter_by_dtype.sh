#!/usr/bin/env bash
# transformers 5.24.0 (torch 2.13.0): what a Switch Transformer's jitter changes depends on the dtype.
#
# Training multiplies the router's input by uniform noise (router_jitter_noise, 0.01 by default) so that tokens try other
# experts; the experts see the tokens as they are (Switch Transformer, section 2.4). router_dtype is float32.
#
# Seen: the noise is multiplied in place into what `.to(float32)` returns. Of bfloat16 that is a copy, and the experts see
# clean tokens; of float32 (and under autocast, where the norm before gives float32) it is the hidden state itself, and
# experts are trained on noise. (transformers issue 33969 has the noise in the experts, and is closed.)
# Expected: the same function in both dtypes, up to rounding.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

print(f"transformers {transformers.__version__}, torch {torch.__version__}")
found = {}
for dtype in (torch.float32, torch.bfloat16):
    torch.manual_seed(0)
    config = SwitchTransformersConfig(d_model=16, d_ff=24, num_experts=4, dropout_rate=0.0, router_jitter_noise=0.1)
    block = SwitchTransformersSparseMLP(config).to(dtype).train()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    seen = []
    for expert in block.experts.values():
        expert.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    tokens = torch.randn(2, 5, 16).to(dtype)
    block(tokens.clone())
    rows, tokens = torch.cat(seen).double(), tokens.view(-1, 16).double()
    away = float((rows[:, None] - tokens).norm(dim=-1).min(dim=1).values.max() / tokens.norm(dim=-1).mean())
    found[dtype] = away
    print(f"{dtype}: what the experts see is up to {100 * away:.1f} % away from the tokens")
assert found[torch.float32] > 0.03 and found[torch.bfloat16] == 0, "the behaviour has changed"
PYTHON
