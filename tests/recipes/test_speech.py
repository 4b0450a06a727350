"""Speech: a small run from end to end on sounds of a user; bad sounds counted; what the router is told shows."""

import json
import math
import random
import re
import wave
from importlib.util import find_spec

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("soundfile", reason="shunter[speech] reads sounds")

from shunter import MoE, Routing
from shunter.analysis.information import information
from shunter.cli import main
from shunter.hf.recogniser import ctc_nats
from shunter.moe import moe_layers, tell
from shunter.recipes.config import load_config
from shunter.recipes.run import load_model
from shunter.recipes.speech import RECIPE, SpeechConfig, Vocabulary
from tests.conftest import SEED
from tests.recipes.whole import whole

SMALL = [
    "data.seconds=0.4", "data.mels=8", "data.mask_bands=2", "data.mask_frames=2", "data.eval_share=0.4",
    "model.dim=8", "model.layers=1", "model.heads=2", "model.hidden=96", "model.kernel=3",
    "sparse.num_experts=4", "sparse.embedding_dim=2", "training.batch_tokens=80", "training.warmup=1",
    "training.threads=1", "training.steps=3", "training.eval_every=3", "training.log_every=1",
    "training.save_every=100",
]  # fmt: skip
PITCH = {"la": 300.0, "ti": 900.0}


