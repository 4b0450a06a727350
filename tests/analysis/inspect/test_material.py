"""Material: what each kind of model is shown, and what it is scored on."""

import copy
import math

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

import shunter
from shunter.analysis.inspect.inspecting import Inspected, inspect, material_for
from shunter.analysis.inspect.material import image_material, text_material
from shunter.data.documents import Domain
from shunter.errors import UserError
from tests.analysis.inspect.subjects import BYTES, EXPERTS, LM, material_of, mixtral, random_documents, sparse, vit


def test_encoder_and_decoder_are_told_apart():
    """Hashed tokens: each side's experts follow the tokens of its own side."""
    shape = {"d_model": 32, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(vocab_size=257, pad_token_id=0, **shape))
    shunter.sparsify(model, EXPERTS, "hash")
    subject = Inspected("t5", model, None)
    found = inspect(subject, material_of(subject), ablations=1, quiet=True)["models"][0]
    assert {name.split(".")[0] for name in found["layers"]} == {"encoder", "decoder"}
    for layer in found["layers"].values():
        assert layer["follows"] == {"label": "token", "part": pytest.approx(1, abs=1e-6)}
        assert layer["tokens"] == found["targets"]
    assert math.isfinite(found["loss"])


@pytest.mark.parametrize("given", [{"tokens": 1}, {"tokens": -5}, {"length": 0}, {"length": -3}])
def test_windows_that_cannot_be_are_one_line(given):
    (name, value), *_ = given.items()
    with pytest.raises(UserError, match=f"^{name} {value} must be at least 2"):
        material_for(Inspected("mixtral", mixtral(), None), None, **given)


def test_a_masked_model_is_scored_on_its_masked_tokens():
    tokenizer = copy.deepcopy(BYTES)
    tokenizer.mask_token = tokenizer.eos_token
    shape = {key: value for key, value in LM.items() if key != "num_key_value_heads"}
    model = BertForMaskedLM(BertConfig(**shape, max_position_embeddings=64))
    shunter.sparsify(model, EXPERTS, "topk")
    material = text_material(model, tokenizer, random_documents(), tokens=2000, length=32)
    found = inspect(Inspected("bert", model, None), material, ablations=1, quiet=True)["models"][0]
    asked = torch.cat([batch.targets.flatten() for batch in material.batches])
    hidden = torch.cat([batch.inputs["input_ids"].flatten() for batch in material.batches]) == tokenizer.mask_token_id
    assert found["targets"] == int((asked != -100).sum()) and 0.1 < found["targets"] / len(asked) < 0.2
    assert bool(hidden[asked != -100].all())


def test_a_tokenizer_of_another_model_is_refused():
    model = mixtral(vocab_size=40)
    with pytest.raises(UserError, match="the model has 40 embeddings"):
        text_material(model, BYTES, random_documents())


def test_short_text_is_one_short_window_and_long_windows_fit_the_model():
    subject = sparse("topk")
    short = text_material(subject.model, BYTES, [Domain("a", ["hello there"])])
    assert short.tokens == len("hello there") + 1
    long = text_material(subject.model, BYTES, random_documents(), tokens=3000, length=10_000)
    assert long.window == 64
    assert inspect(subject, short, ablations=1, quiet=True)["complete"]


def test_each_forward_has_images_of_every_domain(monkeypatch, tmp_path):
    """Dark and light images, each with the label of its folder: a forward of one class alone would teach that class."""
    monkeypatch.setattr("shunter.analysis.inspect.material.IMAGES", 4)
    model, images = vit(tmp_path)
    (images / "light" / "0.png").unlink()
    material = image_material(model, tmp_path, [str(images)], tokens=12 * 16)
    targets = [batch.targets.tolist() for batch in material.batches]
    assert targets == [[0, 1, 0, 1], [0, 1, 0, 1], [0, 1, 0]]
    light = torch.cat([batch.inputs["pixel_values"] for batch in material.batches]).mean((1, 2, 3))
    labels = torch.tensor(sum(targets, []))
    assert light[labels == 0].max() < light[labels == 1].min()
    assert material.groups.tolist() == labels.tolist()
    assert torch.equal(material.streams[""].labels["domain"], labels.repeat_interleave(16))
