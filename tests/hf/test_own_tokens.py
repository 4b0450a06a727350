"""Models that make other tokens of those that they are given, or call their masks otherwise: padding stays padding."""

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BigBirdConfig,
    BigBirdForMaskedLM,
    BridgeTowerConfig,
    BridgeTowerModel,
    CanineConfig,
    CanineForTokenClassification,
    FlavaConfig,
    FlavaModel,
    FSMTConfig,
    FSMTForConditionalGeneration,
    FunnelConfig,
    FunnelForMaskedLM,
    GitConfig,
    GitModel,
    LayoutLMv3Config,
    LayoutLMv3Model,
    LEDConfig,
    LEDForConditionalGeneration,
    LongformerConfig,
    LongformerForMaskedLM,
    LukeConfig,
    LukeForMaskedLM,
    LxmertConfig,
    LxmertModel,
    ProphetNetConfig,
    ProphetNetForConditionalGeneration,
    ReformerConfig,
    ReformerForMaskedLM,
    UdopConfig,
    UdopEncoderModel,
    ViltConfig,
    ViltModel,
    VisualBertConfig,
    VisualBertModel,
    XLNetConfig,
    XLNetLMHeadModel,
)

import shunter
from shunter.errors import UserError

_TWO = {"num_attention_heads": 2, "hidden_size": 16}
_BERT = {"num_hidden_layers": 2, "intermediate_size": 24, "pad_token_id": 0, **_TWO}
_BOTH = ("encoder", "decoder")


def _longformer():
    config = LongformerConfig(vocab_size=20, attention_window=8, sep_token_id=3, max_position_embeddings=40, **_BERT)
    return LongformerForMaskedLM(config)


def _led():
    sizes = {f"{side}_{name}": n for side in _BOTH for name, n in (("layers", 1), ("attention_heads", 2))}
    sizes |= {f"{side}_ffn_dim": 24 for side in _BOTH}
    return LEDForConditionalGeneration(
        LEDConfig(vocab_size=20, d_model=16, attention_window=8, pad_token_id=0, **sizes)
    )


def _big_bird():
    config = BigBirdConfig(vocab_size=20, block_size=4, num_random_blocks=1, sep_token_id=3, **_BERT)
    return BigBirdForMaskedLM(config)


def _reformer():
    config = ReformerConfig(
        vocab_size=20,
        attention_head_size=8,
        attn_layers=["local", "local"],
        feed_forward_size=24,
        is_decoder=False,
        local_attn_chunk_length=4,
        axial_pos_embds=False,
        max_position_embeddings=80,
        chunk_size_feed_forward=3,
        **_TWO,
    )
    return ReformerForMaskedLM(config)


def _canine():
    sizes = {"num_hash_functions": 2, "num_hash_buckets": 32, "local_transformer_stride": 8}
    return CanineForTokenClassification(CanineConfig(max_position_embeddings=80, **sizes, **_BERT))


