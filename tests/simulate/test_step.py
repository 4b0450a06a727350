"""Predictions against published measurements, and the order that they must have."""

import itertools
import json
import random
from dataclasses import replace

import pytest

from shunter.cli import main
from shunter.errors import UserError
from shunter.ranks import rows_to_ranks
from shunter.simulate.clusters import load_cluster
from shunter.simulate.files import names
from shunter.simulate.published import check, layers_of_bench
from shunter.simulate.shapes import load_model
from shunter.simulate.step import Job, Layout, best, imbalance, layer_seconds, layouts, predict, sweep
from shunter.simulate.volumes import exchanges, rows_leaving

from ..pages import ROOT


def test_published_measurements_are_predicted():
    rows = check()
    groups = itertools.groupby(rows, key=lambda row: row.source.split(",")[0].split(" 2048")[0])
    assert all(sum(row.fitted for row in group) <= 3 for _, group in groups)
    predictions = [row for row in rows if not row.fitted]
    assert len(predictions) >= 24
    assert not [row.what for row in predictions if not row.within]
    assert all(bool(row.note) == (not row.within) for row in predictions)
    assert all(abs(row.error) < 1e-6 for row in rows if row.fitted)


KEPT = ROOT / "docs" / "results" / "bench-parallel.json"


def some_cluster():
    return load_cluster(random.choice([name for name in names("clusters") if name != "tpu-v3"]))


@pytest.mark.parametrize("form", ["deduplicated", "flat", "two_level"])
def test_exchanges_take_longer_with_more_of_anything_but_bandwidth(form):
    cluster, tokens, k, ranks = (
        some_cluster(),
        random.randint(64, 8192),
        random.randint(1, 8),
        random.choice([8, 16, 64]),
    )

    def seconds(cluster=cluster, tokens=tokens, k=k, ranks=ranks, size=2048, limit=0, factor=None):
        return cluster.exchange_seconds(tokens, k, 256, size, ranks, limit, form, factor)

    assert seconds() < seconds(tokens=2 * tokens)
    assert seconds() < seconds(k=k + 1)
    assert seconds() < seconds(size=4096)
    assert seconds() <= seconds(ranks=4 * ranks)
    assert seconds(factor=1.0) < seconds(factor=1.5)
    slower = {name: tuple(v / 2 for v in getattr(cluster, name)) for name in ("intra", "inter")}
    assert seconds() < seconds(cluster=replace(cluster, **slower))
    assert seconds(ranks=1) == 0
    if form == "deduplicated":
        assert seconds(ranks=64, k=8, limit=2) < seconds(ranks=64, k=8)


def test_two_levels_pay_between_16_and_2048_ranks():
    cluster = load_cluster("a100")
    flat, levels = (
        [cluster.exchange_seconds(4096, 2, 64, 4096, ranks, 0, form, 1.0) for ranks in (16, 2048)]
        for form in ("flat", "two_level")
    )
    assert flat[0] < levels[0] and levels[1] < flat[1]


def test_steps_take_longer_with_load_capacity_and_choices():
    model, cluster, layout = load_model("qwen3-235b-a22b"), some_cluster(), Layout(256, 32, 8)
    job = Job(2**22)

    def seconds(model=model, job=job):
        return predict(model, cluster, layout, job).seconds

    assert seconds() < seconds(job=replace(job, load=1.5)) < seconds(job=replace(job, load=3.0))
    assert seconds(replace(model, capacity_factor=1.0)) < seconds(replace(model, capacity_factor=1.25))
    assert seconds() < seconds(replace(model, top_k=9))
    assert seconds(job=job) < seconds(job=replace(job, shuffle=True))
    assert seconds() < seconds(job=replace(job, recompute=True))
    step = predict(model, cluster, layout, job)
    assert step.shortest < step.seconds < step.longest
    parts = ("compute", "exposed", "routing", "data", "tensor", "bubble")
    assert step.seconds == pytest.approx(sum(getattr(step, part) for part in parts))


def test_chance_alone_makes_the_fullest_rank_fuller():
    assert imbalance(4096, 8, 1) == 1
    assert 1 < imbalance(4096, 8, 8) < imbalance(64, 8, 8) < imbalance(64, 8, 64)
    assert imbalance(64, 8, 8, capacity_factor=1.25) == 1  # its rows are there in any case
    assert imbalance(64, 8, 8, load=2.5) == 2.5 and imbalance(64, 8, 2, load=2.5) == 2


