"""Encoders and encoder-decoders of text: from end to end, what is hidden, and what the report says of their experts."""

import json
import re

import pytest
import torch

from shunter.analysis.inspect.recording import batch_losses, record
from shunter.analysis.inspect.stacks import clearer, stack_information, stack_table
from shunter.cli import main
from shunter.data.corruption import SHARE, Corruption, span_counts
from shunter.moe import moe_layers
from shunter.recipes.config import load_config
from shunter.recipes.text import RECIPE, TextConfig
from tests.conftest import SEED
from tests.recipes.conftest import SMALL
from tests.recipes.whole import whole

QUICK = ["training.steps=3", "training.eval_every=3", "training.log_every=1", "sparse.every=2"]


def settings(corpus, *more):
    return [*SMALL, *QUICK, f"data.source=['{corpus}']", *more]


@pytest.mark.parametrize("kind", [pytest.param("encoder", marks=pytest.mark.slow), "encoder-decoder"])
def test_a_run_from_end_to_end(kind, corpus, tmp_path, capsys, monkeypatch):
    run = whole("text", ["--model", kind, *settings(corpus)], tmp_path, capsys)
    summary = json.loads((run / "summary.json").read_text())
    ratio = summary["sparse"]["flops_per_token"] / summary["dense"]["flops_per_token"]
    assert 0.95 < ratio < 1.05
    page = (run / "report.html").read_text(encoding="utf-8")
    said = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))
    assert ("in the encoder than in the decoder" in said) is (kind == "encoder-decoder")
    assert {"encoder": "guess these from what stands before and behind", "encoder-decoder": "sentinel"}[kind] in said

    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["inspect", str(run), "--data", str(corpus), "--out", str(tmp_path / "seen"), "--ablate", "2"]) == 0
    seen = json.loads((tmp_path / "seen/inspect.json").read_text())
    assert seen["complete"] and seen["models"][0]["loss"] > 0
    assert main(["generate", str(run)]) == 2
    assert f"has an {kind}, which does not continue text" in capsys.readouterr().err
    if kind == "encoder":
        assert main(["eval", str(run), "--calibration"]) == 0
        return
    folder = tmp_path / "c"
    options = ["--model", kind, "--routers", "hash", "--run", str(folder), *settings(corpus, "training.steps=1")]
    assert main(["compare", "text", *options]) == 0
    assert len(json.loads((folder / "compare.json").read_text())["models"]) == 2


