"""The report: true to the run folder's numbers, safe on hostile strings, and there for broken or unfinished runs."""

import json
import math
import re
import warnings
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from shunter.analysis.pages.run_page import _DECIDES, mutual_information, write_picture, write_report
from shunter.analysis.pages.style import visible
from shunter.analysis.runs import read_run
from shunter.errors import UserError
from shunter.routers.taxonomy import CHOOSERS

HOSTILE = [
    " the",
    "\n\n",
    "\t",
    "</script><script>alert(1)</script>",
    "<!--",
    "&amp;\"'",
    "\x00\x1b[31m",
    "\u202eevil\u2066",
    "\ud800",
    "\u0301",
    "\u200b",
    "שלום",
    "漢字",
    "{{ 7 * 7 }}",
    "$x$",
    "",
    "\ufffd",
    "javascript:" + "x" * 200,
]
VOID = {"meta", "br", "link", "img", "input", "hr"}

MakeRun = Callable[..., Path]


def _losses(tokens: np.ndarray, floor: float) -> np.ndarray:
    return floor + 4.2 * np.exp(-tokens / tokens[-1] * 9) + 0.5 * np.exp(-tokens / tokens[-1] * 2)


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Writes a synthetic run folder that follows the schema; sizes by keyword."""

    def make(
        layers: int = 4,
        experts: int = 32,
        domains: tuple[str, ...] = ("English prose", "Python code", "Catalogues"),
        steps: int = 300,
        evals: int = 10,
        gain: float = 0.0913,
        tokens: list[str] | None = None,
        name: str = "text",
        seed: int = 0,
    ) -> Path:
        rng = np.random.default_rng(seed)
        run = tmp_path / name
        run.mkdir()
        per_step = 2048
        total = steps * per_step
        seconds = {"dense": 0.071, "sparse": 0.0993}
        floors = {"dense": 3.1, "sparse": 3.1 - gain}
        offset = {domain: 0.6 * (number - 1) for number, domain in enumerate(domains)}
        tokens = tokens or [" the", "\n    ", "def", " self", " LORD", "msgid", " und", "ation", "0x", " ("]
        rows: list[dict[str, Any]] = []
        final: dict[str, Any] = {}
        eval_steps = {int(step) for step in np.linspace(steps / evals, steps, evals)}
        names = [f"model.layers.{layer}.mlp" for layer in range(layers)]
        drift = rng.dirichlet(np.full(experts, 2.0), size=layers)
        for model in ("dense", "sparse"):
            at = np.arange(1, steps + 1) * per_step
            curve = _losses(at, floors[model])
            for step in range(1, steps + 1):
                base = {"model": model, "step": step, "tokens": step * per_step, "seconds": step * seconds[model]}
                loss = curve[step - 1]
                row = base | {"kind": "train", "loss": loss + 0.1 * rng.normal(), "learning_rate": 1e-3}
                if model == "sparse":
                    row |= {"aux_loss": 0.011, "balance": 1.3}
                rows.append(row)
                if step in eval_steps:
                    scores = {
                        domain: {"loss": loss + offset[domain], "bits_per_byte": (loss + offset[domain]) / 2.2}
                        for domain in domains
                    }
                    final[model] = {"loss": loss, "bits_per_byte": loss / 2.2, "domains": scores}
                    rows.append(base | {"kind": "eval"} | final[model])
                    if model == "sparse":
                        even = min(1.0, step / steps * 1.5)
                        shares = {}
                        for layer, layer_name in enumerate(names):
                            noisy = rng.dirichlet(np.full(experts, 60.0))
                            share = (1 - even) * drift[layer] + even * noisy
                            if layer == 1:
                                share[[2, experts - 1]] = 0
                            shares[layer_name] = list(share / share.sum())
                        rows.append({"kind": "load", "model": model, "step": step, "layers": shares})
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        costs = {
            "dense": {"params_total": 1_115_264, "params_active": 1_115_264, "peak_rss_bytes": 812_345_344},
            "sparse": {"params_total": 7_422_080, "params_active": 1_131_648, "peak_rss_bytes": 1_201_341_440},
        }
        summary: dict[str, Any] = {
            model: {
                "eval_loss": final[model]["loss"],
                "bits_per_byte": final[model]["bits_per_byte"],
                "domains": final[model]["domains"],
                "flops_per_token": 2_359_296 + (8192 if model == "sparse" else 0),
                "seconds": steps * seconds[model],
                "tokens": total,
                **costs[model],
            }
            for model in final
        }
        summary |= {
            "steps_to_dense_loss": 0.7342 if gain > 0 else None,
            "gain": summary["dense"]["eval_loss"] - summary["sparse"]["eval_loss"],
            "tokens": total,
            "seed": seed,
            "versions": {"shunter": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.9"},
            "licenses": ["Public domain", "PSF-2.0", "BSD-3-Clause"],
        }
        (run / "summary.json").write_text(json.dumps(summary))
        special: dict[str, Any] = {"domains": list(domains), "layers": {}}
        for layer, layer_name in enumerate(names):
            sharp = 0.15 * (layer + 1)
            share = np.stack([rng.dirichlet(np.full(experts, 1 / sharp**2)) for _ in domains])
            chosen = [
                [
                    [tokens[(expert + i) % len(tokens)], 0.3 / (i + 1), 9.7 / (i + 1)]
                    for i in range(8)
                ]
                for expert in range(experts)
            ]  # fmt: skip
            special["layers"][layer_name] = {
                "load": list(share.mean(axis=0)),
                "domains": {domain: list(row) for domain, row in zip(domains, share, strict=True)},
                "tokens": chosen,
            }
        (run / "specialisation.json").write_text(json.dumps(special))
        sizes = {"train_bytes": 4_321_012, "eval_bytes": 221_000, "train_tokens": 1_800_123, "eval_tokens": 92_000}
        data = {
            "domains": [
                {"name": domain, "license": "PSF-2.0", "source": f"the package of {domain}"} | sizes
                for domain in domains
            ],
            "fingerprint": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
            "vocab_size": 1024,
            "tokenizer": "bpe",
        }
        (run / "data.json").write_text(json.dumps(data))
        (run / "config.yaml").write_text("name: text\nseed: 0\nmodel:\n  dim: 128\n  layers: 4\n  experts: 32\n")
        return run

    return make


class Page(HTMLParser):
    """Parses a page, keeping tags, ids and text, and noting any tag that is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.numbers: dict[str, list[tuple[str, str]]] = {}
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in {"style", "title"}:
            self.words.append(data)
        if self.open and self.open[-1] == "data":
            attributes = next(values for name, values in reversed(self.tags) if name == "data")
            self.numbers.setdefault(str(attributes["data-key"]), []).append((data, str(attributes["value"])))

    @property
    def text(self) -> str:
        """What a reader reads, spaces collapsed."""
        return " ".join(" ".join(self.words).split())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        """Attributes of every `tag`."""
        return [attributes for name, attributes in self.tags if name == tag]


