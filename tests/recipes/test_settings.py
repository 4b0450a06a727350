"""The settings of recipes: the page is what the command prints, and each of them says what it is."""

import json
from pathlib import Path

import pytest

from shunter.cli import main
from shunter.plain_yaml import parse_yaml
from shunter.recipes.config import load_config
from shunter.recipes.registry import find, names
from shunter.recipes.settings import Setting, settings

PAGE = Path(__file__).parents[2] / "docs" / "recipes" / "settings.md"


def test_the_page_is_what_the_command_prints(capsys):
    assert main(["settings", "--format", "markdown"]) == 0
    printed = capsys.readouterr().out
    assert printed == PAGE.read_text(encoding="utf-8"), f"shunter settings --format markdown > {PAGE}"


@pytest.mark.parametrize("recipe", names())
def test_each_setting_says_what_it_is_and_takes_its_default(recipe):
    kind = find(recipe).config
    rows = list(settings(kind()))
    assert all(row.about for row in rows), [row.name for row in rows if not row.about]
    assert load_config(kind, None, [f"{row.name}={row.default}" for row in rows]) == kind()


def test_what_is_allowed_is_what_is_taken():
    rows = {row.name: row for row in settings(find("text").config())}
    assert rows["training.beta2"][1:3] == ("0.95", "above 0 below 1")
    assert rows["training.schedule"].allowed == "cosine, linear, constant_with_warmup"
    assert rows["model.family"].allowed == "llama, qwen3, modernbert, bert, t5"
    assert rows["sparse.num_experts"] == Setting("sparse.num_experts", "64", "from 1 to 4,096", "of each sparse layer")
    assert parse_yaml(rows["sparse.router"].default)[2] == "topk"
    assert rows["training.eval_every"].about == "steps from one evaluation to the next"  # of the class above


def test_one_recipe_alone_and_as_json(capsys):
    assert main(["settings", "tasks", "--format", "json"]) == 0
    assert {row["name"] for row in json.loads(capsys.readouterr().out)["tasks"]} >= {"model.tower", "seed"}
    assert main(["settings", "tasks"]) == 0
    assert "model.tower" in capsys.readouterr().out
