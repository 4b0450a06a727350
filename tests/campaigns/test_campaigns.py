"""A small version of each campaign: nothing is lost, and nothing is silent."""

from types import SimpleNamespace

import pytest

from tests.campaigns import museum, verbs
from tests.campaigns.campaigns import CAMPAIGNS
from tests.campaigns.runs import KINDS
from tests.conftest import SEED


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("campaigns")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * campaign.slow) for name, campaign in reversed(CAMPAIGNS.items())],
)
def test_nothing_is_lost_and_nothing_is_silent(name, folder):
    result = CAMPAIGNS[name].run(name, folder, range(CAMPAIGNS[name].small), SEED)
    assert result.injected and not result.failures, "\n".join(result.failures)


@pytest.mark.parametrize("bug", museum.MUSEUM, ids=lambda bug: bug.what)
def test_a_bug_of_the_museum_has_its_place(bug):
    text = (museum.ROOT / "src/shunter" / bug.file).read_text()
    assert bug.right in text and text.replace(bug.right, bug.wrong) != text


def test_the_arguments_of_every_verb_are_known(tmp_path):
    """Those of a new one are found by their names, or this says for which it needs help."""
    work = SimpleNamespace(folder=tmp_path, straight=tmp_path, settings=KINDS["topk"])
    for name, parser in verbs.verbs():
        verb = verbs.Verb(name, parser, work)
        given = verb.arguments(tmp_path / "place")[len(name.split()) :]
        settings = parser.parse_known_args([str(word) for word in given])[1]
        assert not settings or name in ("train", "compare"), settings
