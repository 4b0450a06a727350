"""Folders of sparse models and transformers' own classes: the sparse model where Shunter is there, else a refusal."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline

import shunter
from tests.helpers import TIME_LIMIT
from tests.hf.checkpoints.models import save_tokenizer
from tests.hf.conftest import VOCAB

AUTO = {
    **dict.fromkeys(("albert", "bert", "modernbert", "roberta-prelayernorm"), "AutoModelForMaskedLM"),
    "bart": "AutoModelForSeq2SeqLM",
    "t5": "AutoModelForSeq2SeqLM",
    "t5_gated": "AutoModelForSeq2SeqLM",
    "vit": "AutoModelForImageClassification",
}


def same_state(first, second):
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_auto_classes_load_the_sparse_model(architecture, build, inputs, tmp_path):
    model = shunter.sparsify(build(architecture), 4, "topk", top_k=2)
    model.save_pretrained(tmp_path)
    loaded = getattr(transformers, AUTO.get(architecture, "AutoModelForCausalLM")).from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model) and same_state(loaded, model)
    batch = inputs(architecture)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict() and not getattr(loaded, "is_quantized", False)
    assert same_state(pickle.loads(pickle.dumps(loaded)), model)
    assert type(pickle.loads(pickle.dumps(shunter.from_pretrained(str(tmp_path))))) is type(model)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    again, first = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "again", tmp_path))
    for name in ("model_type", "shunter_dense", "transformers_weights", "shunter"):
        assert again[name] == first[name]


def test_without_its_head_or_with_another(build, inputs, tmp_path):
    model = shunter.sparsify(build("llama"), 4, "deepseek", top_k=2)
    model.save_pretrained(tmp_path)
    ids = inputs("llama")["input_ids"]
    base = AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    for other in (whole, classifier):
        assert same_state(other.model, model.model)
    assert classifier.score.weight.std() > 0


def test_routers_stay_in_float32_and_train(build, inputs, tmp_path):
    shunter.sparsify(build("llama"), 4, "topk", top_k=2).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).train()
    layer = shunter.moe_layers(loaded)["model.layers.0.mlp"]
    assert layer.router.weight.dtype == torch.float32 and layer.experts.down_proj.dtype == torch.bfloat16
    loaded(**inputs("llama")).loss.backward()
    assert layer.router.weight.grad.abs().sum() > 0


def test_pipelines_take_the_folder(build, tmp_path):
    model = shunter.sparsify(build("llama"), 4, "topk", top_k=2)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": [VOCAB]}
    said = pipeline("text-generation", model=str(tmp_path))("w3 w4", return_full_text=False, **settings)
    tokens = model.generate(torch.tensor([[3, 4]]), **settings)[0].tolist()
    assert said[0]["generated_text"].split() == [f"w{token}" for token in tokens[2:]]


def test_what_shunter_writes_is_refused_where_shunter_is_not_imported(build, tmp_path):
    """In words, by each class, whether save_pretrained wrote the folder or a conversion did."""
    shunter.sparsify(build("llama"), 4, "topk", top_k=2).save_pretrained(tmp_path / "saved")
    build("llama").save_pretrained(tmp_path / "dense")
    shunter.upcycle(tmp_path / "dense", tmp_path / "upcycled", 4, to="shunter", check=False)
    for name in ("saved", "upcycled"):
        save_tokenizer(tmp_path / name)
    code = """
import json, sys
sys.modules["shunter"] = None  # importing it fails
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM, LlamaModel, pipeline
said = {}
for folder in sys.argv[1:]:
    for kind in (AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM, LlamaModel, pipeline):
        try:
            pipeline("text-generation", model=folder) if kind is pipeline else kind.from_pretrained(folder)
            said[folder + " " + kind.__name__] = None
        except Exception as error:
            said[folder + " " + kind.__name__] = str(error)
