"""Routers: what each promises, whatever the scores."""

import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from shunter import MoE, dropless, routers
from shunter.context import Context
from shunter.routers import base
from shunter.routers.base import largest
from shunter.routers.registry import create

from ..helpers import deviation
from ..test_capacity import LOGITS

VOCAB = 30
FOUR = [("switch", {}), ("topk", {"top_k": 2}), ("expert_choice", {}), ("hash", {"vocab_size": VOCAB})]


def _make(name, options, dim=6, experts=5):
    return create(name, dim, experts, **options)


def _context(tokens, **more):
    return Context(token_ids=torch.randint(VOCAB, (tokens,)), **more)


def test_ties_go_to_the_lowest_expert():
    for value in (0.0, -3.0, float("inf"), -float("inf"), float("nan")):
        assert largest(torch.full((3, 64), value), 8).tolist() == [list(range(8))] * 3
    signed = torch.tensor([[-0.0, 0.0, -0.0, 0.0]])
    assert largest(signed, 2).tolist() == [[0, 1]]


@pytest.mark.parametrize("k", [1, 2, 7])
def test_largest_is_a_stable_sort(k):
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e30, -1e30, float("inf"), -float("inf"), 1.0, -1.0, 1.0000001])
    scores = torch.cat([special[torch.randint(len(special), (200, 11))], torch.randn(200, 11)])
    expected = scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(largest(scores, k), expected)
    assert torch.equal(largest(scores.double(), k), expected)


def test_keys_are_made_for_rows_with_ties_alone(monkeypatch):
    made = []
    monkeypatch.setattr(
        base, "_by_keys", lambda scores, k, own=base._by_keys: made.append(len(scores)) or own(scores, k)
    )
    scores = torch.stack([torch.randperm(64) for _ in range(50)]).float()
    assert torch.equal(largest(scores, 3), scores.argsort(dim=-1, descending=True)[:, :3]) and not made
    scores[7, :] = 1.0
    scores[9, 5] = float("nan")
    largest(scores, 3)
    assert made == [2]


@pytest.mark.parametrize("name, options", FOUR)
def test_rows_of_nan_stay_in_range_and_leave_others_alone(name, options):
    if name == "switch":
        options = {"capacity_factor": None}  # a slot that the row takes would be another's
    router = _make(name, options).eval()
    context = _context(6)
    logits = torch.randn(6, 5)
    clean = router.assign(logits, context)
    logits[2] = float("nan")
    routing = router.assign(logits, context)
    pairs = set(zip(routing.token.tolist(), routing.expert.tolist(), strict=True))
    assert len(pairs) == routing.token.numel()
    assert routing.expert.min() >= 0 and routing.expert.max() < 5
    if router.chooses in ("tokens", "fixed"):
        others = [torch.stack([r.token, r.expert])[:, r.token != 2] for r in (clean, routing)]
        assert torch.equal(*others)


def test_one_raw_choice_trains_the_router_and_a_renormalised_one_is_refused():
    router = create("topk", 6, 4, top_k=1, load_balancing_loss=0.0)
    routing = router.assign(router.score(torch.randn(20, 6)))
    (routing.weight * torch.randn(20)).sum().backward()
    assert router.weight.grad.abs().sum() > 1e-3
    for options in ({"renormalize": "before_drop"}, {"renormalize": "after_drop"}, {"score_after": True}):
        with pytest.raises(ValueError, match="the router gets no gradient"):
            create("topk", 6, 4, top_k=1, **options)


def test_conventions_of_weights():
    def weights(**options):
        router = create("topk", 6, 4, top_k=2, **options)
        return router.assign(LOGITS).dense()

    probs = LOGITS.softmax(-1)
    index = LOGITS.topk(2).indices
    raw = torch.zeros_like(probs).scatter(1, index, probs.gather(1, index))
    assert torch.allclose(weights(renormalize="no"), raw)
    normal = raw / raw.sum(1, keepdim=True)
    assert torch.allclose(weights(), normal)
    assert torch.allclose(weights(score_after=True, renormalize="no"), normal), "softmax over the chosen is the same"
    sigmoid = torch.zeros_like(probs).scatter(1, index, LOGITS.sigmoid().gather(1, index))
    assert torch.allclose(weights(score_function="sigmoid", renormalize="no"), sigmoid)


