"""Early exit: the limits are the first and the last layer, what is cached is what was copied, and the promise holds."""

import math

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import shunter
from shunter.errors import UserError
from shunter.hf import early_exit as early_exiting
from shunter.hf.early_exit import early_exit, risk_p_value, smallest_safe_threshold
from tests.hf.families import build

LAYERS = 3


def llama():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=LAYERS, **sizes))


def bloom():
    return BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=LAYERS, n_head=2))


def sparse():
    return shunter.sparsify(llama(), 4, "topk", top_k=2)


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=LAYERS, n_head=2))


MODELS = {
    "llama": llama,
    "sparse": sparse,
    "gpt2": gpt2,
    "bloom": bloom,
    **{n: lambda n=n: build(n) for n in ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3")},
}


def stack(model):
    inner = model.get_decoder()
    return (inner.layers, inner.norm) if hasattr(inner, "layers") else (inner.h, inner.ln_f)


def make(name):
    model = MODELS[name]().eval()
    layers, _ = stack(model)
    with torch.no_grad():  # layers that say something, so that no two depths agree
        for p in layers.parameters():
            if p.dim() > 1:
                p.mul_(8)
    model.generation_config.pad_token_id = model.generation_config.eos_token_id = None
    return model


def generate(model, ids, steps=6):
    return model.generate(ids, max_new_tokens=steps, do_sample=False, use_cache=True)


@torch.no_grad()
def by_definition(model, ids, steps, leave):
    """Greedy generation without a cache: the states of each token in each layer are computed anew, one by one.

    A token that left keeps its state in the later layers, and others attend to keys and values made of that.
    leave(before, after, number) says whether a single state leaves.
    """
    layers, norm = stack(model)
    depths = []
    for row in range(len(ids)):
        left: dict[int, int] = {}
        tokens, taken = ids[row : row + 1].clone(), []
        for step in range(steps):
            position, kept = tokens.shape[1] - 1, {}

            def hook(number, position=position, step=step, kept=kept, left=left):
                def keep(module, args, kwargs, output):
                    given = args[0] if args else kwargs["hidden_states"]
                    out = output[0] if isinstance(output, tuple) else output
                    out = out.clone()
                    for place, depth in left.items():
                        if depth <= number:
                            out[:, place] = given[:, place]
                    if step and position in kept:
                        out[:, position] = given[:, position]
                    elif step and number + 1 < len(layers) and leave(given[0, position], out[0, position], number):
                        kept[position] = number + 1
                    return (out, *output[1:]) if isinstance(output, tuple) else out

                return keep

            handles = [layer.register_forward_hook(hook(i), with_kwargs=True) for i, layer in enumerate(layers)]
            logits = model(input_ids=tokens, use_cache=False).logits[:, -1]
            for handle in handles:
                handle.remove()
            if step:
                left[position] = kept.get(position, len(layers))
                taken.append(left[position])
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
        depths.append((tokens[0], taken))
    return torch.stack([tokens for tokens, _ in depths]), torch.tensor([taken for _, taken in depths]).T


@pytest.mark.parametrize("name", MODELS)
def test_the_limits_are_all_layers_and_the_first(name):
    model = make(name)
    ids = torch.randint(3, 64, (2, 5))
    full = generate(model, ids)
    with early_exit(model, 1.5) as taken:
        assert torch.equal(generate(model, ids), full)
    assert taken.mean_layers == len(stack(model)[0])
    with early_exit(model, 0.0) as taken:
        early = generate(model, ids)
    expected, depths = by_definition(model, ids, 6, lambda *_: True)
    assert torch.equal(early, expected) and torch.equal(torch.stack(taken.layers), depths)
    assert taken.mean_layers == 1
    assert torch.equal(generate(model, ids), full), "the model is as it was"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("confidence", ["softmax", "saturation"])
def test_in_between_each_token_leaves_where_it_is_sure(name, confidence):
    model = make(name)
    _, norm = stack(model)
    ids = torch.randint(3, 64, (1, 5))
    seen = []

    def sure(before, after, number):
        if confidence == "softmax":
            best = model.get_output_embeddings()(norm(after)).softmax(-1).sort(descending=True).values
            seen.append(float(best[0] - best[1]))
        else:
            seen.append(max(0.0, float(before @ after / before.norm() / after.norm())))
        return seen[-1] >= threshold

    threshold = 2.0
    by_definition(model, ids, 6, sure)
    ordered = sorted(seen)
    threshold = (ordered[len(ordered) // 2 - 1] + ordered[len(ordered) // 2]) / 2
    expected, depths = by_definition(model, ids, 6, sure)
    with early_exit(model, threshold, confidence) as taken:
        early = generate(model, ids)
    assert torch.equal(torch.stack(taken.layers), depths) and torch.equal(early, expected)


def test_what_is_left_out_is_not_computed():
    model = make("sparse")
    ran = []
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda m, a, o, number=number: ran.append(number))
        layer.self_attn.o_proj.register_forward_hook(lambda m, a, o, number=number: ran.append(number))
    with early_exit(model, 0.0):
        cache = model.generate(
            torch.randint(3, 64, (2, 5)), max_new_tokens=3, return_dict_in_generate=True
        ).past_key_values
    assert sorted(ran) == [0] * 2 * 3 + [1] * 2 + [2] * 2
    assert [cache.get_seq_length(i) for i in range(LAYERS)] == [7] * LAYERS


def test_the_threshold_decays_towards_nine_tenths():
    model = make("llama")
    with early_exit(model, 0.5, decay=4.0) as taken:
        generate(model, torch.randint(3, 64, (1, 4)), steps=3)
    assert len(taken.layers) == 2
    from shunter.hf.early_exit import EarlyExit, _Run

    run = _Run(EarlyExit(3), 0.5, "softmax", 4.0, None)
    run.prompt, run.step = 4, 2
    assert run.limit() == pytest.approx(0.45 + 0.1 * math.exp(-2))


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt_oss"])
def test_every_generation_begins_anew_with_a_prompt_of_one_token_or_of_states(name, monkeypatch):
    model, limits = make(name), []
    ids = torch.randint(3, 64, (2, 5))
    prompts = [
        {"input_ids": ids},
        {"input_ids": ids[:, :1]},
        {"inputs_embeds": model.get_input_embeddings()(ids[:, :3])},
    ]
    limit = early_exiting._Run.limit
    monkeypatch.setattr(early_exiting._Run, "limit", lambda run: limits.append((run.step, run.prompt)) or limit(run))
    with torch.no_grad(), early_exit(model, 0.0, decay=4.0) as taken:
        for prompt in prompts:
            model.generate(**prompt, max_new_tokens=3, do_sample=False)
    first = sorted(set(limits), key=limits.index)
    assert first == [(1, 5), (2, 5), (1, 1), (2, 1), (1, 3), (2, 3)] and len(taken.layers) == 6
    with early_exit(model, 0.0):
        early = model.generate(ids[:, :1], max_new_tokens=1, do_sample=False)
    assert torch.equal(early, model.generate(ids[:, :1], max_new_tokens=1, do_sample=False))


def test_what_cannot_leave():
    t5 = T5Config(vocab_size=32, d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2)
    for model, threshold, confidence, said in (
        (T5ForConditionalGeneration(t5), 0.5, "softmax", "no causal language model"),
        (llama(), -1.0, "softmax", "threshold -1.0"),
        (llama(), math.nan, "softmax", "threshold nan"),
        (llama(), 0.5, "entropy", "choose softmax or saturation"),
    ):
        with pytest.raises(UserError, match=said), early_exit(model, threshold, confidence):
            pass
    mamba = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4)).eval()
    with pytest.raises(UserError, match="keeps no keys and values"), early_exit(mamba, 0.5):
        pass


