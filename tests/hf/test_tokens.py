"""What a forward's arguments say of its tokens: packed rows, caches and masks of every form are as the padded batch."""

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    ContinuousBatchingConfig,
    DataCollatorWithFlattening,
    GenerationConfig,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

import shunter
from shunter.hf.observe.listening import listening
from shunter.hf.tokens import tokens_of
from shunter.routers.registry import find, names

DRAWS = {"thor", "bernoulli"}
ROUTERS = [n for n in names() if set(find(n).needs) <= {"token_ids", "sequence", "position"} and n not in DRAWS]
LENGTHS = [5, 1, 7, 3]


def _rows(left=False):
    """Rows of ids, the padded batch (ids, mask) of them, and the flattened one."""
    rows = [torch.randint(1, 50, (length,)) for length in LENGTHS]
    ids, mask = torch.zeros(len(rows), max(LENGTHS), dtype=torch.int64), torch.zeros(len(rows), max(LENGTHS))
    for place, row in enumerate(rows):
        where = slice(-len(row), None) if left else slice(0, len(row))
        ids[place, where], mask[place, where] = row, 1
    packed = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(
        [{"input_ids": row.tolist()} for row in rows]
    )
    return rows, {"input_ids": ids, "attention_mask": mask.long()}, packed


# With a cache, which a forward makes unless told otherwise, transformers itself attends across packed sequences.
def _layers(model, **batch):
    """The logits of a forward, and the losses and the routing of every layer."""
    logits = model(**batch).logits
    return logits, {name: (layer.losses, layer.routing) for name, layer in shunter.moe_layers(model).items()}


@pytest.mark.parametrize("router", ROUTERS)
def test_a_packed_row_is_as_the_padded_batch(router, build):
    try:
        options = {"num_positions": 32} if router == "position_hash" else {}
        model = shunter.sparsify(build("llama"), 4, router, allow_leak=True, **options).double().eval()
    except ValueError as error:
        pytest.skip(str(error))
    _, padded, packed = _rows()
    logits, _ = _layers(model, **padded)
    flat, _ = _layers(model, input_ids=packed["input_ids"], position_ids=packed["position_ids"], use_cache=False)
    assert torch.allclose(flat[0], logits[padded["attention_mask"].bool()], atol=1e-9)


@pytest.mark.parametrize("router", ["deepseek", "topk", "sentence", "previous_token_hash", "position_hash"])
def test_losses_and_experts_of_a_packed_row_are_the_padded_batchs(router, build):
    options = {
        "deepseek": {"sequence_balance_loss": 0.5, "top_k": 2},
        "topk": {"top_k": 2, "load_balancing_loss": 0.5},
        "position_hash": {"num_positions": 32},
    }
    model = shunter.sparsify(build("llama"), 4, router, allow_leak=True, **options.get(router, {})).double().train()
    _, padded, packed = _rows()
    _, want = _layers(model, **padded)
    _, got = _layers(model, input_ids=packed["input_ids"], position_ids=packed["position_ids"], use_cache=False)
    real = padded["attention_mask"].flatten().nonzero().flatten()
    for name, (losses, routing) in got.items():
        assert losses.keys() == want[name][0].keys()
        for loss, value in losses.items():
            assert torch.allclose(value, want[name][0][loss], atol=1e-9), loss
        assert torch.equal(real[routing.token], want[name][1].token)
        assert torch.equal(routing.expert, want[name][1].expert)


@pytest.mark.parametrize("family", ["shunter", "transformers"])
def test_records_of_a_packed_row_and_of_the_padded_batch_replay_each_other(family, build):
    if family == "shunter":
        model = shunter.sparsify(build("llama"), 4, "topk", top_k=2).eval()
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = MixtralForCausalLM(MixtralConfig(vocab_size=50, **sizes, num_key_value_heads=2, num_local_experts=4))
        model.eval()
    _, padded, packed = _rows()
    packed = {name: packed[name] for name in ("input_ids", "position_ids")} | {"use_cache": False}
    with shunter.record(model) as one:
        model(**padded)
    with shunter.record(model) as other:
        model(**packed)
    assert one.lengths == other.lengths == LENGTHS
    assert torch.equal(one.experts, other.experts)
    with shunter.replay(model, one):
        model(**packed)
    with shunter.replay(model, other):
        model(**padded)


def _say(form, packed):
    """The packed row's arguments, its sequences told by one form alone."""
    ids = packed["input_ids"]
    number = packed["seq_idx"][0]
    together = number[:, None] == number
    causal = torch.ones(len(number), len(number)).tril().bool()
    masks = {
        "causal": (together & causal)[None, None],
        "both ways": together[None, None],
        "three sizes": together[None],
        "of numbers": torch.where(together & causal, 0.0, torch.finfo(torch.float32).min)[None, None],
    }
    if form in masks:
        return {"input_ids": ids, "attention_mask": masks[form]}
    return {"input_ids": ids, form: packed[form]}