def _funnel():
    sizes = {"d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 24}
    return FunnelForMaskedLM(FunnelConfig(vocab_size=20, block_sizes=[1, 1, 1], num_decoder_layers=1, **sizes))


def _prophetnet():
    sizes = {f"num_{side}_{name}": 2 for side in _BOTH for name in ("layers", "attention_heads")}
    sizes |= {f"{side}_ffn_dim": 24 for side in _BOTH}
    config = ProphetNetConfig(vocab_size=20, hidden_size=16, ngram=2, num_buckets=4, pad_token_id=0, **sizes)
    return ProphetNetForConditionalGeneration(config)


def _heard(model, **batch):
    """Every layer's contexts in a forward, one for each time that it ran."""
    heard = {}
    for name, layer in shunter.moe_layers(model).items():
        layer.router.register_forward_hook(lambda router, args, out, name=name: heard.setdefault(name, []).append(args))
    model(**batch)
    return {name: [context for _, context in calls] for name, calls in heard.items()}


def _halves(mask):
    """Of two tokens one, real where both are, after the first token has been doubled."""
    return torch.cat([mask[:, :1], mask[:, :-1]], 1).reshape(len(mask), -1, 2).all(-1)


MODELS = [
    (_longformer, 13),
    (_led, 13),
    (_big_bird, 62),
    (_reformer, 14),
    (_canine, 16),
    (_funnel, 16),
    (_prophetnet, 8),
]


@pytest.mark.parametrize("pads", [True, False])
@pytest.mark.parametrize("build_one, length", MODELS)
def test_padding_reaches_the_tokens_that_a_model_makes(build_one, length, pads):
    model = shunter.sparsify(build_one(), 4, "topk", top_k=2).eval()
    real = torch.ones(2, length, dtype=torch.bool)
    decoded = torch.ones(2, 5, dtype=torch.bool)
    if pads:
        real[1, int(torch.randint(3, length, ())) :] = False
        decoded[1, 3:] = False
    batch = {"input_ids": torch.randint(4, 20, (2, length)), "attention_mask": real.long()}
    if model.config.is_encoder_decoder:
        batch["labels"] = torch.randint(4, 20, (2, 5)).masked_fill(~decoded, -100)
    sizes = set()
    for name, calls in _heard(model, **batch).items():
        (context,) = calls
        size = context.shape[1]
        wanted = decoded if ".decoder." in name and build_one is not _funnel else real
        if build_one is _prophetnet and wanted is decoded:
            wanted = decoded.repeat(1, 3)
        elif build_one is _canine and size != length:
            wanted = real.reshape(2, size, -1).any(-1)
        elif build_one is _funnel:
            while wanted.shape[1] > size:
                wanted = _halves(wanted)
        elif size != wanted.shape[1]:
            wanted = F.pad(wanted, (0, size - length))
        sizes.add(size)
        found = torch.ones(context.shape) if context.mask is None else context.mask.reshape(context.shape)
        assert torch.equal(found.bool(), wanted), name
    assert sizes - {length, 5}  # some have other tokens than those given


def test_what_a_window_adds_at_the_end_is_no_token():
    """By its experts that choose, a layer sees whether what was padded counts."""
    model = shunter.sparsify(_longformer(), 4, "expert_choice", allow_leak=True).double().eval()
    ids = torch.randint(4, 20, (1, 13))
    out = model(ids).logits
    with torch.no_grad():
        model.get_input_embeddings().weight[0] = torch.randn(16)
    for layer in shunter.moe_layers(model).values():
        assert int(layer.routing.token.max()) < 13
    torch.testing.assert_close(model(ids).logits[..., 1:], out[..., 1:])  # the embedding is the head too


@pytest.mark.parametrize("router", ["hash", "position_hash"])
def test_ids_and_places_of_a_padded_window(router):
    options = {"num_positions": 64} if router == "position_hash" else {}
    model = shunter.sparsify(_longformer(), 4, router, **options).eval()
    ids = torch.randint(4, 20, (2, 13))
    for (context,) in _heard(model, input_ids=ids).values():
        if router == "hash":
            assert torch.equal(context.token_ids.reshape(2, 16)[:, :13], ids)
        else:
            assert torch.equal(context.position.reshape(2, 16)[:, :13], torch.arange(13).expand(2, 13))


@pytest.mark.parametrize("router", ["deepseek", "position_hash"])
@pytest.mark.parametrize("build_one, length", MODELS[4:])
def test_a_row_of_other_tokens_is_a_sequence_too(build_one, length, router):
    """Tokens for n-grams stand where those stand that they are of."""
    options = {"num_positions": 64} if router == "position_hash" else {"top_k": 2}
    model = shunter.sparsify(build_one(), 4, router, allow_leak=True, **options).eval()
    batch = {"input_ids": torch.randint(4, 20, (2, length))}
    if model.config.is_encoder_decoder:
        batch["labels"] = torch.randint(4, 20, (2, 5))
    for name, calls in _heard(model, **batch).items():
        (context,) = calls
        size = context.shape[1]
        assert torch.equal(context.sequence.reshape(context.shape), torch.arange(2)[:, None].expand(2, size))
        if router == "position_hash":
            places = torch.arange(5).repeat(3) if "decoder" in name and build_one is _prophetnet else torch.arange(size)
            assert torch.equal(context.position.reshape(context.shape), places.expand(2, size)), name


def test_ids_of_other_tokens_are_refused():
    model = shunter.sparsify(_canine(), 4, "hash", vocab_size=20).eval()
    with pytest.raises(ValueError, match="knows it of other tokens than this layer's"):
        model(torch.randint(4, 20, (2, 16)))


def test_tokens_are_not_cut_into_chunks():
    """A router that saw some of the tokens would have other places, sequences and slots."""
    config = BertConfig(vocab_size=20, chunk_size_feed_forward=3, **_BERT)
    model = shunter.sparsify(BertForMaskedLM(config), 4, "topk", top_k=2).eval()
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 4:] = 0
    for (context,) in _heard(model, input_ids=torch.randint(4, 20, (2, 9)), attention_mask=mask).values():
        assert torch.equal(context.mask.reshape(2, 9), mask.bool())


