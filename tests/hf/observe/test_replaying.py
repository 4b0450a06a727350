"""Record and replay: the same experts, weighed by the present logits, in every family and in Shunter's layers."""

import copy
import os
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.overrides import _len_torch_function_stack
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

import shunter
from shunter import RoutingRecord, routers
from shunter.hf.observe.listening import listening
from shunter.hf.observe.taps import taps
from shunter.hf.rules import NOT_TOP_K, topk_options
from shunter.training.trainer import BalanceCallback
from tests.hf.families import BIASED, FAMILIES, VOCAB, build


def _spread(model, std=0.2):
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=std)
    return model


def _routers(model):
    return [tap.router for tap in taps(model).values()]


def _batch(batch=3, length=7, left=False):
    ids = torch.randint(3, VOCAB, (batch, length))
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        padding = row % 4
        mask[row, slice(0, padding) if left else slice(length - padding, length)] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def _rows(batch, rows):
    return {key: value[rows] for key, value in batch.items()}


def _step(model, batch):
    """Logits and gradients of one training forward."""
    model.zero_grad()
    out = model(**batch)
    out.loss.backward()
    return out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _same(one, other):
    assert torch.equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    for name, grad in one[1].items():
        assert torch.equal(grad, other[1][name]), name


def _observed(model, batch):
    seen = {}
    with listening(model, seen.__setitem__):
        model(**batch)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_the_experts_of_the_record(family):
    """Routers that would choose otherwise take the recorded experts and weigh them by the family's own rule."""
    model, batch = _spread(build(family)), _batch(left=True)
    with shunter.record(model) as r:
        before = _step(model, batch)
    assert r.experts.dtype == torch.int16 and r.experts.shape[0] == int(batch["attention_mask"].sum())
    assert r.layers == list(taps(model))
    with shunter.replay(model, r):
        _same(_step(model, batch), before)
    states = [copy.deepcopy(router.state_dict()) for router in _routers(model)]
    for router in _routers(model):
        _spread(router, std=0.5)
    free = _observed(model, batch)
    with shunter.replay(model, r):
        seen = _observed(model, batch)
    with shunter.replay(model, r):
        _step(model, batch)
    for place, (name, forced) in enumerate((name, seen[name]) for name in r.layers):
        real = forced.mask
        assert torch.equal(forced.index[real], r.experts[:, place].long())
        assert not torch.equal(forced.index[real], free[name].index[real])
        if place == 0:  # what deeper layers see of padding depends on the experts
            assert torch.equal(forced.index[~real], free[name].index[~real])
        config = model.config.get_text_config()
        if config.model_type.removesuffix("_text") not in NOT_TOP_K and family != "jetmoe":
            rule = routers.create("topk", config.hidden_size, 8, **topk_options(config))
            expected = rule.weigh(forced.logits.detach().double(), forced.index)
            assert torch.allclose(forced.weight.double(), expected, rtol=1e-4, atol=1e-6)
        assert forced.weight.isfinite().all() and bool((forced.weight[real] > 0).all())
    for router in _routers(model):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in router.parameters())
    for router, state in zip(_routers(model), states, strict=True):
        router.load_state_dict(state)
    with shunter.replay(model, RoutingRecord(r.experts, r.lengths)):
        _same(_step(model, batch), before)


FOLLOWING = [name for name in routers.names() if routers.find(name).replays]


def _moe(name, **options):
    cls = routers.find(name)
    options = {**cls.example_options, **options}
    layer = shunter.MoE(16, 24, 8, name, **options)
    for parameter in layer.router.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def _known(layer, shape):
    known = {"mask": torch.rand(shape) < 0.8}
    for name in layer.router.required:
        if name == "embedding":
            known[name] = torch.randn(*shape, layer.router.embedding_dim)
        elif name == "sequence":
            known[name] = torch.arange(shape[0])[:, None].expand(shape)
        elif name == "experts":
            known[name] = torch.rand(*shape, 8).topk(2).indices
        else:
            known[name] = torch.randint(2, shape)
    return known


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", FOLLOWING)
def test_shunters_routers_follow_bit_for_bit(name, training):
    """With capacity, padding and, in training, noise and drops by chance."""
    layer = _moe(name).train(training)
    x = torch.randn(3, 11, 16)
    known = _known(layer, x.shape[:2])

    def run():
        layer.zero_grad()
        out = layer(x, **known)
        (out.square().sum() + shunter.aux_loss(layer)).backward()
        return out.detach(), {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}

    noise = torch.get_rng_state()
    with shunter.record(layer) as r:
        before = run()
    assert r.lengths == known["mask"].sum(1).tolist()
    torch.set_rng_state(noise)  # of the jitter on the router's input, which is not a decision
    with shunter.replay(layer, r):
        _same(run(), before)
    kept = layer.routing
    for parameter in layer.router.parameters():
        nn.init.normal_(parameter, std=0.5)
    with shunter.record(layer) as again, shunter.replay(layer, r):
        run()
    assert torch.equal(again.experts, r.experts)
    assert name == "forced" or torch.equal(layer.routing.demand, kept.demand)


