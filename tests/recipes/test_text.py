"""The main job end to end: what it leaves, that it resumes to the bit, and that its numbers come again."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

import shunter
from shunter.analysis.runs import Metrics
from shunter.cli import main
from shunter.errors import UserError
from shunter.recipes import registry
from shunter.recipes.config import load_config
from shunter.recipes.run import expert_width
from shunter.recipes.run import train as run_recipe
from shunter.recipes.text import RECIPE, TextConfig, evaluate
from shunter.training import loop as training
from tests.helpers import TIME_LIMIT

from .conftest import SMALL, write_corpus

train = partial(run_recipe, RECIPE)


def _weights(run):
    return {which: (run / which / "model.safetensors").read_bytes() for which in ("dense", "sparse")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One run, to be copied: its folder, its summary, and its configuration."""
    root = tmp_path_factory.mktemp("trained")
    source = f"data.source=['{write_corpus(root / 'corpus')}']"
    config = load_config(TextConfig, None, [*SMALL, source, "training.steps=8"])
    return root / "run", train(config, root / "run"), config


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the run, and its summary."""
    shutil.copytree(trained[0], tmp_path / "run")
    return tmp_path / "run", trained[1]


def test_a_run_leaves_what_it_promises(run):
    folder, summary = run
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "report.html",
        "picture.png",
        "data.json",
        "specialisation.json",
    ):
        assert (folder / name).stat().st_size > 0, name
    assert not (folder / "checkpoints").exists()
    assert json.loads((folder / "summary.json").read_text()) == summary
    keys = "eval_loss bits_per_byte flops_per_token params_total params_active seconds tokens peak_rss_bytes"
    for which in ("dense", "sparse"):
        for key in keys.split():
            assert math.isfinite(summary[which][key]) and summary[which][key] > 0, (which, key)
        pickles = [p for p in (folder / which).iterdir() if p.suffix in {".bin", ".pt", ".pth", ".pkl"}]
        assert not pickles
    for key in ("steps_to_dense_loss", "tokens", "seed", "versions", "gain"):
        assert key in summary
    assert summary["tokens"] == 8 * 64
    ratio = summary["sparse"]["flops_per_token"] / summary["dense"]["flops_per_token"]
    assert 0.95 < ratio < 1.05
    kinds = {line["kind"] for line in Metrics(folder / "metrics.jsonl").lines()}
    assert kinds == {"train", "eval", "load"}


def test_both_models_start_alike_outside_the_experts(small):
    config = small()
    dense, sparse = (RECIPE.build_model(config, 257, which == "sparse") for which in ("dense", "sparse"))
    others = dict(sparse.named_parameters())
    shared = [name for name, _ in dense.named_parameters() if name in others]
    assert len(shared) == len([n for n in dict(dense.named_parameters()) if ".mlp." not in n])
    for name in shared:
        assert torch.equal(dense.get_parameter(name), others[name]), name


@pytest.mark.parametrize("hidden, experts, k", [(384, 48, 1), (264, 24, 2), (100, 7, 3)])
def test_expert_width_spends_the_dense_blocks_flops(hidden, experts, k):
    width = expert_width(hidden, shunter.routers.create("topk", 16, experts, top_k=k), 32)
    assert abs(3 * width * k + experts - 3 * hidden) <= 1.5 * k
    free = expert_width(hidden, shunter.routers.create("hash", 16, experts, vocab_size=9), 32)
    assert free == hidden, "a router without weights leaves the experts the whole width"


def test_evaluation_is_the_mean_over_all_predicted_tokens(small):
    config = small()
    data = RECIPE.prepare(config)
    model = RECIPE.build_model(config, 257, True)
    found = evaluate(model, data.eval, batch_size=3)
    model.eval()
    nats, count, size = 0.0, 0, 0
    for domain in data.eval:
        for row in domain.input_ids:
            log_probs = model(input_ids=row[None]).logits[0].double().log_softmax(-1)
            nats -= sum(log_probs[i, row[i + 1]].item() for i in range(len(row) - 1))
            count += len(row) - 1
            text = data.tokenizer.decode(row[1:], skip_special_tokens=True)
            size += len(text.encode())
    assert found["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


SLOW = pytest.mark.slow
ROUTERS = [
    ["sparse.router=topk"], ["sparse.router=switch"], ["sparse.router=hash"],
    ["sparse.top_k=1", "sparse.options={selection_bias: true, jitter: 0.1, capacity_factor: 1.0}"],
]  # fmt: skip


@pytest.mark.parametrize(
    "router, stops",
    [
        pytest.param(router, stops, marks=[] if (router, stops) == (ROUTERS[3], (2, 4)) else SLOW)
        for router in ROUTERS
        for stops in ((2, 4), (3, 5, 7))
    ],
)
def test_stopped_and_resumed_runs_end_with_the_same_bits(router, stops, small, tmp_path, monkeypatch):
    """Weights, optimizer, data order, random state, router state and metrics: all as if never stopped."""

    config = small("training.steps=8", *router)
    straight = tmp_path / "straight"
    train(config, straight)
    broken = tmp_path / "broken"
    inner = training._Watch.on_step_begin
    pending = [("dense", stops[0]), *(("sparse", step) for step in stops)]

    def stop_at(watch, args, state, control, **kwargs):
        inner(watch, args, state, control, **kwargs)
        if pending and (watch.name, state.global_step + 1) == pending[0]:
            pending.pop(0)
            watch.asked = True

    monkeypatch.setattr(training._Watch, "on_step_begin", stop_at)
    for attempt in range(len(stops) + 1):
        with pytest.raises(training.Interrupted):
            train(config, broken, resume=attempt > 0)
    assert not pending
    train(config, broken, resume=True)
    assert _weights(straight) == _weights(broken)

    def lines(run):
        timed = {"seconds"}
        return [{k: v for k, v in line.items() if k not in timed} for line in Metrics(run / "metrics.jsonl").lines()]

    assert lines(straight) == lines(broken)


def test_ctrl_c_saves_says_how_to_resume_and_resumes(corpus, tmp_path):
    """The real thing: a signal to a real process."""
    run = tmp_path / "killed"
    options = [*SMALL, f"data.source=['{corpus}']", "training.steps=4000", "training.eval_every=5000"]
    command = [sys.executable, "-m", "shunter", "train", "text", "--run", str(run), *options]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = Metrics(run / "metrics.jsonl")
    limit = time.monotonic() + TIME_LIMIT
    while process.poll() is None and len(metrics.lines()) < 3 and time.monotonic() < limit:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    try:
        said = process.communicate(timeout=TIME_LIMIT)[1]
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert f"shunter train text --resume --run {run}" in said
    assert list((run / "checkpoints/dense").glob("checkpoint-*"))


def test_saved_runs_evaluate_to_the_same_numbers_and_continue_prompts(run, capsys):
    folder, summary = run
    assert main(["eval", str(folder), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    for which in ("dense", "sparse"):
        assert again[which]["loss"] == summary[which]["eval_loss"]
        assert again[which]["domains"] == summary[which]["domains"]
    for which in ("dense", "sparse"):
        args = ["generate", str(folder), "--prompt", "abc", "--model", which, "--max-new-tokens", "5"]
        texts = []
        for _ in range(2):
            assert main(args) == 0
            texts.append(capsys.readouterr().out)
        assert texts[0] == texts[1] and texts[0].startswith("abc")
    assert main([*args, "--memory", "300kB"]) == 0
    assert capsys.readouterr().out == texts[0]


@pytest.mark.parametrize(
    "args, message",
    [
        (["train", "text", "training.step=5"], "did you mean training.steps?"),
        (["train", "text", "--bogus"], "--bogus"),
        (["train", "text", "--resume", "--run", "nowhere"], "No such file"),
        (["train", "text", "--data", "nowhere.txt"], "no such file or folder"),
        (["eval", "nowhere"], "No such file"),
        (["generate", "nowhere"], "no trained model"),
        (["eval", "x", "--bogus"], "unknown argument '--bogus'"),
    ],
)
def test_bad_commands_are_one_line_and_exit_code_2(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and len(said.splitlines()) == 1, said


def test_a_folder_with_a_run_is_not_overwritten(run, capsys):
    assert main(["train", "text", "--run", str(run[0])]) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_a_run_goes_on_with_its_own_data_alone(corpus, small, tmp_path):
    """Else the sparse model would learn from other text than the dense one it is compared with."""
    folder = tmp_path / "run"
    train(small("training.steps=8"), folder)
    dense = (folder / "dense/model.safetensors").read_bytes()
    (folder / "sparse/training.json").unlink()
    (corpus / "letters" / "0.txt").write_text("zyx " * 60, encoding="utf-8")
    with pytest.raises(UserError, match="the text has changed since this run"):
        train(small("training.steps=8"), folder, resume=True)
    assert not (folder / "sparse/training.json").exists()
    assert (folder / "dense/model.safetensors").read_bytes() == dense


@pytest.mark.parametrize("file", ["dense/training.json", "dense/model.safetensors", "config.yaml", "data.json"])
def test_damage_to_a_run_is_named(run, trained, file):
    content = (run[0] / file).read_bytes()
    (run[0] / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=f"{file}: is damaged or changed"):
        train(trained[2], run[0], resume=True)


@pytest.mark.parametrize("cut", [0, 0.5, 0.97])
def test_a_log_that_was_cut_is_put_back(run, trained, cut):
    log = run[0] / "metrics.jsonl"
    content = log.read_text(encoding="utf-8")
    log.write_text(content[: int(cut * len(content))], encoding="utf-8")
    assert train(trained[2], run[0], resume=True)["gain"] == run[1]["gain"]
    assert log.read_text(encoding="utf-8") == content


@pytest.mark.parametrize(
    "option, message",
    [
        (["--temperature", "1e-40"], "temperature 1e-40 must be 0, or between 0.001 and 1000"),
        (["--temperature", "nan"], "temperature nan must be"),
        (["--temperature", "-1"], "temperature -1.0 must be"),
        (["--prompt", "a\udcff"], "the prompt is not UTF-8 text"),
        (["--prompt", ""], "the prompt is empty"),
    ],
)
def test_what_cannot_be_continued_is_one_line(run, option, message, capsys):
    assert main(["generate", str(run[0]), *option]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and len(said.splitlines()) == 1


def test_windows_go_to_where_the_model_is(small):
    class Elsewhere(torch.nn.Module):
        device = torch.device("meta")

        def forward(self, input_ids):
            raise LookupError(input_ids.device)

    with pytest.raises(LookupError, match="meta"):
        evaluate(Elsewhere(), RECIPE.prepare(small()).eval)


def test_json_lines_are_the_metrics(small, tmp_path, capsys):
    run = tmp_path / "json"
    train(small("training.steps=4"), run, as_json=True)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == Metrics(run / "metrics.jsonl").lines()


def test_custom_routers_train(small, tmp_path):
    class Mine(shunter.routers.TopK):
        """A router from outside."""

    shunter.routers.register("mine", Mine)
    try:
        train(load_config(TextConfig, None, []) and small("sparse.router=mine", "training.steps=2"), tmp_path / "mine")
    finally:
        shunter.routers.registry._ROUTERS.pop("mine")


def test_a_run_is_resumed_by_its_own_recipe(run, capsys, monkeypatch):
    folder, _ = run
    monkeypatch.setattr(registry, "_RECIPES", {**registry._RECIPES, "other": RECIPE})
    assert main(["train", "other", "--resume", "--run", str(folder)]) == 2
    assert f"{folder} is a run of text, not of other" in capsys.readouterr().err


def test_routers_in_turn_are_configured_and_cost_what_the_dense_model_does():
    config = load_config(
        TextConfig, None, ["sparse.router=[bigram_hash,{hash: {num_hashes: 4}},topk]", "sparse.options={num_hashes: 2}"]
    )
    assert [(one.router, one.options) for one in config.sparse.in_turn()] == [
        ("bigram_hash", {"num_hashes": 2}), ("hash", {"num_hashes": 4}), ("topk", {}),
    ]  # fmt: skip
    with torch.device("meta"):
        dense, sparse = (RECIPE.build_model(config, 300, which) for which in (False, True))
    costs = [RECIPE.ledger(model, config).flops_per_token for model in (dense, sparse)]
    assert abs(costs[1] / costs[0] - 1) < 0.005
    one = load_config(TextConfig, None, ["sparse.router=switch"]).sparse
    assert one.in_turn() == [one]
    both = load_config(TextConfig, None, ["sparse.router=[domain,hash,topk]", "sparse.top_k=4"]).sparse
    assert [each.build_router(8, {"token_ids": 9}).top_k for each in both.in_turn()[1:]] == [4, 4]
    for wrong, said in {
        "sparse.router=[hash,swich]": "did you mean switch",
        "sparse.router=[]": "at least one",
        "sparse.router=[{}]": "a router and its options",
        "sparse.router=[{hash: {top: 1}}]": "has no option 'top'",
        "sparse.options={z: 1}": "has no option 'z'",
        "sparse.router=[{hash: {num_hashes: no}}]": "num_hashes",
    }.items():
        with pytest.raises(UserError, match=said):
            load_config(TextConfig, None, [wrong])
