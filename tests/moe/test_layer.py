"""The layer: equal to a loop over tokens, symmetric, causal where it says so, its losses right under every regime."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import shunter
from shunter import MoE, aux_loss, losses, moe_layers, routers, tell, update_routers
from shunter.experts import Experts
from shunter.hf.observe.listening import listening
from shunter.moe import RoutedLayer
from tests.helpers import by_tokens

VOCAB = 20
ROUTERS = {
    "switch": {"jitter": 0.0},
    "dropless switch": {"jitter": 0.0, "capacity_factor": None},
    "topk": {"top_k": 2},
    "topk sigmoid": {"top_k": 3, "score_function": "sigmoid", "renormalize": "no"},
    "topk drop": {"top_k": 2, "capacity_factor": 0.6},
    "expert_choice": {},
    "hash": {"vocab_size": VOCAB},
}


def make(name, dim=6, hidden=5, experts=4, **more):
    options = {**ROUTERS[name], **more}
    return MoE(dim, hidden, experts, name.replace("dropless ", "").split(" ")[0], **options).double()


def call(moe, x, **known):
    if "token_ids" in moe.router.needs:
        known.setdefault("token_ids", (x.detach()[..., 0] * 1000).long().abs() % VOCAB)
    return moe(x, **known)


@pytest.fixture(params=list(ROUTERS))
def name(request):
    return request.param


def test_equal_to_a_loop_over_tokens(name):
    moe = make(name, bias=True, num_shared_experts=2)
    x = torch.randn(3, 7, 6, dtype=torch.float64)
    y = call(moe, x)
    flat = x.reshape(-1, 6)
    expected = by_tokens(flat, moe.experts.weights, moe.routing.dense())
    expected = expected + by_tokens(flat, moe.shared_experts.weights, torch.ones(21, 1, dtype=torch.float64))
    assert torch.allclose(y.reshape(-1, 6), expected)


def _nearest(scores):
    """The least distance of two numbers of a row or of a column."""
    return min(float(scores.sort(dim).values.diff(dim=dim).min()) for dim in (0, 1))


def test_gradcheck(name):
    moe = make(name, dim=4, hidden=3)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    # Where two tokens or experts are about to change places there is no gradient: draw again.
    while name != "hash" and _nearest(moe.router.score(x).detach().softmax(-1)) < 2e-5:
        x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    ids = {"token_ids": torch.randint(VOCAB, (5,))} if name == "hash" else {}
    names, values = zip(*moe.named_parameters(), strict=True)

    def function(x, *parameters):
        state = dict(zip(names, parameters, strict=True))
        y = torch.func.functional_call(moe, state, (x,), ids)
        return y, sum(moe.losses.values(), y.sum() * 0)

    assert torch.autograd.gradcheck(function, (x, *values))


@pytest.mark.parametrize("name", [n for n in ROUTERS if n not in ("switch", "topk drop")])
def test_permuting_tokens_permutes_outputs(name):
    moe = make(name)
    x = torch.randn(12, 6, dtype=torch.float64)
    order = torch.randperm(12)
    assert torch.allclose(call(moe, x)[order], call(moe, x[order]))


def test_relabelling_experts_changes_nothing(name):
    moe = make(name)
    x = torch.randn(12, 6, dtype=torch.float64)
    y, order = call(moe, x), torch.randperm(4)
    other = copy.deepcopy(moe)
    with torch.no_grad():
        for ours, theirs in zip(moe.experts.parameters(), other.experts.parameters(), strict=True):
            theirs.copy_(ours[order])
        if name == "hash":
            other.router.table.copy_(order.argsort()[moe.router.table])
        else:
            other.router.weight.copy_(moe.router.weight[order])
    assert torch.allclose(call(other, x), y)
    assert torch.equal(other.routing.counts, moe.routing.counts[order])


@pytest.mark.parametrize("name", ["dropless switch", "topk", "topk sigmoid", "hash"])
def test_dropless_outputs_do_not_depend_on_the_batch(name):
    moe = make(name)
    x = torch.randn(12, 6, dtype=torch.float64)
    parts = torch.cat([call(moe, part) for part in x.split([1, 4, 7])])
    assert torch.allclose(call(moe, x), parts, atol=1e-14)


def test_all_experts_are_the_dense_mixture():
    moe = make("topk", top_k=4)
    x = torch.randn(9, 6, dtype=torch.float64)
    probs = torch.nn.functional.linear(x, moe.router.weight).softmax(-1)
    assert torch.allclose(moe(x), by_tokens(x, moe.experts.weights, probs))


def test_one_expert_is_the_dense_block():
    moe = make("topk", experts=1, top_k=1)
    x = torch.randn(9, 6, dtype=torch.float64)
    assert torch.allclose(moe(x), by_tokens(x, moe.experts.weights, torch.ones(9, 1, dtype=torch.float64)))


def test_top_1_with_raw_weights_trains_the_router():
    moe = make("switch", load_balancing_loss=0.0)
    moe(torch.randn(30, 6, dtype=torch.float64)).square().sum().backward()
    assert moe.router.weight.grad.norm() > 1e-3


def test_padding_takes_no_slot_and_enters_nothing(name):
    moe = make(name, z_loss=0.1, importance_loss=0.1) if name != "hash" else make(name)
    x = torch.randn(3, 8, 6, dtype=torch.float64)
    mask = torch.rand(3, 8) < 0.6
    mask[0] = True
    y = call(moe, x, mask=mask)
    losses, routing = moe.losses, moe.routing
    ids = {"token_ids": ((x[..., 0] * 1000).long().abs() % VOCAB)[mask]} if name == "hash" else {}
    alone = moe(x[mask], **ids)
    assert torch.allclose(y[mask], alone)
    assert y[~mask].eq(0).all()
    assert torch.equal(routing.counts, moe.routing.counts)
    assert torch.equal(routing.demand, moe.routing.demand)
    for key, value in losses.items():
        assert torch.allclose(value, moe.losses[key]), key
    poisoned = x.masked_fill(~mask[..., None], float("nan"))
    again = call(
        moe,
        poisoned,
        mask=mask,
        **({"token_ids": torch.zeros(3, 8).long().masked_scatter(mask, ids["token_ids"])} if ids else {}),
    )
    assert torch.allclose(again[mask], alone), "whatever stands in padding"


def test_future_tokens_change_nothing_in_causal_safe_layers(name):
    """Random later tokens, and those that all ask for expert 0, first or last.

    Expert 0 is the second choice of token 0 and the last of tokens 1 to 4. It has 5 slots or fewer, which are for token
    0 unless later tokens ask for it first.
    """
    moe = make(name)
    futures = [torch.randn(5, 6, dtype=torch.float64) for _ in range(20)]
    x = torch.randn(5, 6, dtype=torch.float64)
    if name != "hash":
        wanted = torch.randn(7, 4, dtype=torch.float64)
        wanted[0] = torch.tensor([2.0, 3.0, 0.0, -1.0])
        wanted[1:5, 0] -= 20
        wanted[5:] = torch.tensor([[50.0, 0, 0, 0], [-50.0, 1, 0, 2]])
        solved = wanted @ torch.linalg.pinv(moe.router.weight.detach()).T  # hidden states with these logits
        x, futures = solved[:5], [*futures, *(row.expand(5, 6) for row in solved[5:])]
    outs = [call(moe, torch.cat([x, future]))[:5] for future in futures]
    assert any(not torch.allclose(out, outs[-1]) for out in outs) == (moe.router.leak is not None)


def test_leaks_are_refused_in_causal_models():
    with pytest.raises(ValueError, match="ExpertChoice in a causal model: expert choice lets later tokens"):
        MoE(6, 5, 4, "expert_choice", causal=True)
    MoE(6, 5, 4, "switch", causal=True)


def _gradients(moe):
    return {n: p.grad.clone() for n, p in moe.named_parameters() if p.grad is not None}


def test_the_auxiliary_gradient_is_exactly_the_coefficients():
    """Against float64 sums written out: coefficient x E x sum f_i dP_i, and nothing through f."""
    moe = make("topk", load_balancing_loss=0.3, z_loss=0.2)
    x = torch.randn(15, 6, dtype=torch.float64)
    moe(x)
    aux_loss(moe).backward()
    weight = moe.router.weight.detach().clone().requires_grad_()
    logits = x @ weight.T
    index = logits.topk(2).indices
    f = torch.bincount(index.flatten(), minlength=4).double() / 30
    (0.3 * 4 * (f * logits.softmax(-1).mean(0)).sum() + 0.2 * logits.logsumexp(-1).square().mean()).backward()
    assert torch.allclose(moe.router.weight.grad, weight.grad)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulated_gradients_are_the_sum(parts, name):
    moe = make(name)
    x = torch.randn(8, 5, 6, dtype=torch.float64)
    expected = None
    for part in x.chunk(parts):
        single = copy.deepcopy(moe)
        (call(single, part).square().mean() + aux_loss(single)).backward()
        found = _gradients(single)
        expected = found if expected is None else {n: expected[n] + g for n, g in found.items()}
    for part in x.chunk(parts):
        (call(moe, part).square().mean() + aux_loss(moe)).backward()
    for key, value in _gradients(moe).items():
        assert torch.allclose(value, expected[key]), key


def test_activation_checkpointing_changes_no_bit(name):
    moe = make(name, **({} if name == "hash" else {"jitter": 0.1}))
    x = torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True)
    results = []
    for wrap in (False, True):
        torch.manual_seed(1)
        moe.zero_grad()
        y = checkpoint(lambda v: call(moe, v), x, use_reentrant=False) if wrap else call(moe, x)
        (y.square().sum() + aux_loss(moe)).backward()
        results.append(_gradients(moe))
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key


def test_state_counts_a_forward_once_under_checkpointing_and_not_in_evaluation():
    moe = MoE(6, 5, 4, "topk", top_k=2, selection_bias=True)
    x = torch.randn(11, 6, requires_grad=True)  # 22 choices of 4 experts: never in balance
    with set_checkpoint_early_stop(False):  # else a recomputation stops before it would count
        checkpoint(moe, x, use_reentrant=False).sum().backward()
    moe.eval()(torch.randn(50, 6))
    assert moe.router.observed.sum() == 22
    update_routers(moe)
    assert moe.router.observed.sum() == 0 and moe.router.selection_bias.abs().sum() > 0


def test_losses_that_train_nothing_are_an_error():
    moe = make("topk")
    x = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    checkpoint(moe, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        aux_loss(moe)


def test_an_evaluation_in_between_leaves_the_losses():
    moe = make("topk")
    moe(torch.randn(7, 6, dtype=torch.float64))  # 14 choices of 4 experts: in balance there would be no gradient
    before = aux_loss(moe)
    with torch.no_grad():
        moe.eval()(torch.randn(60, 6, dtype=torch.float64))
    assert torch.equal(aux_loss(moe.train()), before)
    aux_loss(moe).backward()
    assert moe.router.weight.grad.abs().sum() > 0


def test_layers_are_collected_and_summed():
    model = torch.nn.Sequential(make("topk"), torch.nn.Linear(6, 6).double(), make("switch"), make("hash"))
    assert list(moe_layers(model)) == ["0", "2", "3"]
    x = torch.randn(9, 6, dtype=torch.float64)
    model[2](model[1](model[0](x)))
    total = sum(value for layer in (model[0], model[2]) for value in layer.losses.values())
    assert torch.allclose(aux_loss(model), total)
    assert aux_loss(torch.nn.Linear(2, 2)) == 0


def test_no_tokens(name):
    moe = make(name)
    x = torch.zeros(0, 6, dtype=torch.float64, requires_grad=True)
    y = call(moe, x)
    (y.sum() + aux_loss(moe)).backward()
    assert y.shape == (0, 6)
    assert all(p.grad is None or p.grad.eq(0).all() for p in moe.parameters())


def test_copied_pickled_and_saved(name):
    moe = make(name)
    x = torch.randn(9, 6, dtype=torch.float64)
    y = call(moe, x)
    fresh = make(name)
    fresh.load_state_dict(moe.state_dict())
    for other in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe)), fresh):
        assert torch.equal(call(other, x), y)


@settings(max_examples=40)
@given(
    lead=st.lists(st.integers(0, 4), min_size=0, max_size=3), dim=st.integers(1, 8), hidden=st.integers(1, 8),
    experts=st.integers(1, 7), k=st.integers(1, 7), shared=st.integers(0, 2),
)  # fmt: skip
def test_any_leading_shape(lead, dim, hidden, experts, k, shared):
    moe = MoE(dim, hidden, experts, "topk", top_k=min(k, experts), num_shared_experts=shared)
    x = torch.randn(*lead, dim)
    y = moe(x)
    assert y.shape == x.shape and y.isfinite().all()


def test_explain_says_what_will_run():
    text = MoE(6, 5, 4, "switch").explain(100)
    for part in ("Switch", "32 slots", "review formula", "load_balancing_loss x 0.01", "Backend", "Causal-safe: yes"):
        assert part in text, text
    assert "dropless" in MoE(6, 5, 4, "topk").explain()
    assert "no, expert choice" in MoE(6, 5, 4, "expert_choice").explain()


@pytest.mark.parametrize(
    "run, error, message",
    [
        (lambda: MoE(6, 5, 4)(torch.randn(3, 5)), ValueError, "its last size must be 6"),
        (lambda: MoE(6, 5, 4)(torch.randn(3, 6), mask=torch.ones(4)), ValueError, "mask has shape"),
        (lambda: MoE(6, 5, 4)(torch.randn(3, 6), masks=torch.ones(3)), TypeError, "masks is not known of tokens"),
        (lambda: MoE(6, 5, 4, "hash", vocab_size=9)(torch.randn(3, 6)), ValueError, "pass token_ids= to the layer"),
        (lambda: MoE(6, 5, 4, "switch", top_k=2), ValueError, "topk"),
        (lambda: MoE(6, 5, 4, shunter.routers.create("topk", 6, 4), top_k=2), ValueError, "takes no options"),
        (lambda: MoE(6, 5, 4, shunter.routers.create("topk", 7, 4)), ValueError, "router is for dim 7"),
        (lambda: MoE(6, 5, 4, backend="fast"), ValueError, "choose auto"),
    ],
)
def test_errors_say_what_is_allowed(run, error, message):
    with pytest.raises(error, match=message):
        run()


class QueriesByExperts(RoutedLayer):
    """A layer of the review's section 4.1 that is no feed-forward block: experts make the queries of an attention."""

    def __init__(self, dim, num_experts):
        super().__init__(routers.create("topk", dim, num_experts, top_k=2), Experts(num_experts, dim, 8))
        self.key_value = torch.nn.Linear(dim, 2 * dim)

    def forward(self, x, **told):
        tokens, logits, routing, context = self.route(x, told)
        queries = self.experts(tokens, routing).reshape(x.shape)
        out = torch.nn.functional.scaled_dot_product_attention(queries, *self.key_value(x).chunk(2, -1))
        return self.finish(out, tokens, logits, routing, context)


