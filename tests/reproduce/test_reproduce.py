"""The review's figures and numbers: real decisions, verdicts that follow the numbers, and pages that are the JSON."""

import dataclasses
import json
import math
import random
import re
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("pydantic")
pytest.importorskip("scipy")
pytest.importorskip("transformers")

from matplotlib.figure import Figure

from shunter.cli import main
from shunter.reproduce import asynchronous, figures_3_to_5, headline, registry, routings, scaling, sweep
from shunter.reproduce.page import write_pages
from shunter.reproduce.registry import ALL, find
from shunter.reproduce.results import DIRECTION, NOT, REPRODUCED, Result, Row, read
from shunter.reproduce.scaling_figures import draw_domains

from ..pages import ROOT

KEPT = ROOT / "docs" / "reproduction"


def verdicts(result):
    return {row.what: row.verdict for row in result.rows}


def test_routings_are_as_the_review_says_on_any_tokens(monkeypatch, seed):
    """What only these tokens show, that a load is uneven, is left out."""
    monkeypatch.setattr(routings, "_seed", lambda fixed: torch.manual_seed(seed + fixed))
    for figure in (routings.figure_1, routings.figure_2, routings.figure_6, routings.figure_7):
        for row in figure().rows:
            assert row.verdict == REPRODUCED or row.paper == "any number", row


def test_a_layer_that_renormalises_is_not_equation_2(monkeypatch):
    class Renormalised(routings.MoE):
        def __init__(self, *args, **options):
            super().__init__(*args, **options | {"renormalize": "before_drop"})

    monkeypatch.setattr(routings, "MoE", Renormalised)
    found = verdicts(routings.figure_2())
    assert found["equation 1: the weights are the softmax over all experts"] == NOT
    assert found["equation 2: the output is their sum weighted by p"] == NOT


def planted(loss, monkeypatch):
    """Every sweep gives these losses, a function of router, parameters and experts."""

    def run(self, folder, routers, sizes=None, counts=sweep.COUNTS):
        for size in sizes or self.sizes:
            for router, count in [("dense", 1), *((router, count) for count in counts for router in routers)]:
                value = loss(router, 1000.0 * size**2, count)
                yield {
                    "router": router,
                    "size": size,
                    "parameters": 1000.0 * size**2,
                    "experts": count,
                    "loss": value,
                    "recalled": 100 * math.exp(-value),
                    "flops_per_token": 2000.0 * size**2 + 10 * size * count * (count > 1),
                    "seconds": 1.0,
                    "domains": {"even": {"loss": value**0.5}},
                }

    def measured(study, runs):
        rows = study.sweep.run(runs, scaling.LAW_ROUTERS, None, (study.experts,))
        return [row | {"right": row["recalled"], "error": row["loss"] / 100, "noise": 0.001} for row in rows]

    monkeypatch.setattr(sweep.Sweep, "run", run)
    monkeypatch.setattr(sweep.Sweep, "run_more_dense", lambda self, folder: iter(()))
    monkeypatch.setattr(figures_3_to_5, "_measured", measured)
    monkeypatch.setattr(headline, "_speed_up", lambda run, name: 5.0)
    monkeypatch.setattr(headline, "residual", lambda: Result("residual", [Row("a", "b", "c", NOT)], {}))


