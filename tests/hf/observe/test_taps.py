"""Taps read what every family of transformers and every router of Shunter decided, once a forward."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from transformers import (
    DogeConfig,
    DogeForCausalLM,
    NllbMoeConfig,
    NllbMoeForConditionalGeneration,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

import shunter
from shunter.hf.observe.listening import Observation, listening
from shunter.hf.observe.taps import taps
from tests.hf.families import FAMILIES, SIGMOID, SOFTMAX, VOCAB, build


def _spread(model):
    """Weights large enough that routers disagree about tokens."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def _batch():
    ids = torch.randint(3, VOCAB, (2, 7))
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _observe(model, batch, **options) -> tuple[dict[str, Observation], object]:
    seen: dict[str, Observation] = {}

    def note(name, observation):
        assert name not in seen, "a layer is heard once a forward"
        seen[name] = observation

    with listening(model, note), torch.no_grad():
        out = model(**batch, **options)
    return seen, out


def test_experts_that_transformers_never_calls_are_told_of_in_one_line():
    """NLLB-MoE of transformers 5.24 takes the 0s and 1s of a one-hot choice for the numbers of experts."""
    config = NllbMoeConfig(
        vocab_size=50, d_model=16, encoder_layers=2, decoder_layers=2, encoder_sparse_step=1, decoder_sparse_step=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_experts=6,
        pad_token_id=1, moe_token_dropout=0.0, router_dtype="float32", second_expert_policy="all",
    )  # fmt: skip
    model = _spread(NllbMoeForConditionalGeneration(config)).eval()
    called = set()
    for name, module in model.named_modules():
        if name.rpartition(".")[2].startswith("expert_"):
            number = int(name.rpartition("_")[2])
            module.register_forward_hook(lambda *_, number=number: called.add(number))
    ids = torch.randint(3, 50, (4, 20))
    heard = {}
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        with listening(model, lambda name, seen: heard.setdefault(name, seen)):
            model(input_ids=ids, decoder_input_ids=ids)
        with shunter.record(model):
            model(input_ids=ids, decoder_input_ids=ids)
    chosen = set(torch.cat([seen.index.flatten() for seen in heard.values()]).tolist()) - {-1}
    said = [str(warning.message) for warning in caught if "calls the experts" in str(warning.message)]
    if chosen <= called:
        assert not said, "this transformers calls what the router chose"
    else:
        assert len(said) == 2, "one line for each that listens"
        for line in said:
            assert "\n" not in line and "what is shown is the router's choice" in line
            assert f"calls the experts {', '.join(map(str, sorted(called)))} alone" in line


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_read_without_its_class_names(family):
    model = _spread(build(family))
    batch = _batch()
    seen, out = _observe(model, batch, output_router_logits=True)
    assert set(seen) == set(taps(model))
    recorded = out.router_logits
    for place, observation in enumerate(seen.values()):
        tokens, experts = observation.logits.shape
        assert (tokens, experts, observation.num_experts) == (14, 8, 8)
        assert observation.index.shape == observation.weight.shape == (14, 2)
        assert observation.hidden.shape == (14, 32)
        assert torch.equal(observation.mask, batch["attention_mask"].flatten().bool())
        if family == "gemma4_text":
            # transformers' router_logits of Gemma are probabilities
            assert torch.allclose(recorded[place].reshape(14, 8), observation.probs)
        elif family != "jetmoe":  # records the logits of its attention twice
            assert torch.equal(recorded[place].reshape(14, 8), observation.logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_probabilities_follow_the_familys_own_score_function(family):
    seen, _ = _observe(_spread(build(family)), _batch())
    for observation in seen.values():
        logits = observation.logits.double()
        scores = logits.softmax(-1) if family in SOFTMAX else logits.sigmoid()
        expected = scores / scores.sum(-1, keepdim=True)
        assert torch.allclose(observation.probs.double(), expected, atol=1e-6), family


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "gpt_oss", "granitemoe", "llama4_text", "jetmoe", "flint"])
def test_indices_are_the_largest_logits_and_weights_their_scores(family):
    seen, _ = _observe(_spread(build(family)), _batch())
    for observation in seen.values():
        logits, index = observation.logits.double(), observation.index
        best = logits.sort(dim=-1, descending=True, stable=True).indices[:, :2]
        assert torch.equal(index.sort(-1).values, best.sort(-1).values)
        scores = (logits.sigmoid() if family in SIGMOID else logits.softmax(-1)).gather(1, index)
        weight = observation.weight.double()
        ratio = weight[:, 0] / weight[:, 1]
        assert torch.allclose(ratio, scores[:, 0] / scores[:, 1], rtol=1e-4)


