"""Experts on several ranks give what data parallelism gives: outputs, every gradient, the norm, routers' state."""

import copy
import functools
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import shunter
from shunter import moe_layers, parallel, routers
from shunter.errors import LostRank, UserError
from shunter.moe import expect_steps
from shunter.parallel import dispatch, exchange, experts
from tests.conftest import SEED
from tests.helpers import TIME_LIMIT, on_ranks
from tests.parallel.models import (
    DIM,
    EXPERTS,
    Exchanges,
    Model,
    difference,
    gradients,
    layer,
    loss_of,
    told,
    twins,
    whole,
)

QUICK_BACKENDS = ("reference", "padded", "grouped_mm")


def _run(moe, x, known):
    """The output and the input's gradient; the parameters keep theirs."""
    x = x.clone().requires_grad_()
    out = _of_this_rank(lambda: moe(x, **known))
    if moe.decider.learns_by_reward and moe.training:
        shunter.give_reward(moe, torch.ones(x.shape[:-1], dtype=x.dtype))
    (out.square().mean() + shunter.aux_loss(moe).to(x.dtype)).backward()
    return {"out": out.detach(), "x": x.grad}


def _against_data_parallelism(moe, mesh, x, known, dispatch="auto"):
    moe, copied = twins(moe)
    parallel.shard_experts(moe, mesh, dispatch=dispatch)
    found, expected = _run(moe, x, known), _run(copied, x, known)
    parallel.average_gradients(moe, mesh)
    return max(difference(found, expected), difference(gradients(moe), gradients(copied, averaged=True)))


