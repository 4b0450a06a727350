"""Around the layers: token ids and padding reach routers, losses reach output.loss, under any trainer."""

import copy
import warnings

import pytest
import torch
from transformers import (
    BertConfig,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    CLIPConfig,
    CLIPModel,
    FSMTConfig,
    FSMTForConditionalGeneration,
    GPT2Config,
    GPT2DoubleHeadsModel,
    Trainer,
    TrainingArguments,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    XLNetConfig,
    XLNetLMHeadModel,
)

import shunter
from shunter.context import Scope, within
from shunter.hf.hooks import install, tokens_of
from shunter.routers.registry import find, names

CAUSAL = ["llama", "gpt2"]
# The others need to be told of tasks or modalities, which no Hugging Face model knows.
IN_A_MODEL = [name for name in names() if set(find(name).needs) <= {"token_ids", "sequence", "position"}]


@pytest.mark.parametrize("router", IN_A_MODEL)
@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_padding_changes_nothing(architecture, router, build, inputs):
    if router in ("thor", "bernoulli"):
        pytest.skip("draws in evaluation too")
    try:
        model = shunter.sparsify(build(architecture), 4, router, allow_leak=True).double()  # nearer than any two scores
    except ValueError as error:
        pytest.skip(str(error))
    batch = {k: v[:1] for k, v in inputs(architecture).items() if k != "labels"}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    short = model(**batch).logits
    loads = [layer.routing.counts for layer in shunter.moe_layers(model).values()]
    padded = {k: torch.nn.functional.pad(v, (0, 5)) for k, v in batch.items()}
    long = model(**padded).logits
    assert torch.allclose(short, long[:, : short.shape[1]], atol=1e-6)
    for before, layer in zip(loads, shunter.moe_layers(model).values(), strict=True):
        assert torch.equal(before, layer.routing.counts)


def test_hash_follows_the_ids_of_each_stack(build, inputs):
    model = shunter.sparsify(build("t5"), 4, "hash")
    ids, target = torch.randint(1, 50, (1, 6)), torch.randint(1, 50, (1, 3))
    model(input_ids=ids, decoder_input_ids=target)
    for name, layer in shunter.moe_layers(model).items():
        expected = ids if name.startswith("encoder") else target
        sent = torch.empty(expected.numel(), dtype=torch.int64)
        sent[layer.routing.token] = layer.routing.expert
        assert torch.equal(sent, layer.router.table[expected.flatten()])


def test_ids_of_an_earlier_forward_are_not_used(build):
    model = shunter.sparsify(build("llama"), 4, "hash")
    model(input_ids=torch.randint(1, 50, (1, 6)))
    with pytest.raises(ValueError, match="needs token_ids"):
        model(inputs_embeds=torch.randn(1, 6, 32))


def test_generation_from_a_cache_routes_the_new_token(build):
    model = shunter.sparsify(build("llama"), 4, "hash").double()  # in which no two words are as good as equal
    ids = torch.randint(1, 50, (2, 5))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    model.generation_config.eos_token_id = None  # never shorter than 4
    out = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    full = torch.cat([mask, torch.ones(2, 4, dtype=torch.int64)], 1)
    again = model(input_ids=out, attention_mask=full, position_ids=(full.cumsum(1) - 1).clamp_min(0)).logits
    assert torch.equal(again[:, 4:-1].argmax(-1), out[:, 5:])


@pytest.mark.parametrize("architecture", [*CAUSAL, "bert", "t5", "vit"])
def test_training_loss_is_the_models_loss_plus_the_layers(architecture, build, inputs):
    options = {"top_k": 2, "z_loss": 0.01}
    model = shunter.sparsify(build(architecture), 4, "topk", **options)
    batch = inputs(architecture)
    bare = model(**batch).loss
    assert torch.equal(bare, model.eval()(**batch).loss), "in evaluation nothing is added"
    total = model.train()(**batch).loss
    assert torch.allclose(total, bare + shunter.aux_loss(model))
    assert shunter.aux_loss(model) > 0
    as_tuple = model(**batch, return_dict=False)[0]
    assert torch.allclose(as_tuple, total)
    assert torch.allclose(copy.deepcopy(model)(**batch).loss, total), "copies keep their hooks"