def test_masks_that_say_where_padding_is():
    """XLNet's input_mask is 1 at padding; what FSMT's decoder is given is the inverse of the model's mask for it."""
    sizes = {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24}
    model = shunter.sparsify(XLNetLMHeadModel(XLNetConfig(vocab_size=20, **sizes)), 4, "topk", top_k=2).eval()
    real = torch.ones(3, 7, dtype=torch.bool)
    real[1, 4:] = real[2, :2] = False
    for (context,) in _heard(model, input_ids=torch.randint(4, 20, (3, 7)), input_mask=(~real).float()).values():
        assert torch.equal(context.mask.reshape(3, 7), real)
    sizes = {f"{side}_{name}": n for side in _BOTH for name, n in (("layers", 1), ("attention_heads", 2))}
    sizes |= {f"{side}_ffn_dim": 24 for side in _BOTH}
    config = FSMTConfig(langs=["en", "de"], src_vocab_size=20, tgt_vocab_size=20, d_model=16, **sizes)
    model = shunter.sparsify(FSMTForConditionalGeneration(config), 4, "topk", top_k=2).eval()
    ids = torch.randint(4, 20, (3, 7))
    for use_cache in (False, True):  # with a cache the decoder itself is not given the mask
        batch = {"decoder_input_ids": ids, "decoder_attention_mask": real.long(), "use_cache": use_cache}
        for name, (context, *_) in _heard(model, input_ids=ids, **batch).items():
            assert context.mask is None if ".encoder." in name else torch.equal(context.mask.reshape(3, 7), real)


def _luke():
    return LukeForMaskedLM(LukeConfig(vocab_size=20, entity_vocab_size=9, entity_emb_size=8, **_BERT))


def _visual_bert():
    return VisualBertModel(VisualBertConfig(vocab_size=20, visual_embedding_dim=8, **_BERT))


def _layout_lm():
    sizes = {"coordinate_size": 3, "shape_size": 2, "max_2d_position_embeddings": 64, "input_size": 8, "patch_size": 4}
    return LayoutLMv3Model(LayoutLMv3Config(vocab_size=20, **sizes, **_BERT))


@pytest.mark.parametrize("router", ["topk", "sentence"])
@pytest.mark.parametrize("build_one", [_luke, _visual_bert, _layout_lm])
def test_what_stands_behind_the_words_has_its_own_padding(build_one, router):
    model = shunter.sparsify(build_one(), 4, router, allow_leak=True).eval()
    real, others = torch.ones(2, 8, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool)
    real[1, 5:] = others[0, 2:] = False
    batch = {"input_ids": torch.randint(4, 20, (2, 8)), "attention_mask": real.long()}
    if build_one is _luke:
        ids, places = torch.randint(1, 9, (2, 3)), torch.zeros(2, 3, 4, dtype=torch.int64)
        batch |= {"entity_ids": ids, "entity_position_ids": places, "entity_attention_mask": others.long()}
    elif build_one is _visual_bert:
        batch |= {"visual_embeds": torch.randn(2, 3, 8), "visual_attention_mask": others.long()}
    else:
        batch |= {"bbox": torch.randint(0, 50, (2, 8, 4)).sort(-1).values, "pixel_values": torch.randn(2, 3, 8, 8)}
        others = torch.ones(2, 5, dtype=torch.bool)
    wanted = torch.cat([real, others], 1)
    for (context,) in _heard(model, **batch).values():
        assert torch.equal(context.mask.reshape(context.shape), wanted)
        assert context.sequence is None or torch.equal(
            context.sequence, torch.arange(2).repeat_interleave(len(wanted[0]))
        )


_VISION = {"image_size": 8, "patch_size": 4}


def _vilt():
    return ViltModel(ViltConfig(vocab_size=20, **_VISION, **_BERT))


def _git():
    vision = {"num_hidden_layers": 1, "intermediate_size": 24, **_VISION, **_TWO}
    return GitModel(GitConfig(vocab_size=20, vision_config=vision, **_BERT))


def _udop():
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, **_VISION}
    return UdopEncoderModel(UdopConfig(vocab_size=20, pad_token_id=0, **sizes))