def _render(run: Path) -> Page:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return Page(write_report(run).read_text(encoding="utf-8"))


@pytest.mark.usefixtures("undrawn")
def test_headline_numbers_are_the_summarys(make_run: MakeRun) -> None:
    run = make_run(layers=1, steps=100)
    summary = json.loads((run / "summary.json").read_text())
    dense, sparse = summary["dense"], summary["sparse"]
    page = _render(run)
    expected = {
        "gain": summary["gain"],
        "sparse.eval_loss": sparse["eval_loss"],
        "dense.eval_loss": dense["eval_loss"],
        "sparse.bits_per_byte": sparse["bits_per_byte"],
        "dense.bits_per_byte": dense["bits_per_byte"],
        "|bits_per_byte|": abs(dense["bits_per_byte"] - sparse["bits_per_byte"]),
        "exp(gain)": math.exp(summary["gain"]),
        "steps_to_dense_loss": 100 * summary["steps_to_dense_loss"],
    }
    assert page.numbers.keys() == expected.keys()
    for key, printed in page.numbers.items():
        for shown, exact in printed:
            assert float(exact) == pytest.approx(expected[key], rel=1e-12), key
            digits = len(shown.partition(".")[2])
            assert float(shown) == pytest.approx(expected[key], abs=0.5000001 * 10**-digits), key
    assert f"{sparse['seconds'] / dense['seconds']:.2f}×" in page.text
    assert f"{sparse['peak_rss_bytes'] / dense['peak_rss_bytes']:.2f}×" in page.text
    assert f"{sparse['params_total'] / dense['params_total']:.2f}×" in page.text
    assert f"{sparse['peak_rss_bytes'] / 2**30:.2f} GiB" in page.text
    assert f"{dense['tokens'] / dense['seconds'] / 1000:.1f} k" in page.text