def _of_this_rank(call, *args):
    """What a call draws on this rank alone; the common random state goes on elsewhere."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED + 1000 * dist.get_rank() + 1)
        return call(*args)


def every_router(mesh, modes=(True, False)):
    found = {}
    for name in routers.names():
        for training in modes:
            moe = layer(name).train(training)
            x, known = _of_this_rank(lambda n=name: (torch.randn(2, 9, DIM, dtype=torch.float64), told(n, (2, 9))))
            found[f"{name}, {training}"] = _against_data_parallelism(moe, mesh, x, known)
    return found


FORMS = ("ranks", "all")


def forms(mesh, names=("topk", "expert_choice", "gshard", "top_p", "relu", "null_experts", "soft", "thor")):
    """Rows that travel once to a rank, or to all: against data parallelism, and the exchanges and bytes of each."""
    found = {}
    size, rank = mesh["ep"].size(), dist.get_rank()
    for form in FORMS:
        for name in names:
            moe = layer(name).train()
            shape = (2, 9 if rank else 4)  # not as many on each rank
            x, known = _of_this_rank(lambda n=name, s=shape: (torch.randn(*s, DIM, dtype=torch.float64), told(n, s)))
            found[f"{form}, {name}"] = _against_data_parallelism(moe, mesh, x, known, form)
    moved = {}
    for form in ("choices", *FORMS):
        moe = layer("topk", torch.float32, top_k=4).train()
        moe.experts = experts.ShardedExperts(moe.experts, mesh, top_k=4, dispatch=form)
        x = _of_this_rank(lambda: torch.randn(500, DIM)).requires_grad_()
        with Exchanges() as exchanges:
            out = moe(x)
            forward, rows = exchanges.done, exchanges.rows
            out.sum().backward()
        # Of rows alone, on all ranks, what stays on its own among them.
        count = torch.tensor(float(rows))
        dist.all_reduce(count)
        routing = moe.routing
        to = routing.expert // (EXPERTS // size)
        needed = torch.tensor(float(len(set(zip(to.tolist(), routing.token.tolist(), strict=True)))))
        dist.all_reduce(needed)
        whole_batch = 500 * dist.get_world_size()
        expected = {"choices": 4 * whole_batch, "ranks": int(needed), "all": whole_batch}[form]
        moved[form] = (forward, exchanges.done - forward, int(count), expected)
    return found, moved


def pieces(mesh, degrees=(2, 5)):
    """Exchanges in pieces: against data parallelism, how many there are, and in which order experts compute."""
    found, rank = {}, dist.get_rank()
    for form in ("choices", "ranks"):
        for degree in degrees:
            moe, copied = twins(layer("topk", num_shared_experts=1).train())
            parallel.shard_experts(moe, mesh, dispatch=form, overlap_degree=degree)
            tokens = (3, 13)[rank % 2]  # not as many on each rank, and on one fewer than pieces
            x = _of_this_rank(lambda n=tokens: torch.randn(n, DIM, dtype=torch.float64))
            log = []
            compute = moe.experts.compute
            moe.experts.compute = _noting(log, "experts", compute)
            moe.shared_experts.register_forward_hook(lambda *_, log=log: log.append("shared"))
            own = {name: getattr(exchange, name) for name in ("_start", "_wait")}
            try:
                for name, function in own.items():
                    setattr(exchange, name, _noting(log, name, function))
                got = _run(moe, x, {})
            finally:
                for name, function in own.items():
                    setattr(exchange, name, function)
            order = [*log]
            twice, other = _penalty_gradients(moe, copied, x)
            expected = _run(copied, x, {})
            parallel.average_gradients(moe, mesh)
            gap = max(difference(got, expected), difference(gradients(moe), gradients(copied, averaged=True)))
            found[f"{form}, {degree}"] = order, max(gap, float((twice - other).abs().max() / other.abs().max()))
            moe.zero_grad(set_to_none=True)
            moe.experts.compute = compute
            with torch.no_grad():
                gap = difference({"y": moe.eval()(x[:1])}, {"y": copied.eval()(x[:1])})
            found[f"{form}, {degree}, one token"] = [], gap
    return found


def _noting(log, name, function):
    def noted(*args):
        log.append(name)
        return function(*args)

    return noted


def overlap(mesh):
    """Shared experts during the exchange: the order of things, and how far it is from one after another."""
    moe, serial = twins(layer("topk", num_shared_experts=2).train())
    alone = copy.deepcopy(moe)
    for one in (moe, serial):
        parallel.shard_experts(one, mesh)
    serial.experts.waits = False
    log = []
    own = {name: getattr(exchange, name) for name in ("_start", "_wait")}
    x = _of_this_rank(lambda: torch.randn(2, 9, DIM, dtype=torch.float64))
    try:
        for name, function in own.items():
            setattr(exchange, name, _noting(log, name, function))
        moe.shared_experts.register_forward_hook(lambda *_: log.append("shared"))
        moe.shared_experts.register_full_backward_hook(lambda *_: log.append("back through shared"))
        found = _run(moe, x, {})
    finally:
        for name, function in own.items():
            setattr(exchange, name, function)
    order = [*log]
    expected, whole_one = _run(serial, x, {}), _run(alone, x, {})
    own_grads, serial_grads = gradients(moe), gradients(serial)
    parallel.average_gradients(moe, mesh)
    right = max(difference(found, whole_one), difference(gradients(moe), gradients(alone, averaged=True)))
    one, other = _penalty_gradients(moe, alone, x)
    twice = float((one - other).abs().max() / other.abs().max())
    equal = difference(found, expected), difference(own_grads, serial_grads)
    return order, max(equal), right, twice


def _penalty_gradients(*layers_and_x):
    """Of each layer, the gradient of its router's weight of a penalty on a gradient, summed over the ranks."""
    *layers, x = layers_and_x
    found = [torch.autograd.grad(_penalty(moe, x), moe.router.weight)[0] for moe in layers]
    for grad in found:
        dist.all_reduce(grad)
    return found


def _penalty(moe, x):
    """A penalty on a gradient of the layer."""
    given = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(moe(given).square().mean(), given, create_graph=True)
    return gradient.square().mean()


def backends(mesh, names):
    found = {}
    for backend in names:
        for dtype in (torch.float32, torch.bfloat16):
            moe = layer("topk", dtype, backend)
            x = _of_this_rank(lambda t=dtype: torch.randn(3, 20, DIM, dtype=t))
            exact = copy.deepcopy(moe).double()
            exact.experts.backend = "reference"
            moe, copied = twins(moe)
            parallel.shard_experts(moe, mesh)
            expected = _run(exact, x.double(), {})
            try:
                own = {**_run(copied, x, {}), **gradients(copied)}
            except ValueError:  # not in this dtype, on this machine
                continue
            got = _run(moe, x, {})
            parallel.average_gradients(moe, mesh)
            expected |= gradients(exact, averaged=True)
            own |= gradients(copied, averaged=True)
            got |= gradients(moe)
            error, without = (difference({k: v.double() for k, v in part.items()}, expected) for part in (got, own))
            found[f"{backend}, {dtype}"] = (error, without)
    return found


