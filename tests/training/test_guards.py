"""What is not finite is never trained on: the step is skipped on all ranks, the state untouched, and then it stops."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import shunter
from shunter import BalanceCallback
from shunter.errors import Diverged
from shunter.training.guards import NaNGuard, not_finite
from tests.helpers import on_ranks

STEP = 3
SITES = ["input", "router", "expert", "gradient", "loss"]


def make_model(dtype=torch.float32):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, num_hidden_layers=2, **sizes))
    return shunter.sparsify(model, 4, "topk", top_k=2, selection_bias=True, load_balancing_loss=0.01).to(dtype)


class Plant(TrainerCallback):
    """Puts a value at a site in some steps, and compares the state before a step with that after it."""

    def __init__(self, site, value, steps, ranks=(0,)):
        self.site, self.value, self.steps = site, value, steps
        self.on = False
        self.rank_counts = not torch.distributed.is_initialized() or torch.distributed.get_rank() in ranks
        self.same = {}

    def state(self, model, optimizer):
        moments = [t for p in model.parameters() for t in optimizer.state.get(p, {}).values()]
        return copy.deepcopy([*model.state_dict().values(), *model.buffers(), *moments])

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        layer = model.model.layers[1].mlp
        module = {"input": model.model.embed_tokens, "expert": layer.experts}.get(self.site)
        if module is not None:
            module.register_forward_hook(self.spoil)
        if self.site == "router":
            score = layer.router.score
            layer.router.score = lambda *given: score(*given) * (self.value if self.on else 1.0)
        if self.site == "gradient":
            layer.router.weight.register_hook(lambda grad: grad * self.value if self.on else None)
        if self.site == "loss":
            model.register_forward_hook(self.spoil_loss)

    def spoil(self, module, args, output):
        return output * self.value if self.on else None

    def spoil_loss(self, module, args, output):
        if self.on:
            output.loss = output.loss + self.value  # its gradients are finite

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.on = self.rank_counts and state.global_step + 1 in self.steps
        self.before = self.state(model, optimizer)
        if self.site == "moment" and self.on:
            next(iter(optimizer.state.values()))["exp_avg"].fill_(self.value)

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        after = self.state(model, optimizer)
        same = len(after) == len(self.before)
        self.same[state.global_step] = same and all(map(torch.equal, self.before, after))


def train(folder, model, plant, callbacks, steps=6):
    ids = torch.randint(40, (64, 12), generator=torch.Generator().manual_seed(0))
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, use_cpu=True, report_to="none",
        disable_tqdm=True, save_strategy="no", learning_rate=0.01,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[*callbacks, plant])
    trainer.train()
    return trainer


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_planted_value_costs_one_step_and_nothing_else(site, value, dtype, tmp_path):
    model, guard, plant = make_model(dtype), NaNGuard(), Plant(site, value, [STEP])
    balance = BalanceCallback(load_balancing_loss=0.01)
    train(tmp_path, model, plant, [guard, balance])
    assert [len(loads) for loads in balance._alarm.recent.values()] == [5, 5]
    assert guard.skipped == [STEP]
    assert plant.same == {step: step == STEP for step in range(1, 7)}
    assert not not_finite(model)


@pytest.mark.parametrize("site", [*SITES, "moment"])
def test_what_comes_again_stops_with_step_layer_and_cure(site, tmp_path):
    model, guard = make_model(), NaNGuard(strikes=2, within=10)
    with pytest.raises(Diverged) as error:
        train(tmp_path, model, Plant(site, float("nan"), range(2, 9)), [guard])
    said = str(error.value)
    first = {
        "input": "the output of model.embed_tokens (Embedding)",
        "router": "model.layers.1.mlp.router",
        "expert": "the output of model.layers.1.mlp.experts",
        "gradient": "the gradient of model.layers.1.mlp.router.weight",
        "loss": "model",
        "moment": "model.embed_tokens.weight",
    }[site]
    assert said.startswith("step 4" if site == "moment" else "step 3") and first in said, said
    assert "try a lower learning rate" in said and "\n" not in said


def test_strikes_are_counted_within_a_window(tmp_path):
    guard = NaNGuard(strikes=2, within=2)
    train(tmp_path, make_model(), Plant("loss", float("nan"), [1, 3, 5]), [guard])
    assert guard.skipped == [5]
    for strikes, within in ((0, 5), (6, 5)):
        with pytest.raises(ValueError, match="NaNGuard: strikes"):
            NaNGuard(strikes=strikes, within=within)


def test_gradients_that_are_finite_with_a_norm_that_is_not_are_skipped(tmp_path):
    """Clipping by an infinite norm makes all of them zero: a step of decay alone."""
    guard, model, plant = NaNGuard(), make_model(), Plant("gradient", 1e25, [STEP])
    train(tmp_path, model, plant, [guard])
    assert guard.skipped == [STEP] and plant.same[STEP]


def _on_rank(rank, folder):
    torch.manual_seed(0)
    model, guard, plant = make_model(), NaNGuard(), Plant("loss", float("nan"), [STEP], ranks=(1,))
    train(folder, model, plant, [guard])
    return guard.skipped, plant.same, [p.double().sum().item() for p in model.parameters()]


def test_all_ranks_skip_what_one_of_them_finds(tmp_path):
    one, other = on_ranks(_on_rank, 2, str(tmp_path))
    assert one == other
    assert one[0] == [STEP] and one[1] == {step: step == STEP for step in range(1, 7)}
