"""docs/architectures.md is of the installed transformers, and says of architectures what becomes of them."""

import re
from pathlib import Path

import pytest
import transformers
from tools.architectures import kinds, outcome, row

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "architectures.md").read_text(encoding="utf-8")
# One of each shape, and of those that are refused.
SOME = (
    "albert", "bart", "bitnet", "bloom", "blip_2_qformer", "clip_text_model", "convnext", "convnextv2", "distilbert",
    "dory", "falcon", "glm5_next_text", "gpt_neox", "hubert", "llama", "lxmert", "modernbert", "mpt", "nemotron", "opt",
    "persimmon", "phi3", "roberta-prelayernorm", "swin", "t5", "whisper", "xmod",
)  # fmt: skip


def rows(page):
    return {match[1]: match[0] for match in re.finditer(r"^\| ([\w.-]+) \| .*\|$", page, re.MULTILINE)}


@pytest.mark.parametrize("name", SOME)
def test_the_page_says_what_becomes_of_an_architecture(name):
    if f"transformers {transformers.__version__}:" not in PAGE:
        pytest.skip("the page is of another version of transformers")
    assert rows(PAGE)[name] == row(name, outcome(name))


def test_none_is_wrong_and_nearly_all_are_exact():
    outcomes = [line.split("|")[2].strip() for line in rows(PAGE).values()][1:]
    exact, wrong, refused = map(outcomes.count, ("exact", "wrong", "refused"))
    assert wrong == 0 and exact >= 0.95 * (exact + refused)


@pytest.mark.slow
def test_no_architecture_of_the_installed_version_is_wrong():
    found = {name: outcome(name) for name in kinds()}
    assert not {name: why for name, why in found.items() if why.word == "wrong"}
