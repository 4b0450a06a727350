"""Campaigns J and K: a layer with every backend against a loop over tokens, and the properties that it must have."""

import copy
import itertools
from functools import cache, partial

import torch
from safetensors.torch import load, save

from shunter import MoE, Routing, aux_loss
from shunter.experts import backend_names
from shunter.experts.choice import get
from shunter.experts.combine import sum_by_token
from shunter.experts.weights import Weights
from tests.campaigns.campaign import drawn
from tests.helpers import by_tokens

EXACT = {torch.float64: 1e-10, torch.float32: 1e-4}
BACKENDS = [name for name in backend_names() if name != "triton"]
"""Those of CPUs; the kernels, which an interpreter runs here, have tests of their own."""
TOKENS = [0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 63, 64, 65]


@cache
def _dtype(backend):
    """The most exact that it computes in."""
    weights = Weights(torch.zeros(2, 2, 4).double(), torch.zeros(2, 4, 1).double(), None, None, "swiglu")
    return torch.float32 if get(backend).refuses(torch.zeros(1, 4).double(), weights) else torch.float64


def _layer(draw, dtype, **options):
    experts = draw.choice([1, 2, 3, 4, 7, 8])
    sizes = {"dim": draw.choice([1, 3, 8, 16]), "hidden": draw.choice([1, 4, 5, 8]), "num_experts": experts}
    settings = {"router": "topk", "top_k": draw.randint(1, experts), "load_balancing_loss": 0.01} | options
    return MoE(**sizes, **settings).to(dtype)


def _with(layer, backend, x, **known):
    """The output of a layer with a backend; None where the backend says that it cannot run this."""
    layer.experts.backend = backend
    try:
        return layer(x, **known)
    except ValueError as error:
        if f"backend {backend!r} cannot run this" in str(error) and "\n" not in str(error):
            return None
        raise


def _weights(layer):
    e = layer.experts
    return Weights(e.gate_up_proj.double(), e.down_proj.double(), None, None, "swiglu")


def _laid(draw, x):
    """The same numbers, otherwise in memory."""
    how = draw.choice(["plain", "strided", "transposed", "sliced", "expanded"])
    if how == "strided":
        return torch.stack([x, x * 0 + 1e300], 1).flatten(0, 1)[::2]
    if how == "transposed":
        return x.T.contiguous().T
    if how == "sliced":
        return torch.cat([x * 0 + 1e300, x, x], 1)[:, x.shape[1] : 2 * x.shape[1]]
    if how == "expanded":
        return x[:1].expand(len(x), -1)
    return x


def shapes(result, folder, cases, seed):
    """K: the output is that of a loop over tokens, or the layer says in a line what it cannot do."""
    for case in cases:
        draw = drawn(seed, case)
        torch.manual_seed(draw.getrandbits(31))
        backend = draw.choice(BACKENDS)
        layer = _layer(draw, _dtype(backend))
        tokens = 1000 if draw.random() < 0.02 else draw.choice(TOKENS)
        x = _laid(draw, torch.randn(tokens, layer.dim, dtype=_dtype(backend)))
        how = draw.choice(["plain", "zero", "one", "huge", "never", "nan"])
        weight = layer.router.weight.data
        if how == "zero":
            weight.zero_()
        elif how == "one":
            weight.zero_()[draw.randrange(layer.num_experts)] = 1.0
            x = x.abs()
        elif how == "huge":
            weight.mul_(1e30)
        elif how == "never" and len(x) and layer.num_experts > 1:
            layer.router.score = partial(_never, layer.router.score, draw.randrange(layer.num_experts))
        elif how == "nan" and len(x):
            x = x.clone()
            x[draw.randrange(len(x)), 0] = torch.nan
        fault, refused = _compared(layer, backend, x, how)
        result.count(case, fault and f"{backend}, {how}, {tuple(x.shape)}: {fault}", detected=refused)


def _never(score, expert, *given):
    """Logits of which one expert's are minus infinity."""
    return score(*given).index_fill(-1, torch.tensor([expert]), -torch.inf)


def _compared(layer, backend, x, how):
    with torch.no_grad():
        try:
            out = _with(layer, backend, x)
        except ValueError as error:
            clear = "finite" in str(error) and "\n" not in str(error)
            return ("" if clear and how in ("nan", "huge", "never") else repr(error)), True
        if out is None:
            return "", True
        routing = layer.routing
        expected = by_tokens(x.double(), _weights(layer), routing.dense().double())
    bad = x.isnan().any(1)
    if not bool(out[~bad].isfinite().all()):
        return "not finite", False
    if far := _far(out[~bad], expected[~bad]):
        return far, False
    if bad.any() and bool(out[bad].isfinite().any()):
        return "NaN became a number", False
    if int(routing.counts.sum()) != len(x) * layer.router.top_k:
        return f"{int(routing.counts.sum())} choices", False
    if how == "zero" and bool((routing.counts[layer.router.top_k :] > 0).any()):
        return "ties are not the first experts'", False
    return "", False


