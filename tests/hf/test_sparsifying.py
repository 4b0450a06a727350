"""Dense models made sparse: function kept by copies, saved and loaded to the bit, refused where unknown."""

import copy
import json
import pickle

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, MixtralConfig, MixtralForCausalLM

import shunter
from shunter.errors import UserError
from shunter.hf.blocks import find_feed_forwards

from .conftest import BLOCKS

OLD = {
    "allow_leak": False,
    "backend": "auto",
    "every": 2,
    "hidden": 20,
    "layout": "gate_up_proj (E, 2f, d), gate first; down_proj (E, d, f)",
    "num_experts": 4,
    "num_shared_experts": 1,
    "renormalize": "no",
    "router": "topk",
    "top_k": 2,
}
"""config.shunter as it was before it named each layer."""


def _logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def test_copies_compute_what_the_dense_model_does(architecture, build, inputs):
    dense = build(architecture)
    sparse = shunter.sparsify(copy.deepcopy(dense), 4, "topk", top_k=2, init="copy")
    batch = inputs(architecture)
    error = _logits(sparse, batch) - _logits(dense, batch)
    if "attention_mask" in batch:
        error = error * (batch["labels"] != -100)[..., None]  # padding is not computed
    assert error.abs().max() < 1e-5
    assert len(shunter.moe_layers(sparse)) == BLOCKS.get(architecture, 2)


def test_every_parameter_of_the_experts_learns(architecture, build, inputs):
    model = shunter.sparsify(build(architecture), 3, "topk", top_k=2).train()
    model(**inputs(architecture, batch=4, length=9)).loss.backward()
    for layer in shunter.moe_layers(model).values():
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("router", ["switch", "topk", "hash", "expert_choice"])
def test_saved_models_load_bit_for_bit(architecture, router, build, inputs, tmp_path):
    if router == "hash" and architecture == "vit":
        pytest.skip("images have no token ids")
    model = shunter.sparsify(build(architecture), 4, router, allow_leak=True)
    model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin")) + list(tmp_path.glob("*.pt"))
    loaded = shunter.from_pretrained(str(tmp_path)).eval()
    before, after = model.state_dict(), loaded.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    batch = inputs(architecture)
    assert torch.equal(_logits(model, batch), _logits(loaded, batch))
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_loading_honours_dtype_and_keeps_state_exact(build, tmp_path):
    model = shunter.sparsify(build("llama"), 4, "topk", top_k=2, selection_bias=True)
    for layer in shunter.moe_layers(model).values():
        layer.router.selection_bias.copy_(torch.randn(4))
    model.save_pretrained(tmp_path)
    loaded = shunter.from_pretrained(str(tmp_path), dtype=torch.bfloat16)
    for ours, theirs in zip(shunter.moe_layers(model).values(), shunter.moe_layers(loaded).values(), strict=True):
        assert theirs.experts.down_proj.dtype == torch.bfloat16
        assert torch.equal(ours.router.selection_bias, theirs.router.selection_bias)


def test_balanced_hash_tables_survive_without_their_frequencies(build, tmp_path):
    frequencies = torch.rand(50)
    model = shunter.sparsify(build("llama"), 4, "hash", frequencies=frequencies)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["shunter"]["layers"]
    assert [layer["options"] for layer in saved] == [{"vocab_size": 50}] * 2
    tables = [
        next(iter(shunter.moe_layers(m).values())).router.table for m in (model, shunter.from_pretrained(str(tmp_path)))
    ]
    assert torch.equal(*tables)


def _entries(folder):
    return json.loads((folder / "config.json").read_text())["shunter"]["layers"]


def _exchange(model, other, number):
    """Put a layer of another sparsified model in the place of a model's own."""
    name = list(shunter.moe_layers(model))[number]
    model.set_submodule(name, shunter.moe_layers(other)[name])


WAYS = {"itself": lambda model: model, "copied": copy.deepcopy, "pickled": lambda m: pickle.loads(pickle.dumps(m))}


