"""A drifted load alters the layers, once, alike on every rank and after resuming; a steady one does not."""

import copy
import json
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

import shunter
from shunter import MoE, parallel
from shunter.errors import UserError
from shunter.training.drift import OnDrift, drifted, fit_capacity
from shunter.training.trainer import DriftCallback
from tests.conftest import SEED
from tests.helpers import TIME_LIMIT, on_ranks

DIM, EXPERTS = 8, 4


def _layer(**options):
    given = {"capacity_factor": 1.0, "load_balancing_loss": 0.0, "top_k": 1, **options}
    moe = MoE(DIM, 6, EXPERTS, "topk", "reference", dtype=torch.float64, **given)
    with torch.no_grad():
        moe.router.weight.copy_(torch.eye(EXPERTS, DIM))
    return moe


def _wanting(*counts):
    """Tokens of which so many take each expert of a `_layer`."""
    expert = torch.arange(EXPERTS).repeat_interleave(torch.tensor(counts))
    return 5 * torch.eye(EXPERTS, DIM, dtype=torch.float64)[expert] + 0.1 * torch.rand(len(expert), DIM).double()


def test_capacity_follows_a_load_that_shifts():
    """Where no expert has more than its slots the results are those without a capacity, before and after."""
    moe, free = _layer(), _layer(capacity_factor=None)
    free.load_state_dict(moe.state_dict())
    drift = OnDrift(fit_capacity, trigger=drifted(0.2)).attach(moe)
    history = []
    for counts in [(5, 5, 5, 5)] * 2 + [(4, 6, 5, 5)] + [(17, 1, 1, 1)] * 3 + [(1, 1, 1, 17)] * 2:
        x = _wanting(*counts)
        same = torch.equal(moe(x), free(x))
        history.append((same, drift.step()))
        assert same == (moe.routing.dropped is None or moe.routing.dropped.token.numel() == 0)
    none, fired = [], [""]
    expected = [(True, none)] * 2 + [(False, none)] + [(False, fired), (True, none), (True, none)]
    assert history == [*expected, (False, fired), (True, none)]
    assert drift.alterations == {"": 2} and moe.router.options["capacity_shares"] == [1.0, 1.0, 1.0, 17.0]
    drift.detach()
    moe(x)
    with pytest.raises(RuntimeError, match="attach"):
        drift.step()


def test_what_counts_is_each_training_forward_once():
    heard = []
    moe = _layer()
    drift = OnDrift(lambda model, loads: heard.append(loads[""].tolist()), trigger=lambda *_: True, every=2).attach(moe)
    x = _wanting(6, 2, 2, 2)
    moe(x)
    with torch.no_grad():
        moe(x)
    moe.eval()(x)
    moe.train()
    assert drift.step() == []
    given = x.clone().requires_grad_()
    checkpoint(moe, given, use_reentrant=False).sum().backward()
    assert drift.step() == [""]
    assert heard == [[12, 4, 4, 4]], "demand, what is dropped included"
    assert drift.step() == [] and drift.step() == [], "where nothing was routed there is nothing to ask"


def test_a_state_goes_on():
    moe = _layer()
    drift = OnDrift(fit_capacity, every=3).attach(moe)
    for _ in range(4):
        moe(_wanting(9, 1, 1, 1))
        drift.step()
    state = json.loads(json.dumps(drift.state_dict()))
    other = _layer()
    again = OnDrift(fit_capacity, every=3).attach(other)
    again.load_state_dict(state)
    assert other.router.capacity_shares == moe.router.capacity_shares is not None
    for one, layer in ((drift, moe), (again, other)):
        for _ in range(2):
            layer(_wanting(1, 9, 1, 1))
            done = one.step()
        assert done == [""] and layer.router.capacity_shares == [11.0, 19.0, 3.0, 3.0]
    with pytest.raises(UserError, match="of other layers"):
        OnDrift(fit_capacity).attach(torch.nn.Sequential(_layer())).load_state_dict(state)