def test_what_wraps_a_layer_already_still_does_afterwards():
    model, calls = make("llama"), []
    inner = model.model.layers[1].forward
    wrapper = vars(model.model.layers[1])["forward"] = lambda *a, **k: calls.append(1) or inner(*a, **k)
    with early_exit(model, 0.0), early_exit(model, 1.5):
        generate(model, torch.randint(3, 64, (1, 5)), 2)
    assert vars(model.model.layers[1])["forward"] is wrapper and calls
    assert "forward" not in vars(model.model.layers[0])


def test_the_threshold_that_is_chosen_keeps_its_promise():
    """Of 400 calibrations on 200 examples, hardly more than epsilon choose a threshold whose true risk is too high."""
    thresholds = torch.linspace(0, 1, 21).tolist()
    truth = {t: 0.5 * (1 - t) ** 2 for t in thresholds}
    wrong, chosen = 0, []
    for _ in range(400):
        noise = torch.rand(200)
        losses = {t: (noise < truth[t]).double() for t in thresholds}
        found = smallest_safe_threshold(losses, tolerance=0.15, epsilon=0.1)
        wrong += found is not None and truth[found] > 0.15
        chosen.append(found)
    assert wrong <= 40 + 8 * 6, "0.1 of 400, and eight standard deviations"
    assert sum(c is not None and c < 1 for c in chosen) > 350, "and it is of use"
    assert risk_p_value(0.05, 100, 0.15) == pytest.approx(math.exp(-2))
    assert smallest_safe_threshold({1.0: torch.ones(50)}) is None
    with pytest.raises(UserError, match="from 0 to 1"):
        smallest_safe_threshold({1.0: torch.tensor([2.0])})
