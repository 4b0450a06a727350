"""The comparison of routers: fair by construction, resumable to the bit, and honest in what it refuses."""

import json

import pytest
import torch

from shunter import MoE, routers
from shunter.analysis.runs import TEXT, Metrics
from shunter.cli import main
from shunter.errors import UserError
from shunter.recipes import registry
from shunter.recipes.compare import compare, compared, folder_of, parse_routers, resumed, table, with_router
from shunter.recipes.config import load_config
from shunter.recipes.run import configuration_of, load_model
from shunter.recipes.seeds import parse_seeds, seeds_of
from shunter.recipes.text import RECIPE
from shunter.training import loop as training

from .conftest import SMALL

SPECS = ["switch", "topk:top_k=2:capacity_factor=null", "base", "hash", "reinforce", "relu"]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """One comparison of six routers, finished."""
    root = tmp_path_factory.mktemp("compare")
    (root / "corpus/letters").mkdir(parents=True)
    (root / "corpus/digits").mkdir()
    for i in range(6):
        (root / f"corpus/letters/{i}.txt").write_text("abc de fgh " * 12)
        (root / f"corpus/digits/{i}.txt").write_text("12 345 6 78 " * 12)
    args = [*SMALL, "training.steps=6", f"data.source=['{root / 'corpus'}']"]
    assert main(["compare", "text", "--routers", ",".join(SPECS), "--run", str(root / "run"), "--json", *args]) == 0
    return root / "run", json.loads((root / "run/compare.json").read_text())


def test_a_row_for_each_router_and_for_the_dense_model(done):
    run, result = done
    assert [row["router"] for row in result["models"]] == ["dense", *SPECS]
    dense, *sparse = result["models"]
    for row in sparse:
        assert 1 <= row["balance"] <= 4 and 0 <= row["dropped"] < 1, row
        if row["router"] != "relu":  # its number of experts is what training makes of it
            assert row["flops_per_token"] == pytest.approx(dense["flops_per_token"], rel=0.05)
            assert row["training_flops"] == pytest.approx(dense["training_flops"], rel=0.05)
    by_name = {row["router"]: row for row in sparse}
    assert by_name[SPECS[1]]["experts_per_token"] == pytest.approx(2)
    assert by_name["switch"]["experts_per_token"] == pytest.approx(1)
    assert by_name["base"]["balance"] == pytest.approx(1), "BASE assigns every expert the same number of tokens"
    assert by_name["base"]["leak"] == "training" and by_name["hash"]["leak"] is None
    assert (run / "compare.png").stat().st_size > 0 and not (run / "checkpoints").exists()


LAYERS = [
    "switch:residual=true:pyramid=true",
    "topk:where=[feed_forward, attention]",
    "topk:where=heads:top_k=2:renormalize=no",
    "topk:top_k=1:operations=[swiglu, gelu x2, identity]:cost_loss=0.05",
]


def _last_load(run, name):
    return [line["layers"] for line in Metrics(run / "metrics.jsonl").lines(name) if line["kind"] == "load"][-1]