def test_golden_gshard_renormalisation_before_and_after_dropping():
    rows = {}
    for when in ("before_drop", "after_drop"):
        # 6 tokens, 4 experts: the factor 4/3 makes C = 2.
        router = create("topk", 6, 4, top_k=2, renormalize=when, capacity_factor=4 / 3)
        matrix = router.assign(LOGITS).dense()
        index = LOGITS.topk(2).indices
        rows[when] = matrix.gather(1, index)[1:3]
    expected = torch.tensor([[0.524979, 0], [0, 0.119203]])
    assert torch.allclose(rows["before_drop"], expected, atol=1e-5)
    assert torch.allclose(rows["after_drop"], (expected > 0).float())


def test_selection_bias_moves_the_choice_not_the_weight_and_stays_exact():
    router = create("topk", 6, 4, top_k=2, selection_bias=True, renormalize="no")
    bias = torch.tensor([0.0, 0.0, 10.0, 0.1])
    router.selection_bias.copy_(bias)
    routing = router.assign(LOGITS)
    assert (routing.dense()[:, 2] > 0).all()
    assert torch.equal(routing.dense()[:, 2], LOGITS.softmax(-1)[:, 2])
    exact = torch.randn(4)
    router.selection_bias.copy_(exact)
    for cast in (router.bfloat16, router.half, router.float):
        assert torch.equal(cast().selection_bias, exact)
    other = create("topk", 6, 4, top_k=2, selection_bias=True)
    other.load_state_dict(router.state_dict())
    assert torch.equal(other.selection_bias, exact)


def test_bias_updates_follow_the_load_once():
    router = create("topk", 6, 4, top_k=1, selection_bias=True, bias_update_rate=0.5).train()
    logits = torch.tensor([[5.0, 0, 0, 0]] * 6 + [[0, 5.0, 0, 0]] * 2)
    router.observe(logits, router.assign(logits))
    router.update()
    assert router.selection_bias.tolist() == [-0.5, 0.0, 0.5, 0.5], "loads 6, 2, 0, 0 around their mean 2"
    router.update()
    assert router.selection_bias.tolist() == [-0.5, 0.0, 0.5, 0.5], "nothing seen, nothing moved"


def test_jitter_is_for_training_only():
    router = create("switch", 6, 4, jitter=0.3)
    x = torch.randn(5, 6)
    assert not torch.equal(router.train().score(x), router.score(x))
    assert torch.equal(router.eval().score(x), router.score(x))
    torch.nn.init.ones_(router.weight)
    mean = router.train().score(torch.ones(4000, 6)).mean().item()  # the four experts see one noise
    assert abs(mean - 6) < deviation(4000 * 6, width=0.6) * 6


def test_jitter_multiplies_each_number_by_its_own_noise():
    router = create("switch", 6, 4, jitter=0.3).train()
    x = torch.randn(500, 6, dtype=torch.float64) * torch.tensor([0.01, 0.1, 1, 10, 100, 0], dtype=torch.float64)
    found = router.prepare(x)
    assert (found[:, 5] == 0).all(), "noise that is added would move a zero"
    factor = found[:, :5] / x[:, :5]
    assert factor.min() >= 0.7 and factor.max() <= 1.3
    assert factor.amin(0).max() < 0.75 and factor.amax(0).min() > 1.25, "the whole range, whatever the input's scale"
    assert (factor.std(1) > 0).all(), "a number for each entry, not for each token"


def test_capacity_follows_the_mode():
    router = create("switch", 6, 4)
    assert (router.train().capacity(100), router.eval().capacity(100)) == (32, 50)
    dropless = create("switch", 6, 4, capacity_factor=None)
    assert (dropless.train().capacity(100), dropless.eval().capacity(100)) == (None, None)
    same = create("topk", 6, 4, capacity_factor=1.0)
    assert same.train().capacity(100) == same.eval().capacity(100) == 25


LIMITED = [
    ("topk", {}, {}),
    ("switch", {"no_token_left_behind": 1}, {}),
    ("gshard", {}, {}),
    ("vmoe", {"capacity_order": "batch"}, {}),
    ("limoe", {}, {"modality": torch.zeros(40, dtype=torch.int64)}),
    ("prototypes", {}, {}),
    ("hash", {"vocab_size": VOCAB, "num_hashes": 2}, {"token_ids": torch.zeros(40, dtype=torch.int64)}),
    ("null_experts", {}, {}),
    ("two_sided", {}, {}),
    ("reinforce", {}, {}),
]