@pytest.mark.parametrize("architecture", CAUSAL)
def test_a_micro_batch_adds_its_share_of_the_labels_that_its_loss_counts(architecture, build, inputs):
    model = shunter.sparsify(build(architecture), 4, "topk", top_k=2).train()
    batch = inputs(architecture)
    out = model(**batch, num_items_in_batch=torch.tensor(40))
    labels = batch["labels"][:, 1:].flatten()
    nats = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), labels, ignore_index=-100, reduction="sum"
    )
    assert torch.allclose(out.loss, (nats + shunter.aux_loss(model) * (labels != -100).sum()) / 40)


def _words(*shape):
    return torch.randint(1, 9, (*shape, 6))


LOSSES = {
    "question answering": (
        lambda: BertForQuestionAnswering(_BERT),
        lambda: {
            "input_ids": _words(2),
            "start_positions": torch.tensor([1, 2]),
            "end_positions": torch.tensor([3, 2]),
        },
    ),
    "next sentence": (
        lambda: BertForNextSentencePrediction(_BERT),
        lambda: {"input_ids": _words(2), "labels": torch.tensor([0, 1])},
    ),
    "words and next sentence": (
        lambda: BertForPreTraining(_BERT),
        lambda: {"input_ids": _words(2), "labels": _words(2), "next_sentence_label": torch.tensor([0, 1])},
    ),
    "contrast": (
        lambda: CLIPModel(_CLIP),
        lambda: {"input_ids": _words(2), "pixel_values": torch.randn(2, 3, 8, 8), "return_loss": True},
    ),
    "hidden patches": (
        lambda: ViTMAEForPreTraining(_MAE),
        lambda: {"pixel_values": torch.randn(2, 3, 8, 8), "noise": torch.rand(2, 4)},
    ),
    "choice of a sequence alone": (
        lambda: GPT2DoubleHeadsModel(GPT2Config(vocab_size=9, n_embd=16, n_layer=2, n_head=2, n_inner=24)),
        lambda: {"input_ids": _words(2, 2), "mc_labels": torch.tensor([0, 1])},
    ),
}


@pytest.mark.parametrize("as_tuple", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_any_loss_of_a_model_has_the_layers_losses(loss, as_tuple):
    build, draw = LOSSES[loss]
    model, batch = build(), {**draw(), "return_dict": not as_tuple}
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    blocks = [name for name, _ in model.named_modules() if name.split(".")[-1] == "mlp"]
    if blocks:
        _replace_blocks(model)
        install(model)
    else:
        shunter.sparsify(model, 4, "topk", top_k=2)

    def value(output):
        return output[0] if as_tuple else next(v for name, v in output.items() if name.endswith("loss"))

    bare, total = value(model.eval()(**batch)), value(model.train()(**batch))
    layers = shunter.aux_loss(model)
    assert layers > 0.01
    torch.testing.assert_close(total, bare + layers)
    total.backward()
    assert all(layer.router.weight.grad.abs().sum() > 0 for layer in shunter.moe_layers(model).values())


def test_no_loss_is_taken_for_one(build, inputs):
    model = shunter.sparsify(build("llama"), 4, "topk", top_k=2).train()
    batch = inputs("llama")
    del batch["labels"]
    for options in ({}, {"return_dict": False}):
        found, expected = model(**batch, **options)[0], model.eval()(**batch, **options)[0]
        assert torch.equal(found, expected)
        model.train()


def _own_loss(model, batch):
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)