print(json.dumps(said))
"""
    names = [str(tmp_path / name) for name in ("saved", "upcycled")]
    found = subprocess.run(
        [sys.executable, "-c", code, *names], capture_output=True, check=True, text=True, timeout=TIME_LIMIT
    )
    said = json.loads(found.stdout.splitlines()[-1])
    assert len(said) == 12 and all(words and "shunter" in words for words in said.values()), said


def test_folders_from_before_the_model_type_still_load(build, inputs, tmp_path):
    model = shunter.sparsify(build("llama"), 4, "topk", top_k=2)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    assert config.pop("shunter_dense") == "llama" and config.pop("transformers_weights")
    file.write_text(json.dumps(config | {"model_type": "llama"}))
    assert same_state(shunter.from_pretrained(str(tmp_path)), model)


@pytest.mark.parametrize("dense", [None, "evil", "shunter", ["llama"]])
def test_a_dense_form_that_does_not_exist(dense, build, tmp_path):
    shunter.sparsify(build("llama"), 4, "topk", top_k=2).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shunter_dense": dense}))
    for load in (shunter.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match="which transformers does not know"):
            load(str(tmp_path))


@pytest.mark.parametrize("how", ["the whole of a part", "as transformers does", "the configuration", "a copy of it"])
def test_whoever_writes_the_configuration_writes_that_of_a_sparse_model(how, build, inputs, tmp_path):
    model = build("llama")
    shunter.sparsify(model.model if how == "the whole of a part" else model, 4, "topk", top_k=2)
    batch = inputs("llama")
    expected = model.eval()(**batch).logits
    if how == "the whole of a part":
        model.save_pretrained(tmp_path)
    else:
        type(model).save_pretrained(model, tmp_path)
    config = model.config
    if how == "a copy of it":
        config = pickle.loads(pickle.dumps(copy.deepcopy(transformers.AutoConfig.from_pretrained(tmp_path))))
    assert isinstance(config, transformers.LlamaConfig)
    assert type(config).__name__ == "LlamaConfig" and config == copy.deepcopy(config)
    (tmp_path / "config.json").unlink()
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["model_type"], written["shunter_dense"]) == ("shunter", "llama")
    assert "quantization_config" not in written
    with pytest.raises(ValueError, match="sparse experts; import shunter.hf"):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    for load in (AutoModelForCausalLM.from_pretrained, shunter.from_pretrained):
        assert torch.equal(load(str(tmp_path)).eval()(**batch).logits, expected)


_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_TEXT = {**_SMALL, "vocab_size": 9, "max_position_embeddings": 8, "eos_token_id": 1}
_VISION = {**_SMALL, "image_size": 8, "patch_size": 4}


def _clip():
    config = transformers.CLIPConfig(text_config=_TEXT, vision_config=_VISION, projection_dim=8)
    return transformers.CLIPModel(config)


def _llava():
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**_TEXT),
        vision_config=transformers.CLIPVisionConfig(**_VISION),
        image_token_index=3,
    )
    return transformers.LlavaForConditionalGeneration(config)


WHOLES = [
    (_clip, "vision_model", AutoModel),
    (_clip, "text_model", AutoModel),
    (_llava, "model.vision_tower", transformers.AutoModelForImageTextToText),
    (_llava, "model.language_model", transformers.AutoModelForImageTextToText),
]


@pytest.mark.parametrize("build_one, part, auto", WHOLES)
def test_a_whole_with_one_sparse_part_loads_by_its_name(build_one, part, auto, tmp_path):
    dense = build_one()
    model = shunter.sparsify(copy.deepcopy(dense), 4, "topk", top_k=2, within=part)
    assert model.state_dict().keys() - dense.state_dict().keys()
    assert all(name.startswith(f"{part}.") for name in model.state_dict().keys() ^ dense.state_dict().keys())
    model.save_pretrained(tmp_path)
    for load in (auto, shunter):
        loaded = load.from_pretrained(str(tmp_path))
        assert type(loaded) is type(model) and same_state(loaded, model)
    with pytest.raises(ValueError, match="sparse experts; import shunter.hf"):
        type(model).from_pretrained(tmp_path)


def test_a_part_without_blocks_is_refused():
    with pytest.raises(shunter.errors.UserError, match="'visual_projection' has no .* text_model.encoder.layers.0.mlp"):
        shunter.sparsify(_clip(), 4, "topk", top_k=2, within="visual_projection")


def test_a_part_that_was_made_sparse_by_itself_loads_by_no_name(tmp_path):
    """What lies in the folder is all there, and the part can be made again."""
    dense = _clip()
    model = copy.deepcopy(dense)
    shunter.sparsify(model.vision_model, 4, "topk", top_k=2)
    model.config.to_dict()  # as loggers do
    with pytest.warns(UserWarning, match="whose CLIPVision part alone is sparse: nothing loads the folder"):
        model.save_pretrained(tmp_path)
    for load in (transformers.CLIPModel, AutoModel, shunter):
        with pytest.raises(Exception, match="this part are Shunter's sparse experts; sparsify the part"):
            load.from_pretrained(str(tmp_path))
    again = copy.deepcopy(dense)
    shunter.sparsify(again.vision_model, 4, "topk", top_k=2)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert same_state(again, model)


@pytest.mark.parametrize("source", ["the model", "the folder", "a copy", "a loaded model"])
@pytest.mark.parametrize("architecture", ["llama", "t5", "vit"])
def test_nothing_makes_a_dense_model_of_a_sparse_ones_configuration(architecture, source, build, tmp_path):
    model = shunter.sparsify(build(architecture), 4, "topk", top_k=2)
    model.save_pretrained(tmp_path)
    auto = getattr(transformers, AUTO.get(architecture, "AutoModelForCausalLM"))
    config = {
        "the model": lambda: model.config,
        "the folder": lambda: transformers.AutoConfig.from_pretrained(tmp_path),
        "a copy": lambda: pickle.loads(pickle.dumps(copy.deepcopy(model.config))),
        "a loaded model": lambda: shunter.from_pretrained(str(tmp_path)).config,
    }[source]()
    for make in (auto.from_config, AutoModel.from_config):
        with pytest.raises(shunter.errors.UserError, match="configuration is of a sparse model"):
            make(config)
    if source in ("the model", "a copy"):  # which say nothing of where the weights are
        for load in (auto.from_pretrained, type(model).from_pretrained):
            with pytest.raises(shunter.errors.UserError, match="this is its dense form"):
                load(tmp_path, config=config)
    told = pytest.warns(UserWarning, match="this is its dense form")
    if source == "the folder":
        told = pytest.raises(shunter.errors.UserError, match="this is its dense form")
    with told:
        type(model)(config)
    model.set_attn_implementation("eager")  # is no construction


def test_a_model_inside_is_saved_as_sparse_or_not_at_all(build, inputs, tmp_path):
    model = shunter.sparsify(build("llama"), 4, "topk", top_k=2)
    model.model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert len(shunter.moe_layers(loaded)) == len(shunter.moe_layers(model))
    ids = inputs("llama")["input_ids"]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids).last_hidden_state, model.model(ids).last_hidden_state)
    encoder = shunter.sparsify(build("t5"), 4, "topk", top_k=2).get_encoder()
    with pytest.raises(shunter.errors.UserError, match="part of a sparse T5ForConditionalGeneration"):
        encoder.save_pretrained(tmp_path / "encoder")


@pytest.mark.parametrize("options", [{"dtype": "auto"}, {"dtype": torch.bfloat16}, {"trust_remote_code": True}])
def test_options_of_loading_are_transformers(options, build, tmp_path):
    model = shunter.sparsify(build("llama"), 4, "topk", top_k=2)
    model.to(torch.bfloat16 if options.get("dtype") == "auto" else torch.float32).save_pretrained(tmp_path)
    loaded = shunter.from_pretrained(str(tmp_path), **options)
    assert loaded.dtype == (torch.bfloat16 if "dtype" in options else torch.float32)
