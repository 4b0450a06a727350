"""BalanceCallback: the losses of an independent float64 computation, however the training is cut up."""

import copy
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import shunter
from shunter.hf.observe.listening import listening
from shunter.hf.observe.taps import taps
from shunter.training.balance import BalanceWarning
from shunter.training.trainer import BalanceCallback
from tests.helpers import on_ranks
from tests.hf.families import BIASED, FAMILIES, SOFTMAX, VOCAB, build


def _model(family, spread=0.2, dtype=torch.float64, **changes):
    model = build(family, **changes)
    if dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the others have no float64
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=spread)
    return model.to(dtype).train()


def _batch(batch=4, length=6, padded=True):
    ids = torch.randint(3, VOCAB, (batch, length))
    mask = torch.ones_like(ids)
    if padded:
        mask[1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


class Witness:
    """Reads logits and choices by hooks of its own, and computes the losses in float64 from their definitions."""

    def __init__(self, model, family):
        self.model, self.softmax = model, family in SOFTMAX
        self.layers = [(tap.router, tap.experts) for tap in taps(model).values()]
        self.seen = []
        for router, experts in self.layers:
            router.register_forward_hook(lambda m, args, out: self.seen.append([out[0], None]))
            experts.register_forward_pre_hook(lambda m, args: self.seen[-1].__setitem__(1, args[1]))

    def take(self):
        seen, self.seen = self.seen[: len(self.layers)], []
        return seen

    def balance(self, logits, index, real, shares=None):
        """E sum_i f_i P_i over the tokens where real, token by token."""
        probs = logits.double().softmax(-1) if self.softmax else logits.double().sigmoid()
        probs = probs / probs.sum(-1, keepdim=True)
        num_experts = logits.shape[-1]
        total, tokens, counts = torch.zeros(num_experts, dtype=torch.float64), 0, [0] * num_experts
        for t in range(len(real)):
            if real[t]:
                total, tokens = total + probs[t], tokens + 1
                for e in index[t].tolist():
                    counts[e] += 1
        f = torch.tensor(counts, dtype=torch.float64) if shares is None else shares
        return num_experts * (f / f.sum() * total / tokens).sum()

    @staticmethod
    def z(logits, real):
        return logits.double()[real].logsumexp(-1).square().mean()


# Read by the taps otherwise than by (logits, weights, indices) and experts(hidden, indices, weights).
PLAIN = [family for family in FAMILIES if family not in ("gemma4_text", "jetmoe", "llama4_text")]


@pytest.mark.parametrize("family", PLAIN)
def test_losses_equal_a_float64_computation_in_every_family(family):
    model, batch = _model(family, dtype=torch.float32), _batch()
    witness = Witness(model, family)
    balance = BalanceCallback(load_balancing_loss=0.3, z_loss=0.2).attach(model)
    model(**batch)
    real = batch["attention_mask"].flatten().bool()
    expected = sum(0.3 * witness.balance(h, i, real) + 0.2 * witness.z(h, real) for h, i in witness.take())
    loss = balance.loss()
    assert math.isclose(float(loss), float(expected), rel_tol=1e-5)
    loss.backward()
    for router, _ in witness.layers:
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in router.parameters())


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in PLAIN])
def test_losses_of_families_that_are_read_otherwise(family):
    """From the logits and choices that taps read, which tests of their own compare with transformers'."""
    model, batch, seen = _model(family, dtype=torch.float32), _batch(), {}
    balance = BalanceCallback(load_balancing_loss=0.3, z_loss=0.2).attach(model)
    with listening(model, seen.__setitem__):
        model(**batch)
    real, rule = batch["attention_mask"].flatten().bool(), SimpleNamespace(softmax=family in SOFTMAX)
    expected = sum(
        0.3 * Witness.balance(rule, one.logits, one.index, real) + 0.2 * Witness.z(one.logits, real)
        for one in seen.values()
    )
    loss = balance.loss()
    assert math.isclose(float(loss), float(expected), rel_tol=1e-5)
    loss.backward()
    for tap in taps(model).values():
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in tap.router.parameters())


