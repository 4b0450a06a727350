"""Translation: a small run from end to end, the sub-model of a language, sentences of one's own and what is wrong."""

import json
import random
import re
from dataclasses import replace

import pytest
import torch

pytest.importorskip("sacrebleu")

import sacrebleu
from transformers import AutoModelForSeq2SeqLM

from shunter.analysis.inspect.recording import batch_losses
from shunter.cli import main
from shunter.data.aligned import read_pairs, split_pairs
from shunter.hf.checkpoints.loading import load_folder
from shunter.moe import moe_layers, tell
from shunter.recipes.config import load_config
from shunter.recipes.translation import RECIPE, TranslationConfig, _translations, translate
from tests.conftest import SEED
from tests.recipes.whole import whole

SMALL = [
    "data.vocab_size=320", "data.source_length=12", "data.target_length=14", "data.eval_share=0.3",
    "data.eval_sentences=5", "model.dim=16", "model.layers=1", "model.heads=2", "model.hidden=48",
    "sparse.num_experts=4", "training.batch_tokens=104", "training.warmup=1", "training.threads=1",
    "training.steps=3", "training.eval_every=3", "training.log_every=1", "training.save_every=100",
]  # fmt: skip
WORDS = "zero one two three four five six seven eight nine ten".split()


def write_sentences(file):
    """A table of numbers in words, in three "languages" that spell words otherwise, with holes and a long one."""
    draw = random.Random(SEED)
    rows = [[" ".join(draw.choices(WORDS, k=draw.randint(1, 3)))] for _ in range(40)]
    table = [["en", "x", "y", "z"]]
    for (english,) in rows:
        table.append([english, english[::-1], english.upper(), " ".join(w + "o" for w in english.split())])
    table[3][1] = table[5][2] = ""
    table[7][3] = "long " * 40
    file.write_text("\n".join("\t".join(row) for row in table) + "\n", encoding="utf-8")
    return file


@pytest.fixture
def sentences(tmp_path):
    """The table of `write_sentences`."""
    return write_sentences(tmp_path / "sentences.tsv")


def settings(file, *more):
    return [*SMALL, f"data.source=['{file}']", "data.languages=[x,y,z]", *more]


def made(file, *more):
    return load_config(TranslationConfig, None, settings(file, *more))


def test_a_run_from_end_to_end(sentences, tmp_path, capsys, monkeypatch):
    run = whole("translation", settings(sentences, "data.bilingual=[y]"), tmp_path, capsys)
    summary = json.loads((run / "summary.json").read_text())
    assert 0.95 < summary["sparse"]["flops_per_token"] / summary["dense"]["flops_per_token"] < 1.05
    page = (run / "report.html").read_text(encoding="utf-8")
    said = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page))
    assert "Left out 2 of 120 pairs" in said and "z: left out 1 of 40 pairs that are longer" in said
    assert "A dense model of y alone, trained on as many pairs of it as the others" in said
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = {line["model"]: line["step"] for line in lines if line["kind"] == "eval"}
    assert steps == {"dense": 3, "sparse": 3, "bilingual-y": 1}
    config, data = made(sentences, "data.bilingual=[y]"), RECIPE.prepare(made(sentences))
    for which in ("dense", "sparse"):
        model = load_folder(run / which)
        for part in data.eval:
            texts = [translate(run, which, source, part.language) for source, _ in part.texts]
            right = [[target for _, target in part.texts]]
            assert sacrebleu.corpus_chrf(texts, right).score == pytest.approx(
                summary[which]["domains"][part.language]["chrf"]
            ), "one at a time and side by side"
        assert RECIPE.ledger(model, config).flops_per_token == summary[which]["flops_per_token"]

    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["inspect", str(run), "--out", str(tmp_path / "seen"), "--ablate", "1"]) == 0
    seen = json.loads((tmp_path / "seen/inspect.json").read_text())
    assert seen["models"][0]["loss"] == pytest.approx(summary["sparse"]["eval_loss"], rel=1e-4)
    assert main(["eval", str(run), "--calibration"]) == 0
    capsys.readouterr()
    assert main(["generate", str(run), "--prompt", "one two", "--language", "x"]) == 0
    assert capsys.readouterr().out.strip() == translate(run, "sparse", "one two", "x").strip()
    for options, message in (
        (["--language", "q"], "--language q: the run has x, y, z"),
        (["--language", "x", "--prompt", "one " * 40], "the sentence is longer than the run's sentences"),
        ([], "is a run of translation, which does not continue text"),
    ):
        assert main(["generate", str(run), *options]) == 2
        assert message in capsys.readouterr().err
    assert main(["extract", str(run), "--language", "x", "--out", str(tmp_path / "x")]) == 2
    assert "routes by GShard, not by language" in capsys.readouterr().err


