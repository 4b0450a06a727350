"""Table 1: what comes to a layer and who takes it, on planted decisions; what was not run has no number."""

import random
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("pydantic")
pytest.importorskip("transformers")

from shunter.analysis.information import mutual_information
from shunter.analysis.inspect.material import Material, Stream
from shunter.analysis.specialisation import label_counts
from shunter.errors import UserError
from shunter.reproduce import table_1
from shunter.reproduce.results import DIRECTION, NOT, NOT_RUN, REPRODUCED
from shunter.reproduce.tables import shuffles
from shunter.reproduce.words import word_tokenizer

EXPERTS = 8


def layer(index):
    return SimpleNamespace(index=index, num_experts=EXPERTS)


def sentences(count=100):
    """Positions of sentences of 2 to 9 tokens, the number of each token's sentence, and a label of each sentence."""
    lengths = [random.randint(2, 9) for _ in range(count)]
    position = torch.tensor([i for length in lengths for i in range(length)])
    number = torch.tensor([n for n, length in enumerate(lengths) for _ in range(length)])
    return position, number, torch.randint(4, (count,))[number]


def recording_of(label, names, layers, positions, what):
    stream = Stream({what: label, "position": positions}, {what: names})
    batch = SimpleNamespace(inputs={"input_ids": torch.zeros(7, 1)}, tokens=len(label))
    material = Material([batch], {"": stream}, torch.zeros(0), [], len(label), 9)
    return SimpleNamespace(layers=layers, batches=1), material, 1.5, 2.0


def test_sentences_that_go_as_one_are_told_from_those_that_do_not():
    position, number, _ = sentences()
    together = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(100)])[number]
    turned = torch.rand(len(number)) < 0.5
    together[turned] = together[turned].flip(1)  # which of two experts is the first does not matter
    stream = Stream({"position": position}, {})
    assert table_1.as_one(layer(together), stream) == 1
    together[(number == random.randrange(100)).nonzero()[-1, 0]] = -1
    assert table_1.as_one(layer(together), stream) == pytest.approx(0.99)


def test_planted_experts_are_said_and_others_are_not(monkeypatch, tmp_path):
    position, number, label = sentences(600)
    own = torch.where(torch.rand(len(label)) < 0.8, label, torch.randint(EXPERTS, label.shape))[:, None]
    blind = torch.randint(EXPERTS, label.shape)[:, None]
    kinds = {one.unit: one.label[0] for one in table_1.INPUTS}
    layers = {
        "word": {"a": layer(own), "b": layer(own)},
        "subword": {"a": layer(own), "b": layer(own)},
        "sentence": {"a": layer(torch.randint(EXPERTS, (600, 1))[number])},
        "patch": {"a": layer(own), "b": layer(blind * 0)},  # one expert takes all
        "word or patch": {"a": layer(own), "b": layer(own[:-1])},  # a token that nothing is known of
    }
    said = iter(table_1.INPUTS)

    def recorded(recipe, runs, config, tokens):
        one = next(said)
        assert recipe is one.recipe or recipe.name == one.recipe
        if one.unit == "spectrogram":
            raise UserError("speech needs a package\nand more")
        return recording_of(label, list("wxyz"), layers[one.unit], position, kinds[one.unit])

    monkeypatch.setattr(table_1, "recorded", recorded)
    rows = table_1.table_1(tmp_path).rows
    of = {unit: [row for row in rows if row.paper == unit] for unit in kinds}
    assert all(len(found) == 1 for found in of.values())
    assert of["subword"][0].verdict == REPRODUCED and f"{len(label):,} tokens" in of["subword"][0].ours
    assert of["sentence"][0].verdict == REPRODUCED and "100 %" in of["sentence"][0].ours
    assert of["word or patch"][0].verdict == NOT
    [row] = of["spectrogram"]
    assert row.verdict == NOT_RUN and not row.ours and row.why
    divides = {row.what.split(":")[0]: row for row in rows if "divide" in row.what}
    assert divides["natural language, subword"].verdict == REPRODUCED
    assert divides["vision, patch"].verdict == DIRECTION and "1 of 2 layers" in divides["vision, patch"].ours
    assert "speech, spectrogram" not in divides


def test_whole_items_are_shuffled_where_they_have_one_label():
    """Experts by item and labels by item that know nothing of each other: over tokens chance looks too small."""
    _, number, label = sentences(60)
    index = torch.randint(EXPERTS, (60, 1))[number]
    stream = Stream({"position": sentences_positions(number)}, {})
    assert torch.equal(table_1.items(stream), number)
    known = torch.where((torch.rand(len(label)) < 0.1) & (stream.labels["position"] > 0), -1, label)
    for one in shuffles(known, number):
        assert torch.equal(one < 0, known < 0)
        of = [one[(number == n) & (one >= 0)].unique() for n in range(60)]
        assert all(len(values) <= 1 for values in of)

    def bits(labels):
        return mutual_information(label_counts(index, labels, EXPERTS, 4))

    by_item, by_token = (sum(map(bits, shuffles(label, item))) for item in (number, None))
    assert by_item > 2 * by_token


def sentences_positions(number):
    first = torch.cat([torch.tensor([True]), number[1:] != number[:-1]])
    begin = first.nonzero()[:, 0]
    return torch.arange(len(number)) - begin[number]


def test_every_configuration_is_one_of_its_recipe():
    for one in table_1.INPUTS:
        recipe = table_1.find(one.recipe) if isinstance(one.recipe, str) else one.recipe
        config = one.config() if one.config else recipe.config.model_validate(one.settings)
        assert config.name and config.training.steps <= 250


def test_frequent_words_are_tokens_and_others_are_bytes():
    frequent, rare = [["".join(random.choices("abcdefgh", k=random.randint(3, 7))) for _ in range(40)] for _ in "ab"]
    texts = [" ".join([*(random.choices(frequent, k=3000)), *rare])]
    tokenizer = word_tokenizer(texts, 257 + len(set(frequent)))
    for word in frequent:
        assert len(tokenizer(f" {word}").input_ids) == 1
    for word in set(rare) - set(frequent):
        assert len(tokenizer(f" {word}").input_ids) == len(word) + 1
    text = f"{random.choice(rare)} {random.choice(frequent)}, é\n" + texts[0]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text and len(tokenizer) == 257 + len(set(frequent))
