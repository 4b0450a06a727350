"""The unified scaling law: planted coefficients come back, and those of the released runs of its paper."""

import gzip
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("scipy")

from shunter.analysis.run_table import ONE, read_groups
from shunter.analysis.scaling_law import COEFFICIENTS, Runs, UnifiedLaw, account, bootstrap, fit, leave_one_out
from shunter.cli import main
from shunter.errors import UserError

RELEASED = os.environ.get("SHUNTER_ROUTING_CURVES", "")
"""The file curves.csv.gz of github.com/deepmind/scaling_laws_for_routing (CC BY 4.0), which is not kept here."""

PUBLISHED = {  # Clark et al. 2022, table 3; the cut-offs of section 5.2
    "S-Base": (-0.082, -0.108, 0.009, 1.104, 1.847, 314.478, math.log10(937e9)),
    "RL-R": (-0.083, -0.126, 0.012, 1.111, 1.880, 469.982, math.log10(85e9)),
    "Hash": (-0.087, -0.136, 0.012, 1.157, 4.175, 477.741, math.log10(83e9)),
}


def planted(random, count=5, separable=False):
    """A law like those of the paper, with or without the product, and losses that follow it exactly."""
    law = UnifiedLaw(
        a=-random.uniform(0.06, 0.12),
        b=-random.uniform(0.08, 0.2),
        c=0.0 if separable else random.uniform(0.006, 0.015),
        d=random.uniform(0.8, 1.5),
        e_start=random.uniform(1.2, 6),
        e_max=random.uniform(100, 900),
    )
    sizes = 10 ** np.sort(random.uniform(6.5, 9.5, size=count))
    n, e = (grid.flatten() for grid in np.meshgrid(sizes, [1.0, 2, 4, 8, 16, 32, 64, 128, 256, 512]))
    x = np.log10(n)
    h = np.log10(1 / (1 / (e - 1 + 1 / (1 / law.e_start - 1 / law.e_max)) + 1 / law.e_max))  # as the paper writes it
    return law, Runs(n, e, 10 ** (law.a * x + law.b * h + law.c * x * h + law.d))


def test_planted_coefficients_come_back(seed):
    random = np.random.default_rng(seed)
    for _ in range(5):
        law, runs = planted(random)
        found = fit(runs)
        for name in COEFFICIENTS:
            assert getattr(found, name) == pytest.approx(getattr(law, name), rel=0.01), (name, law, found)
        assert found.log10_cutoff == pytest.approx(law.log10_cutoff, rel=0.01)
        assert found.residual < 1e-6
        for what, other in leave_one_out(runs, found).items():
            assert other.log10_cutoff == pytest.approx(law.log10_cutoff, rel=0.01), what


@pytest.mark.parametrize("separable", [False, True])
def test_coefficients_come_back_to_one_percent_under_noise(separable, seed):
    random = np.random.default_rng(seed)
    for _ in range(3):
        law, exact = planted(random, 60, separable)
        runs = Runs(exact.parameters, exact.experts, exact.loss * 10 ** random.normal(0, 1e-5, len(exact)))
        found = fit(runs, separable=separable)
        for name in COEFFICIENTS:
            assert getattr(found, name) == pytest.approx(getattr(law, name), rel=0.01), (name, law, found)
        assert found.residual == pytest.approx(1e-5, rel=0.2)
        half = fit(runs[random.random(len(runs)) < 0.5], separable=separable)
        assert half.loss(1e8, 64) == pytest.approx(law.loss(1e8, 64), rel=1e-4), "whichever half is kept"


def test_what_the_law_says_against_its_definitions(seed):
    law, runs = planted(np.random.default_rng(seed))
    assert law.effective_experts([1, 1e12]) == pytest.approx([law.e_start, law.e_max])
    worth = law.effective_parameters(runs.parameters, runs.experts)
    assert law.loss(worth, 1) == pytest.approx(law.loss(runs.parameters, runs.experts), rel=1e-9)
    assert law.effective_parameters(runs.parameters, 1) == pytest.approx(runs.parameters)
    cutoff = 10**law.log10_cutoff
    assert law.effective_parameters(cutoff, runs.experts) == pytest.approx(np.full(len(runs), cutoff))
    always = UnifiedLaw(law.a, law.b, -law.c, law.d, law.e_start, law.e_max)
    assert always.log10_cutoff == math.inf


def test_the_intervals_of_noisy_runs_hold_the_truth(seed):
    """Of 90 % intervals of 7 numbers some miss it; an interval that is much too narrow misses most."""
    random = np.random.default_rng(seed)
    inside = []
    for _ in range(4):
        law, exact = planted(random)
        runs = Runs(exact.parameters, exact.experts, exact.loss * 10 ** random.normal(0, 0.003, len(exact)))
        draws = bootstrap(runs, fit(runs), 60, seed)
        for name in (*COEFFICIENTS, "log10_cutoff"):
            low, high = np.quantile([getattr(draw, name) for draw in draws], [0.05, 0.95])
            inside.append(low <= getattr(law, name) <= high)
    assert sum(inside) >= len(inside) / 3