@pytest.mark.parametrize("facts", ["", "facts_"])
def test_verdicts_of_figures_3_to_5_follow_the_runs(facts, monkeypatch, tmp_path):
    figure_3, figure_4, figure_5 = (getattr(figures_3_to_5, f"{facts}figure_{n}") for n in (3, 4, 5))
    more, fewer = "the loss falls with more experts, each time", "gains diminish"

    def diminishing(router, parameters, experts):
        return 30 * parameters**-0.1 * (0.5 + 0.5 / experts)

    planted(diminishing, monkeypatch)
    assert set(verdicts(figure_3(tmp_path)).values()) == {REPRODUCED}
    assert set(verdicts(figure_4(tmp_path)).values()) == {REPRODUCED}
    larger, *sparse = figure_5(tmp_path).rows
    assert larger.verdict == REPRODUCED and all(row.verdict == DIRECTION for row in sparse)
    assert all("told by 1 of 5 sizes" in row.why for row in sparse), "no dense run computes ten times what most do"

    planted(lambda router, parameters, experts: 30 * parameters**-0.1 * (1 + 0.01 * experts), monkeypatch)
    found = figure_3(tmp_path)
    assert all(row.verdict == NOT for row in found.rows if row.paper != "it is"), "experts that harm"
    assert all("above dense" in row.ours for row in found.rows if more in row.what)
    found = figure_4(tmp_path)
    assert {row.verdict for row in found.rows} == {NOT}
    assert all(row.ours.startswith("less than") for row in found.rows if "over its own" in row.what), (
        "below the smallest"
    )
    assert [row.verdict for row in figure_5(tmp_path).rows] == [REPRODUCED, NOT, NOT]

    planted(lambda router, parameters, experts: 30 * parameters**-0.1 / min(experts, 8), monkeypatch)
    found = verdicts(figure_3(tmp_path))
    assert found[f"Switch: {more}"] == DIRECTION and found[f"Switch: {fewer}"] == REPRODUCED

    planted(lambda router, parameters, experts: 30 * parameters**-0.1 * (1.5 - 0.001 * experts**1.5), monkeypatch)
    assert verdicts(figure_3(tmp_path))[f"Switch: {fewer}"] == NOT, "gains that grow"

    planted(lambda router, parameters, experts: 5 + math.sin(parameters) - (experts > 1), monkeypatch)
    first, second = figure_4(tmp_path).rows[:2]
    assert first.verdict == REPRODUCED and "more than" in second.ours, "dense models that are not better all the way"


def test_what_few_sizes_tell_is_not_reproduced_and_said():
    inf = math.inf
    assert scaling.at_least([(2.1, 2.1), (3, inf), (2, 2), (1, inf), (0.5, inf)], 2)
    assert not scaling.at_least([(2.1, 2.1), (3, inf), (1.9, inf), (1, inf), (0.5, inf)], 2), "two of five tell"
    assert not scaling.at_least([(2.1, 2.1), (3, inf), (2, 2), (1.9, 1.9), (0.5, inf)], 2), "one is smaller"
    assert scaling.told([(2.1, 2.1), (3, inf), (0, 1.5), (1, inf), (0, 2.5)], 2).endswith("told by 3 of 5 sizes")
    assert not scaling.told([(2.1, 2.1), (0, 1.5)], 2)


def test_gains_that_are_not_there_do_not_diminish(monkeypatch, tmp_path):
    for loss in (lambda router, parameters, experts: 2.0, lambda router, parameters, experts: 2.0 + 0.1 * experts):
        planted(loss, monkeypatch)
        found = headline.headline(tmp_path).rows[0]
        assert found.verdict == NOT and "does not gain" in found.ours


def test_gradients_may_be_as_old_as_all_younger_ones_do_no_harm():
    first, *_ = asynchronous.STALENESS
    assert first == 0
    for curve, most, verdict in (
        ([1, 1, 1.1, 1, 1.19, 1.3, None], 8, REPRODUCED),
        ([1, 1.3, 1, 1, 1, 1, 1], 0, NOT),
        ([1, 1, None, 1, 1, 1, 1], 1, DIRECTION),
        ([1, 1, 1, 1, 1, 1, 1], 32, REPRODUCED),
    ):
        row = asynchronous._tolerates("dense", curve)
        assert row.ours.endswith(f"up to {most}") and row.verdict == verdict, curve
    assert asynchronous._tolerates("dense", [None] * 7).verdict == NOT


def test_what_leaks_is_said(monkeypatch, tmp_path):
    planted(lambda router, parameters, experts: 30 / experts, monkeypatch)
    why = {row.what.split(":")[0]: row.why for row in figures_3_to_5.figure_3(tmp_path).rows if "falls" in row.what}
    assert "later tokens" in why["expert choice"] and not any(why[name] for name in why if name != "expert choice")