def no_tokens(mesh, names):
    """Ranks without tokens, with padding alone, and whose experts nobody wants."""
    found = {}
    rank, size = dist.get_rank(), dist.get_world_size()
    cases = [(name, "choices", 1) for name in names] + [(names[0], form, 1) for form in FORMS]
    for backend, form, degree in [*cases, (names[0], "choices", 3), (names[0], "ranks", 3)]:
        for case in ("all to one rank", "a rank without tokens", "a rank of padding", "no tokens anywhere"):
            moe = layer("forced" if case == "all to one rank" else "topk", torch.float32, backend)
            tokens = 0 if case == "no tokens anywhere" or (case == "a rank without tokens" and rank == 1) else 6
            x = _of_this_rank(torch.randn, tokens, DIM)
            known = {"experts": torch.full((tokens, 1), EXPERTS - 1)} if case == "all to one rank" else {}
            if case == "a rank of padding" and rank == size - 1:
                known["mask"] = torch.zeros(tokens, dtype=torch.bool)
            moe, copied = twins(moe.eval())
            parallel.shard_experts(moe, mesh, dispatch=form, overlap_degree=degree)
            results = []
            for one in (moe, copied):
                given = x.clone().requires_grad_()
                out = one(given, **known)
                out.square().sum().backward()
                results.append({"out": out.detach(), "x": given.grad})
            missing = [name for name, p in moe.experts.named_parameters() if p.grad is None]
            parallel.average_gradients(moe, mesh)
            gap = max(difference(*results), difference(gradients(moe), gradients(copied, averaged=True)))
            found[f"{backend}, {form} in {degree}, {case}"] = (gap, missing)
    return found


NAMES = ("topk", "switch", "deepseek", "soft_moe")


def _trained(model, batches, accumulate, optimizer, clip):
    """Gradients before the last clipping, the norms, and the parameters after the steps."""
    norms = []
    for micro in batches:
        optimizer.zero_grad()
        for x in micro:
            (_of_this_rank(loss_of, model, x) / accumulate).backward()  # with the same noise
        found = clip(model, norms)
        optimizer.step()
        shunter.update_routers(model)
    state = {name: whole(value.detach()) for name, value in model.state_dict().items() if value.is_floating_point()}
    return found, norms, state


def layouts(mesh, accumulations=(1, 3)):
    """FSDP2 for everything else, with and without accumulation, without in pieces."""
    found = {}
    for accumulate in accumulations:
        model, copied = twins(Model(NAMES).train())
        batches = _of_this_rank(lambda a=accumulate: torch.randn(2, a, 2, 7, DIM, dtype=torch.float64))
        parallel.shard_model(model, mesh, overlap_degree=2 if accumulate == 1 else 1)
        optimizer = torch.optim.AdamW(parallel.parameter_groups(model), lr=1e-2, eps=1e-3)
        plain = torch.optim.AdamW(copied.parameters(), lr=1e-2, eps=1e-3)

        def clip(model, norms):
            grads = gradients(model)
            norms.append(float(parallel.clip_grad_norm_(model, 0.05)))
            return grads

        def average_and_clip(model, norms):
            for name, grad in gradients(model, averaged=True).items():
                model.get_parameter(name).grad = grad
            grads = gradients(model)
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)))
            return grads

        got, norms, state = _trained(model, batches, accumulate, optimizer, clip)
        expected, plain_norms, plain_state = _trained(copied, batches, accumulate, plain, average_and_clip)
        gap = max(abs(a - b) / b for a, b in zip(norms, plain_norms, strict=True))
        states = difference(state, plain_state)
        bias = [layer.decider.selection_bias.tolist() for layer in moe_layers(model).values() if _biased(layer)]
        found[f"accumulating {accumulate}"] = (difference(got, expected), gap, states, bias)
    return found