@pytest.mark.parametrize("way", WAYS)
def test_layers_that_differ_are_saved_as_they_are(way, build, inputs, tmp_path):
    """Sizes, router and options of each layer come back, though it changed after sparsify."""
    model = shunter.sparsify(build("llama"), 4, "topk", top_k=2, layers=[1])
    model = WAYS[way](model)
    other = shunter.sparsify(build("llama"), 6, "deepseek", top_k=3, hidden=20, num_shared_experts=2)
    _exchange(model, other, 0)
    layer = shunter.moe_layers(model)["model.layers.1.mlp"]
    layer.experts.recompute = True
    model.save_pretrained(tmp_path)
    assert _entries(tmp_path) == [
        {
            "name": "model.layers.1.mlp",
            "num_experts": 6,
            "hidden": 20,
            "activation": "swiglu",
            "bias": False,
            "num_shared_experts": 2,
            "dropout": 0.0,
            "expert_dropout": 0.0,
            "backend": "auto",
            "recompute": True,
            "router": "deepseek",
            "options": {"top_k": 3},
        }
    ]
    loaded = shunter.from_pretrained(str(tmp_path)).eval()
    before, after = model.state_dict(), loaded.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
    batch = inputs("llama")
    assert torch.equal(_logits(model, batch), _logits(loaded, batch))
    assert shunter.moe_layers(loaded)["model.layers.1.mlp"].experts.recompute


@pytest.mark.parametrize(
    "router, options",
    [("switch", {"capacity_factor": None}), ("topk", {"top_k": 3, "router_bias": True}), ("cosine", {"top_k": 1})],
)
def test_a_layer_that_was_put_in_by_hand_is_saved(router, options, build, inputs, tmp_path):
    model = shunter.sparsify(build("llama"), 4, "topk", top_k=2)
    layer = shunter.MoE(32, 20, 5, router, activation="reglu", bias=True, **options)
    model.set_submodule("model.layers.0.mlp", layer.eval())
    model.save_pretrained(tmp_path)
    assert _entries(tmp_path)[0]["options"] == options
    loaded, batch = shunter.from_pretrained(str(tmp_path)).eval(), inputs("llama")
    assert torch.equal(_logits(model, batch), _logits(loaded, batch))


def test_layers_of_two_sizes_and_routers(architecture, build, inputs, tmp_path):
    model = shunter.sparsify(build(architecture), 4, "topk", top_k=2)
    _exchange(model, shunter.sparsify(build(architecture), 3, "switch", hidden=20, capacity_factor=None), -1)
    model.save_pretrained(tmp_path)
    *others, last = [(e["num_experts"], e["router"]) for e in _entries(tmp_path)]
    assert last == (3, "switch") and set(others) <= {(4, "topk")}
    loaded = shunter.from_pretrained(str(tmp_path)).eval()
    batch = inputs(architecture)
    assert torch.equal(_logits(model, batch), _logits(loaded, batch))


def test_a_layer_that_cannot_be_described_is_refused(build, tmp_path):
    model = shunter.sparsify(build("llama"), 4, "topk")
    layer = shunter.moe_layers(model)["model.layers.1.mlp"]

    class Mine(type(layer.router)):
        """Not registered."""

    layer.router = Mine(32, 4)
    with pytest.raises(UserError) as caught:
        model.save_pretrained(tmp_path)
    assert "register" in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_folders_that_say_how_sparsify_was_called_still_load(build, inputs, tmp_path):
    options = {"num_shared_experts": 1, "renormalize": "no", "top_k": 2}
    model = shunter.sparsify(build("llama"), 4, "topk", every=2, hidden=20, **options)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    new = config["shunter"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"shunter": OLD}))
    loaded = shunter.from_pretrained(str(tmp_path)).eval()
    batch = inputs("llama")
    assert torch.equal(_logits(model, batch), _logits(loaded, batch))
    loaded.save_pretrained(tmp_path / "again")
    again = json.loads((tmp_path / "again/config.json").read_text())["shunter"]
    assert again == new and [layer["name"] for layer in again["layers"]] == ["model.layers.1.mlp"]


@pytest.mark.parametrize("every, expected", [(1, [0, 1]), (2, [1])])
def test_every_counts_within_each_stack(every, expected, build):
    model = shunter.sparsify(build("t5"), 2, "topk", every=every)
    numbers = [int(name.split("block.")[1].split(".")[0]) for name in shunter.moe_layers(model)]
    assert numbers == expected * 2


