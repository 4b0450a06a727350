"""What is not finite is never trained on: the step is skipped on all ranks, the state untouched, and then it stops."""

import copy
import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import shunter
from shunter import BalanceCallback
from shunter.errors import Diverged, UserError
from shunter.training.guards import GuardedLoop, NaNGuard, not_finite
from tests.helpers import on_ranks
from tests.hf.families import build

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

    def state(self, model, optimizer, lr_scheduler):
        moments = [t for p in model.parameters() for t in optimizer.state.get(p, {}).values()]
        rates = torch.tensor([lr_scheduler.last_epoch, *lr_scheduler.get_last_lr()], dtype=torch.float64)
        return copy.deepcopy([*model.state_dict().values(), *model.buffers(), *moments, rates])

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        layer = model.model.layers[1].mlp
        module = (
            None if self.site == "loss" else {"input": model.model.embed_tokens, "expert": layer.experts}.get(self.site)
        )
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

    def on_step_begin(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        self.on = self.rank_counts and state.global_step + 1 in self.steps
        self.before = self.state(model, optimizer, lr_scheduler)
        self.poison(optimizer)

    def poison(self, optimizer):
        if self.site == "moment" and self.on:
            next(iter(optimizer.state.values()))["exp_avg"].fill_(self.value)

    def on_step_end(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        after = self.state(model, optimizer, lr_scheduler)
        same = len(after) == len(self.before)
        self.same[state.global_step] = same and all(map(torch.equal, self.before, after))


def train(folder, model, plant, callbacks, steps=6, resume=None, **more):
    ids = torch.randint(40, (64, 12), generator=torch.Generator().manual_seed(0))
    more = {"save_strategy": "no", "learning_rate": 0.01} | more
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=4, use_cpu=True, report_to="none",
        disable_tqdm=True, **more,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=[*callbacks, plant])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize(
    "value, dtype",
    [
        (float("nan"), torch.float32),
        (float("inf"), torch.bfloat16),
        *(
            pytest.param(*other, marks=pytest.mark.slow)
            for other in ((float("inf"), torch.float32), (float("nan"), torch.bfloat16))
        ),
    ],
)
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


class Watch(TrainerCallback):
    """The sums of a model's parameters and the schedule's place after each step."""

    def __init__(self):
        self.seen = {}

    def on_step_end(self, args, state, control, model=None, lr_scheduler=None, **kwargs):
        self.seen[state.global_step] = [p.double().sum().item() for p in model.parameters()], lr_scheduler.last_epoch


def test_a_spike_takes_a_trainer_back_to_a_checkpoint_and_no_further_than_asked(tmp_path):
    """Step 37 leaps after 36 calm ones: everything is as after step 30 then, which the margin of 5 steps allows."""
    guard, watch = NaNGuard(rewinds=1, margin=5), Watch()
    with pytest.warns(UserWarning, match=r"step 37: rewound to .*checkpoint-30"):
        train(tmp_path, make_model(), Plant("loss", 100.0, [37]), [guard, watch], 40,
              save_strategy="steps", save_steps=6, learning_rate=1e-4)  # fmt: skip
    assert guard.rewound == [(37, 30)]
    assert watch.seen[37] == watch.seen[30] and watch.seen[38][1] == 31
    assert watch.seen[36] != watch.seen[30]
    left = {int(path.name.split("-")[1]) for path in tmp_path.glob("checkpoint-*")}
    assert left == {6, 12, 18, 24, 30, 40}, "checkpoint-36 is of the time that is not trusted"


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_a_family_that_renames_what_it_saves_is_taken_back_as_a_whole(family, tmp_path):
    guard, watch = NaNGuard(1, 10, rewinds=1, margin=0), Watch()
    with pytest.warns(UserWarning, match="rewound"):
        train(tmp_path, build(family).train(), Plant("loss", float("nan"), [5]), [guard, watch], 5,
              save_strategy="steps", save_steps=3)  # fmt: skip
    assert watch.seen[5] == watch.seen[3] and watch.seen[4] != watch.seen[3]


def test_strikes_take_a_trainer_back_and_then_stop_it(tmp_path):
    guard, watch = NaNGuard(2, 10, rewinds=1, margin=0), Watch()
    plant = Plant("loss", float("nan"), [5, 6, 9, 10])
    with pytest.warns(UserWarning, match="rewound"), pytest.raises(Diverged, match="after 1 rewinds"):
        train(tmp_path, make_model(), plant, [guard, watch], 12, save_strategy="steps", save_steps=3)
    assert guard.rewound == [(6, 3)] and watch.seen[6] == watch.seen[3]


def test_a_guard_goes_on_with_what_the_checkpoint_knows(tmp_path):
    keep = {"save_strategy": "steps", "save_steps": 4}
    train(tmp_path, make_model(), Plant("loss", float("nan"), [3]), [NaNGuard(2, 10)], 4, **keep)
    guard, folder = NaNGuard(2, 10), str(tmp_path / "checkpoint-4")
    with pytest.raises(Diverged, match=r"step 6: .*2 of the last 10 steps"):
        train(tmp_path, make_model(), Plant("loss", float("nan"), [6]), [guard], 8, resume=folder, **keep)
    again = NaNGuard.from_state(guard.state())
    assert (again.strikes, again.within, again.skipped) == (2, 10, [3, 6])


def test_a_rewinding_guard_asks_for_whole_checkpoints(tmp_path):
    with pytest.raises(UserError, match="save_strategy"):
        train(tmp_path, make_model(), Plant("loss", 1.0, []), [NaNGuard(rewinds=1)])


def loop(site, value, steps, total, guard_options, resumed=None, dtype=torch.float32, ranks=(0,)):
    """A plain loop with a guard: the state after each step, what was admitted, and the guard."""
    torch.manual_seed(7)
    model, plant = make_model(dtype), Plant(site, value, steps, ranks)
    plant.on_train_begin(None, None, None, model=model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 100)
    ids = torch.randint(40, (total, 4, 12), generator=torch.Generator().manual_seed(0))
    states, admitted = {0: plant.state(model, optimizer, scheduler)}, []
    with GuardedLoop(model, optimizer, scheduler, **guard_options) as guard:
        if resumed is not None:
            guard.load_state_dict(resumed)
        for batch in ids:
            plant.on = plant.rank_counts and guard.step + 1 in steps
            plant.poison(optimizer)
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            admitted.append(guard.admits(loss))
            if admitted[-1]:
                optimizer.step()
                scheduler.step()
                shunter.update_routers(model)
            optimizer.zero_grad()
            states[guard.step] = plant.state(model, optimizer, scheduler)
    return states, admitted, guard


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize("site", SITES)
def test_a_plain_loop_skips_what_is_not_finite(site):
    states, admitted, guard = loop(site, float("inf"), [STEP], 5, {"rewinds": 0})
    assert admitted == [True, True, False, True, True] and guard.skipped == [STEP]
    assert same(states[STEP], states[STEP - 1]) and not same(states[STEP], states[STEP + 1])


def test_a_plain_loop_goes_back_after_a_spike_and_after_strikes():
    with pytest.warns(UserWarning, match="step 37: rewound to the state after step 30"):
        states, admitted, guard = loop("loss", 100.0, [37], 38, {"every": 6, "margin": 5})
    assert guard.rewound == [(37, 30)] and admitted == [True] * 36 + [False, True]
    assert same(states[37], states[30]) and not same(states[36], states[30])

    with pytest.warns(UserWarning, match="rewound"):
        states, admitted, guard = loop("gradient", float("nan"), [6, 7], 8, {"strikes": 2, "every": 4, "margin": 0})
    assert guard.rewound == [(7, 4)] and same(states[7], states[4])

    # Steps that are skipped make no copies, so that one of before them is left.
    with pytest.warns(UserWarning, match="rewound"):
        states, _, guard = loop("loss", float("nan"), [4, 5, 6], 6, {"every": 1, "margin": 0})
    assert guard.rewound == [(6, 3)] and same(states[6], states[3])

    with pytest.raises(Diverged, match=r"step 7: the gradient is not finite, and 2 of the last 100"):
        loop("gradient", float("nan"), [6, 7], 8, {"strikes": 2, "rewinds": 0})


def test_no_state_is_gone_back_to_that_is_not_finite():
    """A moment that was spoiled shows in the loss of the step after next at last: copies since are spoiled, too."""
    with pytest.warns(UserWarning, match="step 5: rewound to the state after step 2"):
        states, _, guard = loop("moment", float("nan"), [4], 6, {"strikes": 1, "within": 1, "every": 1, "margin": 0})
    assert guard.rewound == [(5, 2)] and all(bool(part.isfinite().all()) for part in states[6])


def test_a_loops_guard_goes_on_with_its_state():
    _, _, guard = loop("loss", float("nan"), [3], 4, {"strikes": 2, "rewinds": 0})
    state = json.loads(json.dumps(guard.state_dict()))
    with pytest.raises(Diverged, match="step 6"):
        loop("loss", float("nan"), [6], 4, {"strikes": 2, "rewinds": 0}, resumed=state)


def _on_rank(rank, folder):
    torch.manual_seed(0)
    model, guard, plant = make_model(), NaNGuard(), Plant("loss", float("nan"), [STEP], ranks=(1,))
    train(folder, model, plant, [guard])
    return guard.skipped, plant.same, [p.double().sum().item() for p in model.parameters()]


def test_all_ranks_skip_what_one_of_them_finds(tmp_path):
    one, other = on_ranks(_on_rank, 2, str(tmp_path))
    assert one == other
    assert one[0] == [STEP] and one[1] == {step: step == STEP for step in range(1, 7)}