def test_page_is_one_file_and_accessible(make_run: MakeRun) -> None:
    run = make_run(layers=2, steps=60)
    page = _render(run)
    text = (run / "report.html").read_text()
    assert "http://" not in text and "https://" not in text
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed"}
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    assert not re.search(r"url\((?!#)", text)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:href="#|url\(#)([^")]*)', text)
    assert used and set(used) <= set(ids)
    figures = page.named("svg")
    assert len(figures) == 3 + 1 + (1 + 2) + (1 + 2)
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in figures)
    assert page.tags.count(("figcaption", {})) == len(page.named("figure")) == 4
    assert all(attributes.get("scope") in {"col", "row"} for attributes in page.named("th"))
    assert len(page.named("thead")) == len(page.named("table"))
    assert "prefers-color-scheme: dark" in text and "tabular-nums" in text
    assert not re.search("#0[1-4]0[1-4]0[1-4]", text), "a placeholder colour was left"


def test_same_folder_same_page_and_picture(make_run: MakeRun) -> None:
    run = make_run(layers=1, steps=40)
    first = write_report(run).read_bytes(), write_picture(run, run / "a.png").read_bytes()
    second = write_report(run).read_bytes(), write_picture(run, run / "b.png").read_bytes()
    assert first == second
    assert first[1].startswith(b"\x89PNG\r\n")


def test_hostile_strings_are_shown_not_obeyed(make_run: MakeRun) -> None:
    names = ("</title><script>alert(2)</script>", "\u202e\x00$a_b$", "漢字" * 20)
    run = make_run(layers=1, experts=18, steps=20, tokens=HOSTILE, domains=names)
    data = json.loads((run / "data.json").read_text())
    data["domains"][0]["license"] = data["domains"][0]["source"] = "<img src=x onerror=alert(3)>\x00"
    (run / "data.json").write_text(json.dumps(data))
    (run / "config.yaml").write_text("a: '</pre><script>\x01'\n")
    page = _render(run)
    assert not page.named("script") and not page.named("img")
    raw = (run / "report.html").read_text(encoding="utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069]", raw)
    shown = {token.strip() for token in page.words}
    for token in HOSTILE:
        assert visible(token) in shown, ascii(token)


def test_mutual_information_against_the_joint_distribution() -> None:
    seed = np.random.SeedSequence().entropy
    print(f"seed {seed}")
    rng = np.random.default_rng(seed)
    for _ in range(20):
        domains, experts = rng.integers(1, 6), rng.integers(1, 40)
        share = rng.dirichlet(np.full(experts, 0.3), size=domains)
        joint = share / domains
        entropy = [
            -sum(p * math.log2(p) for p in part.ravel() if p > 0) for part in (joint.sum(0), joint.sum(1), joint)
        ]
        assert mutual_information(share) == pytest.approx(entropy[0] + entropy[1] - entropy[2], abs=1e-9)
    assert mutual_information(np.eye(4)) == pytest.approx(2)
    assert mutual_information(np.zeros((3, 5))) == 0


@pytest.mark.usefixtures("undrawn")
def test_balance_and_dead_experts_are_named(make_run: MakeRun) -> None:
    run = make_run(layers=3, experts=16, steps=100)
    layers = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["layers"]
    text = _render(run).text
    assert text.count("No expert is dead.") == 2
    assert "Dead: 2, 15 (2)." in text
    for share in layers.values():
        assert f"busiest expert has {max(share) / np.mean(share):.2f}× the mean load" in text


@pytest.mark.usefixtures("undrawn")
def test_worse_sparse_model_is_said(make_run: MakeRun) -> None:
    run = make_run(layers=1, steps=20, gain=-0.05)
    text = _render(run).text
    assert "raised the loss" in text and "setback" in text and "did not reach" in text
    assert "lowered" not in text


