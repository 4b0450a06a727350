"""Roles of parameters: each has one, on every architecture, and groups of an optimizer train by them."""

import re

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from shunter import MoE, sparsify
from shunter.errors import UserError
from shunter.layers.recurrent import ExpertLSTM
from shunter.layers.sparse_mixer import SparseMixer
from shunter.training.roles import GROUPS, ROLES, accumulate, parameter_groups, roles, select, table, train_only
from tests.hf.families import FAMILIES, build

# What a parameter's own name says of its role, in every family that has such a name.
NAMED = {
    r"\.(gate|router)\.(weight|wg\.weight|proj\.weight|classifier\.weight|layer\.weight)$": "router",
    r"(^|\.)experts\.(gate_up_proj|up_proj|down_proj)$": "expert",
    r"shared_(experts?|mlp)\.": "shared",
    r"[._]attn\.[qkvo]_proj\.weight$": "attention",
    r"(input|post_attention)_layernorm\.weight$": "norm",
    r"(embed_tokens|wte)\.weight$": "embedding",
    r"^(lm_head|classifier)\.weight$": "head",
    r"^(?!.*(shared|expert)).*mlp\.(down_proj|fc1|c_fc)\.weight$": "feed_forward",
}
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}


def dense():
    yield GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2))
    t5 = T5Config(vocab_size=32, d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2)
    yield T5ForConditionalGeneration(t5)
    yield ViTForImageClassification(ViTConfig(**SMALL, image_size=16, patch_size=8))
    yield BertForSequenceClassification(BertConfig(**SMALL, vocab_size=32))


def must_fit(model, without=()):
    of = roles(model)
    assert list(of) == [name for name, _ in model.named_parameters()]
    assert set(of.values()) <= set(ROLES)
    for name, role in of.items():
        for pattern, expected in NAMED.items():
            if re.search(pattern, name):
                assert role == expected, f"{name} is {role}"
        assert role != "other" or any(word in name for word in without), f"{name} has no role"
    return of


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_every_family_has_one_role(family):
    with torch.device("meta"):
        model = build(family)
    # Hyper-connections and the embeddings of each layer are none of the roles.
    of = must_fit(model, without=("hc_head", "_hc.", "per_layer"))
    assert {"router", "expert", "attention", "norm"} <= set(of.values())


def test_dense_models_and_their_sparse_forms():
    for model in dense():
        before = must_fit(model)
        assert not {"router", "expert", "shared"} & set(before.values())
        after = must_fit(sparsify(model, 4, "topk", num_shared_experts=1))
        assert {"router", "expert", "shared"} <= set(after.values()) and "feed_forward" not in after.values()
        kept = before.keys() & after.keys()
        assert all(before[name] == after[name] for name in kept)
    sizes = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_heads": 2, "num_experts": 4, "num_sparse_encoder_layers": 1}
    config = SwitchTransformersConfig(vocab_size=32, num_layers=2, num_decoder_layers=2, **sizes)
    assert {"router", "expert", "feed_forward"} <= set(
        must_fit(SwitchTransformersForConditionalGeneration(config)).values()
    )


def test_recurrences_mixers_and_layer_groups():
    sizes = {"hidden_size": 16, "intermediate_size": 48, "num_attention_heads": 2, "vocab_size": 32}
    recurrent = AutoModelForCausalLM.from_config(AutoConfig.for_model("recurrent_gemma", num_hidden_layers=3, **sizes))
    albert = AutoModelForMaskedLM.from_config(AutoConfig.for_model("albert", embedding_size=8, **sizes))
    mixer = SparseMixer(32, 16, 24, 3, 8, attention=[2], experts=[1], mixing="linear", num_heads=2, num_experts=4)
    lstm = ExpertLSTM(32, 16, 16, 8, num_groups=2)
    wanted = {
        "temporal_block": "attention", "mlp_block": "feed_forward", "ffn": "feed_forward", "mixers.": "attention",
        "feed_forward.1.router": "router", "feed_forward.1.experts": "expert", "feed_forward.0": "feed_forward",
        "lower.": "attention", "upper.": "attention", "experts.router": "router", "experts.experts": "expert",
    }  # fmt: skip
    seen = set()
    for model in (recurrent, albert, mixer, lstm):
        for name, role in must_fit(model).items():
            if role != "norm" and (word := next((word for word in wanted if word in name), None)):
                assert role == wanted[word], name
                seen.add(word)
    assert seen == set(wanted)