@pytest.mark.parametrize("add", [False, True])
def test_losses_that_a_training_leaves_out_are_told_of(add, build, inputs, recwarn):
    model = shunter.sparsify(build("llama"), 4, "topk", top_k=2).train()
    batch = inputs("llama")
    loss = _own_loss(model, batch)
    (loss + shunter.aux_loss(model) if add else loss).backward()
    model(**batch).loss.backward()
    (2 * model(**batch).loss).backward()
    told = [str(w.message) for w in recwarn if "auxiliary losses" in str(w.message)]
    assert len(told) == (not add)
    assert all("shunter.aux_loss(model)" in text and "BalanceCallback" in text for text in told)


@pytest.mark.parametrize("way", ["labels", "smoothing", "function", "callback"])
def test_a_trainer_that_leaves_the_losses_out_is_told_of(way, build, inputs, tmp_path, recwarn):
    model = shunter.sparsify(build("llama"), 4, "topk", top_k=2)
    options = {
        "labels": {},
        "smoothing": {},
        "function": {"compute_loss_func": lambda out, labels, **rest: out.logits.square().mean()},
        "callback": {
            "compute_loss_func": lambda out, labels, **rest: out.logits.square().mean(),
            "callbacks": [shunter.BalanceCallback()],
        },
    }[way]
    arguments = _arguments(tmp_path, label_smoothing_factor=0.1 if way == "smoothing" else 0.0)
    Trainer(model=model, args=arguments, train_dataset=_Rows(inputs("llama", batch=4)), **options).train()
    told = [str(w.message) for w in recwarn if "auxiliary losses" in str(w.message)]
    assert bool(told) == (way in ("smoothing", "function"))


@pytest.mark.parametrize("way", ["plain", "callback", "loop", "frozen"])
@pytest.mark.parametrize("router", ["deepseek", "dense_to_sparse", "topk"])
def test_state_that_no_gradient_moves_moves_or_is_told_of(router, way, build, inputs, tmp_path, recwarn):
    model = shunter.sparsify(build("llama"), 4, router, **({} if router == "dense_to_sparse" else {"top_k": 2}))
    before = {name: value.clone() for name, value in model.named_buffers() if name.split(".")[-1] in _STATE}
    batch = inputs("llama", batch=4)
    if way in ("plain", "callback"):
        callbacks = [shunter.BalanceCallback(load_balancing_loss=0)] if way == "callback" else []
        Trainer(model=model, args=_arguments(tmp_path), train_dataset=_Rows(batch), callbacks=callbacks).train()
    else:
        optimizer = torch.optim.SGD(model.parameters(), 0.1 if way == "loop" else 0.0)
        for _ in range(3):
            model.train()(**batch).loss.backward()
            if way == "loop":
                optimizer.step()
                shunter.update_routers(model)
            optimizer.zero_grad()
    told = [str(w.message) for w in recwarn if "update_routers" in str(w.message)]
    assert len(told) == (way == "plain" and router != "topk")
    assert all("BalanceCallback(load_balancing_loss=0)" in text for text in told)
    if router != "topk":
        assert len(before) == 2
        moved = [not torch.equal(dict(model.named_buffers())[name], value) for name, value in before.items()]
        assert all(moved) if way in ("callback", "loop") else not any(moved)


_STATE = ("selection_bias", "temperature")


def _arguments(folder, **options):
    return TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=2, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, learning_rate=0.01, **options,
    )  # fmt: skip


