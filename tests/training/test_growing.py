"""Growth in mid-run: the function and the optimizer's moments are kept, and what is new is trained."""

import copy

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import shunter
from shunter import MoE, aux_loss
from shunter.errors import UserError
from shunter.hf.checkpoints.layouts import Sizes
from shunter.training import growing
from shunter.training.growing import GrowOnPlateau, UpcycleAt, losses_by_expert, split_expert, upcycle_in_training
from shunter.training.pruning import prune
from shunter.training.roles import accumulate, parameter_groups
from tests.helpers import random_routing

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=24, num_key_value_heads=2))


def gpt2():
    dropout = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, **dropout))


def opt():
    return OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=24, dropout=0, word_embed_proj_dim=16))


def step(model, optimizer, batch):
    model(input_ids=batch, labels=batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


ROUTERS = {
    "topk": {"top_k": 2},
    "switch": {"capacity_factor": 0.5, "jitter": 0.0},
    "soft": {},
    "deepseek": {"top_k": 2},
    "expert_choice": {},
    "hme": {"branching": 2},
}


@pytest.mark.parametrize("router", ROUTERS)
def test_a_split_keeps_the_function_and_then_the_halves_part(router):
    moe = MoE(8, 12, 4, router, load_balancing_loss=0.01, **ROUTERS[router]).double().train()
    x = torch.randn(40, 8, dtype=torch.float64)
    before, loss = moe(x), shunter.aux_loss(moe)
    optimizer = torch.optim.Adam(moe.parameters(), 1e-2)
    (before.square().mean() + loss).backward()
    optimizer.step()
    optimizer.zero_grad()
    before, loss = moe(x).detach(), sum(moe.losses.values(), x.new_zeros(()))
    old_moment = optimizer.state[moe.experts.down_proj]["exp_avg"].clone()
    split_expert(moe, 2, optimizer)
    split_expert(moe, 4, optimizer)  # the copy itself
    torch.testing.assert_close(moe(x).detach(), before, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sum(moe.losses.values(), x.new_zeros(())), loss)
    assert moe.num_experts == moe.routing.num_experts == 6
    torch.testing.assert_close(
        optimizer.state[moe.experts.down_proj]["exp_avg"], old_moment[[0, 1, 2, 3, 2, 2]], rtol=0, atol=0
    )
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in moe.parameters()}
    parts = moe.experts.down_proj.detach().clone()
    torch.testing.assert_close(parts[4], parts[2], rtol=0, atol=0)
    gate = moe.router.weight.detach().clone()
    for _ in range(2):
        (moe(x) - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for one, other in ((2, 4), (2, 5), (4, 5)):
        assert not torch.equal(moe.experts.down_proj[one], moe.experts.down_proj[other])
    assert (moe.router.weight != gate).any(1).all()


def test_weights_of_halves_add_up_and_follow_the_sigmoid():
    moe = MoE(8, 12, 4, "topk", top_k=2).double()
    x = torch.randn(30, 8, dtype=torch.float64)
    moe(x)
    before = moe.routing.dense()
    split_expert(moe, 1)
    split_expert(moe, 1)
    moe(x)
    first, second = torch.sigmoid(x @ moe.router.weight.T.double()).T
    expected = torch.stack([
        before[:, 0], before[:, 1] * (1 - first) * (1 - second), before[:, 2], before[:, 3],
        before[:, 1] * first, before[:, 1] * (1 - first) * second,
    ], 1)  # fmt: skip
    torch.testing.assert_close(moe.routing.dense(), expected.detach())


def test_what_cannot_be_split():
    with pytest.raises(UserError, match="there is no expert 4: they are 0 to 3"):
        split_expert(MoE(8, 12, 4), 4)
    with pytest.raises(UserError, match="SoftMoE cannot be split"):
        split_expert(MoE(8, 12, 4, "soft_moe"), 0)
    with pytest.raises(UserError, match="max_experts 1"):
        GrowOnPlateau(1)
    model = shunter.sparsify(llama(), 2)
    split_expert(model.model.layers[1].mlp, 0)
    with pytest.raises(UserError, match="no other format has layers with split experts"):
        Sizes.of(model.model.layers[1].mlp)


def test_losses_by_expert_are_weighted_means():
    routing, losses = random_routing(50, 5), torch.rand(50, dtype=torch.float64)
    losses[:5] = torch.nan
    matrix = routing.dense()[5:]
    expected = (matrix * losses[5:, None]).sum(0) / matrix.sum(0)
    torch.testing.assert_close(losses_by_expert(routing, losses).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [llama, gpt2, opt])
def test_upcycling_keeps_function_and_moments(make):
    model = make().train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    batches = torch.randint(32, (4, 2, 10))
    for batch in batches[:2]:
        step(model, optimizer, batch)
    before = model(input_ids=batches[2]).logits
    block = shunter.hf.blocks.find_feed_forwards(model)[0][0]
    down, up = (block.maps[name].linear.weight for name in ("down", "up"))
    moments = {name: (optimizer.state[p]["exp_avg"].clone(), optimizer.state[p]["step"]) for name, p in
               (("down", down), ("up", up))}  # fmt: skip
    transposed, path = block.maps["down"].is_transposed, block.path
    upcycle_in_training(model, optimizer, 4, "topk", top_k=2)
    torch.testing.assert_close(model(input_ids=batches[2]).logits, before, rtol=1e-4, atol=1e-5)
    weights = model.get_submodule(path).experts.weights
    for name, stack in (("down", weights.down), ("up", weights.up)):
        moment = moments[name][0].T if transposed else moments[name][0]
        rows = stack.shape[1] - moment.shape[0] if name == "up" else 0  # behind those of the gate
        state = optimizer.state[stack]
        torch.testing.assert_close(state["exp_avg"][:, rows:], moment.expand(4, *moment.shape), rtol=0, atol=0)
        assert state["step"] == moments[name][1] == 2
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in model.parameters()}
    assert set(optimizer.state) <= set(model.parameters())
    for batch in batches[2:]:
        step(model, optimizer, batch)
    assert optimizer.state[model.get_submodule(path).router.weight]["step"] == 2
    assert not torch.equal(weights.down[0], weights.down[1])