def test_verdicts_follow_the_losses(monkeypatch, tmp_path):
    def saturating(router, parameters, experts):
        effective = 1 / (1 / (experts - 1 + 1 / (1 / 2 - 1 / 300)) + 1 / 300)
        x, h = np.log10(parameters), np.log10(effective)
        return float(10 ** (-0.08 * x - 0.15 * h + 0.012 * x * h + 1.0))

    planted(saturating, monkeypatch)
    monkeypatch.setattr(scaling, "account", partial(scaling.account, resamples=30))
    assert set(verdicts(scaling.law(tmp_path)).values()) == {REPRODUCED}
    found = verdicts(figures_3_to_5.facts_figure_3(tmp_path))
    assert all(verdict == REPRODUCED for what, verdict in found.items() if "falls" in what or "two experts" in what)
    assert set(verdicts(scaling.domains(tmp_path)).values()) == {NOT}, "the root of a power law gains as much compute"
    assert verdicts(headline.headline(tmp_path))["as few as two experts help"] == REPRODUCED


@pytest.mark.parametrize("more", [False, True], ids=["sweep alone", "more dense runs"])
def test_domains_of_text_are_worth_the_compute_that_was_planted(more, monkeypatch, tmp_path):
    """Experts are worth four times the dense compute in the domain of training, and twice out of it."""

    def loss(worth, size):
        return 30 * (2000.0 * size**2 * worth) ** -0.1

    def row(router, size, count, worth):
        found = {"router": router, "size": size, "experts": count, "loss": loss(worth, size)}
        return found | {"parameters": 1000.0 * size**2, "flops_per_token": 2000.0 * size**2, "seconds": 1.0}

    def run(self, folder, routers, sizes=None, counts=sweep.COUNTS):
        for size in self.sizes:
            for router, count in [("dense", 1), *((router, count) for count in counts for router in routers)]:
                yield row(router, size, count, 1 if count == 1 else 4)

    def run_more_dense(self, folder):
        for size, longer in ((64, 2), (64, 9)) if more else ():
            yield row("dense", size, 1, longer) | {"longer": longer}

    def load(run, name):
        size, _, longer = run.name[1:].partition("-")
        return int(size), 2 if name != "dense" else int(longer.split("-")[0] or 1)

    monkeypatch.setattr(sweep.Sweep, "run", run)
    monkeypatch.setattr(sweep.Sweep, "run_more_dense", run_more_dense)
    monkeypatch.setattr(scaling, "configuration_of", lambda run: (None, sweep._text_of_domains(16, {"hidden": 64})))
    monkeypatch.setattr(scaling.RECIPE, "windows", lambda config, tokenizer=None: _Read(config.data.domains))
    monkeypatch.setattr(scaling, "load_model", load)

    def evaluated(model, read):
        assert read == [sweep.OUTSIDE]
        return {"loss": loss(model[1], model[0])}

    monkeypatch.setattr(scaling, "evaluate", evaluated)
    found = scaling.text_domains(tmp_path)
    assert {row.verdict for row in found.rows} == {REPRODUCED} and len(found.rows) == 2
    if more:
        assert not any(row.why or "than" in row.ours for row in found.rows)
        assert "Dense runs of 2 and 9 times the steps" in found.notes[-1]
    else:
        assert all("told by 3 of 4 sizes" in row.why and "more than 1.00" in row.ours for row in found.rows)
    for gains in found.data["gains"].values():
        for key, worth in (("inside", 4), ("outside", 2)):
            assert [low for low, _ in gains[key]] == pytest.approx([worth, worth, worth, worth if more else 1])
            assert [high for _, high in gains[key]] == [*map(pytest.approx, [worth] * 3), worth_of(worth, more)]
    draw_domains(found.data)


def worth_of(worth, known):
    """A worth that is found, or no bound above it."""
    return pytest.approx(worth) if known else None


class _Read:
    def __init__(self, domains):
        self.tokenizer, self.eval = "known", domains


