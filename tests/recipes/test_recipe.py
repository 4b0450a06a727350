"""A recipe that is no text: another input, model and metric, through the same engine, page and commands."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, set_seed
from transformers.modeling_outputs import ModelOutput

from shunter import MoE, aux_loss, recipes
from shunter.analysis.ledger import Ledger
from shunter.analysis.runs import Words, read_run
from shunter.cli import main
from shunter.data.files import LeftOut
from shunter.errors import UserError
from shunter.recipes import registry
from shunter.recipes.recipe import Recipe
from shunter.recipes.sections import RunConfig


class SumsConfig(PretrainedConfig):
    model_type = "sums"

    def __init__(self, sparse=False, **rest):
        super().__init__(**rest)
        self.sparse = sparse


class Sums(PreTrainedModel):
    """Vectors to numbers."""

    config_class = SumsConfig
    main_input_name = "vectors"
    _tied_weights_keys = None

    def __init__(self, config):
        super().__init__(config)
        self.block = MoE(4, 8, 3, "topk", top_k=2) if config.sparse else nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.head = nn.Linear(4, 1)
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, vectors, labels=None):
        guess = self.head(self.block(vectors)).squeeze(-1)
        loss = None if labels is None else (guess - labels).square().mean() + aux_loss(self)
        return ModelOutput(loss=loss, logits=guess)


class Vectors(torch.utils.data.Dataset):
    def __init__(self, count, seed):
        self.x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"vectors": self.x[i], "labels": self.x[i].abs().sum()}


class SumsRecipe(Recipe):
    name = "sums"
    config = RunConfig
    words = Words("sums", "Two models add up numbers.", "squared error", shown={"off": "of 100 more than 1 off"})

    def prepare(self, config):
        warnings.warn("numbers: left out 3", LeftOut, stacklevel=2)
        train = Vectors(config.training.steps * self.items_per_step(config), config.seed)
        record = {"name": "numbers", "license": "none", "source": "drawn", "train_bytes": 16, "eval_bytes": 16}
        record |= {"train_tokens": len(train), "eval_tokens": 32}
        about = {"domains": [record], "fingerprint": str(config.seed), "vocab_size": 0, "tokenizer": "none"}
        return SimpleNamespace(
            train=train,
            domains=[record],
            fingerprint=str(config.seed),
            describe=lambda: about,
            save_pretrained=lambda folder: None,
        )

    def build(self, config, data, sparse):
        set_seed(config.seed)
        return Sums(SumsConfig(sparse=sparse))

    def load(self, folder):
        return Sums.from_pretrained(folder).eval()

    @torch.no_grad()
    def evaluate(self, model, data):
        held_out = Vectors(32, 12345)
        error = model(torch.stack([row["vectors"] for row in held_out])).logits - held_out.x.abs().sum(-1)
        found = {"loss": float(error.square().mean()), "off": 100 * float((error.abs() > 1).double().mean())}
        return found | {"domains": {"numbers": found}}

    def ledger(self, model, config):
        total = sum(p.numel() for p in model.parameters())
        return Ledger(total, total, {"all": 2.0 * total})

    def items_per_step(self, config):
        return config.training.batch_tokens

    def tokens_per_step(self, config):
        return config.training.batch_tokens


@pytest.fixture
def sums(monkeypatch):
    monkeypatch.setattr(registry, "_RECIPES", dict(registry._RECIPES))
    recipes.register(SumsRecipe())


SMALL = ["training.steps=6", "training.batch_tokens=8", "training.log_every=2", "training.eval_every=3"]


def test_another_recipe_trains_resumes_evaluates_compares_and_reports(sums, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "sums", "name=first", *SMALL]) == 0
    said = capsys.readouterr()
    assert "Held-out loss (squared error): dense" in said.out and "numbers: 16 bytes to train on" in said.err
    folder = tmp_path / "runs" / "first"
    summary = json.loads((folder / "summary.json").read_text())
    assert {"eval_loss", "off", "flops_per_token"} <= set(summary["sparse"]) and "bits_per_byte" not in summary[
        "sparse"
    ]
    found = read_run(folder)
    assert found.words.recipe == "sums" and set(found.summary.dense.shown) == {"off"}
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "numbers: left out 3." in page, "what the data warn of is in the report"
    assert "Two models add up numbers." in page and "of 100 more than 1 off" in page
    assert "nats" not in page and "bits per byte" not in page and "next token" not in page
    assert main(["eval", str(folder), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert {which: result["loss"] for which, result in again.items()} == {
        which: summary[which]["eval_loss"] for which in again
    }
    (folder / "summary.json").unlink()
    assert main(["train", "sums", "--resume", "--run", str(folder)]) == 0
    assert json.loads((folder / "summary.json").read_text())["gain"] == summary["gain"]
    assert main(["generate", str(folder)]) == 2
    assert "is a run of sums, which does not continue text" in capsys.readouterr().err


def test_routers_are_compared_on_what_the_recipe_knows(sums, tmp_path, capsys):
    assert main(["compare", "sums", "--routers", "hash", "--run", str(tmp_path / "no"), *SMALL]) == 2
    assert "router 'hash' needs token_ids of each token, which plain sums has not" in capsys.readouterr().err
    assert main(["compare", "sums", "--routers", "topk:top_k=2", "--run", str(tmp_path / "yes"), *SMALL]) == 0
    table = (tmp_path / "yes" / "compare.md").read_text()
    assert table.splitlines()[0].startswith("| router | loss | gain | of 100 more than 1 off | balance |")


def test_a_model_that_cannot_run_fails_before_any_training(sums, tmp_path, monkeypatch, capsys):
    def build(self, config, data, sparse):
        model = whole(self, config, data, sparse)
        if sparse:
            model.head = nn.Linear(5, 1)
        return model

    whole = SumsRecipe.build
    run = tmp_path / "run"
    with monkeypatch.context() as broken:
        broken.setattr(SumsRecipe, "build", build)
        assert main(["train", "sums", "--run", str(run), *SMALL]) == 2
    said = capsys.readouterr().err.strip()
    assert "the sparse model cannot be trained with these settings: mat1 and mat2 shapes" in said and "\n" not in said
    assert not run.exists()
    assert main(["train", "sums", "--run", str(run), "sparse.router=hash", *SMALL]) == 2
    assert "router 'hash' needs token_ids of each token" in capsys.readouterr().err
    assert main(["train", "sums", "--run", str(run), *SMALL]) == 0, "nothing was trained, so the folder is free"


def test_recipes_are_found_by_name(sums):
    assert recipes.find("sums").name == "sums" and "text" in recipes.names()
    with pytest.raises(UserError, match="recipe 'sum' is unknown; did you mean sums"):
        recipes.find("sum")
    for nothing in (5, [], None):  # what a damaged recipe.json may say
        with pytest.raises(UserError, match="is unknown"):
            recipes.find(nothing)
    with pytest.raises(ValueError, match="is there already"):
        recipes.register(SumsRecipe())


@pytest.mark.parametrize("words", [["--data", "{data}", "name=mine"], ["name=mine", "--data", "{data}"]])
def test_settings_may_stand_behind_the_data(words, corpus, tmp_path, monkeypatch):
    from tests.recipes.conftest import SMALL

    monkeypatch.chdir(tmp_path)
    given = [word.format(data=corpus) for word in words]
    assert main(["train", "text", *given, "training.steps=2", *SMALL]) == 0
    assert (tmp_path / "runs/mine/report.html").is_file()