def test_what_was_added_up_for_a_batch_of_a_role_begins_anew():
    ids = torch.randint(32, (2, 8))
    dense, sparse = llama().train(), shunter.sparsify(llama(), 4, "topk", top_k=2).train()
    for model, role, change in (
        (dense, "feed_forward", lambda o: upcycle_in_training(dense, o, 4, "topk", top_k=2)),
        (sparse, "expert", lambda o: split_expert(sparse.model.layers[0].mlp, 1, o)),
    ):
        optimizer = accumulate(torch.optim.AdamW(parameter_groups(model, 1e-2, batches={role: 2})))
        for number in range(3):
            step(model, optimizer, ids)
            if number == 0:
                change(optimizer)
        experts = model.model.layers[0].mlp.experts.down_proj
        assert optimizer.state[experts]["step"] == 1


def test_an_optimizer_whose_state_has_other_shapes_is_refused_before_anything_changes():
    ids = torch.randint(32, (2, 8))
    dense, sparse = llama().train(), shunter.sparsify(llama(), 4, "topk", top_k=2).train()
    for model, change in (
        (dense, lambda o: upcycle_in_training(dense, o, 4, "topk", top_k=2)),
        (sparse, lambda o: split_expert(sparse.model.layers[0].mlp, 1, o)),
    ):
        optimizer = torch.optim.Adafactor(model.parameters())
        step(model, optimizer, ids)
        with pytest.raises(UserError, match="row_var of the optimizer"):
            change(optimizer)
        step(model, optimizer, ids)
    with pytest.raises(UserError, match="leave init out"):
        upcycle_in_training(llama(), None, 4, init="scratch")