@pytest.mark.parametrize("name", ["expert_choice", "sinkhorn", "top_p"])
def test_routers_that_do_not_follow_say_so(name):
    layer = shunter.MoE(16, 24, 4, name)
    with shunter.record(layer) as r:
        layer(torch.randn(9, 16))
    assert r.experts.shape[:2] == (9, 1)
    with pytest.raises(
        ValueError, match=r"the layer cannot be replayed: its router \w+ \((experts|global|tokens) choose"
    ):
        with shunter.replay(layer, r):
            pass


def test_families_that_do_not_choose_by_a_top_k_say_so():
    config = SwitchTransformersConfig(
        vocab_size=VOCAB, d_model=32, d_ff=24, d_kv=8, num_layers=1, num_heads=4, num_sparse_encoder_layers=1,
        num_decoder_layers=1, num_sparse_decoder_layers=1, num_experts=4, decoder_start_token_id=0,
    )  # fmt: skip
    model = _spread(SwitchTransformersForConditionalGeneration(config)).eval()
    ids = torch.randint(3, VOCAB, (2, 6))
    with pytest.raises(ValueError, match=r"saw different tokens: encoder.* 12 in 1 forwards, decoder.* 8 in 1; record"):
        with shunter.record(model):
            model(input_ids=ids, decoder_input_ids=ids[:, :4])
    encoder = model.get_encoder()
    with shunter.record(encoder) as r:
        model(input_ids=ids, decoder_input_ids=ids[:, :4])
    other = RoutingRecord((r.experts + 1) % 4, r.lengths)
    with pytest.raises(ValueError, match=r"block.* cannot be replayed: SwitchTransformersTop1Router does not choose"):
        with shunter.replay(encoder, other):
            model(input_ids=ids, decoder_input_ids=ids[:, :4])


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "shunter"])
def test_a_generation_is_replayed_in_a_forward_over_whole_sequences(family, build_dense):
    model = (
        _spread(build(family)) if family != "shunter" else shunter.sparsify(build_dense("llama"), 4, "topk", top_k=2)
    )
    batch = _batch(left=True)
    prompt = {key: value.clamp_max(49) for key, value in batch.items() if key != "labels"}
    with shunter.record(model) as r:
        ids = model.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=True, pad_token_id=0)
    assert len(r.forwards) == 5 and set(r.forwards) == {3}
    mask = torch.cat([prompt["attention_mask"], torch.ones(3, 5, dtype=torch.int64)], 1)
    mask[2, -2:] = 0  # as after an end of sequence
    whole = r.joined(mask.sum(1))
    assert whole.lengths == mask.sum(1).tolist()
    assert bool((whole.sequences()[0][-1] == -1).all()), "the last token was sampled and never run"
    pieces = r.sequences()
    for row in range(3):
        expected = torch.cat(pieces[row::3])
        assert torch.equal(whole.sequences()[row][: len(expected)], expected[: int(mask[row].sum())])
    for router in _routers(model):
        _spread(router, std=0.5)
    with shunter.record(model) as again, shunter.replay(model, whole):
        model(input_ids=ids, attention_mask=mask)
    known = (whole.experts >= 0).all(-1)
    assert torch.equal(again.experts[known], whole.experts[known])
    assert bool((again.experts >= 0).all()), "a token that is not known chooses by itself"
    arrays = [part[:-1].numpy() if row < 2 else part.numpy() for row, part in enumerate(whole.sequences())]
    assert torch.equal(RoutingRecord.from_numpy(arrays, lengths=mask.sum(1)).experts, whole.experts)


WAYS = {
    "no cache": {"use_cache": False},
    "no cache, sampled": {"use_cache": False, "do_sample": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1},
    "assisted": {"num_assistant_tokens": 3, "assistant_confidence_threshold": 0.0},
}


