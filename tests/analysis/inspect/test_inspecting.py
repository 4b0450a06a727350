"""Inspection: planted routing is named, removals equal an independent loop, every broken input is one line."""

import base64
import copy
import io
import json
import math
import os
import re
import signal
from html.parser import HTMLParser

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from PIL import Image

import shunter
from shunter import Routing, cli, routers
from shunter.analysis.inspect import inspecting as room
from shunter.analysis.inspect import recording
from shunter.analysis.inspect.inspecting import Inspected, inspect, load, specialisation
from shunter.analysis.inspect.material import Document, image_material, text_material
from shunter.analysis.inspect.recording import batch_losses
from shunter.analysis.inspect.tokens import KINDS, kind
from shunter.analysis.pages.inspect_figures import patch_sheet
from shunter.analysis.pages.inspect_page import LABELS, render
from shunter.data.windows import _tokenizer
from shunter.errors import UserError
from shunter.hf.observe.taps import taps
from shunter.recipes.sections import DataConfig
from tests.hf import families

EXPERTS = 4
LM = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
LETTERS = "abcdefgh ,.1ABC"


class Planted(routers.Router):
    """Sends each token to the expert that `rule` of (token ids, sequence, position) says."""

    chooses = "tokens"
    source = "this test"
    needs = ("token_ids", "sequence", "position")
    rule = None

    def __init__(self, dim, num_experts, *, device=None, dtype=None):
        super().__init__(dim, num_experts)

    def score(self, x, context=None):
        ids, sequence, position = context.token_ids, context.sequence, context.position
        expert = type(self).rule(ids, sequence, position) % self.num_experts
        return torch.nn.functional.one_hot(expert, self.num_experts).float() * 5

    def choose(self, logits, context):
        index = logits.argmax(-1, keepdim=True)
        return Routing.from_topk(index, torch.ones(index.shape), self.num_experts)


@pytest.fixture
def plant(monkeypatch):
    """Makes Planted a router by name, going by a rule."""
    monkeypatch.setitem(routers.registry._ROUTERS, "planted", Planted)
    return lambda rule: monkeypatch.setattr(Planted, "rule", staticmethod(rule))


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves the figures' drawing out, which takes most of the time, where only the words matter."""
    monkeypatch.setattr("shunter.analysis.pages.html.to_svg", lambda figure, name, title: "<svg></svg>")


def _marked(ids, sequence, mark):
    """Whether a token's sequence holds the mark."""
    has = torch.zeros(int(sequence.max()) + 1, dtype=torch.int64).index_add(0, sequence, (ids == mark).long())
    return has[sequence].clamp_max(1)