@pytest.mark.parametrize("architecture", ["t5", "bart"])
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_one_stack_of_two(stack, architecture, build):
    model = build(architecture)
    blocks = {name for layers in find_feed_forwards(model) for name in (block.path for block in layers)}
    inside = {name for name in blocks if stack in name.split(".")}
    assert (
        set(
            shunter.moe_layers(
                shunter.sparsify(model, 2, "hash", within=stack if architecture == "t5" else f"model.{stack}")
            )
        )
        == inside
        < blocks
    )


def test_a_stack_that_is_not_there_is_refused(build):
    with pytest.raises(UserError, match="within='encoder' has no block of LlamaForCausalLM"):
        shunter.sparsify(build("llama"), 2, "topk", within="encoder")


def test_scratch_experts_have_the_dense_spread(build):
    dense = build("gpt2")
    spread = dense.transformer.h[0].mlp.c_proj.weight.std()
    layer = next(iter(shunter.moe_layers(shunter.sparsify(dense, 16, "topk")).values()))
    assert torch.isclose(layer.experts.down_proj.std(), spread, rtol=0.1)
    assert not torch.equal(layer.experts.down_proj[0], layer.experts.down_proj[1])


def test_dropout_at_a_blocks_end_is_kept():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2, resid_pdrop=0.3))
    layer = next(iter(shunter.moe_layers(shunter.sparsify(model, 2, "topk")).values()))
    assert layer.dropout.p == 0.3


def test_leaking_routers_are_refused_in_causal_stacks_only(build):
    with pytest.raises(ValueError, match="causal model: expert choice .* allow_leak=True"):
        shunter.sparsify(build("llama"), 4, "expert_choice")
    with pytest.raises(ValueError, match="capacity_order='batch'"):
        shunter.sparsify(build("t5"), 4, "switch", capacity_order="batch")
    shunter.sparsify(build("bert"), 4, "expert_choice")
    shunter.sparsify(build("vit"), 4, "expert_choice")
    shunter.sparsify(build("llama"), 4, "expert_choice", allow_leak=True)


def test_a_refusal_leaves_the_model_whole(build, inputs):
    model, batch = build("llama"), inputs("llama")
    before = _logits(model, batch)
    with pytest.raises(ValueError):
        shunter.sparsify(model, 4, "expert_choice")
    assert torch.equal(_logits(model, batch), before)
    assert not hasattr(model.config, "shunter")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"router": "swich"}, "did you mean 'switch'"),
        ({"router": "topk", "topk": 2}, "did you mean 'top_k'"),
        ({"init": "copied"}, "choose scratch, copy or paper"),
        ({"every": 0}, "every=0"),
        ({"every": 3}, "leaves no block"),
        ({"init": "copy", "hidden": 7}, "keeps the dense width 48"),
        ({"init": "copy", "num_shared_experts": 1}, "shared expert"),
        ({"backend": "fast"}, "backend 'fast' is unknown"),
    ],
)
def test_bad_options_say_what_is_allowed(options, message, build):
    with pytest.raises(ValueError, match=message):
        shunter.sparsify(build("llama"), 4, **options)


def test_models_that_are_none_or_have_no_tokens_are_refused(build):
    with pytest.raises(UserError, match="Linear is no model of transformers"):
        shunter.sparsify(torch.nn.Linear(3, 3), 2)
    with pytest.raises(UserError, match="ViTForImageClassification has no token ids, by which router 'hash' goes"):
        shunter.sparsify(build("vit"), 2, "hash")


def test_unknown_architectures_say_what_was_looked_at():
    model = MambaForCausalLM(MambaConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(ValueError, match=r"Looked at: backbone.layers.0.mixer \(MambaMixer\)"):
        shunter.sparsify(model, 4)


def test_sparse_models_are_refused(build):
    mixtral = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=9,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=2,
        )  # fmt: skip
    )
    with pytest.raises(ValueError, match="already has experts"):
        shunter.sparsify(mixtral, 4)
    twice = shunter.sparsify(build("llama"), 4)
    with pytest.raises(ValueError, match="already has experts"):
        shunter.sparsify(twice, 4)