@pytest.mark.parametrize("name, options, known", LIMITED)
def test_a_dropless_evaluation_is_one_word(name, options, known):
    """Training drops by the capacity, evaluation is that of a layer without one, and a token's output is its own."""
    limited = MoE(6, 5, 4, name, capacity_factor=0.1, eval_capacity_factor="dropless", **options)
    free = MoE(6, 5, 4, name, capacity_factor=None, **options)
    model = torch.nn.Sequential(MoE(6, 5, 4, name, capacity_factor=0.1, **options))
    x = torch.randn(40, 6)
    for layer in (free, model[0]):
        layer.load_state_dict(limited.state_dict())
    limited.train()(x, **known)
    assert limited.routing.token.numel() < 40
    expected = free.eval()(x, **known)
    assert torch.equal(limited.eval()(x, **known), expected)
    assert limited.router.leak is None and limited.router.capacity(40) is None
    dropless(model)
    assert model[0].router.options["eval_capacity_factor"] == "dropless"
    assert torch.equal(model[0].eval()(x, **known), expected)
    some = {key: value[:7] for key, value in known.items()}
    assert torch.allclose(model[0](x[:7], **some), expected[:7], atol=1e-6)


def test_experts_that_choose_have_no_dropless_evaluation():
    with pytest.raises(ValueError, match="in evaluation too"):
        create("expert_choice", 6, 4, eval_capacity_factor="dropless")
    model = torch.nn.Sequential(MoE(6, 5, 4, "switch"), MoE(6, 5, 4, "expert_choice"))
    with pytest.raises(ValueError, match="in 1 experts choose their tokens, by a capacity"):
        dropless(model)
    assert model[0].router.eval_capacity_factor == 2.0, "nothing was changed"
    with pytest.raises((ValueError, TypeError)):
        create("topk", 6, 4, capacity_factor="dropless")


def test_golden_expert_choice():
    router = create("expert_choice", 6, 4, capacity_factor=2.0)
    assert router.capacity(6) == 3
    routing = router.assign(LOGITS)
    chosen = [set(routing.token[routing.expert == e].tolist()) for e in range(4)]
    assert chosen == [{2, 0, 4}, {4, 3, 1}, {3, 5, 1}, {5, 3, 1}]
    assert (routing.dense() > 0).sum(1).tolist() == [1, 3, 1, 3, 2, 2]


def test_expert_choice_takes_the_best_possible_tokens():
    """Its choice maximises the total score with C tokens an expert: the assignment problem without the token side."""
    router = create("expert_choice", 6, 4, capacity_factor=1.0)
    logits = torch.randn(12, 4, dtype=torch.float64)
    routing = router.assign(logits)
    assert routing.counts.tolist() == [3] * 4
    scores = logits.softmax(-1)
    value = float((routing.dense() > 0).to(scores).mul(scores).sum())
    assert value >= float(scores.repeat(1, 3).numpy()[linear_sum_assignment(-scores.repeat(1, 3).numpy())].sum()) - 1e-6
    assert value == pytest.approx(float(scores.topk(3, 0).values.sum()), rel=1e-6)


def test_expert_choice_without_real_tokens_is_empty():
    router = create("expert_choice", 6, 4)
    routing = router.assign(torch.randn(5, 4), Context(mask=torch.zeros(5, dtype=torch.bool)))
    assert routing.token.numel() == 0


def test_hash_is_a_saved_function_of_the_id():
    router, other = (create("hash", 6, 4, vocab_size=VOCAB, seed=s) for s in (1, 2))
    assert not torch.equal(router.table, other.table)
    other.load_state_dict(router.state_dict())
    ids = torch.randint(VOCAB, (50,))
    routing = other.assign(other.score(torch.randn(50, 6)), Context(token_ids=ids))
    assert torch.equal(routing.expert, router.table[ids[routing.token]])


def test_balanced_hash_bounds_the_load():
    frequency = torch.rand(200) ** 4
    table = create("hash", 6, 8, vocab_size=200, frequencies=frequency).table
    load = torch.zeros(8).index_add(0, table, frequency) / frequency.sum()
    assert load.max() <= 1 / 8 + frequency.max() / frequency.sum() + 1e-6