@pytest.mark.usefixtures("undrawn")
def test_unequal_compute_is_said(make_run: MakeRun) -> None:
    run = make_run(layers=1, steps=20)
    summary = json.loads((run / "summary.json").read_text())
    summary["sparse"]["flops_per_token"] *= 1.5
    (run / "summary.json").write_text(json.dumps(summary))
    text = _render(run).text
    assert "1.51×" in text and "not a comparison at equal compute" in text
    assert "for the same compute" not in text


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "missing", ["summary.json", "specialisation.json", "data.json", "config.yaml", "metrics.jsonl"]
)
def test_a_missing_file_still_gives_a_page(make_run: MakeRun, missing: str) -> None:
    run = make_run(layers=1, steps=20)
    (run / missing).unlink()
    page = _render(run)
    assert ("not finished" in page.text) == (missing == "summary.json")
    assert missing in page.text or missing == "summary.json"


def test_killed_run_with_a_cut_line_and_no_summary(make_run: MakeRun) -> None:
    run = make_run(layers=1, steps=40)
    for name in ("summary.json", "specialisation.json"):
        (run / name).unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    for keep in (1, len(lines) // 2 + 3, len(lines) - 1):
        (run / "metrics.jsonl").write_text("".join(lines[:keep]) + lines[keep][:17])
        text = _render(run).text
        assert f"Left out 1 unreadable line of metrics.jsonl (line {keep + 1})." in text
        assert "not finished" in text


@pytest.mark.usefixtures("undrawn")
def test_unfinished_run_compares_the_models_at_the_same_step(make_run: MakeRun) -> None:
    run = make_run(layers=1, steps=40, evals=4)
    (run / "summary.json").unlink()
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if row["model"] == "dense" or row["step"] <= 25]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = _render(run)
    evals = [row for row in rows if row["kind"] == "eval" and row["step"] == 20]
    at = {row["model"]: row["domains"]["Python code"]["loss"] for row in evals}
    assert "both models at step 20" in page.text
    assert f"{at['dense']:.3f}" in page.text and f"{at['dense'] - at['sparse']:+.3f}" in page.text
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["model"] == "dense"))
    assert "no step yet at which both models were evaluated" in _render(run).text
    with pytest.raises(UserError, match="nothing to compare yet"):
        write_picture(run, run / "x.png")


def test_resumed_steps_replace_the_lost_ones(make_run: MakeRun) -> None:
    run = make_run(layers=1, steps=40)
    whole = read_run(run)
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    sparse = [line for line in lines if '"model": "sparse"' in line]
    again = [line for line in sparse if json.loads(line)["step"] > 20]
    lost = [json.dumps(json.loads(line) | {"loss": 99.0}) + "\n" for line in again[:9]]
    path.write_text("".join([line for line in lines if line not in again] + lost + again))
    resumed = read_run(run)
    assert np.array_equal(resumed.train["sparse"].loss, whole.train["sparse"].loss)
    assert np.array_equal(resumed.evals["sparse"].loss, whole.evals["sparse"].loss)
    assert np.array_equal(resumed.loads["model.layers.0.mlp"].step, whole.loads["model.layers.0.mlp"].step)


@pytest.mark.parametrize("bad", [math.inf, None])
def test_losses_that_are_not_finite(make_run: MakeRun, bad: float | None) -> None:
    run = make_run(layers=1, steps=20, evals=2)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["model"] == "sparse" and row["step"] > 10 and "loss" in row:
            row["loss"] = bad
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = json.loads((run / "summary.json").read_text())
    summary["gain"] = summary["sparse"]["eval_loss"] = summary["sparse"]["bits_per_byte"] = bad
    for score in summary["sparse"]["domains"].values():
        score["loss"] = bad
    summary["sparse"]["peak_rss_bytes"] = None
    (run / "summary.json").write_text(json.dumps(summary))
    page = _render(run)
    assert "10 sparse train losses not finite, the first at step 11" in page.text
    assert "No comparison" in page.text and "n/a" in page.text
    assert not re.search(r"\b(nan|inf)\b", page.text)
    write_picture(run, run / "picture.png")


def test_every_loss_not_finite(make_run: MakeRun) -> None:
    run = make_run(layers=1, steps=10, evals=1)
    path = run / "metrics.jsonl"
    path.write_text(re.sub(r'"loss": [\d.]+', '"loss": NaN', path.read_text()))
    assert "not finite" in _render(run).text


def test_one_step_and_one_evaluation(make_run: MakeRun) -> None:
    assert _render(make_run(layers=1, evals=1, steps=1)).named("svg")


