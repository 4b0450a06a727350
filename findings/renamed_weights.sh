#!/usr/bin/env bash
# transformers 5.24.0 (torch 2.13.0): Trainer.train(resume_from_checkpoint=…) leaves a ViT at its first weights.
#
# save_pretrained writes the weights of some families by the names of older versions (ViT: vit.encoder.layer.0.… for
# vit.layers.0.…), and from_pretrained renames them back. The Trainer saves its checkpoints by save_pretrained, and loads
# them by load_state_dict(strict=False), which knows nothing of names.
#
# Seen: a resumed training goes on with the optimizer's state and the step of the checkpoint and with the weights that
# the model was made with; two warnings list missing and unexpected keys, and nothing fails.
# Expected: the weights of the checkpoint, as with a Llama, whose names are not changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}


def vit():
    return ViTForImageClassification(ViTConfig(image_size=4, patch_size=2, **SIZES))


def llama():
    return LlamaForCausalLM(LlamaConfig(vocab_size=9, **SIZES))


IMAGES = [{"pixel_values": torch.randn(3, 4, 4), "labels": torch.tensor(0)}] * 8
TEXT = [{"input_ids": torch.arange(4), "labels": torch.arange(4)}] * 8


def lost(make, data, name):
    """The share of the weights that a resumed training, of no further step, does not have from its checkpoint."""
    options = {"output_dir": name, "max_steps": 2, "save_steps": 2, "report_to": "none", "disable_tqdm": True}
    trained = Trainer(make(), TrainingArguments(**options), train_dataset=data)
    trained.train()
    again = Trainer(make(), TrainingArguments(**options), train_dataset=data)
    again.train(resume_from_checkpoint=f"{name}/checkpoint-2")
    pairs = zip(trained.model.parameters(), again.model.parameters(), strict=True)
    same = [torch.equal(a, b) for a, b in pairs]
    return 1 - sum(same) / len(same)


found = {"vit": lost(vit, IMAGES, "vit"), "llama": lost(llama, TEXT, "llama")}
print(f"transformers {transformers.__version__}, torch {torch.__version__}", found)
assert found["llama"] == 0 and found["vit"] > 0.5, "the behaviour has changed"
PYTHON