def test_groups_are_made_of_roles():
    model = build("qwen2_moe")
    everything = select(model, "all")
    moe, rest = select(model, "moe"), select(model, "non_moe")
    assert moe.keys() | rest.keys() == everything.keys() and not moe.keys() & rest.keys()
    assert select(model, "all,-expert").keys() == select(model, "all_but_experts").keys()
    assert select(model, "expert, router,shared").keys() == moe.keys()
    assert set().union(*GROUPS.values()) == set(ROLES)


@pytest.mark.parametrize(
    "which, message",
    [
        ("mo", "'mo' is no role"),
        ("feed_forward", "has the role feed_forward; there are router"),
        ("norm,-norm", "leaves no"),
    ],
)
def test_what_selects_nothing_is_an_error(which, message):
    with pytest.raises(UserError, match=message):
        select(build("mixtral"), which)


def test_rates_that_train_nothing_are_an_error():
    model = build("mixtral")
    for rates, message in ({"expert": 0.0}, "above 0"), ({"router": 2.0}, "not among what is trained"):
        with pytest.raises(UserError, match=message):
            parameter_groups(model, 1e-3, "norm" if "router" in rates else "all", rates=rates)


def test_each_role_moves_at_its_own_rate():
    model = nn.Sequential(nn.LayerNorm(8), MoE(8, 16, 4, "topk", dropout=0.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    rates = {"moe": 3.0, "router": 0.5}
    optimizer = torch.optim.SGD(parameter_groups(model, 0.1, rates=rates))
    model(torch.randn(32, 8)).square().sum().backward()
    optimizer.step()
    of = roles(model)
    for name, p in model.named_parameters():
        rate = {"router": 0.05, "expert": 0.3}.get(of[name], 0.1)
        torch.testing.assert_close(p, before[name] - rate * p.grad)


def test_a_trainer_trains_what_is_chosen_and_nothing_else(tmp_path):
    model = build("mixtral")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = parameter_groups(model, 1e-2, "non_moe", rates={"norm": 10.0}, weight_decay=0.1)
    assert {group["role"]: group["lr"] for group in groups}["norm"] == pytest.approx(0.1)
    assert all(group["weight_decay"] == (0.1 if group["params"][0].dim() > 1 else 0) for group in groups)
    data = [{"input_ids": row, "labels": row} for row in torch.randint(64, (8, 6))]
    arguments = TrainingArguments(
        tmp_path, max_steps=2, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True
    )
    Trainer(model, arguments, train_dataset=data, optimizers=(torch.optim.AdamW(groups), None)).train()
    of = roles(model)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (of[name] in ("router", "expert")), name


def test_the_table_counts_what_is_trained():
    model = build("qwen2_moe")
    train_only(model, "router")
    rows = {line.split()[0]: line.split() for line in table(model).splitlines()[1:]}
    total = sum(p.numel() for p in model.parameters())
    routers = sum(p.numel() for name, p in model.named_parameters() if name.endswith("mlp.gate.weight"))
    assert rows["all"][2:] == [f"{total:,}", f"{routers:,}"]
    assert rows["router"][3] == f"{routers:,}" and rows["expert"][3] == "0"


def batched(kind, folder, steps=7, number=3, way="loop"):
    """A model trained with batches of several steps for its experts, and copies of its weights after each step."""
    torch.manual_seed(3)
    llama = {"num_key_value_heads": 2, "vocab_size": 32}
    model = build(kind) if kind else sparsify(LlamaForCausalLM(LlamaConfig(**SMALL, **llama)), 4, "topk", top_k=2)
    model.train()
    groups = parameter_groups(model, 1e-2, "router,expert,norm", batches={"expert": number})
    optimizer, seen = accumulate(torch.optim.AdamW(groups)), []
    ids = torch.randint(1, 30, (steps, 2, 8), generator=torch.Generator().manual_seed(4))

    def note(*_):
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})

    note()
    if way == "loop":
        for batch in ids:
            model(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            note()
        return model, optimizer, seen, ids
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, per_device_train_batch_size=2, use_cpu=True, report_to="none",
        disable_tqdm=True, save_strategy="steps", save_steps=5, max_grad_norm=0, lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in ids.flatten(0, 1)]
    trainer = Trainer(model=model, args=arguments, train_dataset=data, optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=way if way != "trainer" else None)
    return model, optimizer, seen, ids


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "olmoe"])
def test_a_role_is_updated_by_the_mean_over_its_batches(kind, tmp_path):
    """Against Adam written down: of gradients that autograd takes at the weights of each step."""
    model, optimizer, seen, ids = batched(kind, tmp_path)
    of, gradients = roles(model), {}
    for step, batch in enumerate(ids[:3]):
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(seen[step][name])
        model.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        gradients[step] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    moved = {role: [] for role in ("router", "expert", "norm")}
    for name, grad in gradients[0].items():
        changes = [not torch.equal(a[name], b[name]) for a, b in zip(seen, seen[1:], strict=False)]
        moved[of[name]].append(changes)
        if of[name] == "expert":
            mean = sum(gradients[step][name] for step in range(3)) / 3
            first = seen[0][name] - 1e-2 * mean / (mean.abs() + 1e-8)
        else:
            first = seen[0][name] - 1e-2 * grad / (grad.abs() + 1e-8)
        torch.testing.assert_close(seen[3 if of[name] == "expert" else 1][name], first, rtol=1e-4, atol=2e-5)
    assert all(changes == [False, False, True] * 2 + [False] for changes in moved["expert"])
    assert all(all(changes) for changes in moved["router"]) and moved["router"]
    counts = {of[n]: optimizer.state[p]["step"].item() for n, p in model.named_parameters() if p in optimizer.state}
    assert counts == {"router": 7, "expert": 2, "norm": 7}