@pytest.mark.parametrize("bad", [-1, VOCAB])
def test_ids_outside_the_table_are_named(bad):
    router = create("hash", 6, 4, vocab_size=VOCAB)
    with pytest.raises(ValueError, match=f"token_ids {bad} is out of range; ids are 0 to {VOCAB - 1}"):
        router.assign(torch.zeros(1, 4), Context(token_ids=torch.tensor([bad])))


LEAKS = [
    ("topk", {"top_k": 2}, False),
    ("switch", {"capacity_factor": 1.0, "jitter": 0.0}, False),
    ("topk", {"top_k": 2, "capacity_factor": 0.7}, True),
    ("switch", {"capacity_factor": 0.5, "capacity_order": "batch", "jitter": 0.0}, True),
    ("switch", {"capacity_factor": 0.5, "capacity_order": "random", "jitter": 0.0}, True),
    ("expert_choice", {}, True),
]


@pytest.mark.parametrize("name, options, leaks", LEAKS)
def test_leak_says_whether_the_future_matters(name, options, leaks):
    router = create(name, 6, 3, **options)
    assert (router.leak is not None) == leaks
    changed = False
    for _ in range(60):
        logits = torch.randn(12, 3)
        other = logits.clone()
        other[6:] = torch.randn(6, 3)
        state = torch.random.get_rng_state()
        first = router.assign(logits).dense()[:6]
        torch.random.set_rng_state(state)
        second = router.assign(other).dense()[:6]
        changed |= not torch.equal(first, second)
    # Random order depends on how many tokens follow, not on what they are.
    assert changed == leaks or options.get("capacity_order") == "random"


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: create("swich", 6, 4), "did you mean 'switch'"),
        (lambda: create("topk", 6, 4, topk=2), "did you mean 'top_k'"),
        (lambda: create("topk", 6, 4, top_k=5), "between 1 and num_experts, 4"),
        (lambda: create("switch", 6, 4, top_k=2), 'use router="topk"|router="topk"'),
        (lambda: create("topk", 6, 4, score_function="tanh"), "choose softmax or sigmoid"),
        (lambda: create("topk", 6, 4, renormalize="yes"), "choose from no, before_drop, after_drop"),
        (lambda: create("topk", 6, 4, capacity_order="first"), "choose from position, random, batch"),
        (lambda: create("topk", 6, 4, capacity_factor=math.nan), "positive number"),
        (lambda: create("topk", 6, 4, balance_choices="second"), "choose from first, all, mean"),
        (lambda: create("expert_choice", 6, 4, capacity_factor=None), "needs a capacity_factor"),
        (lambda: create("hash", 6, 4), "needs vocab_size"),
        (lambda: create("hash", 6, 4, vocab_size=5, frequencies=[1, 2]), "2 frequencies for 5"),
        (lambda: create("hash", 6, 4, vocab_size=5).assign(torch.zeros(2, 4)), "needs token_ids"),
        (lambda: create("topk", 6, 4).assign(torch.zeros(2, 3)), r"must be \(T, 4\)"),
        (lambda: create("topk", 6, 4).assign(torch.zeros(2, 4), Context(mask=torch.ones(3))), "3 entries for 2 tokens"),
        (lambda: create("topk", 0, 4), "must be at least 1"),
        (lambda: create("topk", 6, 4, top_k=True), "top_k is a number; got True"),
        (lambda: create("vmoe", 6, 4, capacity_factor=True), "capacity_factor is a number; got True"),
        (lambda: create("limoe", 6, 4, num_modalities=True), "num_modalities is a number; got True"),
    ],
)
def test_errors_say_what_is_allowed(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_registering():
    class Mine(routers.TopK):
        """A router from outside."""

    routers.register("mine", Mine)
    try:
        assert isinstance(create("mine", 6, 4, top_k=2), Mine) and "mine" in routers.names()
        with pytest.raises(ValueError, match="already Mine"):
            routers.register("mine", routers.Hash)
    finally:
        routers.registry._ROUTERS.pop("mine")
    with pytest.raises(TypeError, match="not a subclass"):
        routers.register("other", torch.nn.Linear)
