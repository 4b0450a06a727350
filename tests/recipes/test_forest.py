"""Branch-Train-Merge: branches that depend on nothing but their seed, averages and ensembles by other arithmetic."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

pytest.importorskip("matplotlib")

from torch.nn import functional as F

from shunter.cli import main
from shunter.durable import MANIFEST, seal
from shunter.hf.checkpoints.loading import load_folder
from shunter.recipes import forest as forests
from shunter.recipes import mixing, run
from shunter.recipes.run import configuration_of
from shunter.training import loop
from tests.helpers import TIME_LIMIT

from .conftest import SMALL


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A run of three domains and a forest of it, nothing of which is trained."""
    folder = tmp_path_factory.mktemp("forest")
    texts = {"letters": "abc de fgh ", "digits": "12 345 6 78 ", "signs": "+ - == (()) ; "}
    for domain, text in texts.items():
        (folder / "corpus" / domain).mkdir(parents=True)
        for i in range(8):
            (folder / "corpus" / domain / f"{i}.txt").write_text(text * (10 + i))
    settings = [*SMALL, f"data.source=['{folder / 'corpus'}']", "training.steps=4", "data.eval_share=0.4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "write_report", lambda folder: None)
        patch.setattr(run, "write_picture", lambda *places: None)
        assert main(["train", "text", "--run", str(folder / "run"), "--json", *settings]) == 0
    assert main(["branch", str(folder / "run"), "--out", str(folder / "bare"), "--together", "training.steps=6"]) == 0
    return folder


def train(*folders):
    for folder in folders:
        assert main(["train", "text", "--resume", "--run", str(folder), "--json"]) == 0


@pytest.fixture(scope="module")
def trained(grown):
    shutil.copytree(grown / "bare", grown / "forest")
    train(*sorted((grown / "forest/branches").iterdir()), grown / "forest/together")
    return grown / "forest"


def weights(folder):
    return {path.name: (path / "branch/model.safetensors").read_bytes() for path in (folder / "branches").iterdir()}


def test_branches_are_the_same_in_any_order(grown, trained, monkeypatch):
    """Backwards, with one stopped and gone on with."""
    other = grown / "backwards"
    shutil.copytree(grown / "bare", other)
    inner = loop._Watch.on_step_begin

    def stop(watch, args, state, control, **kwargs):
        inner(watch, args, state, control, **kwargs)
        watch.asked = watch.asked or state.global_step == 2

    monkeypatch.setattr(loop._Watch, "on_step_begin", stop)
    assert main(["train", "text", "--resume", "--run", str(other / "branches/signs")]) == 130
    monkeypatch.setattr(loop._Watch, "on_step_begin", inner)
    train(*(other / "branches" / name for name in ("signs", "letters", "digits")))
    assert weights(other) == weights(trained)
    assert len(set(weights(trained).values())) == 3
    seed = (trained / "seed/model.safetensors").read_bytes()
    assert seed == (grown / "run/dense/model.safetensors").read_bytes() and seed not in weights(trained).values()
    assert not (trained / "branches/signs/checkpoints").exists()


@pytest.mark.slow
def test_branches_are_the_same_in_processes_side_by_side(grown, trained):
    other = grown / "beside"
    shutil.copytree(grown / "bare", other)
    words = [sys.executable, "-m", "shunter", "train", "text", "--resume", "--json", "--run"]
    calls = [
        subprocess.Popen([*words, str(other / "branches" / name)], stdout=subprocess.DEVNULL)
        for name in ("letters", "digits", "signs")
    ]
    assert [call.wait(timeout=TIME_LIMIT) for call in calls] == [0, 0, 0]
    assert weights(other) == weights(trained)


def test_a_branch_begins_as_its_seed_on_the_same_held_out_text(grown, trained):
    recipe, config = configuration_of(grown / "run")
    seed = recipe.evaluate(load_folder(trained / "seed"), recipe.prepare(config))["domains"]
    for folder in (trained / "branches").iterdir():
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        first = next(line for line in lines if line["kind"] == "eval")
        assert first["step"] == 0 and first["loss"] == pytest.approx(seed[folder.name]["loss"], rel=1e-6)
    steps = [json.loads(line)["step"] for line in (trained / "together/metrics.jsonl").read_text().splitlines()]
    assert max(steps) == 18


def test_averages(trained):
    folders = [trained / "branches" / name / "branch" for name in ("digits", "letters", "signs")]
    states = [load_folder(folder).state_dict() for folder in folders]
    share = torch.rand(3, dtype=torch.float64) + 0.1
    found = forests.average(folders, (5 * share).tolist()).state_dict()
    for name, value in found.items():
        expected = sum(w * state[name].double() for w, state in zip(share / share.sum(), states, strict=True))
        torch.testing.assert_close(value, expected.float(), rtol=1e-6, atol=1e-9)
    for place in range(3):
        one = [0.0] * 3
        one[place] = 0.3
        alone = forests.average(folders, one).state_dict()
        assert all(torch.equal(alone[name].view(torch.int32), states[place][name].view(torch.int32)) for name in alone)


def test_the_table_is_that_of_the_models_themselves(trained, capsys):
    """Each number again, by the whole vocabulary, Bayes' rule written out a token at a time."""
    assert main(["eval", str(trained), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    names, loss = found["domains"], found["loss"]
    assert names == ["digits", "letters", "signs"]
    models = [load_folder(trained / "branches" / name / "branch") for name in names]
    alone = {"seed": load_folder(trained / "seed"), "trained together": load_folder(trained / "together/branch")}
    alone |= {f"branch {name}": model for name, model in zip(names, models, strict=True)}
    for name in names:
        config = forests._config_of(trained / "branches" / name)
        windows, rest = forests._held_out(trained, config)
        assert len(windows) == 4 and len(rest) > 0
        with torch.no_grad():
            for which, model in alone.items():
                logits = model(input_ids=windows).logits[:, :-1]
                nats = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
                assert loss[which][name] == pytest.approx(float(nats), rel=1e-4)
            probs = torch.stack([model(input_ids=windows).logits.double().softmax(-1) for model in models])
        nats = []
        for window, row in enumerate(windows):
            belief = torch.full((3,), 1 / 3, dtype=torch.float64)
            for place in range(1, len(row)):
                each = probs[:, window, place - 1, row[place]]
                nats.append(-float((belief * each).sum().log()))
                belief = belief * each / (belief * each).sum()
        assert loss["ensemble, uniform prior"][name] == pytest.approx(sum(nats) / len(nats), rel=1e-4)
        best = min(loss[f"branch {other}"][name] for other in names)
        bound = best + float(torch.tensor(3.0).log()) / (windows.shape[1] - 1)
        assert loss["ensemble, uniform prior"][name] <= bound + 1e-4
    assert {"ensemble, updating prior", "ensemble, cached prior", "ensemble, last token alone"} <= set(loss)


def test_domains_come_and_go_without_touching_the_others(grown, trained, tmp_path, capsys):
    forest = tmp_path / "forest"
    shutil.copytree(trained, forest)
    (tmp_path / "new/hex").mkdir(parents=True)
    for i in range(8):
        (tmp_path / "new/hex" / f"{i}.txt").write_text("12 34 ff 6a " * (10 + i))
    before = {path: path.read_bytes() for path in forest.rglob("*") if path.is_file() and path.name != ".lock"}
    add = ["branch", str(forest), "--data", str(tmp_path / "new"), "--start", "posterior", "training.steps=3"]
    assert main(add) == 0
    assert "branches/hex" in capsys.readouterr().out
    facts = json.loads((forest / "branches/hex/branch.json").read_text())
    assert facts["start"]["digits"] > 1 / 3, "it has digits"
    folders = [forest / "branches" / name / "branch" for name in facts["start"]]
    mean = forests.average(folders, list(facts["start"].values())).state_dict()
    start = load_folder(forest / "branches/hex/start").state_dict()
    assert all(torch.equal(mean[name], start[name]) for name in mean)
    assert main(["eval", str(forest)]) == 2
    assert "hex is not trained; do so: shunter train text --resume --run" in capsys.readouterr().err
    train(forest / "branches/hex")
    assert all(path.read_bytes() == content for path, content in before.items())
    assert list(forests.evaluate_forest(forest)["loss"]["seed"]) == ["digits", "hex", "letters", "signs"]
    shutil.rmtree(forest / "branches/letters")
    assert forests.read_forest(forest).domains == ["digits", "hex", "signs"]
    part = forests.evaluate_forest(forest, ["digits", "signs"])["loss"]
    shutil.rmtree(forest / "branches/hex")
    assert forests.evaluate_forest(forest)["loss"] == part


def test_what_is_merged_needs_no_forest(trained, tmp_path, capsys):
    average, ensemble, like = (tmp_path / name for name in ("average", "ensemble", "like"))
    words = ["--weights", "digits=3,signs=1", "--as", "average", "--json"]
    assert main(["merge", str(trained), "--out", str(average), *words]) == 0
    receipt = json.loads(capsys.readouterr().out)
    assert receipt["weights"] == {"digits": 0.75, "signs": 0.25} and "seed" in receipt["loss"]
    assert (average / "losses.png").read_bytes().startswith(b"\x89PNG")
    folders = [trained / "branches" / name / "branch" for name in ("digits", "signs")]
    expected = forests.average(folders, [0.75, 0.25])
    found = load_folder(average)
    assert all(torch.equal(found.state_dict()[name], value) for name, value in expected.state_dict().items())
    assert main(["merge", str(trained), "--out", str(ensemble), "--top-k", "2", "--no-check"]) == 0
    assert main(["merge", str(trained), "--out", str(like), "--like", "signs", "--no-check", "--json"]) == 0
    share = json.loads(capsys.readouterr().out.splitlines()[-1])["weights"]
    assert max(share, key=share.get) == "signs" and sum(share.values()) == pytest.approx(1)
    prompt = ["--prompt", "12 345", "--max-new-tokens", "6", "--temperature", "0"]
    said = {}
    for folder, *which in (
        [average], [ensemble], [like], [trained], [trained, "--model", "seed"], [trained, "--model", "average"],
        [trained, "--model", "together"], [trained, "--model", "digits"],
    ):  # fmt: skip
        assert main(["generate", str(folder), *which, *prompt]) == 0
        said[(folder.name, *which[1:])] = capsys.readouterr().out
    assert all(text.startswith("12 345") for text in said.values())
    model = load_folder(average)
    from shunter.hf.checkpoints.folders import load_tokenizer

    ids = load_tokenizer(average)("12 345", return_tensors="pt").input_ids
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert said[(average.name,)].rstrip("\n") == load_tokenizer(average).decode(ids[0], skip_special_tokens=True)
    for facts in {}, {"as": "soup", "weights": {}}, {"as": "ensemble", "weights": 3}:
        (ensemble / "merged.json").write_text(json.dumps(facts))
        (ensemble / MANIFEST).unlink()
        seal(ensemble)
        assert main(["generate", str(ensemble), *prompt]) == 2
        assert "merged.json does not say what was merged" in capsys.readouterr().err


def test_text_is_continued_by_the_mixture(trained):
    """Token by token, the likeliest of the weighted sum of the predictions."""
    folders = forests.read_forest(trained)
    models = [load_folder(folders.model_folder(name)) for name in folders.domains]
    mixture = forests.DomainMixture(lambda domain, input_ids: models[domain](input_ids=input_ids).logits, 3)
    ids = torch.randint(40, 60, (1, 5))
    found = mixing.continue_ids(mixture, ids, 4, 0.0)
    assert found.shape == (1, 9) and torch.equal(found[:, :5], ids)
    with torch.no_grad():
        probs = torch.stack([model(input_ids=found).logits[0].double().softmax(-1) for model in models])
    belief = torch.full((3,), 1 / 3, dtype=torch.float64)
    for place in range(8):
        if place >= 4:
            mixed = (belief[:, None] * probs[:, place]).sum(0)
            assert mixed[found[0, place + 1]] >= mixed.max() * (1 - 1e-4)
        belief = belief * probs[:, place, found[0, place + 1]]
        belief = belief / belief.sum()


BAD = {
    "no forest": (["merge", "{work}", "--out", "{new}"], "is no forest; shunter branch makes one"),
    "unknown domain": (["merge", "{forest}", "--out", "{new}", "--domains", "digit"], "did you mean digits?"),
    "unknown weight": (["merge", "{forest}", "--out", "{new}", "--weights", "x=1"], "has no branch of 'x' here"),
    "no weight": (["merge", "{forest}", "--out", "{new}", "--weights", "digits"], "must be DOMAIN=WEIGHT"),
    "nothing": (
        ["merge", "{forest}", "--out", "{new}", "--weights", "digits=0"],
        "must be at least 0, and one of them",
    ),
    "unlike": (["merge", "{forest}", "--out", "{new}", "--like", "x"], "--like: "),
    "both": (["merge", "{forest}", "--out", "{new}", "--like", "digits", "--weights", "digits=1"], "give one"),
    "top-k": (["merge", "{forest}", "--out", "{new}", "--top-k", "4"], "from 1 to the number of branches, 3"),
    "how": (["merge", "{forest}", "--out", "{new}", "--as", "soup"], "choose ensemble or average"),
    "window": (["merge", "{forest}", "--out", "{new}", "--as", "average", "--window", "1"], "an average is one model"),
    "not trained": (["merge", "{bare}", "--out", "{new}"], "is not trained; do so: shunter train text --resume --run"),
    "there": (["merge", "{forest}", "--out", "{work}"], "exists already"),
    "no text": (["branch", "{run}", "--out", "{new}", "--domains", "poems"], "has no domain 'poems'; it has digits"),
    "again": (["branch", "{forest}", "--domains", "signs"], "has a branch of 'signs' already"),
    "all there": (["branch", "{forest}"], "has a branch of each domain"),
    "no out": (["branch", "{run}"], "--out FOLDER is needed"),
    "no run": (["branch", "{work}/none", "--out", "{new}"], "none"),
    "a branch": (["branch", "{forest}/branches/signs", "--out", "{new}"], "a forest grows from one"),
    "setting": (["branch", "{run}", "--out", "{new}", "model.dim=8"], "in its training alone"),
    "bad setting": (["branch", "{run}", "--out", "{new}", "training.steps=0"], "training.steps"),
    "which": (["branch", "{run}", "--out", "{new}", "--model", "x"], "choose dense or sparse"),
    "start": (["branch", "{run}", "--out", "{new}", "--start", "posterior"], "a run has none"),
    "no model": (["generate", "{forest}", "--model", "poems"], "has no branch of 'poems'"),
    "no such model": (["generate", "{run}", "--model", "poems"], "a run has dense and sparse"),
    "no domains": (["generate", "{run}", "--domain", "signs"], "its experts are not of domains"),
    "no mixing": (["eval", "{run}", "--mixing"], "train text with sparse.router=domain"),
    "train": (
        ["train", "text", "--run", "{bare}/branches/signs"],
        "holds a branch; train it, or go on: shunter train text",
    ),
    "compare": (["compare", "text", "--routers", "topk", "--run", "{bare}/branches/signs"], "holds a run already"),
    "mixing": (["eval", "{forest}", "--mixing"], "none of the three is for a forest"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case, grown, trained, tmp_path, capsys):
    arguments, message = BAD[case]
    places = {
        "work": tmp_path,
        "new": tmp_path / "new",
        "run": grown / "run",
        "forest": trained,
        "bare": grown / "bare",
    }
    assert main([word.format(**places) for word in arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and "\n" not in said and not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["encoder", "encoder-decoder"])
def test_only_decoders_are_mixed(kind, grown, tmp_path, capsys):
    """Of hidden or left out tokens there is no past, by which predictions are weighed."""
    other = tmp_path / "run"
    other.mkdir()
    (other / "recipe.json").write_bytes((grown / "run/recipe.json").read_bytes())
    (other / "config.yaml").write_text(f"model: {{kind: {kind}}}")
    assert main(["branch", str(other), "--out", str(tmp_path / "new")]) == 2
    assert f"has an {kind}; branches are of decoders" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, message",
    [
        ("seed", "other weights"),
        ("tokenizer", "other tokens"),
        ("start", "damaged"),
        ("domains", "branch.json does not say the domains"),
    ],
)
def test_a_branch_of_another_seed_is_refused(change, message, grown, trained, tmp_path, capsys):
    """A branch copied from a forest that grew from another model, or with other tokens, or changed by hand."""
    forest = tmp_path / "forest"
    shutil.copytree(grown / "bare", forest)
    facts = json.loads((forest / "branches/signs/branch.json").read_text())
    folder = forest / "branches/signs"
    (folder / "branch.json").write_text(json.dumps(facts | {change: {"signs": 1.0} if change == "start" else "0" * 64}))
    if change != "start":
        (folder / MANIFEST).unlink()
        seal(folder)
    for arguments in (
        ["train", "text", "--resume", "--run", str(folder)],
        ["merge", str(forest), "--out", str(tmp_path / "new"), "--domains", "signs"],
    ):
        assert main(arguments) == 2
        said = capsys.readouterr().err.strip()
        assert message in said and "\n" not in said