def test_keys_that_are_combined_into_experts_are_not_taken_for_logits():
    shape = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = DogeForCausalLM(DogeConfig(vocab_size=VOCAB, is_moe=True, num_experts=16, **shape))
    assert taps(model) == {}


def test_switch_transformers_is_read_with_its_drops():
    config = SwitchTransformersConfig(
        vocab_size=VOCAB, d_model=32, d_ff=24, d_kv=8, num_layers=2, num_heads=4, num_sparse_encoder_layers=1,
        num_decoder_layers=2, num_sparse_decoder_layers=2, num_experts=4, expert_capacity=2, decoder_start_token_id=0,
    )  # fmt: skip
    model = _spread(SwitchTransformersForConditionalGeneration(config)).eval()
    ids, target = torch.randint(3, VOCAB, (1, 12)), torch.randint(3, VOCAB, (1, 5))
    seen, _ = _observe(model, {"input_ids": ids, "decoder_input_ids": target})
    assert set(seen) == set(taps(model)) and len({name[:7] for name in seen}) == 2
    for name, observation in seen.items():
        assert observation.logits.shape == ((12, 4) if name.startswith("encoder") else (5, 4))
        best, index = observation.logits.argmax(-1), observation.index[:, 0]
        for expert in range(4):
            wanted = (best == expert).nonzero().flatten()
            assert index[wanted].tolist() == [expert] * min(2, len(wanted)) + [-1] * (len(wanted) - 2)


@pytest.mark.parametrize("router", ["topk", "switch", "expert_choice", "hash", "noisy_topk"])
def test_shunters_layers_are_read_as_they_route(router):
    options = {"vocab_size": 30} if router == "hash" else {}
    layer = shunter.MoE(16, 24, 4, router, capacity_factor=0.6, **options)
    ids, mask = torch.randint(30, (3, 11)), torch.rand(3, 11) < 0.7
    x = torch.randn(3, 11, 16)
    seen = []
    with listening(layer, lambda name, o: seen.append(o)):
        layer(x, mask=mask, token_ids=ids)
    (observation,) = seen
    assert torch.equal(observation.mask, mask.flatten())
    assert torch.equal(observation.hidden[mask.flatten()], x[mask])
    matrix = torch.zeros(33, 5)
    matrix.scatter_add_(1, observation.index.masked_fill(observation.index < 0, 4), observation.weight)
    assert torch.equal(matrix[:, :4], layer.routing.dense())
    assert torch.equal(observation.routing.counts, layer.routing.demand)
    if router != "expert_choice":
        assert int(observation.dropped.sum()) == layer.routing.dropped.token.numel()


@pytest.mark.parametrize("kind", ["mixtral", "shunter"])
def test_recomputation_is_not_heard(kind, build):
    model = _family("mixtral") if kind == "mixtral" else shunter.sparsify(build("llama"), 4, "topk", top_k=2)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    heard = []
    with listening(model, lambda name, o: heard.append(name)):
        model(**_clip(_batch(), model)).logits.sum().backward()
    assert heard == list(taps(model))


def test_the_model_is_left_as_it_was_even_after_an_error():
    model = _family("mixtral")
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(ZeroDivisionError), listening(model, lambda name, o: 1 / 0):
        model(**_batch())
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    layer = shunter.MoE(16, 24, 4)
    with listening(layer, lambda name, o: None):
        with pytest.raises(ValueError, match="last size"):
            layer(torch.randn(3, 5))
        layer(torch.randn(3, 16))
        copy.deepcopy(layer.router)
        pickle.dumps(layer.router)
    with pytest.raises(ZeroDivisionError), listening(layer, lambda name, o: 1 / 0):
        layer(torch.randn(3, 16))
    assert not layer.router._forward_hooks


def test_two_may_listen():
    layer, first, second = shunter.MoE(16, 24, 4), [], []
    with listening(layer, lambda name, o: first.append(o)):
        with listening(layer, lambda name, o: second.append(o)):
            layer(torch.randn(3, 16))
        layer(torch.randn(3, 16))
    assert (len(first), len(second)) == (2, 1)


def test_models_without_experts_are_refused(build):
    with pytest.raises(ValueError, match="LlamaForCausalLM has no layer whose routing can be read"):
        with listening(build("llama"), lambda name, o: None):
            pass


def _family(name):
    return _spread(build(name))


def _clip(batch, model):
    return {**batch, "input_ids": batch["input_ids"].clamp_max(model.config.vocab_size - 1)}