class _Rows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows["labels"])

    def __getitem__(self, i):
        return {key: value[i] for key, value in self.rows.items()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_trainer_weights_auxiliary_losses_by_tokens(accumulation, checkpointing, build, inputs, tmp_path):
    """One SGD step of a plain Trainer moves the weights by the gradient of an independent loop."""
    model = shunter.sparsify(build("llama"), 4, "topk", top_k=2, load_balancing_loss=0.5).double()
    batch = inputs("llama", batch=8)
    batch["labels"][3:, :4] = -100  # micro-batches with different numbers of labels
    micro = 8 // accumulation
    oracle = copy.deepcopy(model).train()
    labels = [batch["labels"][i : i + micro] for i in range(0, 8, micro)]
    total = sum((part[:, 1:] != -100).sum() for part in labels)
    for i in range(accumulation):
        part = {key: value[i * micro : (i + 1) * micro] for key, value in batch.items()}
        out = oracle(input_ids=part["input_ids"], attention_mask=part["attention_mask"])
        shifted = part["labels"][:, 1:]
        nats = torch.nn.functional.cross_entropy(
            out.logits[:, :-1].flatten(0, 1), shifted.flatten(), ignore_index=-100, reduction="sum"
        )
        share = (shifted != -100).sum() / total
        balance = 0
        for layer in shunter.moe_layers(oracle).values():
            balance = balance + layer.losses["load_balancing_loss"]
        (nats / total + share * balance).backward()
    expected = {name: p - 0.1 * p.grad for name, p in oracle.named_parameters() if p.grad is not None}
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=micro, use_cpu=True, report_to="none",
        gradient_accumulation_steps=accumulation, learning_rate=0.1, lr_scheduler_type="constant", optim="sgd",
        max_grad_norm=0, save_strategy="no", train_sampling_strategy="sequential", disable_tqdm=True,
        gradient_checkpointing=checkpointing, weight_decay=0.0,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=_Rows(batch)).train()
    for name, parameter in model.named_parameters():
        if name in expected:
            assert torch.allclose(parameter, expected[name], atol=1e-6), name


def _heard(model, **batch):
    """What each layer took for its mask and for its task in a forward."""
    found = {}

    def note(name):
        def hook(router, args, output):
            found[name] = args[1]

        return hook

    hooks = [layer.router.register_forward_hook(note(name)) for name, layer in shunter.moe_layers(model).items()]
    model(**batch)
    for hook in hooks:
        hook.remove()
    return found


def test_padding_of_sound_reaches_the_frames_that_convolutions_leave():
    model = Wav2Vec2ForCTC(_WAV2VEC2).eval()
    _replace_blocks(model)
    install(model)
    sound = torch.randn(2, 4000)
    mask = torch.ones(2, 4000, dtype=torch.int64)
    mask[1, 1700:] = 0
    frames = model.wav2vec2.feature_extractor(sound).shape[-1]
    expected = model._get_feature_vector_attention_mask(frames, mask, add_adapter=False)
    assert 0 < int(expected[1].sum()) < frames
    for context in _heard(model, input_values=sound, attention_mask=mask).values():
        assert torch.equal(context.mask.reshape(2, frames), expected.bool())


def _xlnet():
    return XLNetLMHeadModel(XLNetConfig(vocab_size=9, d_model=16, n_layer=2, n_head=2, d_inner=24, dropout=0.0))


def _fsmt():
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in _FSMT.items()}
    config = FSMTConfig(langs=["en", "de"], src_vocab_size=9, tgt_vocab_size=9, d_model=16, **sizes)
    return FSMTForConditionalGeneration(config)


_FSMT = {"layers": 2, "ffn_dim": 24, "attention_heads": 2}