def tied(mesh):
    """Layers that share their experts, and one that occurs twice: gradients, and how many parameters there are."""
    names = ("topk", "deepseek", "topk", "topk")
    model = Model(names, num_shared_experts=1).train()
    first, second, third, _ = model.blocks
    second.moe.experts = first.moe.experts
    model.blocks[3] = third
    model, copied = twins(model)
    parallel.shard_model(model, mesh)
    x = _of_this_rank(lambda: torch.randn(2, 7, DIM, dtype=torch.float64))
    for one in (model, copied):
        _of_this_rank(loss_of, one, x).backward()
    return difference(gradients(model), gradients(copied, averaged=True))


def _biased(layer):
    return getattr(layer.decider, "selection_bias", None) is not None


def states(mesh):
    """What no gradient moves, after five steps with evaluation between: of this rank, and of data parallelism's."""
    found = {}
    for name in routers.names():
        moe = layer(name).train()
        if not moe.decider.advances:
            continue
        moe, copied = twins(moe)
        parallel.shard_experts(moe, mesh)
        expect_steps(moe, 5)
        expect_steps(copied, 5)
        for step in range(5):
            x, known = _of_this_rank(lambda n=name: (torch.randn(2, 9, DIM, dtype=torch.float64), told(n, (2, 9))))
            x = x + step
            for one in (moe, copied):
                _run(one.train(), x, known)
                shunter.update_routers(one)
                one.eval()(
                    x[:, : 3 + dist.get_rank()], **{key: v[:, : 3 + dist.get_rank()] for key, v in known.items()}
                )
        buffers = [{key: value.tolist() for key, value in one.decider.named_buffers()} for one in (moe, copied)]
        start = {key: value.tolist() for key, value in layer(name).decider.named_buffers()}
        found[name] = *buffers, {key for key in start if start[key] != buffers[0][key]}
    return found


def mutants(mesh):
    """How far off the comparison of gradients and state is, when something is broken on purpose."""
    found = {}
    scaled, combine = experts._Scaled.apply, dispatch.weighted_sum

    def twice(y, routing):
        return combine(y * routing.weight.detach()[:, None], routing)

    changes = {
        "not divided": (experts._Scaled, "apply", lambda value, factor: value),
        "divided twice": (experts._Scaled, "apply", lambda value, factor: scaled(scaled(value, factor), factor)),
        "weights twice": (dispatch, "weighted_sum", twice),
        "counts of one rank": (routers.find("deepseek").update.__globals__, "sum_over_ranks", lambda *a, **k: None),
    }
    for name, (owner, attribute, broken) in changes.items():
        own = owner[attribute] if isinstance(owner, dict) else getattr(owner, attribute)
        change = owner.__setitem__ if isinstance(owner, dict) else functools.partial(setattr, owner)
        change(attribute, broken)
        try:
            (grads, norm, states, bias) = layouts(mesh, (1,))["accumulating 1"]
            every = [None] * dist.get_world_size()
            dist.all_gather_object(every, bias)
            found[name] = max(grads, states, 1.0 if every[0] != every[1] else 0.0)
        finally:
            change(attribute, own)
    return found


def checkpointing(mesh):
    """The exchanges of a backward in each mode, and the gradients against those without."""
    found = {}
    names = ("topk", "noisy_topk")
    base = Model(names).train()
    x = _of_this_rank(lambda: torch.randn(2, 5, DIM, dtype=torch.float64))
    kept = functools.partial(checkpoint, use_reentrant=False, context_fn=parallel.checkpoint_policy)
    modes = {"none": None, "whole": functools.partial(checkpoint, use_reentrant=False), "kept": kept, "recompute": None}
    modes |= {"kept, in pieces": kept, "recompute, in pieces": None}
    gathered = {}
    for mode, around in modes.items():
        model = copy.deepcopy(base)
        parallel.shard_experts(model, mesh, overlap_degree=2 if "in pieces" in mode else 1)
        for block in model.blocks:
            block.moe.experts.recompute = mode.startswith("recompute")
            if around is not None:
                block.forward = functools.partial(around, block.forward)
        torch.manual_seed(SEED)
        with Exchanges() as exchanges:
            loss = loss_of(model, x)
            forward = exchanges.done
            loss.backward()
        gathered[mode] = gradients(model)
        found[mode] = (forward, exchanges.done - forward, difference(gathered[mode], gathered["none"]))
    return found


