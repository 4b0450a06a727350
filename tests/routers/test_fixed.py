"""Routing by a document's domain and by language."""

import pytest
import torch

import shunter
from shunter import MoE
from shunter.context import Context
from shunter.routers.registry import create

from . import contract

LABELS = [("domain", "domain"), ("language", "language")]


@pytest.mark.parametrize("check", contract.CHECKS)
@pytest.mark.parametrize("name, field", LABELS)
@pytest.mark.parametrize("options", [{}, {"experts": [3, 0, 3, 7, 1], "capacity_factor": 1.0}])
def test_contract(name, field, options, check):
    labels = 5 if options else contract.EXPERTS
    check(name, options, lambda tokens: Context(**{field: torch.randint(labels, (tokens,))}))


@pytest.mark.parametrize("name, field", LABELS)
def test_the_label_is_the_expert(name, field):
    router = create(name, 6, 4)
    label = torch.randint(4, (50,))
    mask = torch.rand(50) < 0.7
    routing = router.assign(torch.zeros(50, 4), Context(mask=mask, **{field: torch.where(mask, label, -1)}))
    assert torch.equal(routing.token.sort().values, mask.nonzero().flatten())
    assert torch.equal(routing.expert, label[routing.token]) and routing.weight.eq(1).all()
    assert router.leak is None and not list(router.parameters())


def test_languages_of_a_group_share_a_sub_layer():
    moe = MoE(6, 5, 2, router="language", experts=[0, 1, 0], backend="reference").double()
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    out = [moe(x, language=torch.full((3,), number)) for number in range(3)]
    assert torch.equal(out[0], out[2]) and not torch.allclose(out[0], out[1])
    mixed = moe(x, language=torch.tensor([1, 0, 2]))
    for row, number in enumerate((1, 0, 2)):
        assert torch.allclose(mixed[row], out[number][row], atol=1e-12), "one label for each sequence will do"


def test_experts_learn_from_their_own_domain_alone():
    moe = MoE(6, 5, 4, router="domain")
    moe(torch.randn(20, 6), domain=torch.tensor([1, 3] * 10)).square().sum().backward()
    for parameter in moe.experts.parameters():
        used = parameter.grad.flatten(1).abs().sum(1)
        assert (used[[1, 3]] > 0).all() and (used[[0, 2]] == 0).all()


def test_the_table_is_saved():
    router, other = (create("language", 6, 4, experts=table) for table in ([0, 1, 2], [3, 3, 3]))
    other.load_state_dict(router.state_dict())
    assert other.experts.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: create("domain", 6, 4, experts=[0, 4]), "one expert, 0 to 3, for each domain"),
        (lambda: create("language", 6, 4, experts=[]), "one expert, 0 to 3, for each language"),
        (lambda: create("domain", 6, 4).assign(torch.zeros(2, 4)), "Domain needs domain; pass domain="),
        (
            lambda: create("language", 6, 4).assign(torch.zeros(2, 4), Context(language=torch.tensor([0, 4]))),
            "Language: language 4 is out of range; ids are 0 to 3",
        ),
        (
            lambda: create("domain", 6, 4, experts=[1, 1]).assign(torch.zeros(1, 4), Context(domain=torch.tensor([2]))),
            "Domain: domain 2 is out of range; ids are 0 to 1",
        ),
        (
            lambda: create("domain", 6, 4).assign(torch.zeros(2, 4), Context(domain=torch.tensor([2]))),
            "1 entries for 2 tokens",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_names_are_public():
    for name in ("domain", "language", "hash", "previous_token_hash", "bigram_hash", "position_hash"):
        assert name in shunter.routers.names() and shunter.routers.find(name).chooses == "fixed"