def test_runs_whose_gain_never_ends_have_no_cutoff_and_say_so(seed):
    law, runs = planted(np.random.default_rng(seed))
    h = np.log10(runs.experts + 1)
    ever = Runs(runs.parameters, runs.experts, 10 ** (law.a * np.log10(runs.parameters) + law.b * h + law.d))
    found = account(ever, resamples=0)
    assert "no end" in found["edge"]
    falling = Runs(runs.parameters, runs.experts, ever.loss * 10 ** (-0.01 * np.log10(runs.parameters) * h))
    assert account(falling, resamples=0)["log10_cutoff"] is None


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda n, e, y: (n, np.ones_like(e), y), "4 different expert counts .* it has 1$"),
        (lambda n, e, y: (n, np.where(e > 2, 4.0, e), y), "4 different expert counts .* it has 1, 2, 4$"),
        (lambda n, e, y: (np.full_like(n, 1e6), e, y), "2 different numbers of parameters; it has 1e.06"),
        (lambda n, e, y: (n[::9], e[::9], y[::9]), "at least 7 runs for its 6 coefficients; it has 6"),
        (lambda n, e, y: (e * 1e6, e, y), "the one follows from the other"),
        (lambda n, e, y: (n, e, n / 1e6), "here it does not"),
        (lambda n, e, y: (n, e, np.full_like(y, 2.0)), "here it does not"),
        (lambda n, e, y: (n, e, y * 0), "run 1: loss 0 must be a number above 0"),
        (lambda n, e, y: (n, np.where(e == 1, 0, e), y), "run 1: experts 0 must be a number at least 1"),
        (lambda n, e, y: (-n, e, y), "run 1: parameters -.* above 0"),
        (lambda n, e, y: (n, e, np.where(e == 1, np.nan, y)), "loss nan"),
    ],
)
def test_runs_that_determine_no_law_are_refused_in_a_line(spoil, said, seed):
    _, runs = planted(np.random.default_rng(seed))
    with pytest.raises(UserError, match=said) as caught:
        fit(Runs(*spoil(runs.parameters, runs.experts, runs.loss)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "b, c, said",
    [
        (-0.12, 0.012, "help below 1e+10 parameters"),
        (0.12, -0.012, "do not help at the sizes"),
        (0.12, -0.016, "help above 3.16e+07 parameters"),
        (-0.12, -0.002, "help at every size of these runs, and at larger"),
        (0.05, 0.004, "do not help at the sizes"),
    ],
)
def test_where_experts_help_is_said_of_harm_too(b, c, said, tmp_path, capsys, seed):
    random = np.random.default_rng(seed)
    n, e = (grid.flatten() for grid in np.meshgrid([1e6, 1e7, 3e8], [1.0, 2, 4, 8, 16, 32, 64]))
    runs = Runs(n, e, UnifiedLaw(-0.1, b, c, random.uniform(0.8, 1.5), random.uniform(1.5, 3), 200).loss(n, e))
    path = table(tmp_path / "runs.csv", runs)
    assert main(["law", "fit", str(path), "--resamples", "0", "--out", str(tmp_path / "law")]) == 0
    assert said in capsys.readouterr().out


def table(path, runs, **columns):
    names = ["parameters", "experts", "loss", *columns]
    rows = zip(runs.parameters, runs.experts, runs.loss, *columns.values(), strict=True)
    path.write_text("\n".join(",".join(map(str, row)) for row in [names, *rows]) + "\n", encoding="utf-8")
    return path


def test_a_table_is_read_by_group_with_the_dense_runs_in_each(tmp_path, seed):
    random = np.random.default_rng(seed)
    (_, first), (_, second) = planted(random), planted(random)
    routers = [*np.where(first.experts == 1, "dense", "hash"), *np.where(second.experts == 1, "dense", "base")]
    both = Runs(*(np.concatenate(pair) for pair in zip(_columns(first), _columns(second), strict=True)))
    groups, notices = read_groups(table(tmp_path / "runs.csv", both, router=routers), {}, by="router")
    assert set(groups) == {"hash", "base"} and not notices
    dense = both[both.experts == 1]
    for name, own in (("hash", first), ("base", second)):
        expected = {*zip(*_columns(own[own.experts > 1]), strict=True), *zip(*_columns(dense), strict=True)}
        assert set(zip(*_columns(groups[name]), strict=True)) == expected


def _columns(runs):
    return runs.parameters, runs.experts, runs.loss


def test_the_last_step_of_each_run_counts_and_held_values_alone(tmp_path, seed):
    _, runs = planted(np.random.default_rng(seed))
    late = len(runs)
    twice = Runs(*(np.concatenate([values, values]) for values in _columns(runs)))
    twice.loss[late:] *= 2
    steps = ["900"] * late + ["1000"] * late  # as texts "900" is the greater one
    path = table(tmp_path / "runs.csv", twice, name=[*range(late)] * 2, step=steps)
    (found,) = read_groups(path, {}, run="name")[0].values()
    assert sorted(found.loss) == pytest.approx(sorted(runs.loss * 2))
    (found,) = read_groups(path, {}, hold={"step": "9e2"})[0].values()
    assert sorted(found.loss) == pytest.approx(sorted(runs.loss))
    groups, notices = read_groups(path, {})
    assert len(groups[ONE]) == 2 * late
    assert "differ in step" in notices[0]
    unknown = table(tmp_path / "unknown.csv", twice, name=[*range(late)] * 2, step=["nan"] * late + ["1000"] * late)
    with pytest.raises(UserError, match="line 2: step is nan"):
        read_groups(unknown, {}, run="name")


def test_rows_that_are_there_twice_and_missing_dense_runs_are_said(tmp_path, seed):
    random = np.random.default_rng(seed)
    _, runs = planted(random)
    assert not read_groups(table(tmp_path / "runs.csv", runs), {})[1]
    some = np.sort(random.choice(len(runs), size=random.integers(1, len(runs)), replace=False))
    both = runs[[*range(len(runs)), *some]]
    (said,) = read_groups(table(tmp_path / "twice.csv", both), {})[1]
    assert said.startswith(f"{len(some)} of {len(both)} rows repeat another")
    assert not read_groups(table(tmp_path / "seeds.csv", both, seed=range(len(both))), {})[1], "runs of other seeds"
    routed = runs[runs.experts > 1]
    (said,) = read_groups(table(tmp_path / "routed.csv", routed), {})[1]
    assert "no run is dense" in said
    (said,) = read_groups(table(tmp_path / "by.csv", routed, router=["hash"] * len(routed)), {}, by="router")[1]
    assert "no run with router=hash is dense" in said


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "is empty"),
        ("parameters,experts,loss\n", "no rows"),
        (
            "parameters,experts\n1,2\n",
            "has no column 'loss'; it has 'parameters', 'experts'; say which it is, as in --columns loss=NAME",
        ),
        ("parameters,experts,loss\n1e6,2,\n", "line 2: loss is empty"),
        ("parameters,experts,loss\n1e6,2,3\n1e6,many,3\n", "line 3: experts is 'many'"),
        ("parameters,experts,loss\n1e6,2,0\n", "line 2: loss is 0"),
        ("parameters,experts,loss\n1e6,2,nan\n", "line 2: loss is nan"),
        ("parameters,experts,loss\n1e6,2\n", "line 2: has 2 cells, the headings are 3"),
        ("parameters,experts,loss,loss\n1e6,2,3,3\n", "different names"),
        ('parameters,experts,loss\n"1e6,2,3\n', "not CSV"),
        ("parameters,experts,loss\n1e6,2,3\n", "4 different expert counts"),
        ("parameters;experts;loss\n1e6;2;3\n", "4 different expert counts"),
    ],
)
def test_a_bad_table_is_one_line_on_the_command_line(text, said, tmp_path, capsys):
    path = tmp_path / "runs.csv"
    path.write_text(text, encoding="utf-8")
    assert main(["law", "fit", str(path), "--out", str(tmp_path / "law")]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "law").exists()