def _generate(model, prompt, **options):
    model.generation_config.eos_token_id = None
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    return model.generate(**prompt, **{**settings, **options})


@pytest.mark.parametrize("new", [2, 8])
@pytest.mark.parametrize("kind", ["mixtral", "shunter"])
@pytest.mark.parametrize("way", WAYS)
def test_a_joined_record_is_that_of_the_sequences_that_were_returned(way, kind, new, build_dense):
    """However they came about: without a cache, by drafts some of which were rejected. Else it says no."""
    dense = build_dense("llama")
    model = _spread(build("mixtral") if kind == "mixtral" else shunter.sparsify(dense, 4, "topk", top_k=2)).double()
    if kind == "mixtral":
        model.set_experts_implementation("eager")  # torch's grouped product knows no float64
    prompt = {name: value.clamp_max(49) for name, value in _batch(left=True).items() if name != "labels"}
    options = {**WAYS[way], "max_new_tokens": new}
    if not way.startswith("no cache"):  # they take one sequence, and this one repeats itself
        prompt = {"input_ids": torch.randint(3, 9, (1, 5)).repeat(1, 4), "attention_mask": torch.ones(1, 20).long()}
    if way == "assisted":
        helper = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in helper.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        options["assistant_model"] = helper
    with shunter.record(model) as r:
        ids = _generate(model, prompt, **options)
    added = ids.shape[1] - prompt["input_ids"].shape[1]
    mask = torch.cat([prompt["attention_mask"], torch.ones(len(ids), added, dtype=torch.int64)], 1)
    whole = r.joined(mask.sum(1))
    with shunter.record(model) as expected, torch.no_grad():
        model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0))
    assert whole.lengths == expected.lengths
    for joined, wanted in zip(whole.sequences(), expected.sequences(), strict=True):
        assert torch.equal(joined[:-1], wanted[:-1])
        assert bool((joined[-1] == -1).all()) or torch.equal(joined[-1], wanted[-1])


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"num_return_sequences": 3}])
def test_beams_cannot_be_joined(options, tmp_path):
    model, prompt = _spread(build("mixtral")), _batch(left=True)
    del prompt["labels"]
    with shunter.record(model) as r:
        ids = _generate(model, prompt, num_beams=3, **options)
    r.save(tmp_path / "record")
    for each in (r, RoutingRecord.load(tmp_path / "record")):
        with pytest.raises(ValueError, match="did not stay the same sequences, as in beam search"):
            each.joined()
    assert len(ids) in (3, 9)
    with shunter.record(model) as again:
        _generate(model, prompt)
    assert len(again.joined().lengths) == 3, "nothing of a generation before is left behind"


@pytest.mark.parametrize("change", ["batch_select_indices", "batch_repeat_interleave", "reorder_cache"])
def test_rows_of_a_cache_that_become_others_cannot_be_joined(change):
    """As a search of one's own does it, on a cache, between two forwards of as many rows."""
    model, ids = _spread(build("mixtral")).eval(), torch.randint(1, 50, (2, 5))
    cache = DynamicCache()
    with torch.no_grad(), shunter.record(model) as r:
        model(ids[:1] if change == "batch_repeat_interleave" else ids, past_key_values=cache)
        getattr(cache, change)(2 if change == "batch_repeat_interleave" else torch.tensor([1, 0]))
        model(ids[:, -1:], past_key_values=cache)
    assert r.exchanged
    with pytest.raises(ValueError, match="joined: the (rows|forwards)"):
        r.joined()


def test_drafts_without_lengths_cannot_be_joined():
    model = _spread(build("mixtral"))
    with shunter.record(model) as r:
        model(input_ids=torch.randint(3, 50, (1, 6)), use_cache=True)
    assert r.starts == [0] and r.joined().lengths == [6]
    known = {"forwards": [1, 1], "drafts": [True, True]}
    record = RoutingRecord(torch.zeros(9, 1, 1, dtype=torch.int64), [6, 3], starts=[0, 6], **known)
    with pytest.raises(ValueError, match="give the lengths of the sequences"):
        record.joined()
    assert record.joined([8]).experts.flatten().tolist() == [0] * 7 + [-1]
    for starts in ([0, 7], [0, -1]):
        with pytest.raises(ValueError, match="record the whole generation"):
            RoutingRecord(record.experts, [6, 3], starts=starts, **known).joined([9])