def test_two_collapsed_layers_do_not_add_up_to_a_balanced_one():
    model = _model("mixtral", num_hidden_layers=2, num_experts=4, num_local_experts=4)
    for layer, pair in zip(model.model.layers, ([0, 1], [2, 3]), strict=True):
        row = torch.full((4,), -20.0, dtype=torch.float64)
        row[pair] = 20.0
        gate = layer.mlp.gate
        gate.forward = lambda h, row=row, pair=pair: (
            row.expand(len(h), 4) + 0 * h.sum(),
            torch.full((len(h), 2), 0.5, dtype=torch.float64),
            torch.tensor(pair).expand(len(h), 2),
        )
    balance = BalanceCallback(load_balancing_loss=1.0).attach(model)
    logits = []
    for tap in taps(model).values():
        tap.router.register_forward_hook(lambda m, args, out: logits.append(out[0]))
    model(**_batch(padded=False))
    pooled = load_balancing_loss_func(tuple(logits), 4, 2)
    assert torch.isclose(pooled, torch.tensor(2.0, dtype=pooled.dtype)), "transformers: perfect balance"
    assert math.isclose(float(balance.loss()), 2 + 2), "each layer at the worst for 2 of 4 experts, where balance is 1"
    balance.step()
    metrics = balance.metrics()
    assert math.isclose(metrics["balance/load_balancing_loss_p50"], 2, rel_tol=1e-6)
    assert (metrics["balance/max_violation_max"], metrics["balance/dead_experts"]) == (1, 4)
    assert math.isclose(metrics["balance/entropy_min"], 0.5, rel_tol=1e-6)


class _Rows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows["labels"])

    def __getitem__(self, i):
        return {key: value[i] for key, value in self.rows.items()}


def _arguments(folder, micro, accumulation, **options):
    return TrainingArguments(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=micro, use_cpu=True, report_to="none",
        gradient_accumulation_steps=accumulation, learning_rate=0.1, lr_scheduler_type="constant", optim="sgd",
        max_grad_norm=0, save_strategy="no", train_sampling_strategy="sequential", disable_tqdm=True, logging_steps=1,
        weight_decay=0.0, **options,
    )  # fmt: skip


def _stepped(oracle, family, batch, micro, scope, ranks=1):
    """The parameters after one SGD step, and the loads by layer, of a loop that shares no code with the callback.

    `ranks` micro-batches in a row are those of one forward on as many ranks.
    """
    witness = Witness(oracle, family)
    parts = [{key: value[i : i + micro] for key, value in batch.items()} for i in range(0, 8, micro)]
    labels = sum(int((part["labels"][:, 1:] != -100).sum()) for part in parts)
    so_far = [torch.zeros(8, dtype=torch.float64) for _ in witness.layers]
    for first in range(0, len(parts), ranks):
        forwards = []
        for part in parts[first : first + ranks]:
            out = oracle(input_ids=part["input_ids"], attention_mask=part["attention_mask"])
            real, shifted = part["attention_mask"].flatten().bool(), part["labels"][:, 1:]
            nats = nn.functional.cross_entropy(
                out.logits[:, :-1].flatten(0, 1), shifted.flatten(), ignore_index=-100, reduction="sum"
            )
            forwards.append((nats, real, witness.take()))
        for place in range(len(so_far)):
            for _, real, layers in forwards:
                so_far[place] += torch.bincount(layers[place][1][real].flatten(), minlength=8)
        for nats, real, layers in forwards:
            balance = 0
            for place, (logits, index) in enumerate(layers):
                balance = balance + 0.1 * witness.z(logits, real)
                if scope == "sequence":
                    rows = [slice(6 * i, 6 * i + 6) for i in range(micro)]
                    each = [witness.balance(logits[r], index[r], real[r]) for r in rows]
                    balance = balance + 0.5 * torch.stack(each).mean()
                else:
                    shares = so_far[place] if scope == "global_batch" else None
                    balance = balance + 0.5 * witness.balance(logits, index, real, shares)
            (nats / labels + balance / len(parts)).backward()
    return {name: p - 0.1 * p.grad for name, p in oracle.named_parameters() if p.grad is not None}, so_far