def second_derivatives(mesh):
    """The gradient of a penalty on a gradient."""
    moe, copied = twins(layer("topk").eval())
    parallel.shard_experts(moe, mesh)
    x = _of_this_rank(lambda: torch.randn(6, DIM, dtype=torch.float64))
    results = []
    for one in (moe, copied):
        given = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(one(given).square().mean(), given, create_graph=True)
        gradient.square().mean().backward()
        results.append({"x": given.grad})
    parallel.average_gradients(moe, mesh)
    return max(difference(*results), difference(gradients(moe), gradients(copied, averaged=True)))


def precision(mesh):
    """The dtypes in which a bfloat16 model's routers and experts compute."""
    model = Model(("topk", "topk"), torch.float32).train()
    parallel.shard_model(model, mesh, dtype=torch.bfloat16)
    seen = {}
    for block in model.blocks:
        score, compute = block.moe.decider.score, block.moe.experts.compute

        def scored(x, context, score=score, block=block):
            seen["router"] = [str(p.dtype) for p in block.moe.router.parameters()]
            return score(x, context)

        def computed(x, weights, routing, compute=compute):
            seen["experts"] = [str(weights.dtype), str(x.dtype)]
            return compute(x, weights, routing)

        block.moe.decider.score, block.moe.experts.compute = scored, computed
    x = _of_this_rank(lambda: torch.randn(2, 5, DIM))
    loss_of(model, x).backward()
    grads = sorted({str(p.grad.dtype) for p in model.parameters()})
    return seen, grads, sorted({str(p.dtype) for p in model.parameters()})


def autocast(mesh):
    """Under autocast: the output's dtype and its distance from that of one process, by bfloat16's rounding."""
    moe, copied = twins(layer("topk", torch.float32).eval())
    parallel.shard_experts(moe, mesh)
    x = _of_this_rank(lambda: torch.randn(20, DIM))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        got, expected = moe(x), copied(x)
    return str(got.dtype), float((got.float() - expected.float()).abs().max() / expected.float().abs().max())


def inference(mesh):
    """Without gradients, each rank with a batch of its own size; what explain says; the layer as it is saved."""
    moe, copied = twins(layer("topk", torch.float32, "auto").eval())
    state = {name: tuple(value.shape) for name, value in moe.state_dict().items()}
    parallel.shard_experts(moe, mesh)
    found = []
    with torch.no_grad():
        for tokens in (0, 1, 3 * dist.get_rank(), 40):
            x = _of_this_rank(lambda n=tokens: torch.randn(n, DIM))
            found.append(difference({"out": moe(x)}, {"out": copied(x)}))
    again = copy.deepcopy(moe)
    again.load_state_dict(layer("topk", torch.float32).state_dict())
    changed = not torch.equal(again(x), moe(x))
    again.load_state_dict(copied.state_dict())
    assert changed and torch.equal(again(x), moe(x)), "a copy takes the state of whole experts"
    same = {name: tuple(value.shape) for name, value in moe.state_dict().items()} == state
    local = sum(p.to_local().numel() for p in moe.experts.parameters()) / sum(
        p.numel() for p in copied.experts.parameters()
    )
    return max(found), same, local, moe.explain()


