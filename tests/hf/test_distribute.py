"""Hugging Face on several ranks: transformers' own families on Shunter's backends, sparse models in a Trainer."""

import os
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    TrainingArguments,
)
from transformers.distributed import DistributedConfig

import shunter
from shunter.errors import UserError
from shunter.training.guards import NaNGuard
from shunter.training.sharded import ShardedTrainer
from tests.conftest import SEED
from tests.helpers import on_ranks
from tests.hf.families import VOCAB, build

FAMILIES = ("qwen3_moe", "mixtral", "olmoe", "gpt_oss", "deepseek_v3")
LAYOUTS = {
    2: ({"fsdp_size": 2, "ep_size": 2}, {"tp_size": 2, "ep_size": 2}),
    4: (
        {"fsdp_size": 4, "ep_size": 2},
        {"fsdp_size": 2, "tp_size": 2, "ep_size": 4},
        {"dp_replicate_size": 2, "fsdp_size": 2, "ep_size": 2},
        {"fsdp_size": 4, "ep_size": 4},
    ),
}


def _gradients(model):
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if grad is not None:
            found[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).float()
    return found


def _distributed(rank, seed, folder, families, layouts):
    """By family and layout: how far loss and gradients are from those of one process, and what was warned of."""
    shunter.hf  # noqa: B018 (registers the backend)
    found = {}
    for family in families:
        for number, layout in enumerate(layouts):
            whole = AutoModelForCausalLM.from_pretrained(folder / family).train()
            config = DistributedConfig(**layout)
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                model = AutoModelForCausalLM.from_pretrained(
                    folder / family, experts_implementation="shunter", distributed_config=config
                ).train()
                torch.manual_seed(SEED)
                batches = torch.randint(3, VOCAB, (config.dp_size, 2, 12))
                mine = batches[rank // (dist.get_world_size() // config.dp_size)]
                loss = model(input_ids=mine, labels=mine).loss
                loss.backward()
            every = batches.flatten(0, 1)
            expected = whole(input_ids=every, labels=every).loss
            expected.backward()
            got, exact = _gradients(model), _gradients(whole)
            scale = max(float(g.abs().max()) for g in exact.values())
            gap = max(float((got[name] - grad).abs().max()) / scale for name, grad in exact.items())
            losses = [torch.zeros(()) for _ in range(dist.get_world_size())]
            dist.all_gather(losses, loss.detach().float())
            error = abs(float(torch.stack(losses).mean() - expected.detach()))
            fallback = [str(w.message) for w in said if "runs its own loop" in str(w.message)]
            found[f"{family} {number}"] = (error, gap, fallback, model.config._experts_implementation)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("size", LAYOUTS)
def test_transformers_families_run_on_shunters_backends(tmp_path, size):
    os.environ["SHUNTER_SEED"] = str(SEED)
    for family in FAMILIES:
        build(family).save_pretrained(tmp_path / family)
    for found in on_ranks(_distributed, size, SEED, tmp_path, FAMILIES, LAYOUTS[size], start="spawn"):
        for name, (error, gap, fallback, implementation) in found.items():
            assert implementation == "shunter" and not fallback, (name, fallback)
            assert error < 1e-5 and gap < 2e-5, (name, error, gap)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("family", ["t5", "bert", "llama"])
def test_micro_batches_weigh_as_many_labels_as_they_have(tmp_path, family, sparse):
    """Also where the loss of transformers' class is the mean over its own batch, whatever the Trainer tells it."""
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    if family == "t5":
        shape = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    config = AutoConfig.for_model(family, vocab_size=50, **shape)
    auto = {"t5": AutoModelForSeq2SeqLM, "bert": AutoModelForMaskedLM, "llama": AutoModelForCausalLM}[family]
    model = auto.from_config(config)
    if sparse:
        model = shunter.sparsify(model, 4, "topk", top_k=2, load_balancing_loss=0.3)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for block in model.modules():
        if isinstance(getattr(block, "dropout", None), float):
            block.dropout = 0.0
    trainer = ShardedTrainer(model=model.train(), args=TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    ids = torch.randint(1, 50, (4, 9))
    batches = []
    for rows, real in ((ids[:1], 3), (ids[1:], 8)):
        labels = rows.clone()
        labels[:, real:] = -100
        batches.append({"input_ids": rows, "labels": labels})
    counted = [(b["labels"][:, 1:] if family == "llama" else b["labels"]).ne(-100).sum() for b in batches]
    total = sum(counted)
    found = sum(trainer.compute_loss(model, dict(b), num_items_in_batch=total).item() for b in batches)
    expected = sum(model(**b).loss.item() * float(n / total) for b, n in zip(batches, counted, strict=True))
    assert found == pytest.approx(expected, rel=1e-5)
    assert trainer.model_accepts_loss_kwargs, "labels are counted in the next step, too"


class _Data(torch.utils.data.Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(SEED)
        self.ids = torch.randint(1, 50, (64, 8), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


class _InOrder(ShardedTrainer):
    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def _trained(folder, ep_size, resume=None, steps=6, accumulate=1):
    """A training's losses and gradient norms, and the selection biases at its end."""
    torch.manual_seed(SEED)
    size = dist.get_world_size() if dist.is_initialized() else 1
    shape = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "vocab_size": 50}
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", num_attention_heads=2, **shape))
    model = shunter.sparsify(
        dense, 4, "topk", top_k=2, selection_bias=True, bias_update_rate=0.01, load_balancing_loss=0.3
    )
    if size > 1:
        shunter.hf.distribute(model, DistributedConfig(fsdp_size=size, ep_size=ep_size))
    trainer = _InOrder(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=8 // size // accumulate,
            gradient_accumulation_steps=accumulate,
            save_steps=3,
            logging_steps=1,
            learning_rate=1e-2,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            seed=SEED % 2**31,
            max_grad_norm=0.5,
        ),  # fmt: skip
        train_dataset=_Data(),
        callbacks=[shunter.BalanceCallback(load_balancing_loss=0.0), NaNGuard()],
    )
    trainer.train(resume_from_checkpoint=resume)
    logs = [(line["loss"], line["grad_norm"]) for line in trainer.state.log_history if "grad_norm" in line]
    biases = [layer.decider.selection_bias.tolist() for layer in shunter.moe_layers(model).values()]
    return logs, biases


def _in_trainers(rank, seed, folder):
    warnings.simplefilter("ignore")
    found = {
        "two": _trained(folder / "two", 2),
        "data parallel": _trained(folder / "one", 1),
        "accumulating": _trained(folder / "accumulating", 2, accumulate=2),
        "resumed": _trained(folder / "two", 2, resume=str(folder / "two" / "checkpoint-3")),
        "resumed, another layout": _trained(folder / "two", 1, resume=str(folder / "two" / "checkpoint-3")),
    }
    try:
        shunter.hf.distribute(build("mixtral"), DistributedConfig(fsdp_size=2, ep_size=2))
    except UserError as error:
        found["refused"] = str(error)
    return found


@pytest.mark.slow
def test_a_trainer_trains_saves_and_resumes(tmp_path):
    os.environ["SHUNTER_SEED"] = str(SEED)
    results = on_ranks(_in_trainers, 2, SEED, tmp_path, start="spawn")
    alone = {
        n: _trained(tmp_path / f"alone {n}", 1, accumulate=n) for n in (1, 2)
    }  # micro-batches of all ranks' tokens
    assert "from_pretrained(..., experts_implementation" in results[0].pop("refused")
    for name, (found, own) in results[0].items():
        logs, biases = alone[2 if name == "accumulating" else 1]
        assert len(found) == 6, name
        assert torch.allclose(torch.tensor(found), torch.tensor(logs), rtol=2e-4), (name, found, logs)
        assert own == results[1][name][1], f"{name}: biases are equal on all ranks"
        assert torch.allclose(torch.tensor(own), torch.tensor(biases), atol=1e-6), name
    plain = shunter.from_pretrained(tmp_path / "two" / "checkpoint-6")
    state = plain.state_dict()
    bias = next(value for name, value in state.items() if name.endswith("selection_bias"))
    assert bias.tolist() == results[0]["two"][1][0]