def test_many_layers_and_experts(make_run: MakeRun) -> None:
    domains = tuple(f"language {number}" for number in range(9))
    run = make_run(layers=7, experts=128, steps=5, evals=1, domains=domains)
    page = _render(run)
    assert page.text.count("1 further layer ") == 2
    assert len(page.named("svg")) == 3 + 1 + (1 + 7) + (1 + 7)


@pytest.mark.usefixtures("undrawn")
def test_layers_in_their_natural_order(make_run: MakeRun) -> None:
    run = make_run(layers=12, experts=4, steps=10, evals=1)
    path = run / "specialisation.json"
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    order = re.findall(r"model\.layers\.(\d+)\.mlp", _render(run).text)
    assert [int(number) for number in order] == [*range(12)] * 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.json", "{", "not complete JSON"),
        ("summary.json", "[]", "summary.json does not follow"),
        ("summary.json", '{"dense": {}}', "lacks the key 'eval_loss'"),
        ("specialisation.json", '{"domains": ["a"], "layers": {"0": {"load": [1]}}}', "lacks the key 'domains'"),
        ("specialisation.json", "null?", "not complete JSON"),
        ("data.json", '{"domains": [{"name": 1}]}', "lacks the key 'license'"),
        ("metrics.jsonl", '{"kind": "train", "model": "dense"}\n', "metrics.jsonl lacks the key 'step'"),
        ("metrics.jsonl", "5\n", "line 1, does not follow"),
        ("metrics.jsonl", '{"kind":"train","model":"dense","step":"x","tokens":1,"seconds":1,"loss":1}\n', "number"),
    ],
)
def test_a_broken_file_is_one_clear_error(make_run: MakeRun, name: str, content: str, message: str) -> None:
    run = make_run(layers=1, steps=5)
    (run / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        write_report(run)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_experts_that_do_not_agree_are_an_error(make_run: MakeRun) -> None:
    run = make_run(layers=1, steps=5)
    special = json.loads((run / "specialisation.json").read_text())
    special["layers"]["model.layers.0.mlp"]["tokens"].pop()
    (run / "specialisation.json").write_text(json.dumps(special))
    with pytest.raises(UserError, match="32 loads, 32 domain shares and 31 token lists"):
        write_report(run)


def test_nothing_to_report_is_an_error(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder"):
        write_report(tmp_path / "absent")
    run = make_run(layers=1, steps=5)
    (run / "summary.json").unlink()
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no loss yet"):
        write_report(run)
    with pytest.raises(UserError, match="holds no loss yet"):
        write_picture(run, tmp_path / "x.png")


@pytest.mark.usefixtures("undrawn")
def test_the_page_says_who_decides_in_each_layer(make_run: MakeRun) -> None:
    run = make_run(layers=3, steps=60)
    path = run / "summary.json"
    assert "A router decides which experts compute a token." in _render(run).text
    names = [f"model.layers.{layer}.mlp" for layer in range(3)]
    routers = [("bigram_hash", "fixed"), ("hash", "fixed"), ("topk", "tokens")]
    said = {name: {"router": router, "chooses": who} for name, (router, who) in zip(names, routers, strict=True)}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"routers": said}))
    text = _render(run).text
    assert "In 2 of these layers a fixed rule, which learns nothing, sends each token to a few experts" in text
    assert (
        "(bigram_hash, hash); in 1 of these layers a learned router sends each token to a few experts (topk)." in text
    )
    for name, (router, _) in zip(names, routers, strict=True):
        assert f"{name} {router}" in text
    path.write_text(json.dumps(json.loads(path.read_text()) | {"routers": {names[0]: said[names[2]]}}))
    assert "A learned router sends each token to a few experts (topk)." in _render(run).text


@pytest.mark.usefixtures("undrawn")
def test_alarms_say_how_it_ended(make_run: MakeRun) -> None:
    run = make_run(layers=2, steps=60)
    with (run / "metrics.jsonl").open("a") as file:
        alarm = {"kind": "alarm", "model": "sparse", "step": 30, "what": "model.layers.1.mlp: expert 2 is dead"}
        file.write(json.dumps(alarm) + "\n")
    text = _render(run).text
    assert (
        "Seen in training (at its end 2 experts are dead): sparse model, step 30: model.layers.1.mlp: expert 2" in text
    )


def test_every_kind_of_router_has_its_sentence() -> None:
    assert set(_DECIDES) == set(CHOOSERS)