def refusals(mesh):
    """What each mistake says."""
    found = {}

    def said(case, call):
        try:
            call()
            found[case] = "nothing"
        except (UserError, LostRank, ValueError) as error:
            found[case] = str(error)

    rank = dist.get_rank()
    said("experts", lambda: parallel.shard_experts(shunter.MoE(DIM, 4, 5, "topk"), mesh))
    said("world", lambda: parallel.mesh(expert_parallel=3))
    said("dense", lambda: parallel.shard_experts(torch.nn.Linear(2, 2), mesh))
    adapted = layer("topk", torch.float32)
    torch.nn.utils.parametrizations.weight_norm(adapted.experts, "down_proj")
    said("adapted", lambda: parallel.shard_experts(adapted, mesh))
    moe = layer("topk", torch.float32)
    said("twice", lambda: parallel.shard_experts(parallel.shard_experts(moe, mesh), mesh))
    other = layer("topk", torch.float32)
    if rank == 1:
        other.router.weight.data[0, 0] += 1e-3
    said("drawn apart", lambda: parallel.shard_experts(other, mesh))
    x = torch.randn(4, DIM)

    def alone():
        with torch.set_grad_enabled(rank == 0):
            moe(x)

    said("evaluates alone", alone)

    def in_bfloat16():
        with torch.autocast("cpu", torch.bfloat16, enabled=rank == 0), torch.no_grad():
            moe(x)

    said("other dtype", in_bfloat16)
    apart = layer("topk", torch.float32)
    said("pieces", lambda: parallel.shard_experts(apart, mesh, overlap_degree=0))
    one, two = (layer("topk", torch.float32) for _ in range(2))
    two.experts.down_proj = one.experts.down_proj
    said("tied", lambda: parallel.shard_experts(torch.nn.ModuleList([one, two]), mesh))
    said("pieces of all", lambda: parallel.shard_experts(apart, mesh, overlap_degree=2, dispatch="all"))
    parallel.shard_experts(apart, mesh, overlap_degree=1 + rank)
    said("other pieces", lambda: apart(x))
    said("splits", lambda: exchange.exchange(x, [1, 1], [1, 1], mesh["ep"].get_group(), "a test"))
    return found


def _on_rank(rank, seed, expert_parallel, cases):
    assert seed == SEED, "the ranks draw alike"
    warnings.simplefilter("ignore")
    mesh = parallel.mesh(expert_parallel=expert_parallel, timeout=TIME_LIMIT)
    found = {}
    for name, arguments in cases.items():
        torch.manual_seed(SEED)
        found[name] = globals()[name](mesh, *arguments)
    return found


def _cases(expert_parallel, names, size=2):
    import os

    os.environ["SHUNTER_SEED"] = str(SEED)  # of the spawned processes
    return on_ranks(_on_rank, size, SEED, expert_parallel, names, start="spawn")


QUICK = dict.fromkeys(
    (
        "checkpointing", "second_derivatives", "precision", "autocast", "inference", "refusals", "overlap", "pieces",
        "states", "tied",
    ),
    (),
) | {
    "every_router": ((True,),), "forms": (("topk", "expert_choice", "soft"),), "layouts": ((3,),),
    "backends": (QUICK_BACKENDS,), "no_tokens": (QUICK_BACKENDS,),
}  # fmt: skip


def _holds(results):
    """What every case must keep to, at any number of ranks."""
    for found in results:
        for name, gap in found["every_router"].items():
            assert gap < 1e-12, (name, gap)
        gaps, moved = found["forms"]
        for name, gap in gaps.items():
            assert gap < 1e-12, (name, gap)
        for form, (forward, backward, rows, expected) in moved.items():
            assert (forward, backward) == ((3, 2) if form == "choices" else (4, 3)), form
            assert rows == expected, (form, rows, expected)
        for name, (error, without) in found["backends"].items():
            assert error <= max(2e-6, 2 * without), (name, error, without)
        for name, (gap, missing) in found["no_tokens"].items():
            assert gap < 2e-6 and not missing, (name, gap, missing)
        for name, (grads, norm, states, _) in found["layouts"].items():
            assert max(grads, norm, states) < 1e-12, (name, grads, norm, states)
        biases = {name: bias for name, (*_, bias) in found["layouts"].items()}
        assert biases == {name: bias for name, (*_, bias) in results[0]["layouts"].items()}, "bit-equal on all ranks"


