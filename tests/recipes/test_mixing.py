"""Experts of domains in the text recipe (DEMix): told, mixed in every way, and continuing text."""

import json
import math

import pytest
import torch

import shunter
from shunter.analysis.runs import read_run
from shunter.cli import main
from shunter.hf.checkpoints.folders import load_tokenizer
from shunter.recipes import mixing
from shunter.recipes.lesson import lesson_of
from shunter.recipes.run import configuration_of, load_model

from .browser import complaints
from .conftest import SMALL, write_corpus


@pytest.fixture(scope="module")
def demix(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demix")
    corpus = write_corpus(folder / "corpus")
    settings = [*SMALL, f"data.source=['{corpus}']", "data.eval_windows=3", "data.eval_share=0.4"]
    settings += ["training.steps=4", "sparse.router=domain", "sparse.num_experts=3"]
    assert main(["train", "text", "--run", str(folder / "run"), "--json", *settings]) == 0
    return folder / "run"


def _written_out(probs, ids, prior, window=None):
    """The loss (L - 1,) of each token but the first and the last belief, by the rule written out a token at a time."""
    belief, nats, past = prior.clone(), [], []
    for place in range(1, len(ids)):
        each = probs[:, place - 1, ids[place]]
        nats.append(-float((belief * each).sum().log()))
        past.append(each)
        belief = prior.clone()
        for one in past if window is None else past[-window:]:
            belief = belief * one / (belief * one).sum()
    return nats, belief


def _mean(beliefs, rate=0.3):
    """The running average of beliefs, the newest with the weight `rate`."""
    weights = [(1 - rate) ** age for age in range(len(beliefs))][::-1]
    return sum(w * belief for w, belief in zip(weights, beliefs, strict=True)) / sum(weights)


def test_every_way_of_mixing_is_its_rule_written_out(demix, capsys):
    capsys.readouterr()
    assert main(["eval", str(demix), "--mixing", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    recipe, config = configuration_of(demix)
    data, model = recipe.windows(config, more=100), load_model(demix, "sparse")
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64)
    for place, domain in enumerate(data.eval):

        def probs(ids):
            rows = []
            for told in range(3):
                with shunter.tell(model, domain=torch.tensor(told)), torch.no_grad():
                    rows.append(model(input_ids=ids[None]).logits[0].double().softmax(-1))
            return torch.stack(rows)

        shown, rest = domain.input_ids[:3], domain.input_ids[3:]
        assert len(rest)
        each = [(probs(ids), ids) for ids in shown]
        cached = _mean([_written_out(probs(ids), ids, uniform)[1] for ids in rest])
        nats, beliefs = {way: [] for way in found}, []
        for table, ids in each:
            following = ids[1:]
            nats[mixing.OWN] += (-table[place, torch.arange(len(following)), following].log()).tolist()
            nats["uniform prior"] += _written_out(table, ids, uniform)[0]
            nats["last token alone"] += _written_out(table, ids, uniform, 1)[0]
            nats["cached prior"] += _written_out(table, ids, cached)[0]
            more, end = _written_out(table, ids, _mean(beliefs) if beliefs else uniform)
            nats["updating prior"] += more
            beliefs.append(end)
        for way, values in nats.items():
            assert found[way][domain.name] == pytest.approx(sum(values) / len(values), rel=1e-4), way
    summary = json.loads((demix / "summary.json").read_text())["sparse"]["domains"]
    assert found[mixing.OWN] == {name: pytest.approx(one["loss"], rel=1e-5) for name, one in summary.items()}
    assert complaints(demix / "report.html", demix.parent / "browser") == []
    [table] = [one for one in read_run(demix).exhibits if one.title == "Mixing the experts of the domains"]
    assert [row[0] for row in table.rows] == list(found)
    assert table.rows[1][1:] == [f"{found['uniform prior'][name]:.4f}" for name in summary] + [
        f"{sum(found['uniform prior'].values()) / 3:.4f}"
    ]


def test_text_is_continued_by_a_domain_or_by_all(demix, capsys):
    prompt = ["--prompt", "12 345", "--max-new-tokens", "5", "--temperature", "0"]
    capsys.readouterr()
    said = []
    for domain in (["--domain", "digits"], ["--domain", "signs"], []):
        assert main(["generate", str(demix), *prompt, *domain]) == 0
        said.append(capsys.readouterr().out)
    assert all(text.startswith("12 345") for text in said)
    assert main(["generate", str(demix), *prompt, "--domain", "poems"]) == 2
    assert "has no domain 'poems'; it has digits, letters, signs" in capsys.readouterr().err
    model = load_model(demix, "sparse")
    tokenizer = load_tokenizer(demix / "sparse")
    ids = tokenizer("12 345", return_tensors="pt").input_ids
    for _ in range(5):
        with shunter.tell(model, domain=torch.tensor(0)), torch.no_grad():
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert said[0].rstrip("\n") == tokenizer.decode(ids[0], skip_special_tokens=True).rstrip("\n")


def test_losses_of_planted_domains():
    """Experts that each know one of three texts: mixing costs at most the prior, and less with what came before."""
    n = 6
    likelihood = torch.full((4, n, 3), math.log(0.4), dtype=torch.float64)
    likelihood[..., 1] = math.log(0.8)
    found = mixing.losses({"b": likelihood}, {"b": likelihood}, {"b": 1})
    own, uniform, updating, cached, last = (found[way]["b"] for way in (mixing.OWN, *mixing.WAYS))
    assert own == pytest.approx(-math.log(0.8)) and own < cached < updating < uniform < last
    assert uniform <= own + math.log(3) / n + 1e-6
    best = mixing.losses({"b": likelihood}, {}, {"b": 1}, top_k=1)
    assert set(best) == {mixing.OWN, "uniform prior", "updating prior", "last token alone"}, "no windows, no prior"
    assert best["uniform prior"]["b"] == pytest.approx(((n - 1) * -math.log(0.8) - math.log(0.4)) / n)
    prior, ratio = mixing.cached_prior(likelihood), 2.0**n
    assert prior.tolist() == pytest.approx([1 / (ratio + 2), ratio / (ratio + 2), 1 / (ratio + 2)])


def test_a_student_learns_from_the_runs_own_batches_beside_its_own_dense_model(demix, tmp_path, capsys):
    """The gain is counted by the run's held-out losses, for as many steps; with other steps a twin is trained."""
    summary = json.loads((demix / "summary.json").read_text())
    assert main(["distill", str(demix), "--out", str(tmp_path / "new"), "--json"]) == 0
    receipt = json.loads(capsys.readouterr().out)
    assert receipt["options"] | {"steps": 4, "learning_rate": 3e-3} == receipt["options"]
    assert receipt["options"]["baseline"] == str(demix / "dense")
    for ours, theirs in ("teacher", "sparse"), ("baseline", "dense"):
        assert math.isclose(receipt["losses"][ours], summary[theirs]["eval_loss"], rel_tol=1e-5)
    recipe, config = configuration_of(demix)
    data = recipe.prepare(config)
    lesson = lesson_of(demix)
    rows = [row for batch in lesson.material.batches for row in batch.inputs["input_ids"]]
    assert len(rows) == len(data.train) and all(
        torch.equal(row, data.train[i]["input_ids"]) for i, row in enumerate(rows)
    )
    for batch in lesson.material.batches:
        assert torch.equal(batch.targets[:, :-1], batch.inputs["input_ids"][:, 1:]) and "domain" in batch.told
        assert bool((batch.targets[:, -1] == -100).all())
    assert main(["distill", str(demix), "--out", str(tmp_path / "short"), "--json", "--steps", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["options"]["baseline"] is None