def test_any_layer_with_a_router_is_seen():
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), QueriesByExperts(6, 4)).train()
    x, mask = torch.randn(3, 5, 6), torch.ones(3, 5, dtype=torch.bool)
    mask[1, 2:] = False
    heard = []
    with listening(model, lambda name, seen: heard.append((name, seen))), tell(model, mask=mask):
        out = model(x)
    layer = model[1]
    assert list(moe_layers(model)) == ["1"] and out.shape == x.shape
    assert [name for name, _ in heard] == ["1"] and torch.equal(heard[0][1].routing.counts, layer.routing.counts)
    assert int(layer.routing.counts.sum()) == 2 * int(mask.sum())
    expected = losses.load_balancing_loss(heard[0][1].probs, layer.routing, mask.flatten())
    coefficient = layer.router.coefficients["load_balancing_loss"]
    assert torch.allclose(aux_loss(model), coefficient * expected)
    assert layer.flops_per_token(5) == {"routers": 2 * 6 * 4, "experts": 2 * (2 / 4) * 4 * 3 * 6 * 8}
    assert layer.inactive_parameters(5) == (1 - 2 / 4) * 4 * 3 * 6 * 8


def test_hooks_on_the_router_see_each_decision():
    layer, seen = MoE(6, 8, 4, "topk", top_k=2), []
    layer.router.register_forward_hook(lambda router, args, output: seen.append((args[0], *output)))
    x = torch.randn(2, 3, 6)
    layer(x), layer(x)
    assert len(seen) == 2
    rows, logits, routing = seen[1]
    assert torch.equal(rows, x.reshape(-1, 6)) and torch.equal(logits, layer.router.score(rows))
    assert torch.equal(routing.dense(), layer.routing.dense())


@pytest.mark.parametrize("router", ["soft_moe", "sentence", "deepseek"])
def test_a_grid_of_patches_is_one_sequence(router):
    layer = MoE(
        6,
        8,
        4,
        router,
        **({"sequence_balance_loss": 0.1} if router == "deepseek" else {}),
        **({} if router == "soft_moe" else {"top_k": 2}),
    ).train()
    x = torch.randn(2, 3, 5, 6)
    grid = layer(x)
    kept = dict(layer.losses)
    assert torch.allclose(grid.reshape(2, 15, 6), layer(x.reshape(2, 15, 6)), atol=1e-6)
    for name, value in layer.losses.items():
        assert torch.allclose(kept[name], value), name


def test_ready_experts_are_taken_as_they_are():
    experts = Experts(4, 6, 8, activation="relu")
    layer = MoE(6, 1, 4, "topk", top_k=2, ready_experts=experts)
    assert layer.experts is experts and "f=8" in layer.explain()
    with pytest.raises(ValueError, match="the experts are 4 of dim 6, the layer has 5 of dim 6"):
        MoE(6, 8, 5, ready_experts=experts)