def invariants(result, folder, cases, seed):
    """J: one property of a random layer with a backend."""
    names = list(PROPERTIES)
    for case in cases:
        draw = drawn(seed, case)
        torch.manual_seed(draw.getrandbits(31))
        name, backend = names[case % len(names)], draw.choice(BACKENDS)
        layer = _layer(draw, _dtype(backend)).train()
        x = _drawn_apart(layer, draw.choice(TOKENS[1:]))
        try:
            fault = PROPERTIES[name](layer, backend, x, draw)
        except Exception as error:
            fault = repr(error)
        result.count(case, fault and f"{backend}, {name}, {tuple(x.shape)}: {fault}", detected=fault is None)


def _drawn_apart(layer, tokens):
    """Tokens (T, d) none of whose choices rounding could turn; a router with two experts that are one is drawn anew."""
    x = torch.randn(tokens, layer.dim, dtype=layer.router.weight.dtype)
    for drawn_before in itertools.count(1):
        with torch.no_grad():
            gaps = layer.router.score(x).sort(1).values.diff(dim=1)
        apart = (gaps > 1e-4).all(1)
        if apart.all():
            return x
        x[~apart] = torch.randn(int((~apart).sum()), layer.dim, dtype=x.dtype)
        if drawn_before % 100 == 0:
            torch.nn.init.normal_(layer.router.weight)


def _far(one, other):
    if one is None or other is None:  # of what has no backward
        return "" if one is other else "one has a gradient"
    # Numbers are about one: of a sum that cancels to much less, rounding is as large as of one that does not.
    far = (one.double() - other.double()).norm() / max(other.double().norm(), other.numel() ** 0.5, 1e-300)
    return "" if far < EXACT[one.dtype] else f"differs by {far:.2e}"


def _first(parts):
    return next((part for part in parts if part), "")


def _run(layer, backend, x, **known):
    """Output, gradient of the input, gradients of the parameters; a backend without a backward has outputs alone."""
    given = x.clone().requires_grad_()
    layer.zero_grad()
    if get(backend).no_backward:
        with torch.no_grad():
            out = _with(layer, backend, x, **known)
        return None if out is None else (out, None, {})
    out = _with(layer, backend, given, **known)
    if out is None:
        return None
    if out.numel():
        (out.square().sum() + aux_loss(layer)).backward()
    return out.detach(), given.grad, {name: p.grad for name, p in layer.named_parameters()}


def _as_loop(layer, backend, x, draw):
    """Output and gradients are those of the loop over tokens."""
    found = _run(layer, backend, x)
    if found is None:
        return None
    out, _, gradients = found
    layer.zero_grad()
    matrix = torch.zeros(len(x), layer.num_experts, dtype=torch.float64)
    matrix = matrix.index_put((layer.routing.token, layer.routing.expert), layer.routing.weight.detach().double())
    expected = by_tokens(x.double(), _weights(layer), matrix)
    parts = [_far(out, expected.detach())]
    if gradients:
        expected.square().sum().backward()
        names = ("gate_up_proj", "down_proj")
        parts += [_far(gradients[f"experts.{name}"], getattr(layer.experts, name).grad) for name in names]
    return _first(parts)


def _gradcheck(layer, backend, x, draw):
    """The gradients are those of finite differences, along random directions."""
    if x.dtype != torch.float64 or get(backend).no_backward:
        return None
    names, values = zip(*layer.named_parameters(), strict=True)
    layer.experts.backend = backend

    def function(x, *parameters):
        y = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))
        return y, sum(layer.losses.values(), y.sum() * 0)

    given = x[:5].clone().requires_grad_()
    right = torch.autograd.gradcheck(function, (given, *values), fast_mode=True, raise_exception=False)
    return "" if right else "gradients are not those of finite differences"


def _order(layer, backend, x, draw):
    """Tokens in another order give outputs in that order."""
    order, found = torch.randperm(len(x)), _run(layer, backend, x)
    if found is None:
        return None
    out, given, gradients = found
    other, given_there, there = _run(layer, backend, x[order])
    parts = [_far(other, out[order]), _far(given_there, given if given is None else given[order])]
    return _first([*parts, *(_far(there[name], value) for name, value in gradients.items() if value is not None)])


def _labels(layer, backend, x, draw):
    """Experts with other numbers give the same outputs."""
    found = _run(layer, backend, x)
    if found is None:
        return None
    other, order = copy.deepcopy(layer), torch.randperm(layer.num_experts)
    for parameter in other.parameters():
        parameter.data = parameter.data[order]
    return _far(_run(other, backend, x)[0], found[0])


def _parts(layer, backend, x, draw):
    """A batch in two parts gives the same outputs."""
    found = _run(layer, backend, x)
    if found is None:
        return None
    at = draw.randrange(len(x) + 1)
    return _far(torch.cat([_run(layer, backend, part)[0] for part in (x[:at], x[at:])]), found[0])