@pytest.mark.slow
@pytest.mark.parametrize("size, expert_parallel", [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
def test_four_ranks_in_every_layout(size, expert_parallel):
    cases = dict.fromkeys(
        ("every_router", "forms", "layouts", "checkpointing", "second_derivatives", "pieces", "states"), ()
    )
    found = _cases(expert_parallel, cases | {"backends": (QUICK_BACKENDS,), "no_tokens": (QUICK_BACKENDS,)}, size)
    _holds(found)
    experts_compute_one_piece_while_others_travel(found)
    routers_states_are_of_all_ranks(found)
    for one in found:
        exchanges_are_as_counted([one])
        assert one["second_derivatives"] < 1e-12


@pytest.mark.slow
def test_compiled_and_gpu_backends():
    cases = {"backends": (("numba", "triton"),), "no_tokens": (("numba", "triton"),)}
    for found in _cases(2, cases):
        for name, (error, without) in found["backends"].items():
            if name != "triton, torch.bfloat16":  # wrong in Triton's interpreter
                assert error <= max(2e-6, 2 * without), (name, error, without)
        for name, (gap, missing) in found["no_tokens"].items():
            assert gap < 2e-6 and not missing, (name, gap, missing)


@pytest.mark.slow
def test_broken_forms_are_noticed():
    results = _cases(2, {"mutants": ()})
    for mutant in ("not divided", "divided twice", "weights twice", "counts of one rank"):
        assert max(found["mutants"][mutant] for found in results) > 1e-6, mutant


@pytest.mark.parametrize(
    "top_k, ranks, form",
    [(1, 2, "choices"), (3, 64, "choices"), (4, 2, "all"), (8, 2, "all"), (8, 8, "ranks"), (4, 64, "ranks")],
)
def test_the_form_goes_by_how_many_ranks_a_token_needs(top_k, ranks, form):
    assert dispatch.choose_form(top_k, 256, ranks, "nccl")[0] == form
    assert dispatch.choose_form(top_k, 256, ranks, "gloo")[0] == ("ranks" if form == "all" else form)
    sent = {name: dispatch.rows_sent(name, top_k, 256, ranks) for name in ("choices", "ranks", "all")}
    assert sent["ranks"] <= min(sent["choices"], sent["all"])
    if form == "all":
        assert sent["all"] <= sent["ranks"] / 0.9 + 1e-9


@pytest.mark.parametrize("stable", [True, False])
def test_received_rows_are_a_routing(stable, monkeypatch):
    """Each row once, with the expert that its sender sorted it to; an unstable sort would break the type's order."""
    sort = torch.Tensor.sort
    backwards = sort(torch.zeros(100, dtype=torch.int64), stable=True).indices.flip(0)

    def unstable(self, stable):
        values, indices = sort(self[backwards[: len(self)] % len(self)], stable=True)
        return values, (backwards[: len(self)] % len(self))[indices]

    counts = torch.randint(2, 4, (3, 4))
    if not stable:
        monkeypatch.setattr(torch.Tensor, "sort", unstable)
        with pytest.raises(ValueError, match="unsorted"):
            dispatch.received(counts, torch.float32).check_values()
        return
    counts[torch.rand(3, 4) < 0.3] = 0
    routing = dispatch.received(counts, torch.float64)
    routing.check_values()
    expected = [e for row in counts.tolist() for e, count in enumerate(row) for _ in range(count)]
    of_row = dict(zip(routing.token.tolist(), routing.expert.tolist(), strict=True))
    assert [of_row[row] for row in range(len(expected))] == expected
    assert routing.num_tokens == len(expected) and routing.num_experts == 4 and bool((routing.weight == 1).all())


def exchanges_are_as_counted(results):
    for found in results:
        modes = found["checkpointing"]
        assert {mode: counts[:2] for mode, counts in modes.items()} == {
            "none": (6, 4),
            "whole": (6, 10),
            "kept": (6, 4),
            "recompute": (6, 4),
            "kept, in pieces": (10, 8),
            "recompute, in pieces": (10, 8),
        }
        assert max(gap for mode, (*_, gap) in modes.items() if "pieces" not in mode) == 0
        assert max(gap for *_, gap in modes.values()) < 1e-12


def routers_states_are_of_all_ranks(results):
    moved = set()
    for name, (first, *_) in results[0]["states"].items():
        for found in results:
            own, whole, keys = found["states"][name]
            assert own == whole == first, f"{name}: bit-equal on all ranks, and as without expert parallelism"
            moved |= {(name, key) for key in keys}
    assert {"deepseek", "dense_to_sparse"} <= {name for name, _ in moved}, moved


def penalties_on_gradients_are_right(results):
    assert max(found["second_derivatives"] for found in results) < 1e-12


def routers_decide_in_float32_under_mixed_precision(results):
    seen, grads, parameters = results[0]["precision"]
    assert set(seen["router"]) == {"torch.float32"} and set(seen["experts"]) == {"torch.bfloat16"}
    assert grads == parameters == ["torch.float32"]


def autocast_rounds_no_more_than_elsewhere(results):
    for found in results:
        dtype, gap = found["autocast"]
        assert dtype == "torch.bfloat16" and gap < 0.05


def shared_experts_stay_shared(results):
    assert all(found["tied"] < 1e-12 for found in results), [found["tied"] for found in results]


def inference_takes_batches_of_any_size(results):
    for rank, found in enumerate(results):
        gap, same, local, explained = found["inference"]
        assert gap < 2e-6 and same and local == 0.5
        first = rank * EXPERTS // 2
        assert f"experts {first} to {first + EXPERTS // 2 - 1} of {EXPERTS} are on this rank" in explained
        assert "sends a row for each expert that a token takes because a token takes 3, fewer than 4" in explained


def shared_experts_run_while_rows_are_under_way(results):
    for log, gap, wrong, twice in (found["overlap"] for found in results):
        assert gap == 0, "bit-equal to one after another"
        assert max(wrong, twice) < 1e-12
        exchange = ["_start", "_wait"]  # of the counts, of the outputs back and their gradients
        during = ["_start", "shared", "_wait"], ["_start", "back through shared", "_wait"]
        assert log == [*exchange, *during[0], *exchange, *exchange, *during[1]]


def experts_compute_one_piece_while_others_travel(results):
    for found in (one["pieces"] for one in results):
        for name, (log, gap) in found.items():
            assert gap < 1e-12, (name, gap)
            if log:
                form, n = name.split(", ")
                n, counts = int(n), ["_start", "_wait"]
                weights = counts if form == "ranks" else []
                there = [*["_start"] * n, "shared", *["_wait", "experts", "_start"] * n, *["_wait"] * n]
                back = [*["_start"] * n, *["_wait", "_start"] * n, *["_wait"] * n]
                assert log == [*counts, *weights, *there, *back, *weights], (name, log)


MISTAKES = [
    ("experts", "5 experts, which 2 ranks cannot hold"),
    ("world", "2 processes cannot share experts in groups of 3"),
    ("dense", "Linear has no MoE layer"),
    ("adapted", "its experts are ParametrizedExperts, which cannot be sharded"),
    ("twice", "sharded already"),
    ("drawn apart", "router.weight is another on rank 1"),
    ("evaluates alone", "gradients but for its input's, and rank 1 at sparse layer 0 in float32 without gradients"),
    ("other dtype", "rank 1 at sparse layer 0 in float32 without"),
    ("pieces", "overlap_degree 0 must be at least 1"),
    ("tied", "1.experts.down_proj is the same parameter as 0.experts.down_proj"),
    ("pieces of all", 'overlap_degree 2 needs dispatch="ranks" or "choices"'),
    ("other pieces", "rank 1 at sparse layer 0 in float32 with gradients but for its input's, in 2 pieces"),
    ("splits", "send sums to 2"),
]


def mistakes_are_one_line_with_names(results):
    for case, words in MISTAKES:
        said = results[0]["refusals"][case]
        assert words in said and "\n" not in said, said
        assert all(found["refusals"][case] != "nothing" for found in results), f"{case}: on every rank"


CHECKS = (
    _holds, exchanges_are_as_counted, penalties_on_gradients_are_right,
    routers_decide_in_float32_under_mixed_precision, autocast_rounds_no_more_than_elsewhere,
    inference_takes_batches_of_any_size, mistakes_are_one_line_with_names,
    routers_states_are_of_all_ranks, shared_experts_run_while_rows_are_under_way,
    experts_compute_one_piece_while_others_travel, shared_experts_stay_shared,
)  # fmt: skip


def test_one_process_alone_needs_no_torchrun():
    mesh = parallel.mesh()
    try:
        moe, copied = twins(layer("topk").eval())
        parallel.shard_experts(moe, mesh)
        x = torch.randn(5, DIM, dtype=torch.float64)
        assert torch.allclose(moe(x), copied(x), rtol=1e-13, atol=1e-13)
        assert all(isinstance(p, DTensor) for p in moe.experts.parameters())
    finally:
        dist.destroy_process_group()
