"""The atlas of routing rules: each family's own router in transformers says what the rule is."""

import importlib
import inspect
import itertools
import pathlib
import types

import pytest
import torch
import transformers
from packaging.version import Version

from shunter.hf.rules import KNOWN_UP_TO, NOT_TOP_K, RULES, router_of, routing_fields, topk_options
from shunter.routers.registry import create

DIM, EXPERTS, TOP_K = 16, 8, 3
FIELDS = {
    "hidden_size": DIM,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "top_k_experts": TOP_K,
    "moe_topk": TOP_K,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "route_scale": 1.7,
    "router_scaling_factor": 1.3,
    "topk_method": "group_limited_greedy",
    "moe_norm_min": 1e-12,
    "moe_router_logit_softcapping": 1.5,
    "output_multiplier": 0.7,
    "rms_norm_eps": 1e-6,
    "use_expert_bias": True,
    "moe_normalize_expert_weights": 2,
    "moe_jitter_eps": None,
}
VARIANTS = {
    "scoring_func": ["sigmoid", "sqrtsoftplus"],
    "expert_selection_fn": ["softmax", "sigmoid"],
    "norm_topk_prob": [True, False],
}
# By family: values of n_group, where None leaves the groups out.
GROUPS = {"axk2": [4, None]}


def _module(family):
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def _router_class(family):
    found = [
        cls
        for name, cls in vars(_module(family)).items()
        if inspect.isclass(cls)
        and cls.__module__ == _module(family).__name__
        and name.endswith(("Router", "TopKGating", "MoEV1Gate"))
        and "Vision" not in name
        and "Hash" not in name
    ]
    assert found, f"{family} has no router class"
    return found[0]


def _short(*shape, std=1.0):
    """Normal numbers of so few bits that no order of summing products of two of them rounds: logits are the same."""
    return (256 * std * torch.randn(shape)).round().clamp(-1023, 1023) / 256


def _correction():
    """A bias of every expert, negative for one alone: masked scores are 0, and two below that would tie with them."""
    return (0.1 + _short(EXPERTS, std=0.5).abs()).where(torch.arange(EXPERTS) != torch.randint(EXPERTS, ()), -0.5)


def _theirs(family, config, x):
    """The family's own (T, E) combine matrix, and the router with random parameters that made it."""
    cls = _router_class(family)
    router = cls(DIM, EXPERTS, TOP_K) if family == "jetmoe" else cls(config)
    for tensor in [*router.parameters(), *router.buffers()]:
        tensor.data.copy_(_short(*tensor.shape, std=0.5))
    bias = next((b for n, b in [*router.named_buffers(), *router.named_parameters()] if "correction" in n), None)
    if bias is not None:
        bias.data.copy_(_correction().expand_as(bias))
    extra = []
    if len(inspect.signature(cls.forward).parameters) > 2:
        bias = _correction()
        extra = [bias]
    out = router(x[None] if family == "afmoe" else x, *extra)
    if family == "llama4":
        return out[0], router, bias
    if family == "jetmoe":
        _, token, weight, size, _ = out
        expert = torch.repeat_interleave(torch.arange(EXPERTS), torch.tensor(size))
        return torch.zeros(len(x), EXPERTS).index_put((token, expert), weight), router, bias
    if family == "dbrx":
        owner = types.SimpleNamespace(moe_normalize_expert_weights=2, top_k=TOP_K)
        weight, index = _module(family).DbrxFFN.route_tokens_to_experts(owner, out)
    else:
        _, weight, index = out
    return torch.zeros(len(x), EXPERTS).scatter(1, index, weight), router, bias


