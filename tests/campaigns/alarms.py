"""Campaigns H and I: leaps of the loss, dead experts and collapsing layers, in real trainings and in drawn numbers."""

import contextlib
import os
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from shunter import moe_layers, sparsify
from shunter.analysis.runs import Metrics
from shunter.training import loop
from shunter.training.alarms import LoadAlarm, SpikeAlarm
from shunter.training.checkpoints import Checkpoints
from tests.campaigns.campaign import drawn
from tests.campaigns.processes import in_child

VOCAB, LENGTH, ROWS, EXPERTS = 24, 12, 8, 8
WITHIN = 50  # steps until a collapse is heard
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}


def spikes(result, folder, cases, seed):
    """H: a leap in a training that went well until then, and in a falling, noisy series; and none before or without."""
    for case in cases:
        draw = drawn(seed, case)
        at, plant = draw.randrange(60, 110), draw.choice([_noise, _wild_weights, _long_step])
        fault = _heard(folder, case, at, 3, plant, "the loss leaps to")
        result.count(
            case, fault and f"{plant.__name__} at {at}: {fault}" or _spike_in_numbers(seed, case), detected=True
        )


def loads(result, folder, cases, seed):
    """I: an expert that dies or a layer that collapses, in a healthy training and in drawn loads; and none without."""
    for case in cases:
        draw = drawn(seed, case)
        at, plant = draw.randrange(30, 80), _dead if case % 2 else _collapse
        said = "expert 3 is" if case % 2 else "is collapsing"
        fault = _heard(folder, case, at, WITHIN, plant, said)
        result.count(
            case, fault and f"{plant.__name__} at {at}: {fault}" or _load_in_numbers(seed, case), detected=True
        )


def _heard(folder, seed, at, within, plant, said):
    """What is wrong with the alarms of a training into which something is planted at a step."""
    place = Path(folder) / "alarms"

    def work():
        alarms = _trained(place, seed, at, at + within, plant)
        early = [line for line in alarms if line["step"] < at]
        late = [line["what"] for line in alarms if line["step"] >= at]
        print(f"false alarms {early}" if early else f"heard {late}")
        return int(bool(early) or not any(said in what for what in late))

    ended = in_child(work)
    return "" if ended.code == 0 else f"{ended.code} {ended.line}"


def _trained(folder, seed, at, steps, plant):
    """The alarms of a small language model's training on text of a random grammar, by the recipes' loop."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, num_hidden_layers=2, **SIZES))
    model = sparsify(model, EXPERTS, "topk", top_k=2)
    ids = _text(steps * ROWS)
    counted = [0]

    def before(module, args):
        if module.training:
            counted[0] += 1
            if counted[0] == at:
                with torch.no_grad():
                    plant(model)

    if plant is _noise:
        ids[(at - 1) * ROWS : at * ROWS] = torch.randint(VOCAB, (ROWS, LENGTH))
    else:
        model.register_forward_pre_hook(before)
    metrics = Metrics(folder / "metrics.jsonl", None)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        loop.train_model(
            "sparse", model, [{"input_ids": row, "labels": row} for row in ids], lambda _: {"loss": 0.0}, metrics,
            Checkpoints(folder / "checkpoints", {}), tokens_per_step=ROWS * LENGTH, eval_every=1000, log_every=1000,
            max_steps=steps, per_device_train_batch_size=ROWS, use_cpu=True, save_strategy="no", learning_rate=0.01,
            max_grad_norm=1.0, lr_scheduler_type="constant",
        )  # fmt: skip
    return [line for line in metrics.lines() if line["kind"] == "alarm"]


def _text(rows):
    """Rows of tokens, each of which is followed by one of two, or now and then by any."""
    after = torch.stack([torch.randperm(VOCAB), torch.randperm(VOCAB)], 1)
    ids = torch.randint(VOCAB, (rows, LENGTH))
    for i in range(1, LENGTH):
        follows = after[ids[:, i - 1], torch.randint(2, (rows,))]
        ids[:, i] = torch.where(torch.rand(rows) < 0.1, ids[:, i], follows)
    return ids


def _noise(model):
    """A batch of no text."""


def _wild_weights(model):
    """A flipped bit in an exponent, in all of a matrix."""
    model.lm_head.weight.mul_(16)


def _long_step(model):
    """A step some hundred times too long, in a random direction."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter))


def _dead(model):
    layer = moe_layers(model)["model.layers.1.mlp"]
    score = layer.router.score
    layer.router.score = lambda *given: score(*given).index_fill(-1, torch.tensor([3]), -1e4)


def _collapse(model):
    layer = moe_layers(model)["model.layers.0.mlp"]
    score = layer.router.score
    layer.router.score = lambda *given: score(*given) + 40.0 * (torch.arange(EXPERTS) < 2)


def _spike_in_numbers(seed, case):
    """What is heard wrongly in a falling, noisy series, and in the same with a leap."""
    draw = torch.Generator().manual_seed(seed + case)
    step = torch.arange(400, dtype=torch.float64)
    quiet = 2 + 5 * torch.exp(-step / 150) + 0.1 * torch.randn(400, dtype=torch.float64, generator=draw)
    at = 40 + int(torch.randint(360, (), generator=draw))
    leap = quiet.clone()
    leap[at] += 1.5
    found = []
    for values in (quiet, leap):
        alarm = SpikeAlarm()
        found.append([i for i, value in enumerate(values.tolist()) if alarm.note(value) is not None])
    return "" if found == [[], [at]] else f"planted at {at}, heard at {found}"


def _load_in_numbers(seed, case):
    """What is heard wrongly in the loads of a healthy layer, and in those of one where an expert dies or takes all."""
    draw = torch.Generator().manual_seed(seed + case)
    experts, tokens = 8 << case % 3, 2048
    healthy = (0.3 * torch.randn(experts, generator=draw)).softmax(-1)
    planted = healthy.clone()
    planted[int(torch.randint(experts, (), generator=draw))] = 0.0 if case % 2 else 50.0
    heard = []
    for weights in (healthy, planted):
        alarm = LoadAlarm()
        heard.append(None)
        for step in range(50):
            load = torch.multinomial(weights, tokens, True, generator=draw).bincount(minlength=experts)
            if alarm.note("layer", load, 1) and heard[-1] is None:
                heard[-1] = step
    right = heard[0] is None and heard[1] is not None
    return "" if right else f"healthy heard at {heard[0]}, planted at {heard[1]}"