@pytest.mark.parametrize(
    "accumulation, checkpointing",
    [
        (1, False),
        (2, True),
        (4, False),
        *(pytest.param(*other, marks=pytest.mark.slow) for other in ((1, True), (2, False), (4, True))),
    ],
)
@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "global_batch"])
def test_trainer_steps_as_an_independent_loop(scope, accumulation, checkpointing, tmp_path):
    """One SGD step of a plain Trainer moves a Mixtral by the gradient of a loop that shares no code with it."""
    model, batch, micro = _model("mixtral", num_hidden_layers=2), _batch(8), 8 // accumulation
    batch["labels"][3:, :3] = -100
    expected, _ = _stepped(copy.deepcopy(model), "mixtral", batch, micro, scope)
    callback = BalanceCallback(load_balancing_loss=0.5, z_loss=0.1, scope=scope)
    arguments = _arguments(tmp_path, micro, accumulation, gradient_checkpointing=checkpointing)
    Trainer(model=model, args=arguments, train_dataset=_Rows(batch), callbacks=[callback]).train()
    for name, parameter in model.named_parameters():
        if name in expected:
            assert torch.allclose(parameter, expected[name], rtol=0, atol=1e-7), (
                (parameter - expected[name]).abs().max(),
                name,
            )
    assert not any(m._forward_hooks for tap in taps(model).values() for m in (tap.router, tap.experts))