BYTES = _tokenizer(DataConfig(tokenizer="bytes"), [])
MARK = BYTES.backend_tokenizer.encode("Q").ids[0]
RANK = BYTES.backend_tokenizer.encode("Z").ids[0]
RULES = {
    "token": lambda ids, sequence, position: ids * 7 // 3,
    "previous": lambda ids, sequence, position: torch.where(position > 0, ids.roll(1) * 7 // 3, 0),
    "position": lambda ids, sequence, position: position,
    "domain": lambda ids, sequence, position: _marked(ids, sequence, MARK),
    "language": lambda ids, sequence, position: _marked(ids, sequence, MARK) + 2 * _marked(ids, sequence, RANK),
    "kind": lambda ids, sequence, position: torch.tensor(
        [KINDS.index("special" if i == BYTES.eos_token_id else kind(BYTES.decode([i]))) for i in ids.tolist()]
    ),
    None: lambda ids, sequence, position: torch.randint(EXPERTS, ids.shape),
}


def _letters(count):
    return "".join(LETTERS[i] for i in torch.randint(len(LETTERS), (count,)).tolist())


def _documents(length=32):
    """Random letters in two domains, one of them in two languages; a mark in every window tells which."""
    found = []
    for domain, language, marks in (("a", None, ""), ("b", "x", "Q"), ("b", "y", "QZ")):
        for _ in range(40):
            text = "".join(_letters(6) + (marks[i % len(marks)] if marks else "") for i in range(12))
            found.append(Document(text, domain, language))
    return found


def _sparse(router="topk", **options):
    model = LlamaForCausalLM(LlamaConfig(**LM, max_position_embeddings=64))
    shunter.sparsify(model, EXPERTS, router, **options)
    return Inspected("sparse", model.eval(), None)


def _mixtral(**changes):
    shape = LM | {"num_local_experts": EXPERTS, "num_experts_per_tok": 2} | changes
    return MixtralForCausalLM(MixtralConfig(**shape, max_position_embeddings=64)).eval()


def _material(subject, tokens=6000, length=32):
    return text_material(subject.model, BYTES, _documents(), tokens=tokens, length=length)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("label", RULES)
def test_planted_specialisation_is_named(plant, label):
    plant(RULES[label])
    subject = _sparse("planted")
    if label == "language":  # of one domain alone, or a language would tell nothing that the domain does not
        documents = [d for d in _documents() if d.domain == "b"] + [Document(_letters(400), "b", "z")] * 6
        material = text_material(subject.model, BYTES, documents, tokens=6000, length=32)
    else:
        material = _material(subject)
    findings = inspect(subject, material, ablations=0, quiet=True)
    for layer in findings["models"][0]["layers"].values():
        if label is None:
            assert layer["follows"] is None
            assert all(abs(row["adjusted"]) < 0.05 for row in layer["information"].values() if row["adjusted"])
        else:
            assert layer["follows"]["label"] == label
            assert layer["follows"]["part"] == pytest.approx(1, abs=1e-6)
            row = layer["information"][label]
            assert row["bits"] == pytest.approx(row["entropy"], abs=1e-6)
    page = render(findings)
    if label is None:
        assert "None of the labels looked at decides" in page
    else:
        assert f"In all layers {LABELS[label]} decides most: 100\u00a0% of the routing" in page


def test_a_planted_expert_shows_its_tokens_its_domain_and_the_dead(plant):
    plant(lambda ids, sequence, position: (ids == MARK).long())
    subject = _sparse("planted")
    findings = inspect(subject, _material(subject), ablations=0, quiet=True)
    for layer in findings["models"][0]["layers"].values():
        assert layer["dead"] == [2, 3]
        [[text, share, lift]] = layer["tokens_served"][1]
        assert text == "Q" and share == 1 and lift > 5
        assert layer["serves"]["domain"]["a"][1] == 0 < layer["serves"]["domain"]["b"][1]
        assert layer["experts_per_token"] == 1 and layer["together"] is None
        assert layer["balance"] == pytest.approx(EXPERTS * max(layer["load"]))


def _rows_of(found):
    return [(name, e, row) for name, layer in found["layers"].items() for e, row in enumerate(layer["ablation"]) if row]


def test_removing_an_expert_equals_an_independent_loop(monkeypatch):
    """Against the layer with the expert's triples taken out of the routing; and transformers' against zero weights."""
    subject = _sparse("topk", top_k=2, backend="reference")
    other = Inspected("mixtral", _mixtral(), None)
    for one in (subject, other):
        material = _material(one, tokens=400)
        before = copy.deepcopy(one.model.state_dict())
        found = inspect(one, material, quiet=True)["models"][0]
        assert all(torch.equal(before[name], value) for name, value in one.model.state_dict().items())
        whole = torch.cat([batch_losses(one.model, batch) for batch in material.batches]).nanmean()
        assert found["loss"] == pytest.approx(float(whole), rel=1e-5)
        rows = _rows_of(found)
        assert len(rows) == 2 * EXPERTS
        for name, expert, row in rows:
            experts = one.model.get_submodule(name).experts
            if one is subject:
                inner = experts.forward
                kept = {"forward": lambda x, routing, e=expert, f=inner: f(x, routing.select(routing.expert != e))}
                monkeypatch.setattr(experts, "forward", kept["forward"])
                alone = torch.cat([batch_losses(one.model, batch) for batch in material.batches])
                monkeypatch.setattr(experts, "forward", inner)
            else:
                hook = experts.register_forward_pre_hook(
                    lambda m, args, e=expert: (args[0], args[1], args[2].masked_fill(args[1] == e, 0.0))
                )
                alone = torch.cat([batch_losses(one.model, batch) for batch in material.batches])
                hook.remove()
            assert row["rise"] == pytest.approx(float(alone.nanmean() - whole), abs=2e-5)


def test_the_busiest_experts_are_removed_first_and_the_rest_is_said():
    subject = _sparse("topk")
    findings = inspect(subject, _material(subject, tokens=400), ablations=3, quiet=True)
    found = findings["models"][0]
    assert len(_rows_of(found)) == 3
    for layer in found["layers"].values():
        done = [e for e, row in enumerate(layer["ablation"]) if row]
        assert max(range(EXPERTS), key=lambda e: layer["load"][e]) in done
    assert "3 busiest of" in findings["notices"][0]


@pytest.mark.usefixtures("undrawn")
def test_the_same_checkpoint_is_saturated_and_has_not_moved():
    subject = _sparse("topk", top_k=2)
    findings = inspect(subject, _material(subject, 800), earlier=subject, ablations=0, quiet=True)
    for layer in findings["comparison"]["layers"].values():
        assert layer["saturation"] == 1 and layer["load_moved"] == 0
        assert layer["weights_moved"] == [0.0] * EXPERTS
        assert layer["chance"] < 1
    assert "100\u00a0% of the routing decisions are the same" in render(findings)


@pytest.mark.usefixtures("undrawn")
def test_another_checkpoint_differs_and_is_compared_domain_by_domain():
    subject, earlier = _sparse("topk", top_k=2), _sparse("topk", top_k=2)
    findings = inspect(subject, _material(subject, 800), earlier=earlier, ablations=0, quiet=True)
    for layer in findings["comparison"]["layers"].values():
        assert layer["saturation"] < 1 and min(layer["weights_moved"]) > 0.5
    page = render(findings)
    assert "What changed between the two checkpoints" in page
    assert findings["models"][0]["domain_loss"].keys() == {"a", "b"}


def test_two_runs_give_the_same_json_and_leave_the_model_as_it_was():
    subject = _sparse("topk", top_k=2)
    subject.model.train()
    before = copy.deepcopy(subject.model.state_dict())
    documents = _documents()
    found = []
    for _ in range(2):
        material = text_material(subject.model, BYTES, documents, tokens=1500, length=32)
        found.append(json.dumps(inspect(subject, material, ablations=2, quiet=True), allow_nan=False))
        torch.rand(3)  # another state of torch's generator
    assert found[0] == found[1]
    assert subject.model.training
    assert all(torch.equal(before[name], value) for name, value in subject.model.state_dict().items())


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("stage", "after"),
    [("routing", 2), ("what experts serve", 1), ("experts' weights", 1), ("removing experts", 3)],
)
def test_ctrl_c_leaves_what_there_is(monkeypatch, stage, after):
    def stopping(self, items, what, total):
        for number, item in enumerate(items):
            if what == stage and number == after:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(room._Progress, "steps", stopping)
    subject = _sparse("topk", top_k=2)
    material = _material(subject, 4000)
    before = copy.deepcopy(subject.model.state_dict())
    findings = inspect(subject, material, quiet=True)
    assert not findings["complete"] and findings["notices"][-1].startswith("Stopped early")
    first, second = findings["models"][0]["layers"].values()
    expected = sum(b.targets.numel() for b in material.batches[:2]) if stage == "routing" else material.tokens
    assert first["tokens"] == expected and first["information"]
    assert (second["information"] is None) == (stage == "what experts serve")
    assert (first["ablation"] is None) == (stage != "removing experts")
    assert "Stopped early" in render(findings)
    assert all(torch.equal(before[name], value) for name, value in subject.model.state_dict().items())
    if stage == "routing":
        monkeypatch.setattr(room._Progress, "steps", lambda self, items, what, total: _at_once())
        with pytest.raises(KeyboardInterrupt):
            inspect(subject, material, quiet=True)