@pytest.mark.parametrize(
    "options, message",
    [
        (["--model", "encodr"], "did you mean encoder?"),
        (["--model", "encoder", "model.family=llama"], "model.family llama is no encoder; model.kind=encoder has"),
        (["model.kind=encoder", "model.kv_heads=2"], "model.kv_heads is for a decoder"),
        (["--model", "encoder-decoder", "sparse.router=expert_choice"], "set sparse.allow_leak=true if you insist"),
        (
            ["--model", "encoder-decoder", "sparse.router=language"],
            "needs language of each token, which plain text has not",
        ),
    ],
)
def test_what_no_model_is_made_of_is_one_line(options, message, corpus, capsys, tmp_path):
    assert main(["train", "text", "--run", str(tmp_path / "r"), *settings(corpus), *options]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and len(said.splitlines()) == 1, said


def test_an_encoder_may_route_by_later_tokens(corpus):
    config = load_config(TextConfig, None, settings(corpus, "model.kind=encoder", "sparse.router=expert_choice"))
    model = RECIPE.build_model(config, 258, True)
    assert len(moe_layers(model)) == 1


@pytest.mark.parametrize("family", ["modernbert", "bert", "t5"])
def test_twins_begin_alike_and_are_told_apart_by_their_blocks_alone(family, corpus):
    kind = "encoder-decoder" if family == "t5" else "encoder"
    config = load_config(TextConfig, None, settings(corpus, f"model.kind={kind}", f"model.family={family}"))
    data = RECIPE.prepare(config)
    dense, sparse = (RECIPE.build(config, data, which) for which in (False, True))
    others = dict(sparse.named_parameters())
    left_out = [name for name, _ in dense.named_parameters() if name not in others]
    blocks = {name.rpartition(".")[0] for name in moe_layers(sparse)}
    assert left_out and all(any(name.startswith(f"{block}.") for block in blocks) for name in left_out)
    for name, value in dense.named_parameters():
        assert name in left_out or torch.equal(value, others[name]), name


@pytest.mark.parametrize("kind", ["encoder", "encoder-decoder"])
def test_what_is_hidden(kind, corpus):
    """What is seen and what is to be guessed are the window; the same each time in the held-out part."""
    length = 32 + SEED % 17  # two spans
    more = [f"data.sequence_length={length}", f"training.batch_tokens={2 * length}", f"seed={SEED % 1000}"]
    config = load_config(TextConfig, None, settings(corpus, f"model.kind={kind}", *more))
    plain = RECIPE.prepare(load_config(TextConfig, None, settings(corpus, *more)))
    data, again = RECIPE.prepare(config), RECIPE.prepare(config)
    special = len(data.tokenizer) - len(plain.tokenizer)
    assert data.fingerprint == again.fingerprint != plain.fingerprint
    hidden, spans = span_counts(length)
    way = Corruption("hidden" if kind == "encoder" else "spans", data.tokenizer, length)
    window = torch.arange(special + 1, special + 1 + length)
    assert len({way(window, seed)[0].numpy().tobytes() for seed in range(30)}) > 1, "a window that comes again"
    for i in range(len(data.train)):
        item, own = data.train[i], plain.train[i]["input_ids"]
        own = torch.where(own > 0, own + special, own)  # the special tokens come first
        assert item["domain"] == plain.train[i]["domain"]
        seen, labels = item["input_ids"], item["labels"]
        if kind == "encoder":
            chosen = labels != -100
            assert int(chosen.sum()) == max(1, round(SHARE * length))
            assert torch.equal(seen[~chosen], own[~chosen]) and torch.equal(labels[chosen], own[chosen])
            continue
        assert (len(seen), len(labels)) == config.lengths == (length - hidden + spans, hidden + spans + 1)
        marks = [t for t in seen.tolist() if 2 <= t <= special]
        assert len(marks) == spans and marks == sorted(marks)
        written: dict[int, list[int]] = {}
        for token in labels.tolist():
            if 2 <= token <= special:
                written[token] = []
            else:
                written[max(written)].append(token)
        whole_window = [t for token in seen.tolist() for t in (written[token] if token in written else [token])]
        assert whole_window == own.tolist()
        assert all(written[mark] for mark in marks) and not written[max(written)]


def test_evaluation_is_the_mean_over_what_is_hidden(corpus):
    for kind in ("encoder", "encoder-decoder"):
        config = load_config(TextConfig, None, settings(corpus, f"model.kind={kind}"))
        data = RECIPE.prepare(config)
        model = RECIPE.build(config, data, True).eval()
        nats, count = 0.0, 0
        for domain in data.eval:
            for seen, labels in zip(domain.input_ids, domain.targets, strict=True):
                found = model(input_ids=seen[None], labels=labels[None])
                nats += found.loss.item() * int((labels != -100).sum())
                count += int((labels != -100).sum())
        assert RECIPE.evaluate(model, data)["loss"] == pytest.approx(nats / count, rel=1e-5)
        material = RECIPE.material(model, data)
        parts = torch.cat([batch_losses(model, batch) for batch in material.batches])
        assert float(parts.nanmean()) == pytest.approx(nats / count, rel=1e-5)


def test_a_planted_division_of_labour_is_seen_in_the_stack_that_has_it(corpus):
    """Experts by the kind of token in one stack, at random in the other."""
    config = load_config(TextConfig, None, settings(corpus, "model.kind=encoder-decoder", "data.eval_windows=40"))
    data = RECIPE.prepare(config)
    model = RECIPE.build(config, data, True)
    material = RECIPE.material(model, data)
    recording = record(model, material, lambda batches, what, total: batches)
    generator = torch.Generator().manual_seed(SEED)
    for planted in ("encoder", "decoder"):
        for name, layer in recording.layers.items():
            stream = material.stream(name, len(layer.index), recording.batches)
            random = torch.randint(4, stream.labels["kind"].shape, generator=generator)
            layer.index[:] = (stream.labels["kind"] % 4 if planted in name.split(".") else random)[:, None]
        found = stack_information(recording, material)
        encoder, decoder, chance = clearer(found)
        assert (encoder if planted == "encoder" else decoder) > 0.9
        assert abs(decoder if planted == "encoder" else encoder) < 0.2
        says = stack_table(found).says
        assert ("here experts specialise more clearly in the encoder" in says) is (planted == "encoder"), says