def sing(file, words, voice, rate=16000):
    """A file of a tone for each word, by the standard library; voices differ in pitch."""
    draw = np.random.default_rng([SEED, voice, len(file.name)])
    parts = [np.sin(2 * np.pi * PITCH[word] * (1 + voice / 20) * np.arange(rate // 8) / rate) for word in words]
    samples = 6000 * np.concatenate(parts) + draw.normal(0, 100, len(words) * (rate // 8))
    with wave.open(str(file), "wb") as stream:
        stream.setparams((1, 2, rate, 0, "NONE", ""))
        stream.writeframes(samples.astype("<i2").tobytes())


@pytest.fixture
def songs(tmp_path):
    """A table of two languages, five voices each, with bad sounds among them."""
    folder, rows = tmp_path / "songs", ["path\ttext\tlanguage\tspeaker"]
    folder.mkdir()
    draw = random.Random(SEED)
    for voice in range(10):
        for take in range(2):
            words = ["la", "ti"] if take else draw.choices(list(PITCH), k=2)
            name = f"v{voice}-{take}.wav"
            sing(folder / name, words, voice, 8000 if voice == 3 else 16000)
            rows.append(f"{name}\t{' '.join(words).title()}!\t{'do' if voice < 5 else 're'}\tv{voice}")
    (folder / "cut.wav").write_bytes((folder / "v0-0.wav").read_bytes()[:3000])
    (folder / "empty.wav").write_bytes(b"")
    for name, text in (("cut.wav", "la"), ("empty.wav", "la"), ("gone.wav", "la"), ("v0-0.wav", "")):
        rows.append(f"{name}\t{text}\tdo\tv0")
    (folder / "songs.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return folder


def made(songs, *settings):
    return load_config(SpeechConfig, None, [*SMALL, f"data.source=['{songs / 'songs.tsv'}']", *settings])


def test_a_run_from_end_to_end(songs, tmp_path, capsys, monkeypatch):
    settings = [*SMALL, f"data.source=['{songs / 'songs.tsv'}']", "sparse.domain_input=true", "model.decoder_layers=1"]
    settings += ["model.transducer_dim=4"]
    run = whole("speech", settings, tmp_path, capsys)
    page = (run / "report.html").read_text(encoding="utf-8")
    for part in (
        "Left out 4 of 24 sounds",
        "songs.tsv, record 21",
        "Resampled to 16,000 Hz: 2 of 8,000 Hz",
        "Held out: all that 4 of 10 voices say",
        "wrong of 100 words",
        "Loss by language",
        "6 voices are heard in training, 4 in evaluation, 0 in both",
    ):
        assert part in page, part
    body = page.partition("<main>")[2].partition("<h2>Configuration")[0]
    words = re.sub(r"<[^>]*>", " ", body)
    assert not re.search(r"\b(tokens?|domains?|patch(es)?|images?)\b", words), "words of other recipes"
    shown = {one["title"]: one for one in json.loads((run / "exhibits.json").read_text())}
    assert [row[0] for row in shown["Heads"]["rows"]] == ["dense", "sparse"]
    assert [head.partition(", ")[2] for head in shown["Heads"]["heads"][1::2]] == ["CTC", "attending", "transducer"]
    voices = shown["Errors by voice"]
    assert len(voices["rows"]) == 4 and "4 of 4 voices are not heard in training" in voices["says"]

    monkeypatch.chdir(tmp_path)
    assert main(["inspect", str(run), "--out", str(tmp_path / "seen"), "--ablate", "1"]) == 0
    seen = json.loads((tmp_path / "seen/inspect.json").read_text())
    assert seen["data"]["kind"] == "sounds" and seen["complete"] and set(seen["data"]["domains"]) == {"do", "re"}
    assert "frame of sound" in (tmp_path / "seen/inspect.html").read_text(encoding="utf-8")

    capsys.readouterr()
    assert main(["eval", str(run), "--calibration", "--json"]) == 0
    calibrated = json.loads(capsys.readouterr().out)["models"]
    for one in calibrated.values():
        assert 0 < one["predictions"] == sum(part["predictions"] for part in one["domains"].values())
        assert set(one["domains"]) == {"do", "re"}

    sing(songs / "v7-1.wav", ["ti", "ti"], 7)
    assert main(["eval", str(run)]) == 2
    assert "the sounds have changed since this run" in capsys.readouterr().err


def test_the_numbers_are_those_of_each_clip_alone(songs, tmp_path):
    """Losses and texts in batches with padding are as of each clip without either."""
    config = made(songs)
    data = RECIPE.prepare(config)
    model = RECIPE.build(config, data, True).eval()
    found = RECIPE.evaluate(model, data)
    likely = torch.cat([rows[torch.arange(len(own)), own] for _, rows, own in RECIPE.predictions(model, data)])
    labels = sum(len(data.vocabulary.labels(data.corpus.texts[i])) for i in data.corpus.held_out)
    assert -float(likely.sum()) / labels == pytest.approx(found["loss"], rel=1e-4), "that of its own text is its loss"
    nats, labels = 0.0, 0
    for i in data.corpus.held_out:
        frames, text = data.features(i)[None], data.vocabulary.labels(data.corpus.texts[i])
        with torch.no_grad():
            logits = model(frames).logits
        nats += float(ctc_nats(logits, torch.ones(frames.shape[:2], dtype=torch.bool), torch.tensor([text]))[0])
        labels += len(text)
    assert found["loss"] == pytest.approx(nats / labels, rel=1e-4)
    assert set(found["domains"]) == {"do", "re"}


def test_both_models_compute_as_much_and_begin_alike(songs):
    config = made(songs, "model.dim=32", "model.hidden=200", "sparse.embedding_dim=3", "model.layers=2")
    data = RECIPE.prepare(config)
    dense, sparse = (RECIPE.build(config, data, which) for which in (False, True))
    costs = [RECIPE.ledger(model, config) for model in (dense, sparse)]
    assert costs[1].flops_per_token == pytest.approx(costs[0].flops_per_token, rel=0.01)
    assert costs[1].params_total > costs[0].params_total
    network = sum(2.0 * p.numel() for p in sparse.embedding.parameters() if p.dim() > 1)
    assert costs[1].flops["projections"] > network, "the embedding network is paid for"
    theirs = dict(sparse.named_parameters())
    shared = {name for name in dict(dense.named_parameters()) if name in theirs}
    assert all(torch.equal(p, theirs[name]) for name, p in dense.named_parameters() if name in shared)
    assert {name for name in dict(dense.named_parameters()) if name not in shared} == {
        name for name, _ in dense.named_parameters() if ".ffn" in name and "layer_norm" not in name
    }


def test_items_are_a_function_of_the_seed_and_their_number(songs):
    data, again = (RECIPE.prepare(made(songs, "training.steps=30")) for _ in range(2))
    other = RECIPE.prepare(made(songs, "training.steps=30", "seed=1")).train
    one, two = data.train, again.train
    frames = [item["input_features"] for item in one]
    assert all(torch.equal(frames[i], two[i]["input_features"]) for i in reversed(range(len(one))))
    assert not all(torch.equal(frames[i], other[i]["input_features"]) for i in range(len(one)))
    for i in range(len(one)):
        item, whole_one = one[i], data.example(data.corpus.train[int(one.order[i])])
        same = item["input_features"] == whole_one["input_features"]
        hidden = item["input_features"][~same]
        assert bool((hidden == 0).all()) and same.float().mean() > 0.4, "what is hidden is 0, and not all"
        assert torch.equal(item["labels"], whole_one["labels"])


def test_features_are_those_of_the_saved_extractor(songs, tmp_path):
    from transformers import AutoFeatureExtractor

    data = RECIPE.prepare(made(songs))
    data.save_pretrained(tmp_path)
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path)
    i = data.corpus.train[0]
    samples = data.corpus.clips[i].read(1.0).samples
    found = extractor(samples, sampling_rate=16000, return_tensors="pt")
    expected = found["input_features"][0][found["attention_mask"][0].bool()]
    torch.testing.assert_close(data.features(i), expected[: data.config.frames].float())
    labels = json.loads((tmp_path / "labels.json").read_text(encoding="utf-8"))
    assert labels == {"units": "words", "known": ["la", "ti"]}


@pytest.mark.slow
def test_routers_are_compared_on_speech(songs, tmp_path, capsys):
    run = tmp_path / "compared"
    routers = "speech,language,expert_choice"
    settings = [*SMALL, f"data.source=['{songs / 'songs.tsv'}']", "training.steps=2"]
    assert main(["compare", "speech", "--routers", routers, "--run", str(run), *settings]) == 0
    rows = json.loads((run / "compare.json").read_text())["models"]
    assert [row["router"] for row in rows] == ["dense", *routers.split(",")]
    for row in rows[1:]:
        assert math.isclose(row["flops_per_token"], rows[0]["flops_per_token"], rel_tol=0.06), row["router"]
    assert "wrong of 100 words" in (run / "compare.md").read_text()
    layer = next(iter(moe_layers(load_model(run, "language")).values()))
    frames = torch.randn(2, 6, 8)
    with tell(layer, language=torch.tensor([0, 1])):
        layer(frames)
    assert set(layer.routing.expert.tolist()) == {0, 1}


def test_the_domain_raises_the_purity_of_routing_on_synthetic_accents():
    """Frames are the same in all accents, and mean in each what another expert says: who is told finds out which.

    Experts write to places of their own, so that the gradient only raises the probability of a right expert, and only
    lowers that of a wrong one.
    """
    accents, frames, dim = 4, 200, 8
    x, accent = torch.randn(frames, dim), torch.arange(accents)
    known = {"embedding": torch.zeros(accents * frames, 2), "domain": accent.repeat_interleave(frames)}
    rightly = Routing.from_topk(known["domain"][:, None], torch.ones(accents * frames, 1), accents)
    places = torch.arange(dim) // 2 == accent[:, None]
    taken = {}
    for domains in (0, accents):
        moe = MoE(
            dim, 16, accents, "speech", embedding_dim=2, num_domains=domains, sparsity_loss=0.0,
            mean_importance_loss=0.0,
        )  # fmt: skip
        everywhere = x.repeat(accents, 1)
        with torch.no_grad():
            moe.experts.weights.down.mul_(places[:, :, None])
            meant = moe.experts(everywhere, rightly)
        optimizer = torch.optim.Adam(moe.router.parameters(), lr=0.05)
        for _ in range(150):
            optimizer.zero_grad()
            (moe(everywhere, **known) - meant).square().mean().backward()
            optimizer.step()
        taken[domains] = []
        for one in range(accents):
            moe.eval()(x, embedding=torch.zeros(frames, 2), domain=torch.full((frames,), one))
            taken[domains].append(
                torch.empty_like(moe.routing.token).index_copy(0, moe.routing.token, moe.routing.expert)
            )
    assert all(torch.equal(expert, taken[0][0]) for expert in taken[0])
    assert information(torch.cat(taken[accents])[:, None], known["domain"], accents).adjusted > 0.9


@pytest.mark.parametrize("units", ["words", "characters"])
def test_labels_are_texts_again(units):
    draw = random.Random(SEED)
    texts = [" ".join(draw.choices(["la", "ti", "été", "да"], k=draw.randint(1, 4))) for _ in range(9)]
    vocabulary = Vocabulary(units, texts)
    assert all(vocabulary.text(vocabulary.labels(text)) == text for text in texts)
    assert vocabulary.labels("x") == [1] and vocabulary.text([1]) not in texts
    assert sorted({n for text in texts for n in vocabulary.labels(text)}) == list(range(2, len(vocabulary)))


@pytest.mark.parametrize(
    "setting, part",
    [
        ("model.heads=5", "model.dim 96 must be a multiple of twice model.heads 5"),
        ("training.batch_tokens=79", "training.batch_tokens 79 must be at least the 80 of a clip"),
        ("data.noise=[5,1]", "must be the least ratio, then the greatest"),
        ("model={decoder_layers: 1, transducer_dim: 8, transducer_loss: 0.5}", "must leave CTC a part of 1"),
        ("data.mask_bands=40", "data.mask_bands 40 must be less than data.mels 40"),
        ("sparse.num_experts=400", "the router alone costs more than the dense block"),
        ("data.languages=[de]", "data.languages"),
        ("data.source=[nowhere]", "nowhere: no such folder"),
        ("sparse.router=hash", "router 'hash' needs token_ids of each frame"),
    ],
)
def test_mistakes_are_one_line(setting, part, tmp_path, capsys):
    assert main(["train", "speech", "--run", str(tmp_path / "run"), setting]) == 2
    said = capsys.readouterr().err.strip()
    assert part in said and "\n" not in said
    assert not (tmp_path / "run").exists()


def test_the_built_in_sounds_are_digits_of_voices():
    pytest.importorskip("espeakng_loader", reason="shunter[speech] has the synthesiser")
    data = RECIPE.prepare(load_config(SpeechConfig, None, ["data.voices=5", "data.takes=1"]))
    assert data.languages == ["en", "es", "fr", "it", "ru"] and len(data.corpus.train) == 20
    assert not any("Left out" in note for note in data.corpus.notes), "all are short enough"
    assert find_spec("espeakng_loader")