@pytest.mark.parametrize("kind", ["mixtral", "shunter"])
def test_rows_that_are_all_padding_keep_their_place(kind, build_dense):
    model = build("mixtral") if kind == "mixtral" else shunter.sparsify(build_dense("llama"), 4, "topk", top_k=2)
    batch = _batch(4)
    batch["input_ids"] = batch["input_ids"].clamp_max(49)
    batch["attention_mask"][torch.tensor([0, 2])] = 0
    del batch["labels"]
    with shunter.record(model) as r:
        model(**batch)
    assert r.lengths == batch["attention_mask"].sum(1).tolist() and r.lengths[0] == r.lengths[2] == 0
    for router in _routers(model):
        _spread(router, std=0.5)
    with shunter.record(model) as again, shunter.replay(model, r):
        for row in range(4):
            model(**_rows(batch, slice(row, row + 1)))
    assert torch.equal(again.experts, r.experts)


def test_an_encoder_and_a_decoder_are_recorded_apart():
    from tests.hf.conftest import BUILD

    model = shunter.sparsify(BUILD["t5"](), 4, "topk", top_k=2).eval()
    batch = {name: value.clamp_max(49) for name, value in _batch().items() if name != "labels"}
    with shunter.record(model.get_encoder()) as encoder, shunter.record(model.get_decoder()) as decoder:
        model.generate(**batch, max_new_tokens=4, min_new_tokens=4, suppress_tokens=[0, 1])  # padding, the end
    assert encoder.lengths == batch["attention_mask"].sum(1).tolist() and encoder.forwards == [3]
    whole = decoder.joined([5] * 3)
    assert decoder.forwards == [3] * 4 and whole.lengths == [5] * 3 and bool((whole.sequences()[0][-1] == -1).all())


@pytest.fixture
def build_dense():
    from tests.hf.conftest import BUILD

    return lambda name: BUILD[name]().eval()


@pytest.mark.parametrize("family", ["olmoe", "llama4_text"])
def test_a_record_is_replayed_in_other_micro_batches(family):
    model, batch = _spread(build(family)), _batch(4)
    with shunter.record(model) as r:
        logits = model(**batch).logits
    for router in _routers(model):
        _spread(router, std=0.5)
    with shunter.record(model) as again, shunter.replay(model, r):
        for rows in (slice(0, 1), slice(1, 4)):
            model(**_rows(batch, rows))
    assert torch.equal(again.experts, r.experts) and again.forwards == [1, 3]
    assert logits.shape[0] == 4