def test_a_sweep_goes_on_and_trains_nothing_twice(tmp_path, monkeypatch, capsys):
    small = sweep.Sweep("small", sweep.FACTS, (4,), _small, lambda size: 0, ((4, 2), (6, 1)))
    first = list(small.run(tmp_path, ("switch", "hash"), counts=(2,)))
    assert [(row["router"], row["experts"]) for row in first] == [("dense", 1), ("switch", 2), ("hash", 2)]
    assert len({row["parameters"] for row in first}) == 1
    kept = (tmp_path / "small" / "d4" / "switch-2").stat().st_ino
    again = list(small.run(tmp_path, ("switch", "hash"), counts=(2, 4)))
    assert [row["loss"] for row in again[:3]] == [row["loss"] for row in first] and len(again) == 5
    assert (tmp_path / "small" / "d4" / "switch-2").stat().st_ino == kept
    more = list(small.run_more_dense(tmp_path))
    assert [(row["router"], row["size"], row["longer"]) for row in more] == [("dense", 4, 2), ("dense", 6, 1)]
    assert more[0]["tokens"] == 2 * first[0]["tokens"] and more[1]["tokens"] == first[0]["tokens"]
    assert scaling.compute_of(more[0]) == 2 * scaling.compute_of(first[0]) < scaling.compute_of(more[1]) * 2
    measured = figures_3_to_5._measured(
        dataclasses.replace(figures_3_to_5.FACTS_STUDY, sweep=small, experts=2), tmp_path
    )
    assert [row["loss"] for row in measured] == [row["loss"] for row in first]
    for row in measured:
        assert row["right"] == pytest.approx(row["recalled"]) and 0 <= row["error"] <= 1 and row["noise"] > 0


def _small(size, sparse):
    return sweep.FactsConfig.model_validate(
        {
            "data": {"keys": 64, "values": 4, "sequence_length": 16, "eval_windows": 4},
            "model": {"dim": size, "hidden": 4 * size},
            "training": {"steps": 4, "batch_tokens": 32, "eval_every": 4, "log_every": 2, "threads": 1},
            "sparse": sparse,
        }
    )