def test_padding_and_other_pairs_change_no_loss(sentences):
    """The mean over the real tokens of each pair alone, without padding; and what is inspected has the same loss."""
    config = made(sentences, "sparse.router=task", "sparse.top_k=1", f"seed={SEED % 1000}")
    data = RECIPE.prepare(config)
    model = RECIPE.build(config, data, True).eval()
    nats, count = 0.0, 0
    for part in data.eval:
        for ids, labels in zip(part.input_ids, part.labels, strict=True):
            ids, labels = ids[ids != 1], labels[labels != -100]
            with tell(model, task=torch.tensor(part.number)):
                nats += model(input_ids=ids[None], labels=labels[None]).loss.item() * len(labels)
            count += len(labels)
    assert RECIPE.evaluate(model, data)["loss"] == pytest.approx(nats / count, rel=1e-5)
    parts = torch.cat([batch_losses(model, batch) for batch in RECIPE.material(model, data).batches])
    assert float(parts.nanmean()) == pytest.approx(nats / count, rel=1e-5)


@pytest.mark.parametrize("router", ["language", pytest.param("task", marks=pytest.mark.slow)])
def test_the_sub_model_of_a_language(router, sentences, tmp_path, capsys):
    """The same outputs, the size by formula, the same translations, from plain transformers."""
    run = tmp_path / "run"
    more = [f"sparse.router={router}", "data.bilingual=[]", "training.steps=1"]
    assert main(["train", "translation", "--run", str(run), *settings(sentences, *more)]) == 0
    sparse = load_folder(run / "sparse")
    data = RECIPE.prepare(made(sentences, *more))
    capsys.readouterr()
    for language in ("z", "x"):
        out = tmp_path / language
        assert main(["extract", str(run), "--language", language, "--out", str(out)] if router == "language" else
                    ["extract", str(run), "--task", language, "--out", str(out)]) == 0  # fmt: skip
        alone = AutoModelForSeq2SeqLM.from_pretrained(out).eval()
        layers, k = moe_layers(sparse), 1 if router == "language" else 2
        gone = sum(
            sum(p.numel() for p in layer.parameters()) - k * 3 * layer.dim * layer.experts.hidden
            for layer in layers.values()
        )
        assert alone.num_parameters() == sparse.num_parameters() - gone
        [part] = [part for part in data.eval if part.language == language]
        for given, labels in part.batches():
            with torch.no_grad(), tell(sparse, **part.told()):
                expected = sparse(**given, labels=labels).logits
                written = sparse.generate(**given, max_new_tokens=8, num_beams=2, do_sample=False)
            with torch.no_grad():
                found = alone(**given, labels=labels).logits
            assert (found - expected)[labels != -100].abs().max() < 1e-6 * max(1.0, float(expected.abs().max()))
            assert torch.equal(alone.generate(**given, max_new_tokens=8, num_beams=2, do_sample=False), written)
    assert main(["extract", str(run), f"--{router}", "q", "--out", str(tmp_path / "q")]) == 2
    assert f"--{router} q: the run has x, y, z" in capsys.readouterr().err


def test_no_source_is_held_out_and_trained_on(sentences):
    data = RECIPE.prepare(made(sentences))
    train, held_out = ({source for part in parts for source, _ in part.texts} for parts in (data.pairs, data.eval))
    assert train and held_out and not train & held_out
    assert [int(data.train[i]["language"]) for i in range(6)] == [0, 1, 2, 0, 1, 2]
    alone = data.only("y")
    mine = [data.train[i] for i in range(1, len(data.train), 3)]
    for i, item in enumerate(mine):
        assert torch.equal(alone.train[i]["input_ids"], item["input_ids"]), (
            "the pairs that the others see, in their order"
        )


def test_a_search_gives_each_sentence_its_own_translation(sentences):
    """By beams, language by language, and greedily side by side: what transformers' own search gives one sentence."""
    config = made(sentences, f"seed={SEED % 1000}", "sparse.router=task")
    data = RECIPE.prepare(config)
    model = RECIPE.build(config, data, True).eval()
    for beams in (1, 3):
        said = _translations(model, replace(data, beams=beams))
        for part in data.eval:
            for ids, text in zip(part.input_ids, said[part.language], strict=True):
                with torch.no_grad(), tell(model, task=torch.tensor(part.number)):
                    out = model.generate(input_ids=ids[ids != 1][None], max_new_tokens=14, num_beams=beams)
                assert data.tokenizer.decode(out[0], skip_special_tokens=True) == text


def test_a_router_by_the_token_before_writes_without_a_cache(sentences):
    config = made(sentences, "sparse.router=bigram_hash", "sparse.options={}")
    data = RECIPE.prepare(config)
    model = RECIPE.build(config, data, True).eval()
    said = _translations(model, data)
    [part, *_] = data.eval
    ids = torch.tensor([[1]])  # a decoder begins with padding
    for _ in range(14):
        with torch.no_grad():
            last = model(input_ids=part.input_ids[:1][part.input_ids[:1] != 1][None], decoder_input_ids=ids).logits[
                0, -1
            ]
        ids = torch.cat([ids, last.argmax()[None, None]], 1)
        if int(ids[0, -1]) == 0:
            break
    assert data.tokenizer.decode(ids[0], skip_special_tokens=True) == said[part.language][0]