def _ours(options, router, bias):
    ours = create("topk", DIM, EXPERTS, **options).eval()
    named = dict(router.named_parameters())
    with torch.no_grad():
        ours.weight.copy_(next(p for p in named.values() if p.shape == (EXPERTS, DIM)))
        if ours.bias is not None:
            ours.bias.copy_(named["bias"])
        if ours.input_scale is not None:
            ours.input_scale.copy_(named["scale"])
        if ours.expert_scale is not None:
            ours.expert_scale.copy_(named["per_expert_scale"])
        if ours.selection_bias is not None:
            ours.selection_bias.copy_(bias.reshape(-1))
    return ours


@pytest.mark.parametrize("family", RULES)
def test_topk_routes_as_the_family_does(family):
    source = inspect.getsource(_router_class(family))
    field = next((name for name in VARIANTS if name in source), None)
    for value in VARIANTS.get(field, [None]):
        for norm, groups in itertools.product(
            [True, False] if field == "expert_selection_fn" else [True], GROUPS.get(family, [FIELDS["n_group"]])
        ):
            fields = {**FIELDS, "norm_topk_prob": norm, "n_group": groups, "model_type": family}
            if field:
                fields[field] = value
            config = types.SimpleNamespace(**fields)
            x = _short(40, DIM)
            with torch.no_grad():
                theirs, router, bias = _theirs(family, config, x)
                ours = _ours(topk_options(config), router, bias)
                logits = ours.score(x)
                dense = ours.assign(logits).dense()
                best = ours.rank(logits).topk(TOP_K + 1).values
            clear = best[:, TOP_K - 1] > best[:, TOP_K]  # where scores tie, either choice is right
            assert clear.float().mean() > 0.9
            assert torch.equal((dense != 0)[clear], (theirs != 0)[clear]), "other experts were chosen"
            assert torch.allclose(dense[clear], theirs[clear], rtol=2e-5, atol=1e-7)


def test_every_decorated_family_is_known_or_named():
    models = pathlib.Path(transformers.__file__).parent / "models"
    decorated = {
        path.parent.name
        for path in models.glob("*/modeling_*.py")
        if "@use_experts_implementation" in path.read_text(encoding="utf-8")
    }
    assert decorated, "transformers has moved its decorator"
    missing = decorated - set(RULES) - set(NOT_TOP_K)
    if missing and Version(transformers.__version__) > Version(KNOWN_UP_TO):
        pytest.skip(f"transformers {transformers.__version__} adds {sorted(missing)}, unknown to the atlas")
    assert not missing, f"neither a rule nor a reason for {sorted(missing)}"


def test_options_of_real_configurations():
    assert topk_options(transformers.MixtralConfig())["top_k"] == 2
    options = topk_options(transformers.DeepseekV3Config())
    assert options["selection_bias"] and options["expert_groups"] == 8
    with pytest.raises(ValueError, match="sparsemixer"):
        topk_options(types.SimpleNamespace(model_type="phimoe"))
    with pytest.raises(ValueError, match="'llama' is not known"):
        topk_options(types.SimpleNamespace(model_type="llama"))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "flex_olmo", "olmoe", "deepseek_v3"])
def test_from_fields_to_a_router_and_back(family):
    """Whatever a configuration says of routing, the router that it leads to says too."""
    groups = int(torch.randint(2, 4, ()))  # of two experts each, which hold the most that a token takes
    said = {
        "num_experts_per_tok": int(torch.randint(2, 4, ())),
        "norm_topk_prob": bool(torch.randint(2, ())),
        "n_group": 4,
        "topk_group": groups,
        "routed_scaling_factor": float(torch.rand(())) + 0.5,
        "router_aux_loss_coef": float(torch.rand(())),
        "router_jitter_noise": float(torch.rand(())) / 2,
    }
    default = transformers.AutoConfig.for_model(family)
    said = {name: value for name, value in said.items() if hasattr(default, name)}
    config = transformers.AutoConfig.for_model(family, **said)
    name, options = router_of(config)
    assert routing_fields(family, create(name, DIM, EXPERTS, **options)) == said
    shared = {key: value for key, value in options.items() if key not in ("load_balancing_loss", "jitter")}
    assert shared == topk_options(config)