def _at_once():
    raise KeyboardInterrupt
    yield


def test_two_checkpoints_see_the_same_where_ctrl_c_comes_during_the_first(monkeypatch):
    passes = []

    def stopping(self, items, what, total):
        passes.append(what)
        for number, item in enumerate(items):
            if passes == ["routing"] and number == 2:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(room._Progress, "steps", stopping)
    one, other = _sparse("topk", top_k=2), _sparse("topk", top_k=2)
    material = _material(one, 4000)
    findings = inspect(other, material, earlier=one, quiet=True)
    assert passes.count("routing") == 2 and not findings["complete"]
    seen = sum(batch.targets.numel() for batch in material.batches[:2])
    for model in findings["models"]:
        assert all(layer["tokens"] == seen and layer["information"] for layer in model["layers"].values())
    assert all(0 < layer["saturation"] < 1 for layer in findings["comparison"]["layers"].values())


@pytest.mark.usefixtures("undrawn")
def test_ctrl_c_on_the_command_line_leaves_a_report_and_exit_code_130(monkeypatch, capsys, tmp_path, text_file):
    """Two signals as the terminal sends them: one during the forwards, one while experts are removed."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as Python has it, whatever ran before
    folder = _saved(tmp_path / "model", _mixtral(num_hidden_layers=1))
    capsys.readouterr()
    arguments = ["--data", text_file, "--out", tmp_path / "r", "--tokens", 4000, "--length", 32]
    for name in ("batch_losses", "ablate"):
        where = room if name == "ablate" else recording
        inner, calls = getattr(where, name), []

        def interrupted(*args, inner=inner, calls=calls):
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return inner(*args)

        with monkeypatch.context() as patched:
            patched.setattr(where, name, interrupted)
            code, printed = _run(capsys, folder, *arguments)
        assert code == 130 and "Report: " in printed.err and "Traceback" not in printed.err
        findings = json.loads((tmp_path / "r" / "inspect.json").read_text())
        assert not findings["complete"] and "Stopped early" in (tmp_path / "r" / "inspect.html").read_text()
        [layer] = findings["models"][0]["layers"].values()
        if name == "ablate":
            assert sum(row is not None for row in layer["ablation"]) == 1
        else:
            assert findings["models"][0]["targets"] < 1000 and layer["ablation"] is None


def test_progress_is_shown_unless_it_is_to_be_quiet(capsys):
    subject = _sparse("topk")
    material = _material(subject, 400)
    for quiet in (False, True):
        inspect(subject, material, ablations=1, quiet=quiet)
        shown = capsys.readouterr().err
        for what in ("routing", "what experts serve", "experts' weights", "removing experts"):
            assert (what in shown) is not quiet


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_of_transformers_is_measured_whole(family):
    """And the rise without an expert is that of the same forward with the expert's combine weights at zero."""
    model = families.build(family, vocab_size=257)
    subject = Inspected(family, model, None)
    material = _material(subject, tokens=400)
    found = inspect(subject, material, ablations=1, quiet=True)["models"][0]
    assert found["layers"] and math.isfinite(found["loss"])
    for layer in found["layers"].values():
        assert layer["tokens"] == material.tokens and layer["experts_per_token"] == pytest.approx(2)
        assert all(layer[key] is not None for key in ("information", "together", "margins", "tokens_served"))
        assert layer["similarity"].keys() == {"cosine", "gram"}
    [(name, expert, row)] = _rows_of(found)
    experts = taps(model)[name].experts
    if experts is None:  # Llama 4 and JetMoE decide within
        assert math.isfinite(row["rise"])
        return

    def without(module, args):
        return args[0], args[1], args[2].masked_fill(args[1] == expert, 0.0)

    whole = torch.cat([batch_losses(model, batch) for batch in material.batches])
    hook = experts.register_forward_pre_hook(without)
    alone = torch.cat([batch_losses(model, batch) for batch in material.batches])
    hook.remove()
    assert row["rise"] == pytest.approx(float((alone - whole).nanmean()), abs=2e-5)