@pytest.mark.slow
def test_two_passes_disagree_over_the_words_of_the_decoder(sentences, tmp_path):
    """THOR compares logits, whose padding is the decoder's and not the encoder's."""
    options = settings(sentences, "sparse.router=thor", "sparse.options={}")
    assert main(["train", "translation", "--run", str(tmp_path / "run"), *options]) == 0


def test_pairs_with_a_language_column(tmp_path):
    file = tmp_path / "pairs.jsonl"
    rows = [{"source": f"{w} {v}", "target": f"{v} {w}", "language": "l" + str(i % 2)}
            for i, (w, v) in enumerate((w, v) for w in WORDS for v in WORDS[:4])]  # fmt: skip
    rows += [{"source": "NA", "target": "null", "language": "l0"}, {"source": "one", "target": None, "language": "l1"}]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    config = load_config(TranslationConfig, None, [*SMALL, f"data.source=['{file}']"])
    data = RECIPE.prepare(config)
    assert data.languages == ["l0", "l1"] and "Left out 1 of 46 pairs" in " ".join(data.notes)
    assert ("NA", "null") in read_pairs(file, "en").pairs["l0"], "words, not holes"
    beyond = sum(max(0, len(out) - 1) for _, out in split_pairs(read_pairs(file, "en"), 0.3).values())
    long = ["data.source_length=50", "data.target_length=50", "data.eval_sentences=1"]
    notes = RECIPE.prepare(load_config(TranslationConfig, None, [*SMALL, f"data.source=['{file}']", *long])).notes
    assert beyond and f"Not evaluated: {beyond} held-out pairs, those behind data.eval_sentences=1 a language." in notes


@pytest.mark.parametrize(
    "name, content, options, message",
    [
        ("a.tsv", "de\tfr\na\tb\n", [], "needs columns source, target and language, or one for each language, 'en'"),
        ("a.tsv", "en\tfr\na\tb\n", [], "has no language with pairs to train on and to hold out"),
        ("a.tsv", "en\tfr\na\tb\n", ["data.languages=[it]"], "has no 'it'; it has fr"),
        ("a.txt", "x", [], "must end in .csv, .jsonl, .parquet, .tsv"),
        ("a.jsonl", '{"source": "a", "target": ["b"], "language": "x"}', [], "record 1: a sentence must be a text"),
        ("a.jsonl", '{"source": "a\\ud800", "target": "b", "language": "x"}', [], "a.jsonl"),
        ("a.jsonl", '{"source": "a", "target": "b", "language": "x/y"}', [], "a language must be a short name"),
        ("a.jsonl", '{"source": "a"', [], "a.jsonl, line 1: not JSON"),
        ("a.tsv", "", [], "a.tsv: cannot be read"),
        ("a.tsv", "en\tfr\na\tb\n", ["data.bilingual=[fr]"], "data.bilingual needs data.languages"),
        (None, None, ["data.languages=[xx]"], "the built-in sentences have no 'xx'; they have af"),
        (None, None, ["data.bilingual=[ru]"], "data.bilingual: 'ru' is not among the languages"),
        (None, None, ["sparse.router=sentence"], "set model.sparse_stacks=encoder, or sparse.allow_leak=true"),
        (None, None, ["sparse.options={}"], "take capacity from the second choices of earlier ones, so that a decoder"),
        (None, None, ["training.batch_tokens=20"], "is less than a pair takes, 26"),
        (None, None, ["sparse.router=domain"], "needs domain of each token, which plain translation has not"),
    ],
)
def test_what_cannot_be_translated_is_one_line(name, content, options, message, tmp_path, capsys):
    own = []
    if name is not None:
        (tmp_path / name).write_text(content, encoding="utf-8")
        own = ["--data", str(tmp_path / name)]
    assert main(["train", "translation", *own, "--run", str(tmp_path / "run"), *SMALL, *options]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and len(said.splitlines()) == 1, said


@pytest.mark.parametrize("options", [["sparse.router=sentence", "model.sparse_stacks=encoder"],
                                     ["sparse.router=language"], ["sparse.router=task"]])  # fmt: skip
def test_routers_of_translation_train(options, sentences, tmp_path):
    config = made(sentences, *options)
    data = RECIPE.prepare(config)
    model = RECIPE.build(config, data, True)
    stacks = {name.split(".")[0] for name in moe_layers(model)}
    assert stacks == ({"encoder"} if "model.sparse_stacks=encoder" in options else {"encoder", "decoder"})
    batch = torch.utils.data.default_collate([data.train[i] for i in range(6)])
    with tell(model, language=batch.pop("language"), task=batch.pop("task")):
        model.train()(**batch).loss.backward()
    assert all(layer.routing is not None for layer in moe_layers(model).values())