def _future(layer, backend, x, draw):
    """Other tokens behind a token change nothing for it."""
    found = _run(layer, backend, x)
    if found is None:
        return None
    at = draw.randrange(len(x) + 1)
    other = torch.cat([x[:at], torch.randn_like(x[at:])])
    return _far(_run(layer, backend, other)[0][:at], found[0][:at])


def _padding(layer, backend, x, draw):
    """Padding adds to no output, gradient, loss or count."""
    found = _run(layer, backend, x)
    if found is None:
        return None
    real = torch.cat([torch.ones(len(x)), torch.zeros(draw.randrange(1, 9))]).bool()
    loss, counts = aux_loss(layer).detach() if found[2] else None, layer.routing.counts
    padded = torch.cat([x, torch.full((len(real) - len(x), x.shape[1]), 7.0, dtype=x.dtype)])
    out, given, gradients = _run(layer, backend, padded, mask=real)
    if bool(out[len(x) :].any()) or not torch.equal(counts, layer.routing.counts):
        return "padding counts"
    parts = [_far(out[: len(x)], found[0])]
    if given is not None:
        parts += [
            _far(aux_loss(layer).detach(), loss),
            "padding has a gradient" if bool(given[len(x) :].any()) else "",
            _far(given[: len(x)], found[1]),
        ]
    return _first([*parts, *(_far(value, found[2][name]) for name, value in gradients.items() if value is not None)])


def _counts(layer, backend, x, draw):
    """Each token has k different experts, and one that has none has gradients of zero."""
    found = _run(layer, backend, x)
    if found is None:
        return None
    routing, gradients = layer.routing, found[2]
    empty = routing.counts == 0
    idle = max((float(value[empty].abs().sum()) for name, value in gradients.items() if "experts" in name), default=0)
    each = torch.bincount(routing.token, minlength=len(x))
    return "" if idle == 0 and bool((each == layer.router.top_k).all()) else f"idle gradients {idle}, {each.tolist()}"


def _there_and_back(layer, backend, x, draw):
    """Rows sorted by expert and summed by token are what they were; a matrix of weights is the routing that it was."""
    with torch.no_grad():
        if _with(layer, backend, x) is None:
            return None
    routing = layer.routing
    mean = torch.full_like(routing.weight, 1 / layer.router.top_k).to(x.dtype)
    dense = routing.dense()
    again = Routing.from_dense(
        dense, mask=dense.new_zeros(dense.shape).bool().index_put((routing.token, routing.expert), torch.tensor(True))
    )
    same = all(torch.equal(getattr(again, name), getattr(routing, name)) for name in ("token", "expert", "weight"))
    return _far(sum_by_token(x[routing.token], routing, mean), x) or ("" if same else "another routing")


def _all_experts(layer, backend, x, draw):
    """With k = E the layer is the mixture of all experts by the softmax of its logits."""
    experts = layer.num_experts
    other = MoE(layer.dim, layer.experts.hidden, experts, "topk", top_k=experts).to(x.dtype)
    with torch.no_grad():
        out = _with(other, backend, x)
        if out is None:
            return None
        share = (x.double() @ other.router.weight.double().T).softmax(1)
        return _far(out, by_tokens(x.double(), _weights(other), share))


def _saved(layer, backend, x, draw):
    """Saved, loaded and saved again it has the same bytes, and the same outputs to the bit."""
    with torch.no_grad():
        out = _with(layer, backend, x)
        if out is None:
            return None
        other, content = copy.deepcopy(layer), save(layer.state_dict())
        for parameter in other.parameters():
            parameter.fill_(torch.nan)
        other.load_state_dict(load(content))
        same = save(other.state_dict()) == content and torch.equal(_with(other, backend, x), out)
    return "" if same else "another layer came back"


def _again(layer, backend, x, draw):
    """A second time gives the same bits, with NaN in all memory that is fresh."""
    found = _run(layer, backend, x)
    if found is None:
        return None
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills what torch.empty gives
    try:
        other = _run(layer, backend, x)
    finally:
        torch.use_deterministic_algorithms(False)
    pairs = [found[:1] + other[:1], *((value, other[2][name]) for name, value in found[2].items())]
    pairs += [(found[1], other[1])]
    same = all(one is two is None or torch.equal(one, two) for one, two in pairs)
    return "" if same else "other bits"


PROPERTIES = {
    "loop over tokens": _as_loop,
    "finite differences": _gradcheck,
    "order of tokens": _order,
    "numbers of experts": _labels,
    "parts of a batch": _parts,
    "tokens behind": _future,
    "padding": _padding,
    "counts and idle experts": _counts,
    "there and back": _there_and_back,
    "all experts": _all_experts,
    "saved": _saved,
    "same bits again": _again,
}