def test_batches_of_roles_in_a_trainer_and_after_resuming(tmp_path):
    looped, *_ = batched("", tmp_path)
    trained, *_ = batched("", tmp_path, way="trainer")
    resumed, *_ = batched("", tmp_path, way=str(tmp_path / "checkpoint-5"))  # in the middle of a batch
    for a, b, c in zip(looped.parameters(), trained.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscaled", [False, True])
def test_what_a_gradient_scaler_leaves_out_is_in_no_mean(fused, unscaled):
    """Against SGD written down; a fused optimizer is called by the scaler in any case, with gradients at its scale."""
    weight, inputs = nn.Parameter(torch.randn(3, 4)), torch.randn(4, 3, 4)
    inputs[1, 0, 0] = torch.inf  # after which the scale is another
    expected = weight.detach() - 0.1 * (inputs[0] + inputs[2]) / 2
    optimizer = accumulate(torch.optim.SGD([{"params": [weight], "batches": 2}], 0.1, fused=fused))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in inputs:
        scaler.scale(torch.where(factor.isfinite(), weight * factor, factor).sum()).backward()
        if not factor.isfinite().all():
            weight.grad[0, 0] = torch.inf
        if unscaled:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    torch.testing.assert_close(weight.detach(), expected)
    assert scaler.get_scale() == 2.0


def test_batches_that_cannot_be():
    model = build("mixtral")
    with pytest.raises(UserError, match="batches 0 of router must be an integer above 0"):
        parameter_groups(model, 1e-3, batches={"router": 0})
    with pytest.raises(UserError, match="expert has batches, and is not among what is trained"):
        parameter_groups(model, 1e-3, "router", batches={"expert": 2})