class Note(TrainerCallback):
    def __init__(self):
        self.seen = {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen[state.global_step] = {name: layer.num_experts for name, layer in shunter.moe_layers(model).items()}


def train(folder, model, callbacks, steps, resume=None, **more):
    ids = torch.randint(32, (steps * 2, 10), generator=torch.Generator().manual_seed(0))
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, use_cpu=True, report_to="none",
        disable_tqdm=True, learning_rate=1e-3, **({"save_strategy": "no"} | more),
    )  # fmt: skip
    note = Note()
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        callbacks=[*callbacks, note],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, note.seen


@pytest.mark.parametrize("make", [llama, gpt2, opt])
def test_dense_then_sparse_in_one_trainer(make, tmp_path):
    model = make()
    trainer, seen = train(tmp_path, model, [UpcycleAt(3, 4, router="dense_to_sparse", noise=0.01)], 6)
    layers = shunter.moe_layers(model)
    assert [len(seen[step]) for step in (2, 4)] == [0, 2] and len(layers) == 2
    for layer in layers.values():
        state = trainer.optimizer.state[layer.experts.down_proj]
        assert state["step"] == 6 and trainer.optimizer.state[layer.router.weight]["step"] == 3
        assert layer.updates == 3
    model.save_pretrained(tmp_path / "sparse")
    again = shunter.from_pretrained(tmp_path / "sparse")
    ids = torch.randint(32, (1, 8))
    torch.testing.assert_close(again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_noise_is_in_standard_deviations_of_the_block():
    model = llama()
    dense = model.model.layers[0].mlp.down_proj.weight.detach().clone()
    upcycle_in_training(model, None, 8, "topk", top_k=1, noise=0.5)
    apart = model.model.layers[0].mlp.experts.down_proj.detach() - dense
    assert 0.45 < apart.std() / dense.std() < 0.55
    with pytest.raises(UserError, match="noise -1"):
        upcycle_in_training(llama(), None, 8, noise=-1)


@pytest.mark.parametrize("make", [llama, gpt2, opt])
def test_a_plateau_grows_every_layer_to_its_limit(make, tmp_path):
    model = shunter.sparsify(make(), 2, "topk", top_k=1)
    grower = GrowOnPlateau(max_experts=4, window=2, least=0.9)  # no loss falls so fast
    trainer, seen = train(tmp_path, model, [grower], 14)
    assert [sorted(seen[i].values()) for i in (3, 4, 8, 12)] == [[2, 2], [3, 3], [4, 4], [4, 4]]
    assert [step for step, _ in grower.grown] == [4, 8]
    assert all(set(found) == set(seen[4]) for _, found in grower.grown)
    state = trainer.optimizer.state
    assert all(state[layer.experts.down_proj]["step"] == 14 for layer in shunter.moe_layers(model).values())
    with pytest.raises(UserError, match="no layers of Shunter"):
        train(tmp_path, make(), [GrowOnPlateau(4)], 1)


def test_a_falling_loss_does_not_grow(tmp_path):
    model = shunter.sparsify(llama(), 2, "topk", top_k=1)
    grower = GrowOnPlateau(max_experts=4, window=1, least=0.0)
    fall = iter(range(100, 0, -1))
    model.register_forward_hook(lambda m, a, out: setattr(out, "loss", out.loss * 0 + next(fall)))
    train(tmp_path, model, [grower], 5)
    assert not grower.grown


def test_a_copy_of_a_grown_layer_is_independent():
    moe = MoE(8, 12, 4, "topk", top_k=1)
    split_expert(moe, 0)
    twin = copy.deepcopy(moe)
    twin.load_state_dict(moe.state_dict())
    x = torch.randn(5, 8)
    torch.testing.assert_close(twin(x), moe(x))


@pytest.mark.parametrize("make", [llama, gpt2, opt])
def test_a_split_model_is_saved_and_loaded(make, tmp_path):
    options = {"capacity_factor": 1.0, "load_balancing_loss": 0.01}
    model = shunter.sparsify(make(), 3, "topk", top_k=1, residual=make is llama, **options).eval()
    first, last = shunter.moe_layers(model).values()
    for expert in (1, 3, 0):
        split_expert(last, expert)
    for parameter in (last.router.weight, last.experts.down_proj):
        torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(tmp_path)
    again = shunter.from_pretrained(tmp_path).eval()
    assert [layer.num_experts for layer in shunter.moe_layers(again).values()] == [3, 6]
    ids = torch.randint(32, (2, 12))
    for train in (False, True):
        for one in (model, again):
            one.train(train)
        torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=0)
    torch.testing.assert_close(aux_loss(again), aux_loss(model), rtol=0, atol=0)
    with pytest.raises(UserError, match="split experts, which nothing but training can change"):
        prune(tmp_path, tmp_path / "pruned", 2, "random", check=False)
    half = shunter.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert shunter.moe_layers(half)[list(shunter.moe_layers(model))[1]].router.weight.dtype == torch.float32
    shunter.dropless(again.eval())
    again(input_ids=ids)
    assert all(int(layer.routing.counts.sum()) >= 24 for layer in shunter.moe_layers(again).values())
    assert "dropless" in shunter.moe_layers(again)[list(shunter.moe_layers(model))[1]].explain()


