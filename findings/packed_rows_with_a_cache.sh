#!/usr/bin/env bash
# transformers 5.24.0: a packed batch is attended across its sequences unless the forward is told use_cache=False.
#
# `DataCollatorWithFlattening` packs sequences in one row and tells them apart by position_ids that start again; the
# masks of "sdpa" and "eager" attention are made block diagonal from these. In a training loop of one's own one calls
# model(**batch).
#
# Seen: with the default configuration (use_cache is true, in train mode too) the forward makes a cache, for which the
# position_ids are not looked at: every sequence sees those before it, the loss is another one, and nothing is said. With
# use_cache=False, which Trainer's arguments set, the logits are those of each sequence alone.
# Expected: the same logits with and without a cache, or an error.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).train()
rows = [torch.randint(1, 50, (length,)) for length in (5, 7)]
batch = DataCollatorWithFlattening()([{"input_ids": row.tolist()} for row in rows])
alone = torch.cat([model(row[None]).logits[0] for row in rows])
found = {}
for name, options in (("as it is", {}), ("use_cache=False", {"use_cache": False})):
    found[name] = float((model(**batch, **options).logits[0] - alone).abs().max())
print(f"transformers {transformers.__version__}, torch {torch.__version__}; largest difference of a logit:", found)
assert found["as it is"] > 1e-2 and found["use_cache=False"] < 1e-5, "the behaviour has changed"
PYTHON
