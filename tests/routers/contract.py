"""What every router promises, as checks that a router's own test file runs on its options.

`@pytest.mark.parametrize("check", CHECKS)` and `check(name, options, context)`, where context(T) makes the `Context`
of T tokens.
"""

import copy
import io
from functools import partial

import accelerate
import torch

from shunter import MoE, give_reward, update_routers
from shunter.context import KNOWN, Context
from shunter.routers.registry import create

DIM, EXPERTS = 6, 8


def plain(tokens):
    """The context of tokens of which nothing is known."""
    return Context()


def seeded(call, *args):
    """The result of a call from a fixed random state, which is then put back."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return call(*args)


def make(name, options, **place):
    """The router with parameters away from any symmetric start."""
    router = create(name, DIM, EXPERTS, **options, **place)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return router


def with_mask(context, mask):
    return Context(**{**{f: getattr(context, f) for f in context.__dataclass_fields__}, "mask": mask})


def assignments_are_valid(name, options, context):
    for training in (True, False):
        router = make(name, options).train(training)
        for tokens in (0, 1, 7, 33):
            known = with_mask(context(tokens), torch.rand(tokens) < 0.8)
            logits = router.score(torch.randn(tokens, DIM), known)
            assert logits.shape == (tokens, router.score_width) and logits.dtype == torch.float32
            routing = router.assign(logits, known)
            routing.check_values()
            assert known.mask[routing.token].all(), "padding takes no slot"
            slots = router.capacity(known.num_real(tokens))
            grouped = getattr(router, "group_size", None)
            assert slots is None or grouped or int(routing.counts.max()) <= slots
            for value in router.losses(logits, routing, known).values():
                assert value.shape == () and value.isfinite()


def padding_changes_nothing(name, options, context):
    router = make(name, options).eval()
    known = context(12)
    mask = torch.arange(12) < 9
    x = torch.randn(12, DIM)
    known = with_mask(known, mask)
    logits = router.score(x, known)
    poisoned = torch.where(mask[:, None], logits, torch.nan)
    rows = []
    for h in (logits, poisoned):
        routing = seeded(router.assign, h, known)
        rows.append(routing.dense()[:9])
        for value in router.losses(h, routing, known).values():
            assert value.isfinite()
            rows.append(value)
    half = len(rows) // 2
    for one, other in zip(rows[:half], rows[half:], strict=True):
        assert torch.equal(one, other), "what stands in padded rows reached a decision or a loss"


def padding_reaches_no_gradient(name, options, context):
    """Whatever stands in padded rows, NaN too, the real rows' outputs and all gradients are the same."""
    real = torch.rand(12) < 0.7
    real[:2] = torch.tensor([True, False])
    moe = MoE(DIM, 4, EXPERTS, router=name, num_shared_experts=1, **options).train()
    for parameter in moe.router.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    known = {key: value for key, value in vars(context(12)).items() if key in KNOWN and value is not None}
    x, upstream, reward = torch.randn(12, DIM), torch.randn(12, DIM), torch.randn(12)
    found = []
    for padding in (7.0, torch.nan):
        hidden = torch.where(real[:, None], x, padding).requires_grad_()
        at_padding = {k: torch.where(real[:, None], v, padding) for k, v in known.items() if v.is_floating_point()}
        out = seeded(partial(moe, mask=real, **(known | at_padding)), hidden)
        if moe.decision is not None:
            give_reward(moe, torch.where(real, reward, padding))
        loss = (out * upstream).sum() + sum(moe.losses.values(), out.sum() * 0)
        found.append([out, *torch.autograd.grad(loss, [hidden, *moe.parameters()], materialize_grads=True)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other) and one.isfinite().all(), "what stands in padded rows reached a gradient"
    assert (found[0][1][~real] == 0).all()


def decisions_are_in_float32(name, options, context):
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        router = make(name, options).to(dtype).eval()
        x = torch.randn(9, DIM).to(dtype)
        known = context(9)
        expected = torch.float64 if dtype == torch.float64 else torch.float32
        logits = router.score(x, known)
        assert logits.dtype == expected
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(router.score(x, known), logits)
        assert router.assign(logits, known).weight.dtype == expected


def gradients_are_right(name, options, context):
    router = make(name, options).double().train()
    known = context(8)

    def decide(h):
        return seeded(router.assign, h, known).dense()

    def choices(h):
        routing = seeded(router.assign, h, known)
        parts = [(r.token, r.expert, r.choice) for r in (routing, routing.dropped) if r is not None]
        return [None if value is None else value.tolist() for part in parts for value in part]

    def near_a_switch(h):
        if h.sort(-1).values.diff().abs().lt(1e-5).any():
            return True
        here = choices(h)
        return any(choices(h + 1e-5 * torch.randn_like(h)) != here for _ in range(30))

    # Where two scores of a token, or two choices, are about to change places there is no gradient: draw again.
    for _ in range(10):
        x = torch.randn(8, DIM, dtype=torch.float64, requires_grad=True)
        logits = seeded(router.score, x, known).detach().clone().requires_grad_()
        if not near_a_switch(logits):
            break

    def penalise(h):
        return sum(router.losses(h, seeded(router.assign, h, known), known).values(), h.sum() * 0)

    assert torch.autograd.gradcheck(decide, logits)
    assert torch.autograd.gradcheck(penalise, logits)
    assert torch.autograd.gradcheck(lambda x: seeded(router.score, x, known) + x.sum() * 0, x)


def ties_go_to_the_lowest_expert(name, options, context):
    router = make(name, options).eval()
    known = context(5)
    logits = torch.zeros(5, router.score_width)
    first, second = (router.assign(logits, known) for _ in range(2))
    assert torch.equal(first.dense(), second.dense())


def rows_of_nan_stay_in_range(name, options, context):
    for training in (True, False):
        router = make(name, options).train(training)
        known = context(6)
        logits = seeded(router.score, torch.randn(6, DIM), known).detach().clone()
        logits[2] = float("nan")
        routing = seeded(router.assign, logits, known)
        pairs = set(zip(routing.token.tolist(), routing.expert.tolist(), strict=True))
        assert len(pairs) == routing.token.numel()
        if pairs:
            assert routing.expert.min() >= 0 and routing.expert.max() < EXPERTS
        assert routing.weight[routing.token != 2].isfinite().all()


def evaluation_is_deterministic(name, options, context):
    router = make(name, options).eval()
    known = context(11)
    x = torch.randn(11, DIM)
    first, second = (router.assign(router.score(x, known), known).dense() for _ in range(2))
    assert torch.equal(first, second)


def state_is_saved_and_exact(name, options, context):
    router = make(name, options)
    for buffer in router.buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    stored = io.BytesIO()
    torch.save(router.state_dict(), stored)
    stored.seek(0)
    other = create(name, DIM, EXPERTS, **options)
    other.load_state_dict(torch.load(stored))
    for key, value in router.state_dict().items():
        assert torch.equal(other.state_dict()[key], value)
    low = copy.deepcopy(router).bfloat16()
    for (key, value), kept in zip(router.named_buffers(), low.buffers(), strict=True):
        assert kept.dtype == value.dtype and torch.equal(kept, value), f"{key} lost its precision"
    x = torch.randn(10, DIM)
    known = context(10)
    results = [r.eval().assign(r.score(x, known), known).dense() for r in (router, other)]
    assert torch.equal(*results)


class Around(torch.nn.Module):
    """What an adapter, a compiler or a shard is: it calls the router, and hides its attributes."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, *args):
        return self.base_layer(*args)


def modules_around_it_change_nothing(name, options, context):
    """A module around the router, and weights that are there only while it is called."""
    moe = MoE(DIM, 4, EXPERTS, router=make(name, options)).train()
    assert all(p.dim() for p in moe.router.parameters()), "fully_shard takes no parameter without sizes"
    known = {key: value for key, value in vars(context(10)).items() if key in KNOWN and value is not None}
    x = torch.randn(10, DIM)

    def run(layer):
        layer.routing = layer._last = None
        out = seeded(lambda: layer(x, **known))
        if layer.decider.learns_by_reward:
            give_reward(layer, x[:, 0])
        return [out, *(layer.losses[key] for key in sorted(layer.losses))]

    wrapped, offloaded = copy.deepcopy(moe), copy.deepcopy(moe)
    wrapped.router = Around(wrapped.router)
    if moe.router.state_dict():
        accelerate.cpu_offload(offloaded.router, torch.device("cpu"))
        assert all(p.is_meta for p in offloaded.router.parameters())
    for one, *others in zip(run(moe), run(wrapped), run(offloaded), strict=True):
        for other in others:
            assert torch.equal(one, other)
    wrapped.explain()
    update_routers(wrapped)
    update_routers(moe)
    for (key, value), other in zip(moe.router.named_buffers(), wrapped.decider.buffers(), strict=True):
        assert torch.equal(value, other), key


def state_moves_by_update_alone(name, options, context):
    """Evaluation and recomputation move nothing; `update` moves state once."""
    moe = MoE(DIM, 4, EXPERTS, router=name, **options)
    known = {key: value for key, value in vars(context(10)).items() if key in KNOWN and value is not None}
    x = torch.randn(10, DIM, requires_grad=True)
    before = {key: value.clone() for key, value in moe.router.named_buffers()}
    moe.eval()(x, **known)
    for key, value in moe.router.named_buffers():
        assert torch.equal(value, before[key]), f"evaluation moved {key}"
    moe.train()
    seeded(lambda: moe(x, **known)).sum().backward()
    seen = {key: value.clone() for key, value in moe.router.named_buffers()}
    saved = {key: value.clone() for key, value in moe.router.state_dict().items()}
    # The hooks of checkpointing run the forward a second time inside backward.
    again = {key: value.clone() for key, value in before.items()}
    for key, value in moe.router.named_buffers():
        value.copy_(again[key])
    out = seeded(lambda: torch.utils.checkpoint.checkpoint(lambda y: moe(y, **known), x, use_reentrant=False))
    out.sum().backward()
    for key, value in moe.router.named_buffers():
        assert torch.equal(value, seen[key]), f"recomputation moved {key}"
    for key, value in saved.items():
        assert torch.equal(moe.router.state_dict()[key], value)


def the_layer_trains(name, options, context):
    """A layer with the router runs forward and backward, and every router parameter gets a finite gradient."""
    moe = MoE(DIM, 4, EXPERTS, router=name, **options).train()
    for parameter in moe.router.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    known = {key: value for key, value in vars(context(24)).items() if key in KNOWN and value is not None}
    out = moe(torch.randn(24, DIM), **known)
    if moe.decision is not None:
        give_reward(moe, torch.randn(24))
    (out.square().sum() + sum(moe.losses.values(), out.sum() * 0)).backward()
    for key, parameter in moe.router.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
    assert isinstance(moe.explain(), str)


CHECKS = [
    assignments_are_valid,
    padding_changes_nothing,
    padding_reaches_no_gradient,
    decisions_are_in_float32,
    gradients_are_right,
    ties_go_to_the_lowest_expert,
    rows_of_nan_stay_in_range,
    evaluation_is_deterministic,
    state_is_saved_and_exact,
    modules_around_it_change_nothing,
    state_moves_by_update_alone,
    the_layer_trains,
]