@pytest.mark.slow
def test_layers_of_other_kinds_are_compared_at_equal_cost(done, tmp_path):
    corpus = done[0].parent / "corpus"
    args = [*SMALL, "training.steps=2", "model.heads=2", f"data.source=['{corpus}']"]
    assert (
        main(["compare", "text", "--routers", ",".join(LAYERS), "--run", str(tmp_path / "run"), "--json", *args]) == 0
    )
    dense, *rows = json.loads((tmp_path / "run/compare.json").read_text())["models"]
    costs = [row["flops_per_token"] / dense["flops_per_token"] for row in rows]
    assert costs[:2] == pytest.approx([1, 1], rel=0.03), "an expert is as wide as that allows"
    written_out = 0.0
    for layer, shares in _last_load(tmp_path / "run", folder_of(LAYERS[3])).items():
        model = load_model(tmp_path / "run", folder_of(LAYERS[3]))
        sizes = [sum(p.numel() for p in each.parameters()) for each in model.get_submodule(layer).experts.each]
        router = model.get_submodule(layer).router
        dense_block = sum(p.numel() for p in load_model(tmp_path / "run", "dense").get_submodule(layer).parameters())
        written_out += 2 * (
            sum(s * n for s, n in zip(shares, sizes, strict=True)) + router.weight.numel() - dense_block
        )
    assert rows[3]["flops_per_token"] - dense["flops_per_token"] == pytest.approx(written_out, rel=1e-6)
    kinds = [load_model(tmp_path / "run", folder_of(spec)).config.shunter for spec in LAYERS]
    assert [layer["residual"] for layer in kinds[0]["layers"]] == [True, True]
    assert [len(kind["layers"]) for kind in kinds] == [2, 2, 0, 2]
    assert [[at["kind"] for at in kind.get("attention", [])] for kind in kinds[1:3]] == [
        ["attention"] * 2,
        ["heads"] * 2,
    ]
    assert [op.split()[0] for op in kinds[3]["layers"][0]["operations"]] == ["swiglu", "gelu", "identity", "swiglu"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("where=mouths", "layer.where: Input should be"),
        ("where=attention:residual=true", "residual is of feed-forward blocks"),
        ("operations=[swigloo]", "'swigloo' is unknown"),
        ("operations=[]", "at least 1 item"),
        ("residul=true", "no option 'residul'"),
        ("cost_loss=-1", "greater than or equal to 0"),
        ("pyramid=true:operations=[swiglu]", "a pyramid has more experts"),
        ("where=heads:residual=true", "residual is of feed-forward blocks"),
    ],
)
def test_impossible_layers_are_one_line_before_anything_is_trained(done, tmp_path, capsys, given, said):
    args = [*SMALL, f"data.source=['{done[0].parent / 'corpus'}']"]
    assert main(["compare", "text", "--routers", f"topk:{given}", "--run", str(tmp_path / "run"), *args]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and not (tmp_path / "run/metrics.jsonl").exists()


VARYING = ["dense_to_sparse", "top_p:threshold=0.5", "relu", "thor", "dselect_k"]


@pytest.fixture(scope="module")
def varying(done, tmp_path_factory):
    """A comparison of routers whose number of experts, or of passes, is not what an expert's width says."""
    run = tmp_path_factory.mktemp("varying") / "run"
    corpus = done[0].parent / "corpus"
    args = [*SMALL, "training.steps=6", "sparse.num_experts=8", "model.hidden=48", f"data.source=['{corpus}']"]
    assert main(["compare", "text", "--routers", ",".join(VARYING), "--run", str(run), "--json", *args]) == 0
    return run, json.loads((run / "compare.json").read_text())


def test_all_models_of_a_comparison_are_evaluated_and_calibrated(done, tmp_path, capsys):
    run, result = done
    losses = {folder_of(row["router"]): row["eval_loss"] for row in result["models"]}
    assert main(["eval", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found)[0] == "dense" and {name: one["loss"] for name, one in found.items()} == pytest.approx(losses)
    assert compared(run) == losses and compared(tmp_path) == {}
    (tmp_path / "compare.json").write_text('{"models": [{"router": "hash", "eval_loss": "low"}]}')
    with pytest.raises(UserError, match="compare.json: has no models with their eval_loss"):
        compared(tmp_path)
    assert main(["eval", str(run), "--calibration", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in losses)
    calibrated = json.loads((tmp_path / "calibration.json").read_text(encoding="utf-8"))["models"]
    assert set(calibrated) == set(losses)
    assert len({one["predictions"] for one in calibrated.values()}) == 1, "all of the same held-out tokens"


def test_costs_are_those_of_the_experts_that_were_taken(varying):
    """Written out: the dense model's, less its blocks, and the router's and the experts' products in their place."""
    run, result = varying
    dense, *rows = result["models"]
    assert dense["training_flops"] == pytest.approx(3 * result["tokens"] * dense["flops_per_token"])
    dim, layers, experts = 16, 2, 8
    for row in rows:
        model = load_model(run, row["router"].replace(":", "-"))
        moe = [module for module in model.modules() if isinstance(module, MoE)]
        width = moe[0].experts.hidden
        scored = sum(p.numel() for p in moe[0].router.parameters() if p.dim() == 2)
        around = dense["flops_per_token"] - layers * 6 * dim * 48 + layers * 2 * scored
        lines = [m for m in Metrics(run / "metrics.jsonl").lines() if m["model"] == row["router"].replace(":", "-")]
        spent, before = 0.0, 0
        for line in lines:
            if line["kind"] == "train":
                forward = around + layers * 6 * dim * width * line["experts_per_token"]
                spent, before = spent + 3 * forward * (line["tokens"] - before), line["tokens"]
        passes = 2 if row["router"] == "thor" else 1
        assert row["training_flops"] == pytest.approx(passes * spent), row["router"]
        taken = [m for m in lines if m["kind"] == "eval"][-1]["experts_per_token"]
        assert row["flops_per_token"] == pytest.approx(around + layers * 6 * dim * width * taken), row["router"]
        assert 0 <= taken <= experts


def test_what_an_evaluation_took_is_counted(varying):
    run, result = varying
    data = RECIPE.prepare(configuration_of(run)[1])
    for row in result["models"][2:4]:  # top_p and relu
        name = row["router"].replace(":", "-")
        model = load_model(run, name)
        asked = tokens = 0
        for domain in data.eval:
            model(input_ids=domain.input_ids)
            for module in model.modules():
                if isinstance(module, MoE):
                    asked, tokens = asked + int(module.routing.counts.sum()), tokens + module.routing.num_tokens
        said = [m for m in Metrics(run / "metrics.jsonl").lines(name) if m["kind"] == "eval"][-1]["experts_per_token"]
        assert said == pytest.approx(asked / tokens)


def test_widths_are_of_what_the_router_will_take(varying):
    run, result = varying
    by_name = {row["router"]: row for row in result["models"]}
    annealed = load_model(run, "dense_to_sparse").model.layers[0].mlp
    assert annealed.experts.hidden == round((6 * 16 * 48 - 2 * 16 * 8) / (6 * 16)), "one expert in evaluation"
    assert float(annealed.router.temperature) == pytest.approx(0.3), "annealed over the steps of this training"
    dense = by_name["dense"]
    assert by_name["dense_to_sparse"]["flops_per_token"] == pytest.approx(dense["flops_per_token"], rel=0.03)
    assert by_name["dense_to_sparse"]["training_flops"] > 1.5 * dense["training_flops"]
    assert by_name["top_p:threshold=0.5"]["training_flops"] == pytest.approx(dense["training_flops"], rel=0.2)
    assert by_name["thor"]["training_flops"] == pytest.approx(2 * dense["training_flops"], rel=0.03)


def test_the_table_says_where_a_cost_differs(varying, done):
    for result in (varying[1], done[1]):
        lines = table(result, TEXT).splitlines()
        head = [cell.strip() for cell in lines[0].split("|")]
        for row in result["models"]:
            name = "(dense)" if row["router"] == "dense" else f"`{row['router']}`"
            (line,) = [line for line in lines if f"| {name} |" in line]
            cells = dict(zip(head, (cell.strip() for cell in line.split("|")), strict=True))
            for column, key in (("MFLOP/token", "flops_per_token"), ("training FLOP", "training_flops")):
                ratio = row[key] / result["models"][0][key]
                assert (f"({ratio:.2f}×)" in cells[column]) == (abs(ratio - 1) > 0.03), (name, column)


def test_models_load_and_start_alike_outside_the_experts(done):
    run, _ = done
    first = {}
    for name in ("dense", "hash", "base"):
        lines = [m for m in Metrics(run / "metrics.jsonl").lines() if m["model"] == name]
        assert lines[0]["kind"] == "eval" and lines[0]["step"] == 0
        first[name] = set(load_model(run, name).state_dict())
    assert type(load_model(run, "hash").model.layers[0].mlp.router) is routers.find("hash")
    assert {key for key in first["dense"] if ".mlp." not in key} <= first["hash"] & first["base"]


def test_the_table_has_the_best_loss_first_and_what_was_dropped(done):
    lines = [line for line in table(done[1], TEXT).splitlines() if line.startswith("|")]
    losses = [float(line.split("|")[2]) for line in lines[2:]]
    assert losses == sorted(losses) and len(losses) == 7
    worst = {**done[1]["models"][1], "router": "worst", "eval_loss": 99.0, "dropped": 0.25, "leak": "training"}
    *_, last = (line for line in table({"models": [*done[1]["models"], worst]}, TEXT).splitlines() if line[:1] == "|")
    assert "`worst`" in last and "25.0%" in last and last.endswith("| training |")


def test_drops_are_those_of_the_capacity(done, small, tmp_path):
    result = compare(RECIPE, small("training.steps=3"), ["switch:capacity_factor=0.25"], tmp_path / "run", as_json=True)
    assert 0.75 <= result["models"][1]["dropped"] < 1
    assert all(row.get("dropped", 0) == 0 for row in done[1]["models"] if row["router"] != "switch")


@pytest.mark.parametrize(
    "stop_in, step",
    [pytest.param("dense", 2, marks=pytest.mark.slow), ("hash", 3), pytest.param("switch", 1, marks=pytest.mark.slow)],
)
def test_stopped_and_resumed_ends_with_the_same_bits(stop_in, step, small, tmp_path, monkeypatch):
    config, specs = small("training.steps=4"), ["hash", "switch"]
    compare(RECIPE, config, specs, tmp_path / "straight", as_json=True)
    inner, pending = training._Watch.on_step_begin, [True]

    def stop(watch, args, state, control, **kwargs):
        inner(watch, args, state, control, **kwargs)
        if pending and watch.name == stop_in and state.global_step + 1 == step:
            pending.clear()
            watch.asked = True

    monkeypatch.setattr(training._Watch, "on_step_begin", stop)
    with pytest.raises(training.Interrupted):
        compare(RECIPE, config, specs, tmp_path / "broken", as_json=True)
    again = resumed(tmp_path / "broken")
    assert again == (RECIPE, config, specs)
    compare(*again, tmp_path / "broken", resume=True, as_json=True)
    for name in ("dense", *specs):
        bits = [(tmp_path / run / name / "model.safetensors").read_bytes() for run in ("straight", "broken")]
        assert bits[0] == bits[1], name


def test_options_are_the_routers_own(small):
    config = small("sparse.router=topk", "sparse.top_k=3", "sparse.options={selection_bias: true}")
    other = with_router(RECIPE, config, "switch:capacity_factor=1e1:jitter=0.01")
    assert other.sparse.top_k is None and other.sparse.options == {"capacity_factor": 10.0, "jitter": 0.01}
    assert with_router(RECIPE, config, "topk:top_k=2").sparse.top_k == 2
    assert other.sparse.num_experts == config.sparse.num_experts


@pytest.mark.parametrize(
    "spec, message",
    [
        ("swich", "did you mean switch"),
        ("switch:jiter=1", "did you mean jitter"),
        ("switch:jitter", "option=value"),
        ("switch:jitter=[", "not a YAML value"),
        ("task", "needs task"),
        ("speech:embedding_dim=3", "needs embedding"),
        ("expert_choice", "in evaluation too, so its loss would be no causal model's; leave it out, or set"),
        ("gshard", "leave it out, evaluate it by :eval_capacity_factor=dropless, or set"),
        ("hash:vocab_size=5", "vocab_size is that of the data"),
        ("topk:top_k=true", "top_k: must not be true or false"),
        ("topk:expert_groups=true", "expert_groups=True: Input should be a valid integer"),
        ("topk:top_k=99", "top_k 99"),
        ("topk:capacity_factor=many", "an option cannot be used"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(spec, message, small, tmp_path):
    with pytest.raises(UserError, match=message):
        compare(RECIPE, small(), ["hash", spec], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_lists_are_options_and_commas_within_them_part_no_routers(small):
    specs = parse_routers(
        "switch, hme:branching=[2,2],gshard:eval_capacity_factor=dropless:top_k=2,language:experts=[0,3,3]"
    )
    assert specs == [
        "switch", "hme:branching=[2,2]", "gshard:eval_capacity_factor=dropless:top_k=2", "language:experts=[0,3,3]",
    ]  # fmt: skip
    assert with_router(RECIPE, small(), specs[1]).sparse.build_router(8).widths == [2, 4]
    assert with_router(RECIPE, small(), specs[2]).sparse.build_router(8).eval().leak is None


def test_several_seeds_have_error_bars(corpus, tmp_path, capsys):
    """A folder for each seed, a row of means, the standard deviation over seeds beside them."""
    args = [
        "compare",
        "text",
        "--routers",
        "hash",
        "--run",
        str(tmp_path / "run"),
        "--json",
        "--seeds",
        "2",
    ]
    args += ["--data", str(corpus)]
    assert main([*args, *SMALL, "training.steps=3", "seed=5"]) == 0
    found = json.loads((tmp_path / "run/compare.json").read_text())
    parts = [json.loads((tmp_path / f"run/seed-{seed}/compare.json").read_text()) for seed in (5, 6)]
    assert [part["seed"] for part in parts] == found["seeds"] == [5, 6]
    losses = [[part["models"][row]["eval_loss"] for part in parts] for row in range(2)]
    assert len(set(losses[0])) == 2, "another seed, another start"
    table = (tmp_path / "run/compare.md").read_text()
    for row, own in zip(found["models"], losses, strict=True):
        mean = sum(own) / 2
        assert row["eval_loss"] == pytest.approx(mean)
        spread = sum((loss - mean) ** 2 for loss in own) ** 0.5
        assert row["spread"]["eval_loss"] == pytest.approx(spread)
        assert f"{mean:.4f} ± {spread:.4f}" in table
        gains = [dense - loss for dense, loss in zip(losses[0], own, strict=True)]
        middle = sum(gains) / 2
        assert row["spread"]["gain"] == pytest.approx(sum((gain - middle) ** 2 for gain in gains) ** 0.5)
    assert "seeds 5, 6" in table and (tmp_path / "run/compare.png").stat().st_size > 0
    data = json.loads((tmp_path / "run/seed-6/data.json").read_text())
    assert [domain["name"] for domain in data["domains"]] == ["digits", "letters", "signs"], "--data was read"
    assert main(["compare", "text", "--resume", "--run", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads((tmp_path / "run/compare.json").read_text())["models"] == found["models"], (
        "nothing was trained again"
    )
    assert main([*args, *SMALL]) == 2
    assert "go on with --resume" in capsys.readouterr().err


@pytest.mark.parametrize("text, seeds", [("2", [4, 5]), ("0,7,9", [0, 7, 9])])
def test_seeds_are_a_number_or_a_list(text, seeds):
    assert parse_seeds(text, 4) == seeds


@pytest.mark.parametrize("text", ["1", "0", "3,3", "a", "", "1,-1", "1,", "1000000000000"])
def test_seeds_that_are_neither(text):
    with pytest.raises(UserError, match="--seeds"):
        parse_seeds(text, 0)


@pytest.mark.parametrize("content", ["[1e400, 0]", "{}", "[[0]]", "3", "[0"])
def test_seeds_of_a_damaged_comparison_are_one_line(content, tmp_path):
    (tmp_path / "seeds.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="seeds.json must hold a list of seeds"):
        seeds_of(tmp_path)


def test_a_leak_can_be_insisted_on(small):
    assert with_router(RECIPE, small("sparse.allow_leak=true"), "expert_choice").sparse.router == "expert_choice"


@pytest.mark.parametrize("text", ["", " , ", "hash,hash", "topk:top_k=2,topk/top_k=2", "dense"])
def test_lists_of_routers_are_checked(text):
    with pytest.raises(UserError, match="--routers"):
        parse_routers(text)


@pytest.mark.parametrize("content", ["{", "5", "[5]", "[]", '"hash"'])
def test_a_damaged_list_of_routers_is_named(content, done, tmp_path):
    for name in ("config.yaml", "recipe.json"):
        (tmp_path / name).write_bytes((done[0] / name).read_bytes())
    (tmp_path / "routers.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="no comparison|must hold a list of routers|--routers"):
        resumed(tmp_path)


def test_a_comparison_is_not_resumed_as_a_run(done, capsys):
    assert main(["train", "text", "--resume", "--run", str(done[0])]) == 2
    assert "holds a comparison; go on with shunter compare text --resume" in capsys.readouterr().err
    assert not (done[0] / "sparse").exists()


def test_a_router_that_cannot_run_fails_before_any_training(small, tmp_path):
    with pytest.raises(ValueError, match="leaves no block"):
        compare(RECIPE, small("sparse.every=9"), ["hash"], tmp_path / "run", as_json=True)
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_bad_commands_are_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for args, message in (
        (["--routers", "swich"], "did you mean switch"),
        ([], "--routers: name at least one"),
        (["--routers", "hash", "training.step=3"], "did you mean training.steps"),
        (["--resume", "--run", str(tmp_path / "none")], "no comparison to resume"),
        (["--resume", "--routers", "hash"], "leave the other options out"),
    ):
        assert main(["compare", "text", *args]) == 2
        said = capsys.readouterr().err.strip()
        assert message in said and "\n" not in said


@pytest.mark.slow
def test_every_router_that_text_can_serve_trains(small, tmp_path):
    """Whatever is in the registry, by default options: one step, finite losses."""
    config = small("training.steps=1", "sparse.allow_leak=true", "model.layers=1", "sparse.num_experts=8")
    specs = []
    for name in routers.names():
        try:
            with_router(RECIPE, config, name)
        except UserError as error:
            assert "needs" in str(error) or routers.find(name).example_options, error  # options without a default
        else:
            specs.append(name)
    assert len(specs) >= 20
    result = compare(RECIPE, config, specs, tmp_path / "run", as_json=True)
    assert all(torch.tensor(row["eval_loss"]).isfinite() for row in result["models"])


def test_a_comparison_over_seeds_says_what_to_evaluate(done, tmp_path, capsys):
    for name in ("config.yaml", "recipe.json", "routers.json"):
        (tmp_path / name).write_bytes((done[0] / name).read_bytes())
    (tmp_path / "seeds.json").write_text("[0, 1]", encoding="utf-8")
    for more in ([], ["--calibration"]):
        assert main(["eval", str(tmp_path), *more]) == 2
        assert "give the folder of one, as" in (said := capsys.readouterr().err) and said.count("\n") == 1


def test_routers_with_a_plus_between_are_taken_in_turn():
    recipe, config = RECIPE, load_config(RECIPE.config, None, SMALL)
    own = with_router(recipe, config, "bigram_hash:num_hashes=2+topk:top_k=1")
    assert [(one.router, one.router_options({"token_ids": 9})) for one in own.sparse.in_turn()] == [
        ("bigram_hash", {"num_hashes": 2, "vocab_size": 9}),
        ("topk", {"top_k": 1}),
    ]
    for wrong, said in {
        "hash+swich": "did you mean switch",
        "hash+topk:jiter=1": "jitter",
        "hash+topk:2": "option=",
    }.items():
        with pytest.raises(UserError, match=said):
            with_router(recipe, config, wrong)
    with pytest.raises(UserError):
        with_router(registry.find("images"), load_config(registry.find("images").config, None, []), "vmoe+soft_moe")