def test_encoder_and_decoder_are_told_apart():
    """Hashed tokens: each side's experts follow the tokens of its own side."""
    shape = {"d_model": 32, "d_ff": 24, "d_kv": 8, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(vocab_size=257, pad_token_id=0, **shape))
    shunter.sparsify(model, EXPERTS, "hash")
    subject = Inspected("t5", model, None)
    found = inspect(subject, _material(subject), ablations=1, quiet=True)["models"][0]
    assert {name.split(".")[0] for name in found["layers"]} == {"encoder", "decoder"}
    for layer in found["layers"].values():
        assert layer["follows"] == {"label": "token", "part": pytest.approx(1, abs=1e-6)}
        assert layer["tokens"] == found["targets"]
    assert math.isfinite(found["loss"])


def test_a_masked_model_is_scored_on_its_masked_tokens():
    tokenizer = copy.deepcopy(BYTES)
    tokenizer.mask_token = tokenizer.eos_token
    shape = {key: value for key, value in LM.items() if key != "num_key_value_heads"}
    model = BertForMaskedLM(BertConfig(**shape, max_position_embeddings=64))
    shunter.sparsify(model, EXPERTS, "topk")
    material = text_material(model, tokenizer, _documents(), tokens=2000, length=32)
    found = inspect(Inspected("bert", model, None), material, ablations=1, quiet=True)["models"][0]
    asked = torch.cat([batch.targets.flatten() for batch in material.batches])
    hidden = torch.cat([batch.inputs["input_ids"].flatten() for batch in material.batches]) == tokenizer.mask_token_id
    assert found["targets"] == int((asked != -100).sum()) and 0.1 < found["targets"] / len(asked) < 0.2
    assert bool(hidden[asked != -100].all())


