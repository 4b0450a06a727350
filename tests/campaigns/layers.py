"""Campaigns J and K: a layer with every backend against a loop over tokens, and the properties that it must have."""

import copy
from functools import partial

import torch

from shunter import MoE, aux_loss
from shunter.experts import backend_names
from shunter.experts.weights import Weights
from tests.campaigns.campaign import drawn
from tests.helpers import by_tokens, relative_error

EXACT = 1e-10
BACKENDS = [name for name in backend_names() if name != "triton"]
"""Those of CPUs; the kernels, which an interpreter runs here, have tests of their own."""
TOKENS = [0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 63, 64, 65]


def _layer(draw, **options):
    experts = draw.choice([1, 2, 3, 4, 7, 8])
    sizes = {"dim": draw.choice([1, 3, 8, 16]), "hidden": draw.choice([1, 4, 5, 8]), "num_experts": experts}
    settings = {"router": "topk", "top_k": draw.randint(1, experts), "load_balancing_loss": 0.01} | options
    return MoE(**sizes, **settings).double()


def _with(layer, backend, x, **known):
    """The output of a layer with a backend; None where the backend says that it cannot run this."""
    layer.experts.backend = backend
    try:
        return layer(x, **known)
    except ValueError as error:
        if backend in str(error) and "\n" not in str(error):
            return None
        raise


def _weights(layer):
    e = layer.experts
    return Weights(e.gate_up_proj, e.down_proj, None, None, "swiglu")


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
        layer, backend = _layer(draw), draw.choice(BACKENDS)
        tokens = 1000 if draw.random() < 0.02 else draw.choice(TOKENS)
        x = _laid(draw, torch.randn(tokens, layer.dim, dtype=torch.float64))
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
        expected = by_tokens(x, _weights(layer), routing.dense().to(x.dtype))
    bad = x.isnan().any(1)
    if not bool(out[~bad].isfinite().all()) or relative_error(out[~bad], expected[~bad]) > EXACT:
        return f"differs by {relative_error(out[~bad], expected[~bad])}", False
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
        layer = _layer(draw).train()
        x = torch.randn(draw.choice(TOKENS[1:]), layer.dim, dtype=torch.float64)
        try:
            fault = PROPERTIES[name](layer, backend, x, draw)
        except Exception as error:
            fault = repr(error)
        result.count(case, fault and f"{backend}, {name}, {tuple(x.shape)}: {fault}", detected=fault is None)


def _far(one, other):
    far = relative_error(one, other)
    return "" if far < EXACT else f"differs by {far}"


def _run(layer, backend, x, **known):
    given = x.clone().requires_grad_()
    layer.zero_grad()
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
    expected = by_tokens(x, _weights(layer), matrix)
    expected.square().sum().backward()
    parts = [_far(out, expected.detach())]
    parts += [_far(gradients[f"experts.{n}"], getattr(layer.experts, n).grad) for n in ("gate_up_proj", "down_proj")]
    return next((part for part in parts if part), "")


def _order(layer, backend, x, draw):
    """Tokens in another order give outputs in that order."""
    order, found = torch.randperm(len(x)), _run(layer, backend, x)
    if found is None:
        return None
    out, given, gradients = found
    other, given_there, there = _run(layer, backend, x[order])
    parts = [_far(other, out[order]), _far(given_there, given[order])]
    parts += [_far(there[name], value) for name, value in gradients.items() if value is not None]
    return next((part for part in parts if part), "")


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


def _padding(layer, backend, x, draw):
    """Padding adds to no output, gradient, loss or count."""
    found = _run(layer, backend, x)
    if found is None:
        return None
    real = torch.cat([torch.ones(len(x)), torch.zeros(draw.randrange(1, 9))]).bool()
    loss, counts = aux_loss(layer).detach(), layer.routing.counts
    padded = torch.cat([x, torch.full((len(real) - len(x), x.shape[1]), 7.0, dtype=x.dtype)])
    out, given, gradients = _run(layer, backend, padded, mask=real)
    parts = [_far(out[: len(x)], found[0]), _far(given[: len(x)], found[1]), _far(aux_loss(layer).detach(), loss)]
    parts += [_far(value, found[2][name]) for name, value in gradients.items() if value is not None]
    if bool(out[len(x) :].any()) or bool(given[len(x) :].any()) or not torch.equal(counts, layer.routing.counts):
        return "padding counts"
    return next((part for part in parts if part), "")


def _counts(layer, backend, x, draw):
    """Each token has k different experts, and one that has none has gradients of zero."""
    found = _run(layer, backend, x)
    if found is None:
        return None
    routing, gradients = layer.routing, found[2]
    empty = routing.counts == 0
    idle = max(float(gradients[f"experts.{name}"][empty].abs().sum()) for name in ("gate_up_proj", "down_proj"))
    each = torch.bincount(routing.token, minlength=len(x))
    return "" if idle == 0 and bool((each == layer.router.top_k).all()) else f"idle gradients {idle}, {each.tolist()}"


def _again(layer, backend, x, draw):
    """A second time gives the same bits, whatever memory holds."""
    found = _run(layer, backend, x)
    if found is None:
        return None
    poison = [torch.full((n,), torch.nan, dtype=torch.float64) for n in (7, 64, 512, 4096)]
    del poison
    other = _run(layer, backend, x)
    same = torch.equal(found[0], other[0]) and torch.equal(found[1], other[1])
    return (
        "" if same and all(torch.equal(v, other[2][n]) for n, v in found[2].items() if v is not None) else "other bits"
    )


PROPERTIES = {
    "loop over tokens": _as_loop,
    "order of tokens": _order,
    "numbers of experts": _labels,
    "parts of a batch": _parts,
    "padding": _padding,
    "counts and idle experts": _counts,
    "same bits again": _again,
}