def test_the_command_lists_runs_and_keeps(tmp_path, capsys):
    out = ["--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]
    assert main(["reproduce", *out]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == len(ALL) and all(line.endswith("not run") for line in listed)
    assert main(["reproduce", "figure-2", *out]) == 0
    found = json.loads((tmp_path / "out" / "figure-2.json").read_text(encoding="utf-8"))
    assert {"machine", "versions", "rows", "seconds"} <= set(found)
    page = (tmp_path / "out" / "index.md").read_text(encoding="utf-8")
    for row in found["rows"]:
        assert row["ours"] in page and row["ours"] in (tmp_path / "out" / "figure-2.md").read_text(encoding="utf-8")
    assert page.count("**not run**") == len(ALL) - 1
    assert (tmp_path / "out" / "figure-2.png").stat().st_size > 10_000
    capsys.readouterr()
    assert main(["reproduce", *out]) == 0
    assert "figure-2" in (line := capsys.readouterr().out.splitlines()[1]) and line.endswith("3 reproduced")


@pytest.mark.parametrize(
    "what, said",
    [
        (["figure-22"], "did you mean figure-2?"),
        (["all", "figure-1"], "name nothing besides"),
        (["released-law"], "SHUNTER_ROUTING_CURVES"),
    ],
)
def test_what_cannot_be_run_is_one_line(what, said, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("SHUNTER_ROUTING_CURVES", raising=False)
    assert main(["reproduce", *what, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err.splitlines()
    assert said in error[-1] and "Traceback" not in "".join(error)


def test_all_goes_on_without_what_lacks_a_package(tmp_path, capsys, monkeypatch):
    def lacking(runs):
        raise ModuleNotFoundError("No module named 'peft'", name="peft")

    made = {"a:b": lambda: Result("figure-1", [Row("a", "b", "c", REPRODUCED)], {})}
    cheap = replace(find("figure-1"), minutes=0.001, run="a:b", draw=None)
    few = [replace(find("retrieval"), minutes=0.01), find("figure-2"), cheap]
    monkeypatch.setattr("shunter.reproduce.registry.ALL", few)
    monkeypatch.setattr(
        "shunter.reproduce.registry._function", lambda where: made.get(where, lacking if "retr" in where else _two)
    )
    assert main(["reproduce", "all", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr()
    begun = [line for line in said.err.splitlines() if "about" in line]
    assert [line.split(":")[0].split(" against")[0] for line in begun] == ["Figure 1", "Retrieval", "Figure 2"]
    assert "retrieval was not run: this needs the package peft: pip install 'shunter[lora]'" in said.err
    assert read(tmp_path, "figure-2") is not None and read(tmp_path, "retrieval") is None
    assert main(["reproduce", "all", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("about") == 1, "what has a result is not run again"
    assert main(["reproduce", "retrieval", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("shunter reproduce: this needs the package peft")


def test_runs_that_cannot_go_on_are_said_with_what_to_do(tmp_path, capsys, monkeypatch):
    """Of those of other settings, and of a damaged one; what has nothing to do with runs has no such advice."""
    steps = [4]

    def configure(size, sparse):
        config = _small(size, sparse)
        return config.model_copy(update={"training": config.training.model_copy(update={"steps": steps[0]})})

    def trained(runs):
        small = sweep.Sweep("small", sweep.FACTS, (4,), configure, lambda size: 0, ((4, 1),))
        list(small.run_more_dense(runs))
        return Result("memorisation", [Row("a", "b", "c", REPRODUCED)], {})

    made = [replace(find("memorisation"), run="trained", draw=None), replace(find("released-law"), draw=None)]
    function = registry._function
    monkeypatch.delenv("SHUNTER_ROUTING_CURVES", raising=False)
    monkeypatch.setattr("shunter.reproduce.registry.ALL", made)
    monkeypatch.setattr(
        "shunter.reproduce.registry._function", lambda where: trained if where == "trained" else function(where)
    )
    args = ["--out", str(tmp_path / "out"), "--runs", str(tmp_path / "runs")]
    assert main(["reproduce", "memorisation", *args]) == 0
    capsys.readouterr()
    steps[0] = 6
    for what in ("memorisation", "all"):
        (tmp_path / "out" / "memorisation.json").unlink(missing_ok=True)
        assert main(["reproduce", what, *args]) == (1 if what == "all" else 2)
        said = capsys.readouterr().err.splitlines()
        (about,) = [line for line in said if "other settings" in line]
        assert about.endswith("To train it anew, remove it or give another folder as --runs")
    assert not [line for line in said if "SHUNTER_ROUTING_CURVES" in line and "--runs" in line]
    assert main(["reproduce", "memorisation", *args[:2], "--runs", str(tmp_path / "others")]) == 0


def _two(data=None):
    return Result("figure-2", [Row("a", "b", "c", REPRODUCED)], {}) if data is None else Figure()


@pytest.fixture
def few(monkeypatch):
    """Two reproductions that take no time, and how often each ran."""
    ran = Counter()

    def run(name):
        ran[name] += 1
        return Result(name, [Row("a", "b", "c", REPRODUCED)], {})

    made = [replace(find(f"figure-{n}"), run=f"figure-{n}", draw="figure") for n in (1, 2)]
    found = {"figure": lambda data: Figure()} | {one.run: partial(run, one.name) for one in made}
    monkeypatch.setattr("shunter.reproduce.registry.ALL", made)
    monkeypatch.setattr("shunter.reproduce.registry._function", found.get)
    return ran


def test_damaged_results_are_named_and_run_again(tmp_path, capsys, few):
    Result("figure-1", [Row("a", "b", "c", REPRODUCED)], {}, notes=["d"]).save(tmp_path)
    whole = (tmp_path / "figure-1.json").read_text(encoding="utf-8")
    broken = ["{", "[]", "\0", '{"name": 1}', '{"name": "figure-1", "rows": [{"verdict": "yes"}], "data": {}}']
    for old, new in (('"a"', "1"), ('"d"', "[]"), ("figure-1", "figure-2"), ("0.0", '"x"'), ("threads", "thread")):
        assert whole.count(old) == 1
        broken.append(whole.replace(old, new))
    for lost in ("machine", "versions", "seconds", "notes"):
        broken.append(json.dumps({key: value for key, value in json.loads(whole).items() if key != lost}))
    for content in [*broken, whole[: random.randrange(len(whole) - 1)]]:
        (tmp_path / "figure-1.json").write_text(content, encoding="utf-8")
        assert main(["reproduce", "--out", str(tmp_path)]) == 1
        said = capsys.readouterr()
        assert "figure-1.json" in said.err and said.err.count("\n") == 1
        assert said.out.splitlines()[0].endswith("damaged") and len(said.out.splitlines()) == 2
    assert main(["reproduce", "figure-2", "--out", str(tmp_path)]) == 0, "others go on beside it"
    assert "damaged" in (tmp_path / "index.md").read_text(encoding="utf-8")
    assert main(["reproduce", "all", "--out", str(tmp_path)]) == 0
    assert few == {"figure-1": 1, "figure-2": 1} and read(tmp_path, "figure-1") is not None


def test_what_is_cut_short_is_not_taken_for_done(tmp_path, capsys, few, monkeypatch):
    def stopped(data):
        raise KeyboardInterrupt

    function = registry._function
    with monkeypatch.context() as patch:
        patch.setattr(registry, "_function", lambda where: stopped if where == "figure" else function(where))
        assert main(["reproduce", "all", "--out", str(tmp_path)]) == 130
    assert read(tmp_path, "figure-1") is None
    for page in tmp_path.glob("*.md"):
        page.unlink()
    assert main(["reproduce", "all", "--out", str(tmp_path)]) == 0 and few == {"figure-1": 2, "figure-2": 1}
    (tmp_path / "index.md").unlink()
    assert main(["reproduce", "all", "--out", str(tmp_path)]) == 0 and few == {"figure-1": 2, "figure-2": 1}
    assert "figure-2.png" in (tmp_path / "index.md").read_text(encoding="utf-8"), "the page is made of what there is"


def test_a_verdict_is_one_of_five():
    with pytest.raises(ValueError, match="none of reproduced"):
        Row("a", "b", "c", "proved")


@pytest.mark.skipif(not KEPT.is_dir(), reason="no kept results beside the package")
def test_the_kept_pages_are_their_json(tmp_path):
    for one in ALL:
        result = read(KEPT, one.name)
        if result is not None:
            result.save(tmp_path)
            if one.draw:
                assert (KEPT / f"{one.name}.png").is_file()
                (tmp_path / f"{one.name}.png").touch()
    write_pages(tmp_path, ALL)
    for page in tmp_path.glob("*.md"):
        assert page.read_text(encoding="utf-8") == (KEPT / page.name).read_text(encoding="utf-8"), page.name
    assert {page.name for page in KEPT.glob("*.md")} == {page.name for page in tmp_path.glob("*.md")}


OF_RUNS = {
    "figure-3": lambda data: figures_3_to_5.by_experts(figures_3_to_5.TEXT_STUDY, data["runs"]),
    "figure-3-facts": lambda data: figures_3_to_5.by_experts(figures_3_to_5.FACTS_STUDY, data["runs"]),
    "figure-4": lambda data: figures_3_to_5.quality(figures_3_to_5.TEXT_STUDY, data["runs"]),
    "figure-4-facts": lambda data: figures_3_to_5.quality(figures_3_to_5.FACTS_STUDY, data["runs"]),
    "figure-5": lambda data: figures_3_to_5.calibration(figures_3_to_5.TEXT_STUDY, data["runs"]),
    "figure-5-facts": lambda data: figures_3_to_5.calibration(figures_3_to_5.FACTS_STUDY, data["runs"]),
    "domains": lambda data: scaling.domains_of(data["runs"]),
    "domains-text": lambda data: scaling.text_domains_of(data["runs"]),
    "scaling-law": lambda data: replace(read(KEPT, "scaling-law"), rows=scaling.law_claims(data)),
    "scaling-law-text": lambda data: replace(read(KEPT, "scaling-law-text"), rows=scaling.law_claims(data)),
    "headline": lambda data: headline.headline_of(
        data["runs"], data["speed"], read(KEPT, "figure-5-facts"), read(KEPT, "residual")
    ),
}


@pytest.mark.skipif(not KEPT.is_dir(), reason="no kept results beside the package")
@pytest.mark.parametrize("name", OF_RUNS)
def test_kept_verdicts_are_those_of_the_kept_runs(name):
    kept = read(KEPT, name)
    if kept is None:
        pytest.skip("not run")
    again = OF_RUNS[name](kept.data)
    assert again.rows == kept.rows and again.notes == kept.notes


def test_a_changed_number_changes_the_page(tmp_path):
    result = Result("figure-1", [Row("a", "b", f"{random.random():.6f}", REPRODUCED)], {})
    result.save(tmp_path)
    write_pages(tmp_path, ALL)
    before = (tmp_path / "index.md").read_text(encoding="utf-8")
    path = tmp_path / "figure-1.json"
    path.write_text(re.sub(r"0\.\d{6}", "1.234567", path.read_text(encoding="utf-8")), encoding="utf-8")
    write_pages(tmp_path, ALL)
    after = (tmp_path / "index.md").read_text(encoding="utf-8")
    assert before != after and "1.234567" in after
