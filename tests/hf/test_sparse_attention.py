"""Experts in attention: copies are the dense model, heads are attention's definition; caches, padding, FLOPs, files."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    FSMTConfig,
    FSMTForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import shunter
from shunter.analysis.ledger import ledger
from shunter.errors import UserError
from shunter.layers.attention import Heads, KeyValueProjection, LinearExperts, RoutedProjection, Values

from ..helpers import random_routing

FAMILIES = ["llama", "qwen2", "qwen3", "gpt2", "bert", "t5", "bart", "opt"]
WITH_HEADS = ["llama", "qwen2", "qwen3"]


def _logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def _real(batch):
    return (batch["labels"] != -100)[..., None]


def test_linear_experts_by_a_loop_over_tokens():
    experts = LinearExperts(4, 5, 3, bias=True, dtype=torch.float64)
    torch.nn.init.normal_(experts.bias)
    x, routing = torch.randn(7, 5, dtype=torch.float64), random_routing(7, 4)
    matrix = routing.dense()
    wanted = [sum(matrix[t, e] * (experts.weight[e] @ x[t] + experts.bias[e]) for e in range(4)) for t in range(7)]
    assert torch.allclose(experts(x, routing), torch.stack(wanted))


@pytest.mark.parametrize("architecture", FAMILIES)
def test_copies_compute_what_the_dense_model_does(architecture, build, inputs):
    dense, batch = build(architecture), inputs(architecture)
    where = "attention" if architecture != "llama" else "attention, feed_forward"
    sparse = shunter.sparsify(copy.deepcopy(dense), 3, "topk", top_k=2, init="copy", where=where)
    assert len(shunter.moe_layers(sparse)) == {"t5": 8, "bart": 8, "llama": 6}.get(architecture, 4)
    error = (_logits(sparse, batch) - _logits(dense, batch)) * _real(batch)
    assert error.abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["attention", "heads"])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_learnt_saved_and_loaded(architecture, kind, build, inputs, tmp_path):
    if kind == "heads" and architecture not in WITH_HEADS:
        with pytest.raises(UserError, match="fixed number of heads") as error:
            shunter.sparsify(build(architecture), 4, "topk", top_k=2, where=kind)
        assert "\n" not in str(error.value)
        return
    model = shunter.sparsify(build(architecture), 4, "topk", top_k=2, where=kind)
    batch = inputs(architecture, batch=4, length=9)
    out = model.train()(**batch)
    out.loss.backward()
    assert float(shunter.aux_loss(model)) > 0
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
    model.eval().save_pretrained(tmp_path)
    loaded = shunter.from_pretrained(str(tmp_path)).eval()
    assert list(model.state_dict()) == list(loaded.state_dict())
    assert torch.equal(_logits(model, batch), _logits(loaded, batch))
    assert torch.equal(_logits(copy.deepcopy(model), batch), _logits(model, batch))
    if architecture == "llama":
        with pytest.raises(UserError, match="no other format") as error:
            shunter.export(str(tmp_path), str(tmp_path / "native"), to="mixtral")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("architecture", "kind"), [("llama", "heads"), ("gpt2", "attention"), ("qwen3", "attention")])
def test_cached_steps_equal_one_forward(architecture, kind, build):
    model = shunter.sparsify(build(architecture), 4, "topk", top_k=2, where=kind)
    ids = torch.randint(1, 50, (2, 8))
    whole, cache, steps = _logits(model, {"input_ids": ids}), None, []
    with torch.no_grad():
        for place in range(8):
            out = model(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    assert (torch.cat(steps, 1) - whole).abs().max() < 1e-5


def test_t5_generates_as_its_whole_forward_says(build):
    model = shunter.sparsify(build("t5"), 4, "topk", top_k=2, where="attention")
    ids = torch.randint(1, 50, (2, 6))
    made = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    logits = _logits(model, {"input_ids": ids, "decoder_input_ids": made[:, :-1]})
    logits[..., model.config.eos_token_id] = -torch.inf
    assert torch.equal(logits.argmax(-1), made[:, 1:])


@pytest.mark.parametrize("kind", ["attention", "heads"])
def test_padding_takes_no_expert(kind, build, inputs):
    model = shunter.sparsify(build("llama"), 4, "topk", top_k=2, where=kind)
    batch = inputs("llama")
    model(**batch)
    for layer in shunter.moe_layers(model).values():
        assert int(layer.routing.counts.sum()) == 2 * int(batch["attention_mask"].sum())


def _llama(kind=LlamaForCausalLM, config=LlamaConfig, **options):
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return kind(config(**sizes, attn_implementation="eager", **options)).eval()


@pytest.mark.parametrize(("family", "config"), [(LlamaForCausalLM, LlamaConfig), (MistralForCausalLM, MistralConfig)])
def test_all_heads_with_equal_weights_are_attention_with_one_key(family, config):
    """With as many heads as choices and equal probabilities, w_i = 1/k: multi-query attention with W_o / k."""
    dense = _llama(family, config, num_attention_heads=4, num_key_value_heads=1)
    model = shunter.sparsify(copy.deepcopy(dense), 4, "topk", top_k=4, where="heads")
    with torch.no_grad():
        for layer, old in zip(model.model.layers, dense.model.layers, strict=True):
            new, old = layer.self_attn, old.self_attn
            new.q_proj.router.weight.zero_()
            new.q_proj.experts.queries.weight.copy_(old.q_proj.weight.view(4, 8, 32))
            new.q_proj.experts.outputs.weight.copy_(4 * old.o_proj.weight.view(32, 4, 8).transpose(0, 1))
            new.k_proj.weight.copy_(old.k_proj.weight)
            new.v_proj.weight.copy_(old.v_proj.weight)
    ids = {"input_ids": torch.randint(50, (2, 9))}
    assert (_logits(model, ids) - _logits(dense, ids)).abs().max() < 1e-5


def test_heads_are_weighted_by_what_their_probabilities_add_up_to():
    layer = Heads(6, 3, 5, "topk", top_k=2, renormalize="no", dtype=torch.float64).eval()
    x = torch.randn(7, 6, dtype=torch.float64)
    queries = layer(x).view(7, 2, 3)
    out = layer.combine(queries.reshape(7, 6))
    probs = (x @ layer.router.weight.T).softmax(-1)
    value, index = probs.topk(2)
    for t in range(7):
        wanted = 0
        for p, e in zip(value[t], index[t], strict=True):
            query = layer.experts.queries.weight[e] @ x[t]
            wanted = wanted + p / value[t].sum() * (layer.experts.outputs.weight[e] @ query)
        assert torch.allclose(out[t], wanted)


def test_heads_whose_weights_are_all_zero_add_nothing():
    layer = Heads(6, 3, 5, "topk", top_k=2, renormalize="no", score_function="sigmoid")
    torch.nn.init.constant_(layer.router.weight, -1e3)
    out = layer.combine(layer(torch.ones(7, 6)))
    out.sum().backward()
    assert not out.any() and all(bool(p.grad.isfinite().all()) for p in layer.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", ["attention", "heads"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_flops_equal_the_counted_ones(kind, top_k):
    model = _llama(num_attention_heads=4, num_key_value_heads=2)
    shunter.sparsify(model, 4, "topk", top_k=top_k, where=kind)
    ids = torch.randint(50, (2, 16))
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(ids)
    assert ledger(model, 16).flops_per_token == counted.get_total_flops() / ids.numel()


def test_keys_and_values_share_one_decision_in_either_order():
    shared = KeyValueProjection(6, 4, 9, 3, "topk", top_k=2).eval()
    values, x = Values(shared), torch.randn(2, 5, 6)
    keys, first = shared(x), shared.routing
    value = values(x)
    assert shared.routing is first and keys.shape[-1] == 4 and value.shape[-1] == 5
    assert torch.equal(values(x), value) and torch.equal(shared(x), keys)
    shared(x)  # and nobody asks for its values
    other = torch.randn(2, 5, 6)
    assert not torch.allclose(values(other), value)


def test_every_router_projects_or_says_why_not():
    for name in shunter.routers.names():
        options = {"top_k": 2} if name == "deepseek" else {}
        options |= shunter.routers.find(name).example_options
        try:
            layer = RoutedProjection(8, 12, 4, name, **options)
        except ValueError as error:
            assert name == "null_experts" and "identity=False" in str(error)
            continue
        x = torch.randn(2, 6, 8)
        known = {need: torch.zeros(2, 6, dtype=torch.int64) for need in layer.decider.required if need != "embedding"}
        if "experts" in known:
            known["experts"] = known["experts"][..., None]
        if "embedding" in layer.decider.required:
            known["embedding"] = torch.randn(2, 6, options.get("embedding_dim", 8))
        assert layer(x, **known).shape == (2, 6, 12), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"where": "norms"}, "unknown"),
        ({"where": "attention, heads"}, "unknown"),
        ({"where": "attention", "hidden": 8}, "hidden is of feed-forward"),
        ({"where": "attention", "init": "paper"}, "scratch or copy"),
        ({"where": "heads", "init": "copy"}, "no copy"),
    ],
)
def test_wrong_choices_are_one_line(options, message, build):
    with pytest.raises(UserError, match=message) as error:
        shunter.sparsify(build("llama"), 4, "topk", top_k=2, **options)
    assert "\n" not in str(error.value)


def test_leaks_and_second_calls_are_refused(build):
    with pytest.raises(ValueError, match="causal model"):
        shunter.sparsify(build("llama"), 4, "expert_choice", where="attention")
    with pytest.raises(ValueError, match="any number of heads"):
        shunter.sparsify(build("llama"), 4, "expert_choice", where="heads", allow_leak=True)
    model = shunter.sparsify(build("llama"), 4, "switch", where="attention")
    for where in ("feed_forward", "attention"):
        with pytest.raises(UserError, match="already has experts"):
            shunter.sparsify(model, 4, "switch", where=where)
    with pytest.raises(UserError, match="no attention that is known"):
        shunter.sparsify(build("bloom"), 4, "switch", where="attention")


def test_tokens_place_by_place_are_refused():
    sizes = {"langs": ["en", "de"], "src_vocab_size": 50, "tgt_vocab_size": 50, "d_model": 32}
    layers = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 48))}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "tie_word_embeddings": False}
    model = FSMTForConditionalGeneration(FSMTConfig(**sizes, **layers, **heads))
    with pytest.raises(UserError, match="place by place") as error:
        shunter.sparsify(model, 4, "topk", top_k=2, where="attention")
    assert "\n" not in str(error.value)


def test_a_refused_call_leaves_the_model_as_it_was(build, inputs):
    model, batch = build("gpt2"), inputs("gpt2")
    before = _logits(model, batch)
    with pytest.raises(UserError, match="fixed number"):
        shunter.sparsify(model, 4, "topk", top_k=2, where="heads, feed_forward")
    assert torch.equal(_logits(model, batch), before)


@pytest.mark.parametrize("kind", ["attention", "heads"])
def test_activation_checkpointing_gives_the_same_gradients(kind, build, inputs):
    model, batch = shunter.sparsify(build("llama"), 4, "topk", top_k=2, where=kind).train(), inputs("llama")

    def gradients():
        model.zero_grad()
        model(**batch).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = gradients()
    assert all(torch.allclose(plain[name], again[name], atol=1e-6) for name in plain)