def test_routing_that_is_capped_reports_its_drops():
    subject = _sparse("switch", capacity_factor=0.5, eval_capacity_factor=0.5, allow_leak=True)
    layer = next(
        iter(inspect(subject, _material(subject, 2000), ablations=0, quiet=True)["models"][0]["layers"].values())
    )
    assert layer["dropped"] > 0.3
    assert sum(layer["load"]) == pytest.approx(1)


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in {"meta", "br", "link", "img", "input", "hr"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def _saved(path, model, tokenizer=BYTES):
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def text_file(tmp_path):
    file = tmp_path / "text.jsonl"
    hostile = ["</script><script>alert(1)</script>", "\u202eevil", "{{ 7 * 7 }}", "\x00"]
    rows = [{"text": d.text, "domain": d.domain, "language": d.language} for d in _documents()]
    rows += [{"text": text * 20, "domain": text.strip("\x00") or "nul"} for text in hostile]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def _run(capsys, *arguments):
    code = cli.main(["inspect", *map(str, arguments)])
    return code, capsys.readouterr()


@pytest.mark.parametrize("whose", ["theirs", "ours"])
def test_the_verb_on_folders_of_transformers_and_of_shunter(request, capsys, tmp_path, text_file, whose):
    if whose == "theirs":
        request.getfixturevalue("undrawn")
    model = _mixtral(num_hidden_layers=1) if whose == "theirs" else _sparse("topk", top_k=2).model
    folder, out = _saved(tmp_path / whose, model), tmp_path / "report"
    code, printed = _run(
        capsys, folder, "--data", text_file, "--out", out, "--tokens", 1500, "--length", 32, "--ablate", 3, "--json"
    )
    assert code == 0, printed.err
    findings = json.loads((out / "inspect.json").read_text())
    assert json.loads(printed.out) == findings and findings["complete"]
    text = (out / "inspect.html").read_text()
    page = Page(text)
    assert page.open == [] and "script" not in page.tags
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert "49" not in re.findall(r"\{\{ 7 \* 7 \}\}|>49<", text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069]", text)
    assert text.count("<svg") > 8


@pytest.mark.usefixtures("undrawn")
def test_before_and_after_on_the_command_line(capsys, tmp_path, text_file):
    before, after = _saved(tmp_path / "before", _mixtral()), tmp_path / "after"
    model = MixtralForCausalLM.from_pretrained(before)
    with torch.no_grad():
        for parameter in model.model.layers[0].parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    _saved(after, model)
    code, printed = _run(
        capsys,
        before,
        after,
        "--data",
        text_file,
        "--out",
        tmp_path / "r",
        "--tokens",
        600,
        "--length",
        32,
        "--ablate",
        0,
    )
    assert code == 0, printed.err
    findings = json.loads((tmp_path / "r" / "inspect.json").read_text())
    assert (findings["comparison"]["before"], findings["comparison"]["after"]) == ("before", "after")
    first, second = findings["comparison"]["layers"].values()
    assert min(first["weights_moved"]) > 0 and max(second["weights_moved"]) == 0


def _broken(kind, tmp_path):
    folder = tmp_path / "model"
    if kind == "missing folder":
        return [folder]
    if kind == "no config":
        folder.mkdir()
        return [folder]
    if kind == "dense":
        return [_saved(folder, LlamaForCausalLM(LlamaConfig(**LM)))]
    _saved(folder, _mixtral())
    weights = folder / "model.safetensors"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif kind == "bad header":
        weights.write_bytes(b"\xff" * 64)
    elif kind == "pickle":
        weights.unlink()
        torch.save({}, folder / "pytorch_model.bin")
    elif kind == "weights missing":
        from safetensors.torch import load_file, save_file

        tensors = load_file(weights)
        save_file({n: t for n, t in tensors.items() if "layers.1" not in n}, weights, {"format": "pt"})
    elif kind in ("index outside", "shard missing"):
        from safetensors import safe_open

        outside = weights.rename(tmp_path / "elsewhere.safetensors")
        shard = "../elsewhere.safetensors" if kind == "index outside" else "gone.safetensors"
        with safe_open(outside, "pt") as file:
            index = {"metadata": {}, "weight_map": dict.fromkeys(file.keys(), shard)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif kind == "wrong shapes":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    elif kind == "unknown architecture":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": ["NoSuchForCausalLM"]}))
    elif kind == "remote code":
        config = json.loads((folder / "config.json").read_text())
        changes = {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}}
        (folder / "config.json").write_text(json.dumps(config | changes))
        (folder / "evil.py").write_text("raise SystemExit('the code ran')")
    elif kind == "config is a list":
        (folder / "config.json").write_text("[]")
    elif kind == "no tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    elif kind == "unlike":
        return [folder, _saved(tmp_path / "other", _mixtral(num_local_experts=2))]
    elif kind == "three":
        return [folder] * 3
    return [folder]


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("missing folder", "no such folder"),
        ("no config", "holds no config.json"),
        ("dense", "has no mixture-of-experts layer"),
        ("truncated", "is truncated or damaged"),
        ("bad header", "is truncated or not a safetensors file"),
        ("pickle", "is a pickle, which can run code"),
        ("index outside", "a shard is a .safetensors file in the same folder"),
        ("shard missing", "names gone.safetensors, which is missing"),
        ("wrong shapes", "cannot be loaded"),
        ("weights missing", "tensors are missing, such as 'model.layers.1."),
        ("unknown architecture", "names the architecture 'NoSuchForCausalLM', which transformers does not have"),
        ("remote code", "config.json: transformers cannot use it"),
        ("config is a list", "config.json: must hold a JSON object, not a list"),
        ("no tokenizer", "no tokenizer can be loaded"),
        ("unlike", "do not have the same layers of experts"),
        ("three", "3 models are given"),
    ],
)
def test_a_broken_model_is_one_line_and_nothing_is_written(capsys, tmp_path, text_file, kind, says):
    models = _broken(kind, tmp_path)
    capsys.readouterr()
    code, printed = _run(capsys, *models, "--data", text_file, "--out", tmp_path / "r", "--tokens", 600)
    line = printed.err.strip().splitlines()[-1]
    assert code == 2 and line.startswith("shunter inspect: ") and says in line
    assert "Traceback" not in printed.err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        (None, [], "no such file or folder"),
        ("", [], "holds no text"),
        ("  \n\n ", [], "the data hold no text"),
        ("a", [], "too short"),
        ("some text", ["--tokens", "0"], "--tokens 0 must be at least"),
        ("some text", ["--length", "1"], "--length 1 must be at least"),
        ("some text", ["--ablate", "-1"], "--ablate -1 must be at least"),
    ],
)
def test_bad_data_are_one_line(capsys, tmp_path, content, options, says):
    folder = _saved(tmp_path / "model", _mixtral())
    file = tmp_path / "data.txt"
    if content is not None:
        file.write_text(content)
    capsys.readouterr()
    code, printed = _run(capsys, folder, "--data", file, "--out", tmp_path / "r", *options)
    line = printed.err.strip().splitlines()[-1]
    assert code == 2 and line.startswith("shunter inspect: ") and says in line
    assert not (tmp_path / "r").exists()