CHANGES = {
    "upcycled": (lambda: llama(), lambda: UpcycleAt(2, 3, router="switch", jitter=0.0)),
    "split": (
        lambda: shunter.sparsify(llama(), 2, "topk", top_k=1),
        lambda: GrowOnPlateau(max_experts=3, window=1, least=0.9),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_trainer_goes_on_from_a_checkpoint_of_after_the_change(change, tmp_path):
    make, callback = CHANGES[change]
    kept = {"save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "constant"}
    torch.manual_seed(0)
    whole, _ = train(tmp_path, make(), [callback()], 6, **kept)
    folder = tmp_path / "checkpoint-4"
    again = shunter.from_pretrained(folder)
    assert {layer.num_experts for layer in shunter.moe_layers(again).values()} == {3}
    more = [] if change == "upcycled" else [callback()]
    resumed, _ = train(tmp_path, again, more, 6, resume=str(folder), **kept)
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-6, atol=1e-7, msg=lambda said, name=name: f"{name}: {said}")


def test_a_resumed_training_grows_when_it_would_have_grown(tmp_path):
    kept = {"save_strategy": "steps", "save_steps": 4, "lr_scheduler_type": "constant"}
    grower, again = (GrowOnPlateau(max_experts=3, window=3, least=0.9) for _ in range(2))
    train(tmp_path, shunter.sparsify(llama(), 2, "topk", top_k=1), [grower], 7, **kept)
    folder = tmp_path / "checkpoint-4"
    train(tmp_path, shunter.from_pretrained(folder), [again], 7, resume=str(folder), **kept)
    assert [step for step, _ in grower.grown] == [6] and again.grown == grower.grown


def test_an_optimizer_keeps_what_it_trains_besides():
    model, beside = llama(), torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW([*beside.parameters(), *model.parameters()], 1e-2)
    step(model, optimizer, torch.randint(32, (2, 8)))
    upcycle_in_training(model, optimizer, 2, "topk", top_k=1)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for part in (model, beside) for p in part.parameters()}


@pytest.mark.parametrize("callback", [UpcycleAt(3, 4), GrowOnPlateau(4)])
def test_several_processes_are_refused_before_the_first_step(callback, tmp_path, monkeypatch):
    monkeypatch.setattr(growing, "num_ranks", lambda: 2)
    with pytest.raises(UserError, match="on several processes cannot change in mid-run"):
        train(tmp_path, shunter.sparsify(llama(), 2), [callback], 1)