def test_the_best_layout_is_the_fastest_that_fits():
    model, cluster, job = load_model("mixtral-8x7b"), some_cluster(), Job(2**20)
    n = random.choice([16, 32, 64])
    found = best(model, cluster, n, job)
    every = [
        predict(model, cluster, layout, replace(job, recompute=recompute))
        for layout in layouts(model, cluster, n, job)
        for recompute in (True, False)
    ]
    fitting = [step.seconds for step in every if step.fits]
    assert found.fits and found.seconds == min(fitting)
    assert not best(load_model("switch-c"), cluster, 8, job).fits
    for step in every:
        assert (
            n == step.layout.dp * step.layout.tp * step.layout.pp == step.layout.edp * step.layout.ep * step.layout.pp
        )


def test_more_devices_take_less_time_and_memory_of_each():
    steps = sweep(load_model("deepseek-v3"), load_cluster("h800"), [256, 512, 1024, 2048], Job(15360 * 4096))
    assert all(a.seconds > b.seconds for a, b in itertools.pairwise(steps))
    weak = sweep(load_model("deepseek-v3"), load_cluster("h800"), [256, 2048], Job(15360 * 4096), weak=True)
    assert weak[0].seconds < steps[0].seconds and weak[1].seconds == steps[3].seconds


def test_the_slowest_rank_of_a_pipeline_sets_its_pace():
    """Layers are whole, and the output is on the last: against every way to share them out."""
    model = load_model(random.choice(["qwen3-235b-a22b", "mixtral-8x7b", "gpt-3"]))
    cluster, job = some_cluster(), Job(2**22)
    for pp in (2, 4, 8):
        last = random.randint(1, model.layers // pp)
        step = predict(model, cluster, Layout(64, pp=pp, last=last), job)
        busy = step.compute + step.exposed + step.routing + step.tensor
        output = 3 * model.flops()["output"] * job.batch_tokens / 64 / (cluster.flops * cluster.of("efficiency")) * pp
        layer = (busy * pp - output) / model.layers
        most = -(-(model.layers - last) // (pp - 1))
        slowest = max(most * layer, last * layer + output)
        count = job.batch_tokens / (64 / pp * model.sequence_length)
        assert step.bubble == pytest.approx(slowest * (1 + (pp - 1) / count) - busy)
        every = [
            predict(model, cluster, Layout(64, pp=pp, last=n), job).seconds for n in range(1, model.layers // pp + 1)
        ]
        found = predict(model, cluster, Layout(64, pp=pp), job).seconds
        assert found <= min(every) * (1 + 1e-9)
        assert found > busy
    with pytest.raises(UserError, match="leaves less than a layer"):
        predict(model, cluster, Layout(64, pp=2, last=model.layers), job)


def test_every_expert_of_a_rank_is_launched_in_every_pass():
    model, job = load_model("qwen3-235b-a22b"), Job(2**22)
    cluster = replace(some_cluster(), expert_seconds=(0.0,) * 3)
    ep, tp, each = random.choice([8, 16, 32]), random.choice([1, 2, 4]), random.uniform(1e-5, 1e-4)
    without, found = (
        predict(model, replace(cluster, expert_seconds=(one,) * 3), Layout(64, ep, tp=tp), job) for one in (0.0, each)
    )
    visits = model.sparse_layers * job.batch_tokens / (64 / tp * model.sequence_length)
    assert found.routing - without.routing == pytest.approx(3 * visits * model.experts / ep * each)


def test_gradients_are_summed_behind_what_uses_another_network():
    """All but one layer's, where exchanges stay inside of a node; not behind exchanges between nodes."""
    model = load_model("qwen3-235b-a22b")
    cluster = replace(load_cluster("h100"), intra=(2e9,) * 3, overlap=(0.0,) * 3)
    inside = predict(model, cluster, Layout(256, 8), Job(2**22))
    assert inside.exposed > inside.compute, "a slow network inside of nodes"
    wide = predict(model, replace(cluster, node=4), Layout(256, 8), Job(2**22))
    fast = predict(model, replace(cluster, inter=(1e15,) * 3), Layout(256, 8), Job(2**22))
    assert fast.data < 1e-3 * inside.data
    half = predict(model, replace(cluster, inter=tuple(v / 2 for v in cluster.inter)), Layout(256, 8), Job(2**22))
    assert half.data == pytest.approx(2 * inside.data), "a layer's share alone"
    assert wide.data >= inside.data


def test_a_layer_over_two_ranks_in_closed_form():
    alone = layer_seconds(100, 8, 16, 2, 1, 1e9, 1e-3, 1e6)
    assert alone == {"compute": 18 * 100 * 2 * 8 * 16 / 1e9, "exchange": 0.0, "seconds": 18 * 100 * 2 * 8 * 16 / 1e9}
    two = layer_seconds(100, 8, 16, 2, 2, 1e9, 1e-3, 1e6)
    assert two["exchange"] == pytest.approx(4 * (1e-3 + 100 * 2 / 2 * 8 * 4 / 1e6))


def test_layouts_that_cannot_be_are_refused():
    model, cluster = load_model("mixtral-8x7b"), load_cluster("h100")
    for layout, message in (
        (Layout(8, 3), "ep 3 must divide"),
        (Layout(16, 16), "ep 16 must divide"),
        (Layout(8, 1, 3), "no multiple of pp 3"),
        (Layout(64, 1, 64), "more than the 32 layers"),
    ):
        with pytest.raises(UserError, match=message):
            predict(model, cluster, layout, Job())
    with pytest.raises(UserError, match="no layout exists"):
        best(model, cluster, 8, Job(100))


@pytest.mark.parametrize(
    "text, message",
    [
        ("efficiency: [0.5, 0.4, 0.6]", "must be a number, or"),
        ("efficiency: 1.5", "shares, of at most 1"),
        ("intra: 0", "intra must be above zero"),
        ("node: 0", "node must be above zero"),
        ("torus: 1", "torus must be true or false"),
    ],
)
def test_what_describes_no_cluster(tmp_path, text, message):
    fields = {"name": "a", "node": 8, "flops": 1.0, "efficiency": 0.5, "memory": 1.0, "memory_bandwidth": 1.0}
    fields |= {"intra": 1.0, "inter": 1.0}
    key, _, value = text.partition(": ")
    lines = [f"{k}: {v}" for k, v in fields.items() if k != key] + [text]
    (tmp_path / "c.yaml").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match=message):
        load_cluster(str(tmp_path / "c.yaml"))


def test_the_command(tmp_path, capsys):
    assert (
        main(["simulate", "qwen3-235b-a22b", "--gpus", "64..256", "--batch-tokens", "8Mi", "--out", str(tmp_path)]) == 0
    )
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "simulate.json").read_text())
    assert [row["devices"] for row in found["steps"]] == [64, 128, 256]
    assert found["job"]["batch_tokens"] == 2**23 and (tmp_path / "simulate.png").stat().st_size > 10_000
    assert f"{found['steps'][2]['tokens_per_s']:,.0f}" in said
    fixed = ["--layout", "ep=32,pp=8,tp=2", "--recompute"]
    rest = ["--gpus", "256", "--batch-tokens", "8Mi", "--out", str(tmp_path), "--json"]
    assert main(["simulate", "qwen3-235b-a22b", *fixed, *rest]) == 0
    assert json.loads(capsys.readouterr().out)["steps"][0]["edp"] == 1
    assert main(["simulate", "--check", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(check())


@pytest.mark.parametrize(
    "args, message",
    [
        (["nowhere"], "no such file"),
        ([], "name a model"),
        (["mixtral-8x7b", "--gpus", "8.."], "neither a range"),
        (["mixtral-8x7b", "--gpus", "0..8"], "neither a range"),
        (["mixtral-8x7b", "--cluster", "nowhere"], "clusters described here"),
        (["mixtral-8x7b", "--batch-tokens", "-3"], "must be a number above zero"),
        (["mixtral-8x7b", "--batch-tokens", "0"], "must be a number above zero"),
        (["mixtral-8x7b", "--batch-tokens", "8MiB"], "must be a number above zero"),
        (["mixtral-8x7b", "--load", "0.5"], "at least 1"),
        (["mixtral-8x7b", "--layout", "ep=0"], "give sizes of ep, pp, tp"),
        (["mixtral-8x7b", "--layout", "ep=64"], "ep 64 must divide"),
        (["mixtral-8x7b", "--layout", "ep=8,pp=2,ep=1"], "gives a size twice"),
        (["mixtral-8x7b", "--sequence-length", "0"], "must be a number of at least 1"),
        (["mixtral-8x7b", "--batch-tokens", "8", "--gpus", "8", "--layout", "ep=8"], "for each of 8 replicas"),
        (["mixtral-8x7b", "--capacity-factor", "nan"], "--capacity-factor nan must be a number of at least 0"),
        (["mixtral-8x7b", "--capacity-factor", "inf"], "must be a number of at least 0"),
    ],
)
def test_what_the_command_refuses(tmp_path, capsys, args, message):
    assert main(["simulate", *args, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_page_says_what_the_check_says():
    predictions = [row for row in check() if not row.fitted]
    page = (ROOT / "docs" / "simulate.md").read_text(encoding="utf-8")
    assert (
        f"of {len(predictions)} that no figure was fitted to, {sum(row.within for row in predictions)} come out" in page
    )
    kept = json.loads((ROOT / "docs" / "results" / "simulate-published.json").read_text(encoding="utf-8"))
    bench = json.loads(KEPT.read_text(encoding="utf-8"))
    rows = [*check(), *layers_of_bench(bench)]
    assert [row["predicted"] for row in kept] == pytest.approx([row.predicted for row in rows], rel=1e-6)


def bench_of(ranks, latency, bandwidth):
    """What `shunter bench parallel` would keep where exchanges take exactly this, in ms and MiB/ms."""
    cases = []
    for number in range(4):
        shape = {"tokens": 64 * random.randint(1, 64), "dim": 8 * random.randint(1, 64), "top_k": random.randint(1, 8)}
        sent = 4 * shape["tokens"] / ranks * shape["top_k"] * (1 - 1 / ranks) * shape["dim"] * 4 / 2**20
        shape["bytes_sent"] = sent * 2**20
        plain = random.uniform(10, 100)
        times = {"data parallel": plain, "expert parallel": plain + 4 * latency + sent / bandwidth}
        cases.append({"name": f"S{number}", **shape, "results": {name: {"ms": ms} for name, ms in times.items()}})
    return {"processes": ranks, "cases": cases}


def test_the_check_prints_the_error_of_a_bench(tmp_path, capsys):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(bench_of(2, 0.5, 1.0)), encoding="utf-8")
    assert main(["simulate", "--check", "--bench", str(path)]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "shunter bench parallel |" in line]
    assert len(said) == 4 and all("0.0%" in line for line in said)
    for content in (
        "[]",
        "{",
        json.dumps({"processes": 2, "cases": []} | {"cases": bench_of(2, 0.5, 1.0)["cases"][:1]}),
    ):
        path.write_text(content, encoding="utf-8")
        assert main(["simulate", "--check", "--bench", str(path)]) == 2
        error = capsys.readouterr().err
        assert "shunter bench parallel" in error and error.count("\n") == 1


def test_layers_of_a_planted_bench_are_predicted_exactly():
    for latency in (0.0, random.uniform(0.1, 2)):
        for row in layers_of_bench(bench_of(random.choice([2, 4]), latency, random.uniform(0.1, 2))):
            assert row.predicted == pytest.approx(row.measured, rel=1e-6)


@pytest.mark.skipif(not KEPT.exists(), reason="no run of shunter bench parallel is kept")
def test_layers_of_the_kept_bench_are_predicted_within_a_quarter():
    found = json.loads(KEPT.read_text(encoding="utf-8"))
    for row in layers_of_bench(found):
        assert abs(row.error) <= 0.25, f"{row.what}: {row.measured:.1f} ms, predicted {row.predicted:.1f}"


@pytest.mark.skipif(not KEPT.exists(), reason="no run of shunter bench parallel is kept")
def test_the_kept_bench_sent_what_the_closed_form_says():
    """Two exchanges forward and two backward, of float32 rows: one for each choice, or one for each rank of a token."""
    found = json.loads(KEPT.read_text(encoding="utf-8"))
    ranks = found["processes"]
    for case in found["cases"]:
        tokens, k = case["tokens"] / ranks, case["top_k"]
        rows = rows_leaving(tokens, k, ranks)
        if case["dispatch"] == "ranks":
            rows = tokens * rows_to_ranks(k, case["experts"], ranks) * (1 - 1 / ranks)
        assert case["bytes_sent"] == pytest.approx(sum(exchanges()) * rows * case["dim"] * 4, rel=0.01), case["name"]