def test_a_tokenizer_of_another_model_is_refused():
    model = _mixtral(vocab_size=40)
    with pytest.raises(UserError, match="the model has 40 embeddings"):
        text_material(model, BYTES, _documents())


def test_short_text_is_one_short_window_and_long_windows_fit_the_model():
    subject = _sparse("topk")
    short = text_material(subject.model, BYTES, [Document("hello there", "a")])
    assert short.tokens == len("hello there") + 1
    long = text_material(subject.model, BYTES, _documents(), tokens=3000, length=10_000)
    assert long.window == 64
    assert inspect(subject, short, ablations=1, quiet=True)["complete"]


def _vit(tmp_path):
    shape = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    labels = {"id2label": {0: "dark", 1: "light"}, "label2id": {"dark": 0, "light": 1}}
    model = ViTForImageClassification(ViTConfig(**shape, image_size=16, patch_size=4, num_channels=1, **labels))
    folder = tmp_path / "images"
    for name, low, high in (("dark", 0, 100), ("light", 150, 250)):
        (folder / name).mkdir(parents=True)
        for number in range(6):
            pixels = torch.randint(low, high, (16, 16), dtype=torch.uint8).numpy()
            Image.fromarray(pixels, "L").save(folder / name / f"{number}.png")
    return model, folder