def _flava():
    parts = ("image", "text", "multimodal")
    sizes = {f"{part}_config": _BERT | (_VISION if part == "image" else {}) for part in parts}
    sizes["text_config"] = sizes["text_config"] | {"vocab_size": 20}
    return FlavaModel(FlavaConfig(hidden_size=16, projection_dim=16, **sizes))


@pytest.mark.parametrize(
    "build_one, before, behind",
    [(_vilt, 0, 5), (_git, 5, 0), (_udop, 0, 4), (_flava, 6, 0)],
)
def test_words_among_patches_keep_their_padding(build_one, before, behind):
    """In the layers for both, found by their number of tokens, and nothing of it reaches the patches."""
    model = shunter.sparsify(build_one(), 4, "sentence", allow_leak=True).eval()
    real = torch.ones(2, 7, dtype=torch.bool)
    real[1, 4:] = False
    batch = {"input_ids": torch.randint(4, 20, (2, 7)), "attention_mask": real.long()}
    batch["pixel_values"] = torch.randn(2, 3, 8, 8)
    if build_one is _udop:
        batch["bbox"] = torch.full((2, 7, 4), 0.1)
    wanted = F.pad(real, (before, behind), value=True)
    if build_one is _udop:
        wanted[:, -1] = False  # the patch in which the words are, whose place is padding
    both = 0
    for name, (context,) in _heard(model, **batch).items():
        if context.shape[1] == wanted.shape[1]:
            both += 1
            assert torch.equal(context.mask.reshape(context.shape), wanted), name
        else:
            assert context.mask is None or torch.equal(context.mask.reshape(context.shape), real), name
    assert both == 2


def test_as_many_other_tokens_as_words_do_not_get_their_padding():
    """BridgeTower's layers for patches are told so; for some of LXMERT's regions nothing tells, which is an error."""
    vision = {"hidden_size": 64, "num_hidden_layers": 1, **_VISION}
    text = {"vocab_size": 20, **_BERT}
    sizes = {"share_link_tower_layers": False, "num_hidden_layers": 1, "intermediate_size": 24, **_TWO}
    config = BridgeTowerConfig(text_config=text | {"num_hidden_layers": 1}, vision_config=vision, **sizes)
    model = shunter.sparsify(BridgeTowerModel(config), 4, "topk", top_k=2).eval()
    real = torch.ones(2, 5, dtype=torch.bool)
    real[1, 3:] = False
    batch = {"input_ids": torch.randint(4, 20, (2, 5)), "attention_mask": real.long()}
    heard = _heard(model, pixel_values=torch.randn(2, 3, 8, 8), **batch)
    for name, (context,) in heard.items():
        if "text" in name:
            assert torch.equal(context.mask.reshape(2, 5), real), name
        else:
            assert context.mask is None, name
    assert any("cross_modal_image" in name for name in heard) and any("cross_modal_text" in name for name in heard)
    sizes = {"intermediate_size": 24, "l_layers": 1, "r_layers": 1, "x_layers": 1, **_TWO}
    model = shunter.sparsify(LxmertModel(LxmertConfig(vocab_size=20, visual_feat_dim=8, **sizes)), 4, "topk").eval()
    batch |= {"visual_feats": torch.randn(2, 5, 8), "visual_pos": torch.rand(2, 5, 4)}
    with pytest.raises(UserError, match="nothing tells whether the tokens"):
        model(**batch)
    with shunter.tell(model, mask=torch.ones(2, 5)):
        model(**batch)


def test_what_stands_beside_the_words_does_not_get_their_padding():
    """LXMERT has layers for its pictures' regions alone, of which there may be more than words."""
    sizes = {"num_attention_heads": 2, "intermediate_size": 24, "l_layers": 1, "r_layers": 1, "x_layers": 1}
    config = LxmertConfig(vocab_size=20, hidden_size=16, visual_feat_dim=8, **sizes)
    model = shunter.sparsify(LxmertModel(config), 4, "topk", top_k=2).eval()
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[1, 5:] = 0
    batch = {"input_ids": torch.randint(4, 20, (2, 8)), "visual_feats": torch.randn(2, 11, 8)}
    batch["visual_pos"] = torch.rand(2, 11, 4)
    _heard(model, **batch)
    with pytest.raises(UserError, match="nothing tells whether the tokens"):
        model(attention_mask=mask, **batch)
