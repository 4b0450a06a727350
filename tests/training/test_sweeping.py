"""Sweeps of fine-tuning: labels from texts, every cell from the same weights, parts that are frozen, capacities."""

import copy
import json

import pytest
import torch

from shunter import moe_layers, sparsify
from shunter.data.documents import Domain
from shunter.errors import UserError
from shunter.training.sweeping import Labelled, labelled_windows, markdown, picture, sweep
from tests.hf.families import build


def by_letters(text, add_special_tokens):
    return {"input_ids": [ord(letter) % 64 for letter in text]}


def task(rows=60, length=6):
    """Two labels that every token tells apart."""

    def part(number):
        labels = torch.arange(number) % 2
        return torch.randint(32, (number, length)) + 32 * labels[:, None], labels

    return Labelled(part(rows), part(rows), ["no", "yes"])


def test_windows_have_the_label_of_their_text_and_later_ones_are_held_out():
    domains = [Domain(name, [name * 40, name * 40]) for name in ("ab", "cd")]
    data = labelled_windows(domains, by_letters, length=4, each=30)
    assert data.names == ["ab", "cd"]
    assert [len(part) for part in (*data.train, *data.test)] == [48, 48, 12, 12]
    for ids, labels in (data.train, data.test):
        for row, label in zip(ids, labels, strict=True):
            assert row.tolist() == by_letters(data.names[label] * 2, False)["input_ids"]
    mixed = Domain("all", ["xy" * 40, "zw" * 40, "??" * 40], languages=["x", "z", None])
    assert labelled_windows([mixed], by_letters, 4, 12).names == ["x", "z"]
    with pytest.raises(UserError, match="1 labels have ten windows"):
        labelled_windows(domains[:1], by_letters, 4, 12)


def telling(model):
    """A model whose embedding says the label of `task`, so loudly that no block can be heard beside it."""
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.where(torch.arange(64) < 32, -100.0, 100.0)[:, None])
    return model


def test_cells_learn_from_the_same_weights_with_what_is_frozen_frozen():
    sparse = telling(sparsify(build("mistral", num_hidden_layers=1), 4, "switch", capacity_factor=1.25))
    dense = telling(build("mistral", num_hidden_layers=1))
    before = copy.deepcopy(sparse.state_dict())
    found = sweep(
        {"sparse": sparse, "dense": dense}, task(), rates=[1e-6, 5e-3], batches=[20], train=["all", "non_moe"],
        capacities=[0.1, 4.0], examples=600,
    )  # fmt: skip
    assert all(torch.equal(before[name], tensor) for name, tensor in sparse.state_dict().items())
    assert moe_layers(sparse)["model.layers.0.mlp"].decider.eval_capacity_factor != 0.1
    cells = {(c["model"], c["train"], c["rate"]): c for c in found["cells"]}
    assert set(cells) == {
        *(("sparse", part, rate) for part in ("all", "non_moe") for rate in (1e-6, 5e-3)),
        *(("dense", "all", rate) for rate in (1e-6, 5e-3)),
    }
    for (model, part, rate), cell in cells.items():
        if rate == 5e-3:
            assert cell["loss"] < 0.3 < 0.6 < cells[model, part, 1e-6]["loss"]  # log 2 = 0.69 at the start
        assert set(cell["at_capacity"]) == ({"0.1", "4"} if model == "sparse" else set())
    experts = sum(p.numel() for n, p in sparse.named_parameters() if "router" in n or "experts" in n)
    assert cells["sparse", "all", 5e-3]["trained"] - cells["sparse", "non_moe", 5e-3]["trained"] == experts
    page = markdown(json.loads(json.dumps(found)))
    assert page.count("| sparse |") == 4 and page.count("| dense |") == 2
    assert len(picture(found).axes[0].containers) == 3


def test_cells_of_several_seeds_are_their_means_and_say_how_far_these_lie_apart():
    model, data = sparsify(build("mistral", num_hidden_layers=1), 4, "switch", capacity_factor=2.0), task(20)
    options = {"rates": [5e-3], "batches": [4], "train": ["all"], "capacities": [0.2], "examples": 12}
    alone = [sweep({"sparse": model, "dense": model}, data, seeds=[seed], **options)["cells"][0] for seed in (0, 3)]
    found = sweep({"sparse": model, "dense": model}, data, seeds=[0, 3], **options)
    cell = found["cells"][0]
    for key in ("accuracy", "loss"):
        values = [one[key] for one in alone]
        assert cell[key] == pytest.approx(sum(values) / 2)
        assert cell["spread"][key] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    assert [one["loss"] for one in cell["by_seed"]] == [one["loss"] for one in alone]
    assert alone[0]["loss"] != alone[1]["loss"]
    page = markdown(json.loads(json.dumps(found)))
    assert f"{cell['loss']:.4f} ± {cell['spread']['loss']:.4f}" in page and "+0.0000 ± 0.0000" in page
    with pytest.raises(UserError, match="different"):
        sweep({"sparse": model}, data, seeds=[1, 1], **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"rates": [0.0]}, "rates .* above 0"),
        ({"rates": [1e-3, float("nan")]}, "rates .* above 0"),
        ({"capacities": [1.0, 0.0]}, "capacities .* above 0"),
        ({"batches": []}, "batches"),
        ({"train": ["mo"]}, "neither a role"),
        ({"train": ["all", "shared"]}, "has the role shared"),
    ],
)
def test_impossible_sweeps_are_one_line(options, message):
    with pytest.raises(UserError, match=message):
        sweep({"sparse": build("mixtral")}, task(), **options, say=lambda line: pytest.fail("the work has begun"))