@pytest.mark.parametrize("length", [4, 6])
@pytest.mark.parametrize("router", ["topk", "soft_moe"])
@pytest.mark.parametrize("build_one", [_xlnet, _fsmt])
def test_models_that_run_place_by_place(build_one, router, length):
    """With as many tokens as sequences nothing but the model tells which size is which."""
    options = {"topk": {"top_k": 2}}.get(router, {})
    model = shunter.sparsify(build_one(), 4, router, allow_leak=True, **options).double().eval()
    ids, mask = torch.randint(3, 9, (4, length)), torch.ones(4, length, dtype=torch.int64)
    mask[2, 2:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = torch.randint(3, 9, (4, length))
    heard = _heard(model, **batch)
    for name, context in heard.items():
        decoding = ".decoder." in name
        assert (context.mask is None) if decoding else torch.equal(context.mask.reshape(4, length), mask.bool())
        assert torch.equal(context.token_ids.reshape(4, length), batch["decoder_input_ids"] if decoding else ids)
    whole = model(**batch).logits
    for row in range(4):
        alone = model(**{name: value[row : row + 1] for name, value in batch.items()}).logits
        real = slice(None) if model.config.is_encoder_decoder else mask[row].bool()
        torch.testing.assert_close(whole[row][real], alone[0][real])


def test_a_mask_of_words_does_not_reach_patches():
    """Here a text has as many tokens as an image has patches."""
    model = CLIPModel(_CLIP).eval()
    _replace_blocks(model)
    install(model)
    mask = torch.ones(2, 5, dtype=torch.int64)
    mask[1, 3:] = 0
    found = _heard(
        model, input_ids=torch.randint(3, 9, (2, 5)), attention_mask=mask, pixel_values=torch.randn(2, 3, 8, 8)
    )
    assert {name.split(".")[0] for name in found} == {"text_model", "vision_model"}
    for name, context in found.items():
        if name.startswith("text_model"):
            assert torch.equal(context.mask.reshape(2, 5), mask.bool())
        else:
            assert context.mask is None and context.token_ids is None


def test_padding_that_cannot_be_mapped_is_an_error():
    model = CLIPModel(_CLIP).vision_model.eval()
    _replace_blocks(model)
    install(model)
    pixels, mask = torch.randn(1, 3, 8, 8), torch.ones(1, 8, 8)
    layer = next(iter(shunter.moe_layers(model).values()))

    def run():
        with within(Scope(tokens_of(_TakesAMask(), (), {"pixel_values": pixels, "pixel_mask": mask}))):
            layer(torch.randn(1, 5, 16))

    run()  # nothing is padded
    mask[0, 4:] = 0
    with pytest.raises(ValueError, match=r"mask has shape \(1, 8, 8\).*say what it is here by shunter.tell"):
        run()


def test_what_a_batch_knows_reaches_the_layers_in_a_trainer(build, inputs, tmp_path):
    model = shunter.sparsify(build("llama"), 4, "task", num_tasks=3, top_k=2, batch={"task": "task_ids"})
    batch = {**inputs("llama", batch=4), "task_ids": torch.tensor([2, 0, 1, 1])}
    heard = _heard(model, **batch)
    for context in heard.values():
        assert torch.equal(context.task.reshape(4, -1), batch["task_ids"][:, None].expand(4, context.shape[1]))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=_Rows(batch)).train()
    model.save_pretrained(tmp_path / "saved")
    again = shunter.from_pretrained(tmp_path / "saved")
    model.eval()
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    del batch["task_ids"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="the batch has no 'task_ids', by which the routers know the task"):
            model(**batch)
    with pytest.raises(ValueError, match="batch: tasks is not known of tokens"):
        shunter.sparsify(build("llama"), 4, "task", num_tasks=3, batch={"tasks": "task_ids"})


_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_WAV2VEC2 = Wav2Vec2Config(
    **_SMALL, vocab_size=9, conv_dim=(8, 8), conv_kernel=(10, 8), conv_stride=(5, 4), num_feat_extract_layers=2,
    num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
)  # fmt: skip
_CLIP = CLIPConfig(
    text_config={**_SMALL, "vocab_size": 9, "max_position_embeddings": 8, "eos_token_id": 1},
    vision_config={**_SMALL, "image_size": 8, "patch_size": 4},
    projection_dim=8,
)
_BERT = BertConfig(**_SMALL, vocab_size=9, max_position_embeddings=8)
_MAE = ViTMAEConfig(
    **_SMALL, image_size=8, patch_size=4, decoder_hidden_size=16, decoder_num_hidden_layers=1,
    decoder_num_attention_heads=2, decoder_intermediate_size=24,
)  # fmt: skip


class _TakesAMask(torch.nn.Module):
    def forward(self, pixel_values, pixel_mask):
        return pixel_values


def _replace_blocks(model):
    """An MoE in place of each feed-forward block, whatever it is called there."""
    blocks = [name for name, _ in model.named_modules() if name.split(".")[-1] in ("mlp", "feed_forward")]
    assert blocks
    for name in blocks:
        model.set_submodule(name, shunter.MoE(16, 24, 4, "topk", top_k=2))