@pytest.mark.usefixtures("undrawn")
def test_patches_of_a_vision_transformer(capsys, tmp_path):
    model, images = _vit(tmp_path)
    shunter.sparsify(model, 2, "topk", top_k=1)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    code, printed = _run(capsys, folder, "--data", images, "--out", tmp_path / "r", "--ablate", 4)
    assert code == 0, printed.err
    findings = json.loads((tmp_path / "r" / "inspect.json").read_text())
    found = findings["models"][0]
    assert findings["data"] == {
        "kind": "images",
        "tokens": 12 * 16,
        "window": 16,
        "domains": {"dark": 96, "light": 96},
        "languages": {},
    }
    assert found["targets"] == 12 and math.isfinite(found["loss"])
    for layer in found["layers"].values():
        assert layer["tokens"] == 12 * 17
        for patches in layer["patches"]:
            assert all(0 <= image < 12 and 0 <= patch < 16 for image, patch, _ in patches)
            weights = [weight for _, _, weight in patches]
            assert weights == sorted(weights, reverse=True)
    page = Page((tmp_path / "r" / "inspect.html").read_text())
    sheets = [layer for layer in found["layers"].values() for patches in layer["patches"] if patches]
    assert page.tags.count("img") == len(sheets)


def test_patches_are_those_that_the_layer_routed(monkeypatch, tmp_path, plant):
    """By position: the patch at place p of an image is the layer's token p + 1 of it, after the class token."""
    plant(None)
    monkeypatch.setattr(Planted, "needs", ("position",))
    monkeypatch.setattr(
        Planted, "score", lambda self, x, context: torch.nn.functional.one_hot(context.position % EXPERTS).float()
    )
    model, images = _vit(tmp_path)
    shunter.sparsify(model, EXPERTS, "planted")
    material = image_material(model, tmp_path, [str(images)], tokens=160)
    findings = inspect(Inspected("vit", model, tmp_path), material, ablations=0, quiet=True)
    for layer in findings["models"][0]["layers"].values():
        assert layer["follows"] == {"label": "position", "part": pytest.approx(1, abs=1e-6)}
        for expert, patches in enumerate(layer["patches"]):
            assert len(patches) == 16 and all((patch + 1) % EXPERTS == expert for _, patch, _ in patches)