def _checkpointed(model, reentrant=False):
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model.train()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("order", ["joint", "first in first out", "last in first out"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_recomputations_take_the_experts_of_their_forward(family, order, reentrant):
    """The record is of other routers, so that a recomputation left alone would choose other experts."""
    model = _spread(build(family)).train()
    first, second = _batch(3), _batch(3)
    with shunter.record(model) as r:
        model(**first), model(**second)
    for router in _routers(model):
        _spread(router, std=0.5)

    def run():
        model.zero_grad()
        with shunter.replay(model, r):
            losses = [model(**first).loss, model(**second).loss]
            for loss in {"joint": [sum(losses)], "first in first out": losses}.get(order, losses[::-1]):
                loss.backward()
        return losses[0].detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = run()
    _checkpointed(model, reentrant)
    got = run()
    assert torch.equal(got[0], expected[0])
    for name, grad in expected[1].items():
        assert torch.allclose(got[1][name], grad, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("kind", ["mixtral", "shunter"])
def test_recomputations_within_a_record_take_the_experts_of_their_forward(kind):
    """Routers with noise that activation checkpointing does not repeat."""
    draws = torch.Generator().manual_seed(0)

    def disturb(module, args):
        return (args[0] + torch.randn(args[0].shape, generator=draws),)

    if kind == "mixtral":
        model, batch = _checkpointed(_spread(build("mixtral"))), _batch()
        for router in _routers(model):
            router.register_forward_pre_hook(disturb)
        run = lambda: model(**batch).loss  # noqa: E731
    else:
        model = _moe("topk")
        score = model.router.score
        model.router.score = lambda x, context: score(*disturb(None, (x,)), context)
        x = torch.randn(5, 16)
        run = lambda: checkpoint(model, x, use_reentrant=False).square().sum()  # noqa: E731
    chosen = []
    for tap in taps(model).values():
        module = tap.experts or tap.layer.experts
        note = lambda m, args: chosen.append(args[1] if kind == "mixtral" else args[1].dense() != 0)  # noqa: E731
        module.register_forward_pre_hook(note)
    with shunter.record(model) as r:
        run().backward()
    forwards = len(chosen) // 2
    again = chosen[forwards:][::-1] if kind == "mixtral" else chosen[forwards:]
    assert r.experts.shape[1] == forwards
    for one, other in zip(chosen[:forwards], again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputations_of_one_and_the_same_input_take_the_experts_of_their_forward(reentrant, nested):
    """Both forwards see the same hidden states, and a record sends them to different experts."""
    layer, x = _moe("topk").train().double(), torch.randn(5, 16, dtype=torch.float64)
    layer.router.coefficients = {}
    chosen = torch.stack([torch.rand(4).argsort()[:2] for _ in range(10)])
    record = shunter.RoutingRecord(chosen[:, None], [5, 5], forwards=[1, 1])

    def inner(y):
        return checkpoint(layer, y, use_reentrant=not reentrant) if nested else layer(y)

    gradients = []
    for checkpointed in (False, True):
        layer.zero_grad()
        given = x.clone().requires_grad_()
        with shunter.replay(layer, record):
            run = (lambda y: checkpoint(inner, y, use_reentrant=reentrant)) if checkpointed else layer
            (run(given).square().sum() + 2 * run(given).square().sum()).backward()
        gradients.append({name: p.grad.clone() for name, p in layer.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected)


def test_a_balance_callback_counts_the_replayed_experts():
    model, batch = _spread(build("mixtral")).train(), _batch()
    with shunter.record(model) as r:
        model(**batch)
    for router in _routers(model):
        _spread(router, std=0.5)
    for first in (True, False):
        balance = BalanceCallback()
        if first:
            balance.attach(model)
        with shunter.replay(model, r):
            if not first:
                balance.attach(model)
            model(**batch)
        for place, load in enumerate(balance._loads.values()):
            assert torch.equal(load, torch.bincount(r.experts[:, place].flatten().long(), minlength=8))
        balance.detach()


def test_the_model_is_left_as_it_was_after_errors_and_ctrl_c():
    model, batch = _spread(build("llama4_text")), _batch()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with shunter.record(model) as r:
        model(**batch)
    for error in (ZeroDivisionError, KeyboardInterrupt):

        def fail(*args, error=error):
            raise error

        handle = _routers(model)[1].register_forward_pre_hook(fail)
        inner = model.model.layers[1].feed_forward.router.forward
        for context in (lambda: shunter.record(model), lambda: shunter.replay(model, r)):
            with pytest.raises(error), context():
                model(**batch)
            assert _len_torch_function_stack() == 0
        handle.remove()
        model.model.layers[1].feed_forward.router.forward = fail
        for context in (lambda: shunter.record(model), lambda: shunter.replay(model, r)):
            with pytest.raises(error), context():
                model(**batch)
            assert _len_torch_function_stack() == 0
        model.model.layers[1].feed_forward.router.forward = inner
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    layer = shunter.MoE(16, 24, 4, "topk")
    with shunter.record(layer) as r, pytest.raises(ValueError, match="last size"):
        layer(torch.randn(3, 5))
    assert "assign" not in vars(layer.router)


def test_files_round_trip_and_damaged_ones_are_refused(tmp_path):
    model = _spread(build("mixtral"))
    with shunter.record(model) as r:
        model(**_batch()), model(**_batch(2))
    r.save(tmp_path / "r.safetensors")
    loaded = RoutingRecord.load(tmp_path / "r.safetensors")
    for field in ("experts", "margin", "size"):
        assert torch.equal(getattr(loaded, field), getattr(r, field))
    assert (loaded.lengths, loaded.layers, loaded.forwards) == (r.lengths, r.layers, r.forwards)
    whole = (tmp_path / "r.safetensors").read_bytes()
    for cut in (0, 7, 100, len(whole) - 3):
        (tmp_path / "cut").write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="cut is not a routing record"):
            RoutingRecord.load(tmp_path / "cut")
    for about in ("[" * 10**5, '{"lengths": [1e999], "layers": null, "forwards": null}', "{}"):
        metadata = {"format": "shunter routing record 1", "record": about}
        save_file({"experts": torch.zeros(1, 1, 1, dtype=torch.int16)}, tmp_path / "cut", metadata)
        with pytest.raises(ValueError, match="cut is not a routing record"):
            RoutingRecord.load(tmp_path / "cut")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: is a FIFO"):
        RoutingRecord.load(tmp_path / "pipe")
    (tmp_path / "cut").write_bytes(whole.replace(b'\\"lengths\\": [7', b'\\"lengths\\": [8', 1))
    with pytest.raises(ValueError, match="do not add up"):
        RoutingRecord.load(tmp_path / "cut")
    with pytest.raises(FileNotFoundError):
        RoutingRecord.load(tmp_path / "none")


def _array(*shape):
    return np.argsort(np.random.default_rng().random((*shape, 8)), -1)[..., :2].astype(np.int16)


@pytest.mark.parametrize(
    "arrays, lengths, message",
    [
        (_array(4, 3)[..., 0], None, r"shape \(tokens, layers, k\)"),
        (_array(4, 3).astype(np.float32), None, "integers of shape"),
        ([_array(4, 3), _array(4, 2)], None, r"the last two alike; got .*\(4, 3, 2\), .*\(4, 2, 2\)"),
        ([_array(4, 3)], [4, 5], "2 lengths for 1 sequences"),
        ([_array(4, 3)], [6], "sequence 0 has 6 tokens, its record 4; only the last token"),
        ([_array(4, 3)], [3], "sequence 0 has 3 tokens, its record 4"),
        (np.zeros((4, 3, 2), np.int16), None, r"token 0 of a sequence has experts \[0, 0\] in layer 0"),
        (np.array([[[3, -2]]]), None, "expert -2 is out of range"),
        (_array(4, 3).astype(np.int64) + 32767, None, "is out of range; experts are 0 to 32767"),
        ([], None, "no array is given"),
    ],
)
def test_arrays_that_do_not_fit_say_why(arrays, lengths, message):
    with pytest.raises(ValueError, match=message):
        RoutingRecord.from_numpy(arrays, lengths)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda e: e[:-1], r"a forward have \[7, 6\] real tokens in model.layers.0.mlp; the next of the record"),
        (lambda e: torch.cat([e, e[:1]]), "next of the record have"),
        (lambda e: e[:, :2], "the record has 2 layers, the model 3: model.layers.0.mlp, "),
        (lambda e: e[..., :1], "model.layers.0.mlp takes 2 experts a token; 1 are given"),
        (lambda e: e.clone().fill_(-1).index_put((torch.tensor(0),), torch.tensor([7, 8], dtype=e.dtype)),
         "model.layers.0.mlp has experts 0 to 7; expert 8 is given"),
        (lambda e: e.where(torch.arange(e.numel()).reshape(e.shape) > 0, torch.tensor(-1, dtype=e.dtype)),
         "layers.0.mlp takes 2 experts a token; the record has fewer for some tokens"),
    ],
)  # fmt: skip
def test_records_that_do_not_fit_the_model_say_why(change, message):
    model, batch = _spread(build("mixtral")), _batch(2)
    with shunter.record(model) as r:
        model(**batch)
    experts = change(r.experts)
    lengths = [7, len(experts) - 7]
    with pytest.raises(ValueError, match=message):
        with shunter.replay(model, RoutingRecord(experts, lengths)):
            model(**batch)


def test_what_is_left_of_a_record_or_missing_is_told(build_dense):
    model, batch = _spread(build("mixtral")), _batch(2)
    with shunter.record(model) as r:
        model(**batch)
    with pytest.raises(ValueError, match="replayed 7 of the 13 tokens"), shunter.replay(model, r):
        model(**_rows(batch, slice(0, 1)))
    with pytest.raises(ValueError, match="it is at its end"), shunter.replay(model, r):
        model(**batch), model(**batch)
    with pytest.raises(ValueError, match=r"forwards \[2, 1\] |have \[2, 1\] sequences"):
        with shunter.record(model) as two:
            model(**batch), model(**_rows(batch, slice(0, 1)))
        two.joined()
    with (
        pytest.raises(ValueError, match="has no layer whose routing can be read"),
        shunter.record(build_dense("llama")),
    ):
        pass
    layer = shunter.MoE(16, 24, 8, "topk", top_k=3)
    with pytest.raises(ValueError, match="the layer takes 3 experts a token; the record has 2"):
        with shunter.replay(layer, RoutingRecord(r.experts[:, :1], r.lengths)):
            pass
    layer = shunter.MoE(16, 24, 4, "topk", top_k=2)
    with pytest.raises(ValueError, match="out of range; experts are 0 to 3"):
        with shunter.replay(layer, RoutingRecord(torch.tensor([[[1, 5]]]), [1])):
            layer(torch.randn(1, 16))


_BIASES = ("e_score_correction_bias", "selection_bias")


def _flips(scores, index, noise):
    """Decisions between the last taken and the first not taken that rounding may turn, by a loop in float64."""
    found = 0
    for row, taken in zip(scores.double(), index.tolist(), strict=True):
        inside = min(row[e] for e in taken)
        outside = max(row[e] for e in range(len(row)) if e not in taken)
        found += abs(inside - outside) <= noise * max(abs(inside), abs(outside))
    return found


def _make_second_and_third_alike(router):
    """Ties: of the experts in the order of their biases the third becomes the second, rows, biases and all."""
    named = {**dict(router.named_parameters()), **dict(router.named_buffers())}
    own = [tensor.data.squeeze(0) for tensor in named.values() if 8 in tensor.shape]
    bias = next((b.data.flatten() for name, b in named.items() if name.endswith(_BIASES)), torch.rand(8))
    second, third = bias.argsort(descending=True)[1:3]
    for tensor in own:
        tensor[third] = tensor[second]


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", *BIASED[:3], "shunter"])
def test_near_ties_are_those_that_bfloat16_can_turn(family):
    if family == "shunter":
        model = _moe("topk", selection_bias=True)
        model.router.selection_bias.normal_(std=0.3)
        x = torch.randn(600, 16)
        x[0] = 0  # which the biases alone decide
        run = lambda: model(x)  # noqa: E731
    else:
        model, batch = _spread(build(family, n_group=1)), _batch(40, 12)
        for name, tensor in [*model.named_buffers(), *model.named_parameters()]:
            if name.endswith("e_score_correction_bias"):
                nn.init.normal_(tensor, std=0.2)
        run = lambda: model(**batch)  # noqa: E731
    for router in _routers(model):
        _make_second_and_third_alike(router)
    seen = {}
    with shunter.record(model) as r, listening(model, seen.__setitem__):
        run()
    ties = r.near_ties()
    expected = 0
    for name, one in seen.items():
        layer = taps(model)[name].layer
        biases = [
            b for n, b in [*layer.named_buffers(), *layer.named_parameters()] if n.endswith(_BIASES) and b.numel() == 8
        ]
        scores = one.logits.detach()
        if biases:
            softmax = family == "shunter" or "ernie" in family
            scores = (scores.softmax(-1) if softmax else scores.sigmoid()) + biases[0].flatten()
        real = one.mask if one.mask is not None else slice(None)
        flips = _flips(scores[real], one.index[real], 2.0**-7)
        expected += flips
        assert abs(ties.layers[name].near_ties - flips / len(one.index[real])) < 0.004
    assert expected > 0
    assert abs(ties.decisions - expected / r.margin.numel()) < 0.004
    assert max(m.near_ties for m in ties.layers.values()) - 1e-9 <= ties.tokens <= expected / r.margin.shape[0] + 0.01
    lines = str(ties).splitlines()
    assert len(lines) == 2 + len(seen) and lines[2].startswith(next(iter(seen)))
    with pytest.raises(ValueError, match="only shunter.record notes them"):
        RoutingRecord(r.experts, r.lengths).near_ties()


def test_a_replay_holds_in_another_precision():
    model, batch = _spread(build("olmoe")), _batch(64, 32)
    with shunter.record(model) as r:
        model(**batch)
    low = copy.deepcopy(model).to(torch.bfloat16)
    with shunter.record(low) as own:
        low(**batch)
    assert not torch.equal(own.experts, r.experts), "rounding turns decisions"
    with warnings.catch_warnings(), shunter.record(low) as same, shunter.replay(low, r):
        low(**batch)
    assert torch.equal(same.experts, r.experts)


@pytest.mark.parametrize("use_cache", [True, False])
def test_two_generations_in_one_record_are_not_joined_into_one(use_cache, build_dense):
    model = shunter.sparsify(build_dense("llama"), 4, "topk", top_k=2)
    ids = torch.randint(1, 50, (2, 5))
    more = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, "use_cache": use_cache}
    with shunter.record(model) as r:
        for _ in range(2):
            model.generate(ids, **more)
    with pytest.raises(ValueError, match="more than one generation"):
        r.joined()
