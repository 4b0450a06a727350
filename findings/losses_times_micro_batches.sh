#!/usr/bin/env bash
# transformers 5.24.0 (torch 2.13.0): a Trainer's loss and gradient of T5, BART or BERT grow with gradient accumulation.
#
# A Trainer that accumulates 4 micro-batches of 2 rows makes the step of one batch of 8. It tells the forward how many
# labels a step has (num_items_in_batch), so that the loss comes back as a share of all of them, and divides no more;
# it does so for every class whose forward has **kwargs.
#
# Seen: BertForMaskedLM and T5ForConditionalGeneration have **kwargs, and a loss that knows nothing of them: a mean over
# the micro-batch. Accumulating 4, the logged loss and the gradient norm are 4 times those of one batch of the same
# rows; max_grad_norm then clips what it should not. With several processes they grow by their number too. No warning.
# Expected: the same step, as LlamaForCausalLM has it. (transformers issue 47688 has the accumulation, and is open.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
import transformers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

small = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
bert = BertConfig(**small, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
t5 = T5Config(
    vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, dropout_rate=0.0, decoder_start_token_id=0
)
models = {
    "LlamaForCausalLM": lambda: LlamaForCausalLM(LlamaConfig(**small)),
    "BertForMaskedLM": lambda: BertForMaskedLM(bert),
    "T5ForConditionalGeneration": lambda: T5ForConditionalGeneration(t5),
}
ids = torch.randint(1, 50, (8, 9), generator=torch.Generator().manual_seed(0))
data = [{"input_ids": row, "labels": row} for row in ids]


def first_step(make, accumulate):
    torch.manual_seed(0)
    args = TrainingArguments(
        "out", max_steps=1, per_device_train_batch_size=8 // accumulate, gradient_accumulation_steps=accumulate,
        logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no",
    )
    trainer = Trainer(model=make(), args=args, train_dataset=data)
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    trainer.train()
    line = trainer.state.log_history[0]
    return float(line["loss"]), float(line["grad_norm"])


print(f"transformers {transformers.__version__}, torch {torch.__version__}")
ratios = {}
for name, make in models.items():
    once, parts = first_step(make, 1), first_step(make, 4)
    ratios[name] = [part / whole for whole, part in zip(once, parts)]
    print(f"{name}: loss and gradient norm {once} at once, {parts} in 4 micro-batches")
assert all(abs(ratio - 1) < 0.01 for ratio in ratios.pop("LlamaForCausalLM")), "the behaviour has changed"
assert all(abs(ratio - 4) < 0.04 for found in ratios.values() for ratio in found), "the behaviour has changed"
PYTHON