def test_a_sheet_shows_the_patches_themselves():
    images = torch.randint(256, (3, 1, 8, 8)).float() / 255
    data = patch_sheet([[2, 3, 0.5], [0, 1, 0.25]], images, 4)
    sheet = Image.open(io.BytesIO(base64.b64decode(data.split(",")[1]))).convert("RGB")
    for column, (image, top, left) in enumerate([(2, 4, 4), (0, 0, 4)]):
        for y in range(4):
            for x in range(4):
                seen = sheet.getpixel((column * 26 + x * 6 + 3, y * 6 + 3))
                assert seen == (round(float(images[image, 0, top + y, left + x]) * 255),) * 3


def test_images_are_asked_for_and_read_or_refused(capsys, tmp_path):
    model, images = _vit(tmp_path)
    shunter.sparsify(model, 2, "topk", top_k=1)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    empty = tmp_path / "empty"
    empty.mkdir()
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "x.png").write_bytes(b"no image")
    for data, says in ((None, "this model sees images"), (empty, "no file ends in"), (bad, "not an image")):
        capsys.readouterr()
        code, printed = _run(capsys, folder, *(["--data", data] if data else []), "--out", tmp_path / "r")
        assert code == 2 and says in printed.err and "Traceback" not in printed.err
    assert not (tmp_path / "r").exists()


def test_loading_takes_the_sparse_model_of_a_run(tmp_path):
    _saved(tmp_path / "run" / "sparse", _sparse("topk").model)
    assert load(str(tmp_path / "run")).name == "run"
    with pytest.raises(UserError, match="no such folder"):
        load(str(tmp_path / "nothing"))


def test_hash_routing_shows_each_expert_its_own_tokens():
    tokenizer = _tokenizer(DataConfig(tokenizer="bytes"), [])
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=257,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
        )  # fmt: skip
    )
    shunter.sparsify(model, 4, "hash")
    ids = {"a": torch.randint(0, 20, (6, 32)), "b": torch.randint(20, 40, (6, 32))}
    found = specialisation(model, ids, tokenizer, batch_size=4)
    assert found["domains"] == ["a", "b"]
    for name, layer in shunter.moe_layers(model).items():
        table, seen = layer.router.table, found["layers"][name]
        for domain, windows in ids.items():
            expected = torch.bincount(table[windows.flatten()], minlength=4) / windows.numel()
            assert torch.allclose(torch.tensor(seen["domains"][domain]), expected)
        assert abs(sum(seen["load"]) - 1) < 1e-6
        for expert, tokens in enumerate(seen["tokens"]):
            assert tokens
            for text, share, lift in tokens:
                [i] = [i for i in range(257) if tokenizer.decode([i]) == text]
                assert table[i] == expert
                everything = torch.cat(list(ids.values())).flatten()
                mine = everything[table[everything] == expert]
                assert abs(share - float((mine == i).float().mean())) < 1e-6
                assert abs(lift - share / float((everything == i).float().mean())) < 1e-4