def test_what_cannot_be_is_said():
    with pytest.raises(UserError, match="Linear has no layers"):
        OnDrift(fit_capacity).attach(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="every 0"):
        OnDrift(fit_capacity, every=0)
    with pytest.raises(ValueError, match="distance 1"):
        drifted(1.0)
    drift = OnDrift(fit_capacity).attach(_layer())
    with pytest.raises(RuntimeError, match="attached already"):
        drift.attach(_layer())


def _trained(folder, steps, resume=None):
    torch.manual_seed(SEED)
    shape = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "vocab_size": 30}
    config = AutoConfig.for_model("llama", num_attention_heads=2, **shape)
    options = {"top_k": 1, "capacity_factor": 0.5, "capacity_order": "position"}
    model = shunter.sparsify(AutoModelForCausalLM.from_config(config), 4, "topk", **options)
    ids = torch.randint(30, (32, 9))
    drift = DriftCallback(fit_capacity, trigger=drifted(0.01))
    arguments = TrainingArguments(
        str(folder), max_steps=steps, save_steps=2, per_device_train_batch_size=4, report_to="none", use_cpu=True,
        learning_rate=1e-2, disable_tqdm=True, logging_strategy="no", lr_scheduler_type="constant",
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in ids]
    Trainer(model, arguments, train_dataset=data, callbacks=[drift]).train(resume_from_checkpoint=resume)
    return model, drift


@pytest.mark.slow
def test_a_trainer_resumes_with_the_layers_as_they_were_altered(tmp_path):
    whole, drift = _trained(tmp_path / "whole", 4)
    assert min(drift.alterations.values()) >= 2
    _trained(tmp_path / "parts", 2)
    resumed, again = _trained(tmp_path / "parts", 4, str(tmp_path / "parts" / "checkpoint-2"))
    assert again.alterations == drift.alterations
    for (name, one), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    for one, other in zip(whole.modules(), resumed.modules(), strict=True):
        if isinstance(one, MoE):
            assert one.router.capacity_shares == other.router.capacity_shares is not None


def _on_rank(rank, seed):
    """A layer whose experts move by measured load as it trains, against one whose experts stay."""
    warnings.simplefilter("ignore")
    mesh = parallel.mesh(expert_parallel=2, timeout=TIME_LIMIT)
    torch.manual_seed(seed)
    moves = _layer(capacity_factor=None)
    stays = copy.deepcopy(moves)
    optimizers = []
    for moe in (moves, stays):
        parallel.shard_experts(moe, mesh)
        optimizers.append(torch.optim.AdamW(parallel.parameter_groups(moe), lr=1e-2))
    seen = []
    drift = OnDrift(
        lambda model, loads: seen.append((loads[""].tolist(), parallel.place(model, loads, optimizer=optimizers[0]))),
        trigger=drifted(0.2),
    ).attach(moves)
    outs = []
    for counts in [(3, 3, 3, 3)] * 2 + [(6, 6 - rank, 1, 1 + rank)] * 3:
        x = _wanting(*counts)
        outs.append([])
        for moe, optimizer in zip((moves, stays), optimizers, strict=True):
            optimizer.zero_grad()
            out = moe(x)
            out.square().mean().backward()
            parallel.average_gradients(moe, mesh)
            optimizer.step()
            outs[-1].append(out.detach().tolist())
        drift.step()
    return outs, seen


@pytest.mark.slow
def test_experts_move_by_load_alike_on_every_rank(monkeypatch):
    monkeypatch.setenv("SHUNTER_SEED", str(SEED))
    results = on_ranks(_on_rank, 2, SEED, start="spawn")
    for outs, seen in results:
        for moved, stayed in outs:
            assert torch.allclose(torch.tensor(moved), torch.tensor(stayed), rtol=1e-10, atol=1e-10)
        ((load, orders),) = seen
        assert load == [12, 11, 2, 3], "of both ranks"
        assert sorted(orders[""]) == [0, 1, 2, 3] and {0, 1} not in (set(orders[""][:2]), set(orders[""][2:]))
    assert results[0][1] == results[1][1]