@pytest.mark.parametrize(
    "form", ["position_ids", "seq_idx", "cu_seq_lens_q", "causal", "both ways", "three sizes", "of numbers"]
)
def test_sequences_of_a_packed_row_are_told_in_any_form(form, build):
    model = build("llama")
    _, _, packed = _rows()
    context = tokens_of(model, (), _say(form, packed))
    expected = [number for number, length in enumerate(LENGTHS) for _ in range(length)]
    assert context.sequence.flatten().tolist() == expected
    assert context.mask is None


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("blind", ["nothing", "everything"])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_read_of_a_mask_of_queries_and_keys(causal, blind, left, build):
    """Whether a row of padding sees nothing, or, as kernels need it, everything."""
    _, padded, _ = _rows(left)
    real = padded["attention_mask"].bool()
    allowed = real[:, None, None, :].expand(-1, 1, real.shape[1], -1)
    if causal:
        allowed = allowed & torch.ones(real.shape[1], real.shape[1]).tril().bool()
    if blind == "nothing":
        allowed = allowed & real[:, None, :, None]
    else:
        allowed = allowed | ~allowed.any(-1, keepdim=True)
    context = tokens_of(build("llama"), (), {"input_ids": padded["input_ids"], "attention_mask": allowed})
    assert torch.equal(context.mask, real)
    rows = torch.arange(len(LENGTHS))[:, None].expand(real.shape)
    assert torch.equal(context.sequence, rows)


def test_left_padding_with_positions_is_one_sequence(build):
    _, padded, _ = _rows(left=True)
    mask = padded["attention_mask"]
    for filled in (0, 1):
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, filled)
        context = tokens_of(build("llama"), (), {**padded, "position_ids": positions})
        assert torch.equal(context.sequence, torch.arange(len(mask))[:, None].expand(mask.shape))


@pytest.mark.parametrize("static", [False, True])
def test_positions_go_on_after_a_cache_and_skip_left_padding(static, build):
    model = shunter.sparsify(build("llama"), 4, "position_hash", num_positions=32).eval()
    _, padded, _ = _rows(left=True)
    experts = []
    layer = next(iter(shunter.moe_layers(model).values()))
    layer.router.register_forward_hook(lambda router, args, out: experts.append((args[1].position, args[1].mask)))
    more = {"cache_implementation": "static"} if static else {}
    model.generation_config.eos_token_id = None
    out = model.generate(**padded, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0, **more)
    for step, (position, mask) in enumerate(experts[1:]):
        assert mask is None
        assert position.tolist() == [length + step for length in LENGTHS]
    position, mask = experts[0]
    real = padded["attention_mask"].bool().flatten()
    assert torch.equal(mask, real)
    assert position[real].tolist() == [place for length in LENGTHS for place in range(length)]
    assert out.shape[1] == padded["input_ids"].shape[1] + 4


@pytest.mark.parametrize("router", ["previous_token_hash", "bigram_hash"])
def test_a_cache_that_hides_the_token_before_is_refused(router, build):
    model = shunter.sparsify(build("llama"), 4, router).double().eval()
    ids = torch.randint(1, 50, (2, 5))
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    out = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0, use_cache=False)
    assert torch.equal(model(out).logits[:, 4:-1].argmax(-1), out[:, 5:])


