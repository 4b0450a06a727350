"""A recipe's training loop: what a step's loss is made of, and which signals it hears."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from shunter import moe_layers, sparsify
from shunter.analysis.runs import Metrics
from shunter.training import loop
from shunter.training.checkpoints import Checkpoints
from tests.campaigns.processes import in_child

CONFIG = LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)


def _train(model, data, folder, max_steps=1, log_every=1):
    metrics = Metrics(folder / "metrics.jsonl", None)
    loop.train_model(
        "sparse",
        model,
        data,
        lambda _: {"loss": 0.0},
        metrics,
        Checkpoints(folder / "checkpoints", {}),
        tokens_per_step=10,
        eval_every=100,
        log_every=log_every,
        max_steps=max_steps,
        per_device_train_batch_size=2,
        use_cpu=True,
        save_strategy="no",
    )
    return [line for line in metrics.lines() if line["kind"] == "train"]


def _divergence(p, q):
    return F.kl_div(q, p, log_target=True, reduction="sum")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("options, alpha", [({}, 5.0), ({"consistency_loss": 0.7}, 0.7)])
def test_thor_trains_both_passes_and_their_agreement(options, alpha, padded, tmp_path, monkeypatch):
    """The loss of a step is CE + CE' + alpha (KL(p, q) + KL(q, p)) / 2, the latter a mean over real tokens."""
    model = sparsify(LlamaForCausalLM(CONFIG), 8, "thor", **options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)  # experts that differ
    ids = torch.randint(20, (2, 5))
    mask = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]]) if padded else torch.ones(2, 5, dtype=torch.int64)
    columns = {"input_ids": ids, "labels": ids.where(mask == 1, -100)} | ({"attention_mask": mask} if padded else {})
    data = [{key: column[row] for key, column in columns.items()} for row in range(2)]
    passes, steps = [], []
    model.register_forward_hook(lambda module, args, output: passes.append(output))
    inner = loop._Trainer.compute_loss
    monkeypatch.setattr(
        loop._Trainer, "compute_loss", lambda *args, **kwargs: steps.append(inner(*args, **kwargs)) or steps[-1]
    )
    (line,) = _train(model, data, tmp_path)
    assert len(passes) == 2 and len(steps) == 1
    p, q = (output.logits.detach().log_softmax(-1)[mask == 1].double() for output in passes)
    agreement = alpha * (_divergence(p, q) + _divergence(q, p)) / 2 / mask.sum()
    labels = torch.stack([row["labels"] for row in data])[:, 1:].flatten()
    entropies = [F.cross_entropy(output.logits[:, :-1].detach().flatten(0, 1), labels) for output in passes]
    assert steps[0].item() == pytest.approx(float(sum(entropies) + agreement), rel=1e-5)
    assert line["loss"] == pytest.approx(float(sum(entropies)) / 2, rel=1e-5)
    assert line["aux_loss"] == pytest.approx(float(agreement), rel=1e-3, abs=1e-6)


def test_other_routers_take_one_pass(tmp_path):
    model = sparsify(LlamaForCausalLM(CONFIG), 4, "topk", top_k=2)
    passes = []
    model.register_forward_hook(lambda module, args, output: passes.append(output))
    ids = torch.randint(20, (2, 5))
    (line,) = _train(model, [{"input_ids": row, "labels": row} for row in ids], tmp_path)
    assert len(passes) == 1
    expected = F.cross_entropy(passes[0].logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert line["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_the_auxiliary_loss_in_the_log_is_the_mean_over_its_steps_by_hand(tmp_path):
    """That of a step: over the layers, 0.03 E sum_i f_i P_i + 0.2 mean (log sum exp)^2 over tokens."""
    model = sparsify(LlamaForCausalLM(CONFIG), 4, "topk", top_k=2, load_balancing_loss=0.03, z_loss=0.2)
    said = []
    for layer in moe_layers(model).values():
        torch.nn.init.normal_(layer.router.weight)
        layer.router.register_forward_hook(lambda module, args, output: said.append(output[0].detach().double()))
    ids = torch.randint(20, (6, 5))
    lines = _train(model, [{"input_ids": row, "labels": row} for row in ids], tmp_path, max_steps=3, log_every=2)
    assert len(said) == 6, "two layers in three steps"
    each = []
    for logits in said:
        chosen = torch.zeros_like(logits).scatter_(1, logits.topk(2, dim=1).indices, 1.0)
        share, mean = chosen.sum(0) / chosen.sum(), (logits - logits.logsumexp(1, keepdim=True)).exp().mean(0)
        each.append(0.03 * 4 * float(share @ mean) + 0.2 * float(logits.logsumexp(1).square().mean()))
    steps = [each[0] + each[1], each[2] + each[3], each[4] + each[5]]
    assert [line["aux_loss"] for line in lines] == pytest.approx([(steps[0] + steps[1]) / 2, steps[2]], rel=1e-5)


def test_the_end_of_the_terminal_stops_a_training_and_what_it_says_then_goes_nowhere():
    def work():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        above, terminal = os.openpty()
        os.dup2(terminal, 2)
        os.close(terminal)
        watch = SimpleNamespace(asked=False)
        with loop._interruptible(watch):
            os.close(above)
            os.kill(os.getpid(), signal.SIGHUP)
        return not watch.asked or os.write(2, b"x") != 1

    assert in_child(work).code == 0


def test_under_nohup_a_training_goes_on():
    def work():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        watch = SimpleNamespace(asked=False)
        with loop._interruptible(watch):
            os.kill(os.getpid(), signal.SIGHUP)
        return watch.asked

    assert in_child(work).code == 0
