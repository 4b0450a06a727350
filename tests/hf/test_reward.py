"""Models whose routers learn by reward: the reward of each token is minus the loss of its own prediction."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

import shunter

from .test_hooks import _Rows


def _layers(model):
    return list(shunter.moe_layers(model).values())


def _token_rewards(logits, labels, shifted):
    """Token by token, in float64: minus the cross-entropy of the prediction at each place that has a label."""
    reward, real = torch.zeros(labels.shape, dtype=torch.float64), torch.zeros(labels.shape, dtype=torch.bool)
    for b in range(labels.shape[0]):
        for t in range(labels.shape[1] - shifted):
            label = int(labels[b, t + shifted])
            if label != -100:
                reward[b, t] = logits[b, t].double().log_softmax(-1)[label]
                real[b, t] = True
    return reward, real


def _expected(model, batch, rewards):
    """The total loss of the same draws, from the decisions: rewards(output) gives (reward, mask) of each layer."""
    bare = {key: value for key, value in batch.items() if key != "labels"}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        output = model(**bare)
    total = 0.0
    for layer, (reward, mask) in zip(_layers(model), rewards(output), strict=True):
        found = layer.decision
        reward, mask = (value.expand(found.shape).reshape(-1) for value in (reward, mask))
        if found.context.mask is not None:
            mask = mask & found.context.mask
        losses = layer.router.reward_losses(found, torch.where(mask, reward, 0), mask)
        total = total + sum(losses.values()) + sum(layer.losses.values())
        layer._last = None
    return total


def _loss(model, batch):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return model(**batch)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_each_token_is_rewarded_for_its_own_prediction(architecture, build, inputs):
    model = shunter.sparsify(build(architecture), 4, "reinforce").double().train()
    batch = inputs(architecture)
    shifted = int(architecture != "bert")

    def rewards(output):
        return [_token_rewards(output.logits.detach(), batch["labels"], shifted)] * len(_layers(model))

    with torch.no_grad():
        extra = _expected(model, batch, rewards)
    output = _loss(model, batch)
    labels = batch["labels"][:, shifted:]
    logits = output.logits[:, : labels.shape[1]]
    nats = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    assert torch.allclose(output.loss, nats + extra, rtol=1e-6)
    assert torch.allclose(_loss(model, {**batch, "return_dict": False})[0], output.loss, rtol=1e-6)
    output.loss.backward()
    for layer in _layers(model):
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.router.parameters())
        assert layer.router.weight.grad.abs().sum() > 0


def test_an_encoders_tokens_share_the_reward_of_their_sequence(build, inputs):
    model = shunter.sparsify(build("t5"), 4, "reinforce").double().train()
    batch = inputs("t5")
    batch["labels"] = batch["labels"][:, :4].clone()
    batch["labels"][1, 2:] = -100
    real = (batch["labels"] != -100).long()
    decoder = {"decoder_input_ids": model._shift_right(batch["labels"]), "decoder_attention_mask": real}

    def rewards(output):
        reward, real = _token_rewards(output.logits.detach(), batch["labels"], 0)
        mean = (reward.sum(1) / real.sum(1))[:, None], torch.ones(2, 1, dtype=torch.bool)
        return [mean if name.startswith("encoder") else (reward, real) for name in shunter.moe_layers(model)]

    with torch.no_grad():
        extra = _expected(model, batch | decoder, rewards)
    output = _loss(model, batch)
    nats = F.cross_entropy(output.logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
    assert torch.allclose(output.loss, nats + extra, rtol=1e-6)


def test_an_images_patches_share_its_reward(build, inputs):
    model = shunter.sparsify(build("vit"), 4, "reinforce").double().train()
    batch = inputs("vit")
    batch["pixel_values"] = batch["pixel_values"].double()

    def rewards(output):
        reward = -F.cross_entropy(output.logits.detach(), batch["labels"], reduction="none")[:, None]
        return [(reward, torch.ones_like(reward, dtype=torch.bool))] * len(_layers(model))

    with torch.no_grad():
        extra = _expected(model, batch, rewards)
    output = _loss(model, batch)
    assert torch.allclose(output.loss, F.cross_entropy(output.logits, batch["labels"]) + extra, rtol=1e-6)


def test_own_losses_need_an_own_reward(build, inputs):
    model = shunter.sparsify(build("llama"), 4, "reinforce").train()
    batch = inputs("llama")
    labels = batch.pop("labels")
    output = model(**batch)
    with pytest.raises(RuntimeError, match="learns by reward"):
        shunter.aux_loss(model)
    shunter.give_reward(model, -output.logits.detach().square().mean(-1), labels != -100)
    assert shunter.aux_loss(model).requires_grad


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_plain_trainer_trains_the_router(checkpointing, build, inputs, tmp_path):
    model = shunter.sparsify(build("llama"), 4, "reinforce")
    before = copy.deepcopy(model)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, use_cpu=True, report_to="none",
        gradient_accumulation_steps=2, learning_rate=0.1, optim="sgd", save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=checkpointing,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=_Rows(inputs("llama", batch=16))).train()
    for old, new in zip(_layers(before), _layers(model), strict=True):
        for (key, one), other in zip(old.router.named_parameters(), new.router.parameters(), strict=True):
            assert other.isfinite().all() and not torch.equal(one, other), key