def test_padding_of_a_familys_decoder_is_not_heard():
    sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
    config = SwitchTransformersConfig(
        vocab_size=50,
        num_experts=4,
        **sizes,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    model = SwitchTransformersForConditionalGeneration(config).train()
    source, target = torch.randint(1, 50, (2, 6)), torch.randint(2, 50, (2, 4))
    heard = {}
    with listening(model, lambda name, seen: heard.setdefault(name, seen)):
        model(input_ids=source, labels=F.pad(target, (0, 3), value=-100))
    real = F.pad(torch.ones(2, 4), (0, 3)).bool().flatten()
    assert any(name.startswith("decoder") for name in heard)
    for name, seen in heard.items():
        if name.startswith("decoder"):
            assert torch.equal(seen.mask, real)
        else:
            assert seen.mask is None


@pytest.mark.parametrize("by", ["labels", "ids"])
def test_padding_of_a_decoder_does_not_count(by, build):
    """A decoder's padding is known from the labels, and without them from its ids."""
    model = shunter.sparsify(build("t5"), 4, "topk", top_k=2, load_balancing_loss=0.5).double().train()
    source, target = torch.randint(1, 50, (2, 6)), torch.randint(2, 50, (2, 4))

    def losses(extra):
        if by == "labels":
            batch = {"labels": F.pad(target, (0, extra), value=-100)}
        else:
            start = torch.zeros(2, 1, dtype=torch.int64)
            batch = {"decoder_input_ids": F.pad(torch.cat([start, target], 1), (0, extra))}
        model(input_ids=source, **batch)
        return {name: layer.losses["load_balancing_loss"] for name, layer in shunter.moe_layers(model).items()}

    short, long = losses(0), losses(5)
    for name, value in short.items():
        assert torch.allclose(value, long[name], atol=1e-12), name


def test_a_decoder_called_by_itself_knows_nothing_of_the_last_batch(build):
    model = shunter.sparsify(build("t5"), 4, "topk", top_k=2).train()
    labels = torch.randint(2, 50, (2, 5))
    labels[1, 2:] = -100
    model(input_ids=torch.randint(1, 50, (2, 6)), labels=labels)
    ids, encoded = torch.randint(2, 50, (2, 5)), torch.randn(2, 6, 32)
    model.get_decoder()(input_ids=ids, encoder_hidden_states=encoded)
    layers = shunter.moe_layers(model.get_decoder()).values()
    assert all(int(layer.routing.counts.sum()) == 2 * ids.numel() for layer in layers)


def test_a_mask_of_unknown_form_is_refused(build):
    model = shunter.sparsify(build("llama"), 4, "topk", top_k=2)
    ids = torch.randint(1, 50, (1, 6))
    with pytest.raises(ValueError, match="padding cannot be read"):
        model(ids, attention_mask=torch.ones(1, 1, 1, 6, 6))
    heard = []
    layer = next(iter(shunter.moe_layers(model).values()))
    layer.router.register_forward_hook(lambda router, args, out: heard.append(args[1].mask))
    real = torch.tensor([[True, False] * 3])
    with shunter.tell(model, mask=real):
        model(ids, attention_mask=torch.ones(1, 1, 1, 6, 6))
    assert torch.equal(heard[0], real[0])


@pytest.mark.parametrize("family", ["shunter", "transformers"])
def test_the_balance_of_sequences_is_that_of_the_padded_batch(family, build):
    if family == "shunter":
        model = shunter.sparsify(build("llama"), 4, "topk", top_k=2)
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = MixtralForCausalLM(MixtralConfig(vocab_size=50, **sizes, num_key_value_heads=2, num_local_experts=4))
    model.train()
    _, padded, packed = _rows()
    found = []
    for batch in (padded, {name: packed[name] for name in ("input_ids", "position_ids")} | {"use_cache": False}):
        balance = shunter.BalanceCallback(load_balancing_loss=1.0, scope="sequence").attach(model)
        model(**batch)
        found.append(balance.loss())
        balance.detach()
    assert torch.allclose(*found, atol=1e-6)


@pytest.mark.parametrize("least", [-1e4, -65504.0, -1e9, float("-inf")])
def test_what_forbids_is_any_large_number(least, build):
    _, padded, packed = _rows()
    real = padded["attention_mask"].bool()
    mask = torch.where(real[:, None, None], 0.0, least).expand(-1, 1, real.shape[1], -1)
    context = tokens_of(build("bert"), (), {"input_ids": padded["input_ids"], "attention_mask": mask})
    assert torch.equal(context.mask, real)
    number = packed["seq_idx"][0]
    together = torch.where(number[:, None] == number, 0.0, least)[None, None]
    context = tokens_of(build("bert"), (), {"input_ids": packed["input_ids"], "attention_mask": together})
    assert torch.equal(context.sequence[0], number)


@pytest.mark.parametrize("router", ["topk", "position_hash"])
def test_a_static_cache_of_a_window_generates_as_any(router):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(vocab_size=50, **sizes, num_key_value_heads=2, sliding_window=4)
    options = {"top_k": 2} if router == "topk" else {"num_positions": 32}
    model = shunter.sparsify(MistralForCausalLM(config), 4, router, **options).double().eval()
    ids = torch.randint(1, 50, (2, 6))
    more = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    static = model.generate(ids, cache_implementation="static", **more)
    assert torch.equal(static, model.generate(ids, **more))


def test_continuous_batching_generates_as_generate(build):
    model = shunter.sparsify(build("llama"), 4, "position_hash", num_positions=32).eval()
    for layer in shunter.moe_layers(model).values():
        layer.experts.down_proj.data.mul_(50)
    prompts = [[5, 6, 7], [8, 9]]
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    sizes = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)  # else most of the memory is taken
    found = model.generate_batch(prompts, generation_config=config, continuous_batching_config=sizes)
    for prompt, answer in zip(prompts, found.values(), strict=True):
        alone = model.generate(
            torch.tensor([prompt]), max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=-1
        )
        assert answer.generated_tokens == alone[0, len(prompt) :].tolist()


def test_sequences_of_positions_in_three_dimensions(build):
    _, _, packed = _rows()
    places = packed["position_ids"].expand(3, -1, -1)
    context = tokens_of(build("llama"), (), {"input_ids": packed["input_ids"], "position_ids": places})
    assert torch.equal(context.sequence[0], packed["seq_idx"][0].long())