class _Reporter(TrainerCallback):
    """Stands where TensorBoard and W&B do: before the callbacks of the user."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


@pytest.mark.parametrize("kind", ["glm4_moe", "shunter"])
def test_metrics_reach_what_the_trainer_reports_to(kind, build_dense, tmp_path):
    model = (
        _model(kind, dtype=torch.float32)
        if kind != "shunter"
        else shunter.sparsify(build_dense("llama"), 4, "topk", top_k=2)
    )
    batch = {key: value.clamp_max(49) for key, value in _batch(8).items()}
    reporter = _Reporter()
    trainer = Trainer(
        model=model,
        args=_arguments(tmp_path, 8, 1),
        train_dataset=_Rows(batch),
        callbacks=[reporter, BalanceCallback()],
    )
    trainer.train()
    keys = {key for key in reporter.logs[0] if key.startswith("balance/")}
    assert keys == {
        "balance/load_balancing_loss_p50", "balance/load_balancing_loss_max", "balance/max_violation_p50",
        "balance/max_violation_max", "balance/entropy_p50", "balance/entropy_min", "balance/dead_experts",
    }  # fmt: skip
    assert keys < set(trainer.state.log_history[0])
    assert len(reporter.logs) == 2, "every callback is called once for each log"


@pytest.fixture
def build_dense(request):
    from tests.hf.conftest import BUILD

    return lambda name: BUILD[name]().eval()


def test_only_training_forwards_over_real_tokens_count():
    model, batch = _model("mixtral"), _batch()
    balance = BalanceCallback().attach(model)
    model.eval()(**batch)
    with torch.no_grad():
        model.train()(**batch)
    assert float(balance.loss()) == 0 and not balance._loads
    model.gradient_checkpointing_enable({"use_reentrant": False})
    (model(**batch).loss + balance.loss()).backward()
    for load in balance._loads.values():
        assert int(load.sum()) == 2 * int(batch["attention_mask"].sum())


def test_reentrant_checkpointing_is_refused():
    model = _model("mixtral")
    model.gradient_checkpointing_enable({"use_reentrant": True})
    BalanceCallback().attach(model)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        model(**_batch())


@pytest.mark.parametrize("family", BIASED)
def test_selection_biases_move_by_the_sign_of_the_load(family, tmp_path):
    model, batch = build(family).to(torch.bfloat16).train(), _batch()
    witness = Witness(model, family)
    balance = BalanceCallback(bias_update_rate=0.001).attach(model)
    assert list(balance.biases) == list(taps(model))
    before = {name: bias.clone() for name, bias in balance.biases.items()}
    loads = [torch.zeros(8) for _ in witness.layers]
    for _ in range(2):  # two micro-batches, one optimizer step
        model(**batch)
        real = batch["attention_mask"].flatten().bool()
        for place, (_, index) in enumerate(witness.take()):
            loads[place] += torch.bincount(index[real].flatten(), minlength=8)
    balance.step()
    for (name, bias), load in zip(balance.biases.items(), loads, strict=True):
        assert bias.dtype == torch.float32 and not bias.requires_grad
        moved = bias.flatten() - before[name].flatten()
        assert torch.allclose(moved, 0.001 * (load.mean() - load).sign(), atol=1e-6)
        assert moved.abs().sum() > 0
    state = model.state_dict()
    assert sum(key.rpartition(".")[2] in ("e_score_correction_bias", "expert_bias") for key in state) >= len(loads)
    balance.step()
    assert all(torch.equal(bias, balance.biases[name]) for name, bias in balance.biases.items())


def test_selection_biases_balance_what_is_skewed():
    model = _model("deepseek_v3", n_group=1, num_hidden_layers=2, dtype=torch.float32)
    kinds = torch.eye(8, 32)  # of tokens, by which their embeddings are told apart, whatever the layers add
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(1e4 * kinds.repeat(VOCAB // 8, 1))
        for tap in taps(model).values():
            tap.router.weight.copy_(2 * (kinds + kinds.roll(1, 0)) - 1)  # a kind scores 1 with two experts, and 0 else
            tap.router.e_score_correction_bias.copy_(torch.tensor([1.0] * 2 + [-1.0] * 6))
    ids = torch.randperm(VOCAB).reshape(8, 8)
    balance = BalanceCallback(load_balancing_loss=0, bias_update_rate=0.02).attach(model)
    violations = []
    for _ in range(50):
        model(input_ids=ids)
        balance.step()
        violations.append(balance.metrics()["balance/max_violation_max"])
    assert violations[0] == 3, "two of eight experts have all tokens"
    assert violations[-1] == 0, "a bias stays where all experts have as many"


def test_shunters_layers_have_one_balancing_loss_and_update():
    layer = shunter.MoE(16, 24, 4, "topk", top_k=2, load_balancing_loss=0.7, z_loss=0.3, selection_bias=True)
    # 30 choices of 4 experts: never in balance, where the bias would stay.
    x, mask = torch.randn(2, 9, 16), torch.randperm(18).reshape(2, 9) < 15
    layer(x, mask=mask)
    own = dict(layer.losses)
    layer.router.observed.zero_()
    balance = BalanceCallback(load_balancing_loss=0.7, z_loss=0.3).attach(layer)
    layer(x, mask=mask)
    assert torch.allclose(balance.loss(), sum(own.values()))
    assert layer.losses == {} and float(shunter.aux_loss(layer)) == 0
    balance.step()
    assert layer.router.selection_bias.abs().sum() > 0
    balance.detach()
    layer(x, mask=mask)
    assert all(torch.equal(layer.losses[name], own[name]) or name for name in own)
    assert set(layer.losses) == set(own)


def _toy(scale):
    """An MoE whose router spreads random tokens, or, with a large scale, sends them all to two experts."""
    layer = shunter.MoE(16, 4, 8, "topk", top_k=2, load_balancing_loss=0.0)
    with torch.no_grad():
        layer.router.weight.normal_()
        layer.router.weight[2:, 0] -= scale
    return layer


def _train(layer, balance, steps, planted=False):
    """Real training on random data; planted data have a constant in front, by which a skewed router goes."""
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.01)
    for _ in range(steps):
        x = torch.randn(64, 16)
        x[:, 0] = 1 if planted else x[:, 0]
        ((layer(x) - x.roll(1, -1)).square().mean() + balance.loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        balance.step()


def test_a_planted_collapse_raises_the_alarm_and_healthy_runs_do_not():
    layer = _toy(scale=0.0)
    balance = BalanceCallback().attach(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20):
            healthy = _toy(scale=0.0)
            _train(healthy, BalanceCallback().attach(healthy), 50)
        _train(layer, balance, 30)
    with torch.no_grad():
        layer.router.weight[2:, 0] -= 50  # in the midst of a run that was well
    with pytest.warns(BalanceWarning, match=r"the layer is collapsing: .* used 2.\d of 8 experts"):
        _train(layer, balance, 50, planted=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _train(layer, balance, 30, planted=True)  # said once


def test_a_dead_expert_is_named_with_its_layer():
    model = nn.ModuleDict({"first": _toy(0.0), "second": _toy(0.0)})
    model.forward = lambda x: model["second"](model["first"](x))
    with torch.no_grad():
        model["second"].router.weight[5] = 0
        model["second"].router.weight[5, 0] = -1e3
    balance = BalanceCallback(load_balancing_loss=0).attach(model)
    model["first"].register_forward_hook(lambda m, a, out: nn.functional.pad(torch.randn(64, 15), (1, 0), value=1.0))
    with pytest.warns(BalanceWarning) as caught:
        _train(model, balance, 50, planted=True)
    assert len(caught) == 1 and "second: expert 5 is dead: 0 of" in str(caught[0].message)


def _train_on_rank(rank, folder, state, batch, scope):
    AcceleratorState._reset_state(reset_partial_state=True)  # of the process that this one is forked from
    model = _model("deepseek_v3", num_hidden_layers=2)
    model.load_state_dict(state)
    callback = BalanceCallback(load_balancing_loss=0.5, z_loss=0.1, scope=scope)
    arguments = _arguments(folder, 2, 2, gradient_checkpointing=True, ddp_backend="gloo")
    Trainer(model=model, args=arguments, train_dataset=_Rows(batch), callbacks=[callback]).train()
    return {name: value.tolist() for name, value in [*model.named_parameters(), *callback.biases.items()]}


@pytest.mark.parametrize("scope", ["sequence", "global_batch"])
def test_a_trainer_on_two_ranks_steps_as_an_independent_loop(scope, tmp_path):
    """With accumulation, activation checkpointing, padding and parts that have different numbers of labels."""
    model, batch = _model("deepseek_v3", num_hidden_layers=2), _batch(8)
    batch["labels"][3:, :3] = -100
    state = copy.deepcopy(model.state_dict())
    expected, loads = _stepped(copy.deepcopy(model), "deepseek_v3", batch, 2, scope, ranks=2)
    for got in on_ranks(_train_on_rank, 2, tmp_path, state, batch, scope):
        for name, parameter in expected.items():
            assert torch.allclose(torch.tensor(got[name]), parameter.float(), atol=1e-6), name
        for name, load in zip(taps(model), loads, strict=True):
            assert torch.allclose(torch.tensor(got[name]), (0.001 * (load.mean() - load).sign()).float(), atol=1e-7)


def _rank(rank, state, batch, scope):
    model = _model("deepseek_v3", num_hidden_layers=2)
    model.load_state_dict(state)
    return _step(model, {key: value[rank::2] for key, value in batch.items()}, scope, 2)


def _step(model, batch, scope, world):
    balance = BalanceCallback(load_balancing_loss=0.5, z_loss=0.1, scope=scope).attach(model)
    model(**batch)
    balance.loss().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    for grad in grads:
        if world > 1:
            dist.all_reduce(grad)
            grad /= world
    balance.step()
    metrics = balance.metrics()
    return [g.tolist() for g in grads], [b.tolist() for b in balance.biases.values()], metrics


@pytest.mark.parametrize("scope", ["sequence", "global_batch"])
def test_two_ranks_equal_one(scope):
    model, batch = _model("deepseek_v3", num_hidden_layers=2), _batch(4, padded=False)
    state = copy.deepcopy(model.state_dict())
    grads, biases, metrics = _step(model, batch, scope, 1)
    for got_grads, got_biases, got_metrics in on_ranks(_rank, 2, state, batch, scope):
        for got, expected in zip(got_grads, grads, strict=True):
            assert torch.allclose(torch.tensor(got), torch.tensor(expected), atol=1e-6)
        assert got_biases == biases
        for key in ("max_violation_max", "entropy_min", "dead_experts"):
            assert math.isclose(got_metrics[f"balance/{key}"], metrics[f"balance/{key}"])


class _FromLogits(Trainer):
    """Makes its loss without the model's, as TRL's trainers do."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        out = model(**inputs)
        loss = out.logits.square().mean()
        return (loss, out) if return_outputs else loss