def test_files_that_are_no_table_are_one_line(tmp_path, capsys):
    for name, content in (("half.csv.gz", gzip.compress(b"a,b\n" * 99)[:-20]), ("b.csv", b"\xff\xfe\x00"), ("c", None)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        assert main(["law", "fit", str(tmp_path / name), "--out", str(tmp_path / "law")]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert main(["law", "fit", str(tmp_path), "--out", str(tmp_path / "law")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_command_leaves_numbers_and_a_picture(tmp_path, capsys, seed):
    pytest.importorskip("matplotlib")
    law, runs = planted(np.random.default_rng(seed))
    path = table(tmp_path / "runs.csv", runs)
    assert main(["law", "fit", str(path), "--resamples", "5", "--out", str(tmp_path / "law"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "law" / "law.json").read_text(encoding="utf-8"))
    assert found["groups"][ONE]["log10_cutoff"] == pytest.approx(law.log10_cutoff, rel=0.01)
    assert (tmp_path / "law" / "law.png").stat().st_size > 10_000


@pytest.mark.skipif(not Path(RELEASED).is_file(), reason="SHUNTER_ROUTING_CURVES names no file")
def test_the_released_runs_give_the_published_law():
    columns = {"parameters": "dense_parameter_count", "experts": "num_experts", "loss": "loss_validation"}
    hold = {"k": "1", "routing_frequency": "0.5", "flop_increase": "1"}
    groups, notices = read_groups(Path(RELEASED), columns, "router_type", hold, run="hyper_id")
    assert {name: len(runs) for name, runs in groups.items()} == {"S-Base": 61, "RL-R": 62, "Hash": 59}
    assert not notices
    for router, runs in groups.items():
        found = account(runs, resamples=200)
        for name, published in zip((*COEFFICIENTS, "log10_cutoff"), PUBLISHED[router], strict=True):
            low, high = found["intervals"][name]
            assert low <= published <= high, (router, name)
        assert found["law"]["residual"] < 0.0035
        low, high = found["intervals"]["log10_cutoff"]
        assert all(low <= other["log10_cutoff"] <= high for other in found["left_out"].values())