def test_folders_of_others_are_refused(build, tmp_path):
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a model that shunter.sparsify made"):
        shunter.from_pretrained(str(tmp_path))


class _Twice(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight

    def right_inverse(self, weight):
        return weight / 2


@pytest.mark.parametrize("how", ["compiled", "parametrized", "sharded"])
def test_a_wrapped_router_is_saved_by_its_own_name(how, build, inputs, tmp_path):
    model = shunter.sparsify(build("llama"), 4, "deepseek", top_k=2).eval()
    batch = inputs("llama")
    expected = model(**batch).logits
    if how == "sharded":
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for layer in shunter.moe_layers(model).values():
            if how == "compiled":
                layer.router = torch.compile(layer.router, backend="eager")
            elif how == "parametrized":
                torch.nn.utils.parametrize.register_parametrization(layer.router, "weight", _Twice())
            else:
                torch.distributed.fsdp.fully_shard(layer.router)
        names = list(model.state_dict())
        model.save_pretrained(tmp_path)
        assert list(model.state_dict()) == names
    finally:
        if how == "sharded":
            torch.distributed.destroy_process_group()
    assert torch.equal(shunter.from_pretrained(tmp_path).eval()(**batch).logits, expected)


def test_a_router_of_another_kind_is_not_saved_as_the_one_that_it_is_made_of(build, tmp_path):
    class Other(shunter.routers.find("topk")):
        def choose(self, logits, context):
            return super().choose(-logits, context)

    model = shunter.sparsify(build("llama"), 4, "topk", top_k=2)
    for layer in shunter.moe_layers(model).values():
        layer.router = Other(32, 4, top_k=2)
    with pytest.raises(ValueError, match="register .*Other.* first"):
        model.save_pretrained(tmp_path)


def test_experts_begin_as_in_the_papers(build):
    """The formulae: sd sqrt(s / n) of n inputs, cut at 2 sd, s = 0.1; one draw for all experts; a block of zeros."""
    switch = shunter.MoE(256, 1024, 4, "switch")
    switch.init_as_in_paper()
    for weight, inputs_of in ((switch.experts.gate_up_proj, 256), (switch.experts.down_proj, 1024)):
        scale = (0.1 / inputs_of) ** 0.5
        assert 1.9 * scale < float(weight.abs().max()) <= 2 * scale
        # A normal distribution cut at 2 sd has the variance 1 - 4 phi(2) / (2 Phi(2) - 1) = 0.7737.
        assert abs(float(weight.double().square().mean()) / scale**2 - 0.7737) < 0.01
        assert abs(float(weight.double().mean())) < 0.01 * scale
    model = shunter.sparsify(build("vit"), 4, "vmoe", init="paper")
    for layer in shunter.moe_layers(model).values():
        for weight in layer.experts.parameters():
            assert torch.equal(weight, weight[:1].expand_as(weight))
        assert layer.experts.up_proj[0].std() > 0
    model = shunter.sparsify(build("bert"), 4, "base", init="paper", allow_leak=True)
    for layer in shunter.moe_layers(model).values():
        x = torch.randn(3, 5, layer.dim)
        for mode in (True, False):
            assert not layer.train(mode)(x).any()
    with pytest.raises(ValueError, match="begins experts in no way of its own"):
        shunter.sparsify(build("llama"), 4, "topk", top_k=2, init="paper")


@pytest.mark.parametrize("where", ["model.layers.1.mlp", "model.layers.0.mlp.down_proj"])
def test_hooks_on_what_is_replaced_are_not_lost(where, build):
    model = build("llama")
    kept = model.model.layers[0].self_attn.register_forward_hook(lambda *args: None)
    hook = model.get_submodule(where).register_forward_pre_hook(lambda *args: None)
    with pytest.raises(UserError, match=f"sparsify: {where} has hooks, which its replacement would not call"):
        shunter.sparsify(model, 4, "topk", top_k=2)
    assert not shunter.moe_layers(model)
    hook.remove()
    shunter.sparsify(model, 4, "topk", top_k=2)
    kept.remove()