OWN_LOSSES = {
    "label smoothing": (Trainer, {"label_smoothing_factor": 0.1}, {}),
    "compute_loss_func": (Trainer, {}, {"compute_loss_func": lambda out, labels, **more: out.logits.square().mean()}),
    "compute_loss": (_FromLogits, {}, {}),
}


@pytest.mark.parametrize("kind", OWN_LOSSES)
def test_losses_reach_trainers_that_make_their_loss_without_the_models(kind, tmp_path):
    """What the callback changes in one SGD step is the gradient of the mean over the accumulated micro-batches."""
    cls, options, more = OWN_LOSSES[kind]
    model, batch = _model("mixtral"), _batch(8)
    plain, oracle = copy.deepcopy(model), copy.deepcopy(model)
    trainers = [
        cls(model=one, args=_arguments(tmp_path, 4, 2, **options), train_dataset=_Rows(batch), callbacks=called, **more)
        for one, called in ((model, [BalanceCallback(load_balancing_loss=0.5)]), (plain, []))
    ]
    for trainer in trainers:
        trainer.train()
        assert "compute_loss" not in vars(trainer)
    witness, total = Witness(oracle, "mixtral"), 0
    for part in (slice(0, 4), slice(4, 8)):
        oracle(input_ids=batch["input_ids"][part], attention_mask=batch["attention_mask"][part])
        real = batch["attention_mask"][part].flatten().bool()
        total = total + sum(0.5 * witness.balance(logits, index, real) for logits, index in witness.take()) / 2
    total.backward()
    moved = 0.0
    for (name, got), other, expected in zip(
        model.named_parameters(), plain.parameters(), oracle.parameters(), strict=True
    ):
        change = torch.zeros_like(expected) if expected.grad is None else -0.1 * expected.grad
        assert torch.allclose(got - other, change, atol=1e-7), name
        moved += float(change.abs().sum())
    assert moved > 0.01


@pytest.mark.parametrize(
    "options, message",
    [
        ({"load_balancing_loss": -1}, "load_balancing_loss -1 must be"),
        ({"z_loss": math.nan}, "z_loss nan"),
        ({"scope": "batch"}, "choose from micro_batch, sequence, global_batch"),
        ({"patience": 0}, "at least 1"),
    ],
)
def test_bad_values_say_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        BalanceCallback(**options)


def test_attaching_twice_and_pooled_losses_beside_are_told():
    model = _model("mixtral")
    balance = BalanceCallback().attach(model)
    with pytest.raises(RuntimeError, match="attached already"):
        balance.attach(model)
    balance.detach()
    model.config.output_router_logits = True
    with pytest.warns(UserWarning, match="output_router_logits is True"):
        balance.attach(model)
