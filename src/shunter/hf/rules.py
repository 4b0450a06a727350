"""Routing rules of transformers' families: a configuration to options of the router `topk`, and a router to fields.

`RULES` is the one table. `router_of` adds what a model of Shunter's needs to go on training; `routing_fields` asks the
same table what a family can say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from transformers import AutoConfig

from ..errors import UserError
from ..routers import Router
from ..routers.deepseek import DeepSeek
from ..routers.switch import Switch
from ..routers.topk import TopK

__all__ = [
    "KNOWN_UP_TO",
    "NOT_TOP_K",
    "RULES",
    "balance_here",
    "left_behind",
    "router_of",
    "routing_fields",
    "topk_options",
]

# The newest transformers whose families were all looked at; a later one may have others.
KNOWN_UP_TO = "5.24.0"

Options = dict[str, Any]


def _renormalize(config: Any, always: bool = False) -> str:
    return "before_drop" if always or getattr(config, "norm_topk_prob", True) else "no"


def _always(**options: Any) -> Callable[[Any], Options]:
    """A rule that no field of the configuration changes."""
    return lambda config: dict(options)


# The best k logits, a softmax over these.
_SELECTED: Options = {"score_after": True, "renormalize": "no"}


def _softmax_if_asked(config: Any) -> Options:
    """Softmax over all experts, the best k, renormalised where `norm_topk_prob` says so."""
    return {"renormalize": _renormalize(config)}


def _p_norm(config: Any) -> Options:
    """Softmax over all experts, the best k, divided by their p-norm."""
    order = config.moe_normalize_expert_weights
    return {"renormalize": "no"} if order is None else {"renormalize": "before_drop", "norm_order": float(order)}


def _selected_by_config(config: Any) -> Options:
    """The best k logits, then softmax, or sigmoids that are renormalised where asked."""
    if config.expert_selection_fn == "softmax":
        return _SELECTED
    return {"score_after": True, "score_function": "sigmoid", "renormalize": _renormalize(config)}


def _groups(config: Any, score: str) -> Options:
    groups = config.n_group or 1
    return {"expert_groups": groups, "top_groups": config.topk_group or groups, "group_score": score}


def _group_limited_softmax(config: Any) -> Options:
    """DeepSeek-V2: softmax, groups ranked by their best expert, scaled, not renormalised."""
    limited = config.topk_method == "group_limited_greedy"
    return {
        "renormalize": "no",
        "scaling_factor": config.routed_scaling_factor,
        **(_groups(config, "max") if limited else {}),
    }


def _grouped_softmax(config: Any) -> Options:
    """Softmax, groups ranked by their best two, renormalised, scaled."""
    return {
        "renormalize": _renormalize(config),
        "norm_eps": 1e-20,
        "scaling_factor": getattr(config, "routed_scaling_factor", 1.0),
        **_groups(config, "top2_sum"),
    }


def _deepseek_v3(config: Any) -> Options:
    """DeepSeek-V3: sigmoids, a bias for the choice alone, groups ranked by their best two, renormalised, scaled."""
    return {**_grouped_softmax(config), "score_function": "sigmoid", "selection_bias": True}


def _zero_outside_groups(config: Any) -> Options:
    """DeepSeek-V3, but experts outside the best groups rank as 0; no groups where the configuration has none."""
    if config.n_group is None:
        return _biased_sigmoid(1e-20, "routed_scaling_factor")(config)
    return {**_deepseek_v3(config), "outside_score": 0.0}


def _biased_sigmoid(
    eps: float = 0.0, scale: str | None = None, renormalize: bool = False, **more: Any
) -> Callable[[Any], Options]:
    """Sigmoids, a bias for the choice alone, no groups."""

    def rule(config: Any) -> Options:
        return {
            "score_function": "sigmoid",
            "selection_bias": True,
            "renormalize": _renormalize(config, renormalize),
            "norm_eps": eps,
            **({} if scale is None else {"scaling_factor": getattr(config, scale)}),
            **more,
        }

    return rule


def _laguna(config: Any) -> Options:
    cap = config.moe_router_logit_softcapping
    return {**_biased_sigmoid(renormalize=True)(config), "logit_cap": cap if cap > 0 else None}


def _lfm2(config: Any) -> Options:
    rule = _biased_sigmoid(1e-6, "routed_scaling_factor")(config)
    return {**rule, "selection_bias": config.use_expert_bias}


def _muse_spark(config: Any) -> Options:
    rule = _biased_sigmoid(1e-15, "routed_scaling_factor", renormalize=True)(config)
    return {**rule, "logit_scale": config.output_multiplier}


def _ernie(config: Any) -> Options:
    """Softmax, a bias for the choice alone, divided by the sum but never by less than a minimum."""
    return {"selection_bias": True, "renormalize": "before_drop", "norm_min": config.moe_norm_min}


def _privacy_filter(config: Any) -> Options:
    return {**_SELECTED, "router_bias": True, "scaling_factor": 1 / config.num_experts_per_tok}


def _flint(config: Any) -> Options:
    return {"score_function": "sigmoid", "renormalize": _renormalize(config)}


def _kolibri(config: Any) -> Options:
    """A bias on the logits for the choice, sigmoids of the bare logits as weights."""
    return {
        "score_function": "sigmoid",
        "score_after": True,
        "selection_bias": True,
        "renormalize": _renormalize(config),
    }


def _scored_by_config(config: Any) -> Options:
    names = {"softmax": "softmax", "sigmoid": "sigmoid", "sqrtsoftplus": "sqrt_softplus"}
    rule = _biased_sigmoid(1e-20, "routed_scaling_factor", renormalize=True)(config)
    return {**rule, "score_function": names[config.scoring_func]}


RULES: dict[str, Callable[[Any], Options]] = {
    **dict.fromkeys(
        ["mixtral", "minimax", "hunyuan_v1_moe", "qwen3_5_moe", "qwen3_vl_moe", "qwen3_omni_moe"],
        _always(renormalize="before_drop"),
    ),
    **dict.fromkeys(
        ["gemma4", "diffusion_gemma"], _always(renormalize="before_drop", input_norm=True, per_expert_scale=True)
    ),
    **dict.fromkeys(
        ["qwen2_moe", "qwen3_moe", "qwen3_next", "qwen4_exp", "olmoe", "flex_olmo", "mellum", "lara_mini"],
        _softmax_if_asked,
    ),
    "jamba": _always(renormalize="no"),
    "dbrx": _p_norm,
    **dict.fromkeys(
        ["granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "aria", "jetmoe"], _always(**_SELECTED)
    ),
    "gpt_oss": _always(**_SELECTED, router_bias=True),
    "openai_privacy_filter": _privacy_filter,
    "cohere2_moe": _selected_by_config,
    "llama4": _always(**_SELECTED, score_function="sigmoid"),
    **dict.fromkeys(["deepseek_v2", "deepseek_ocr2", "unlimited_ocr"], _group_limited_softmax),
    "mistral4": _grouped_softmax,
    "mistral_large4": lambda config: {**_grouped_softmax(config), "renormalize": "before_drop"},
    **dict.fromkeys(
        [
            "deepseek_v3", "deepseek_v32", "glm4_moe", "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "glm5_next",
            "dots1", "dots3_note", "kimi_linear", "exaone_moe", "bailing_hybrid", "axk1", "hy_v4", "hy_v4_vl",
            "mimo_v2_flash", "nemotron_h", "solar_open",
        ],
        _deepseek_v3,
    ),
    "axk2": _zero_outside_groups,
    "beam": lambda config: {**_deepseek_v3(config), "scaling_factor": 1.0},
    "afmoe": _biased_sigmoid(1e-20, "route_scale", renormalize=True),
    "hy_v3": _biased_sigmoid(1e-20, "router_scaling_factor", renormalize=True),
    **dict.fromkeys(["minimax_m2", "minimax_m3_vl"], _biased_sigmoid(renormalize=True)),
    "laguna": _laguna,
    "lfm2_moe": _lfm2,
    "muse_spark": _muse_spark,
    "flint": _flint,
    "kolibri1": _kolibri,
    **dict.fromkeys(["ernie4_5_moe", "ernie4_5_vl_moe"], _ernie),
    **dict.fromkeys(["deepseek_v4", "inkling2_loop"], _scored_by_config),
}  # fmt: skip
"""The rule of each family, by `model_type`: a function of its configuration."""

NOT_TOP_K: dict[str, str] = {
    "doge": "product keys choose among experts of one neuron",
    "inkling": "routed and shared experts are normalised together",
    "inkling2": "routed and shared experts are normalised together",
    "longcat_flash": "some experts are the identity; see the router null_experts",
    "nllb_moe": "capacity with second-expert policies; see the router gshard",
    "phimoe": "sparsemixer samples the experts and estimates its own gradient",
    "switch_transformers": "capacity; see the router switch",
    "zaya": "the router carries a state from layer to layer",
}
"""The families whose routing is another algorithm, and which."""

_TOP_K_FIELDS = ("num_experts_per_tok", "top_k_experts", "moe_k", "moe_topk", "moe_top_k", "num_selected_experts")


def topk_options(config: Any) -> Options:
    """The options of `shunter.routers.create("topk", …)` that route as the family of a transformers configuration.

    Args:
        config: of a mixture-of-experts model, or of its text part.

    Raises:
        UserError: where the family is unknown, or its rule is not a top-k rule.

    >>> from transformers import Qwen3MoeConfig
    >>> topk_options(Qwen3MoeConfig(num_experts_per_tok=4))["top_k"]
    4
    """
    family = config.model_type
    for suffix in ("_text", "_thinker", "_talker", "_language"):
        family = family.removesuffix(suffix)
    if family in NOT_TOP_K:
        raise UserError(f"{family} does not route by a top-k rule: {NOT_TOP_K[family]}")
    if family not in RULES:
        raise UserError(f"the routing rule of {family!r} is not known; known: {', '.join(sorted(RULES))}")
    top_k = next((getattr(config, name) for name in _TOP_K_FIELDS if getattr(config, name, None)), None)
    if top_k is None:
        raise UserError(f"the configuration of {family} has none of the fields {', '.join(_TOP_K_FIELDS)}")
    return {"top_k": top_k, **RULES[family](config)}


_TRAINING_ONLY = (
    "balance_choices", "bias_update_rate", "dropout", "expert_dropout", "importance_loss", "init_scale",
    "input_dropout", "jitter", "load_balancing_loss", "policy", "sequence_balance_loss", "z_loss",
)  # fmt: skip
"""Options of a layer and its router that leave a model in evaluation as it is."""


def balance_here(coefficient: float, top_k: int, layers: int) -> float:
    """What a coefficient of transformers' balancing loss is to each layer's own, whose values add up.

    transformers has one loss of the rows of all layers together, in which the k choices of a token all count: at
    balance it is k, where ours is 1 in each layer (`shunter.losses.load_balancing_loss`, choices="mean").
    """
    return coefficient * top_k / layers


def _balance_there(router: TopK, layers: int) -> float:
    """The inverse of `balance_here`, and of the numbers that rounding makes the same the shortest."""
    coefficient, unit = router.coefficients["load_balancing_loss"], router.top_k
    if router.balance_choices == "all":  # at balance it is k here too
        coefficient *= router.top_k
    there = coefficient * layers / unit
    numbers = (float(f"{there:.{digits}g}") for digits in range(1, 17))
    return next((number for number in numbers if balance_here(number, unit, layers) == coefficient), there)


def router_of(config: Any, layers: int = 1) -> tuple[str, Options]:
    """The name and the options of the router that routes, and learns, as a family's configuration says.

    Args:
        config: of the family.
        layers: L, how many layers with experts the model has, over which it takes one balancing loss.

    Raises:
        UserError: where there is none.
    """
    options = topk_options(config)
    if options["top_k"] == 1 and options["renormalize"] != "no":
        raise UserError(
            f"{config.model_type} with one expert a token weighs it by the constant 1, through which no router learns: "
            "take a model with num_experts_per_tok of 2 or more, or norm_topk_prob=false where the family has it"
        )
    if options.get("selection_bias"):
        return "deepseek", options
    options["load_balancing_loss"] = balance_here(config.router_aux_loss_coef, options["top_k"], layers)
    if getattr(config, "router_jitter_noise", 0.0):
        options["jitter"] = config.router_jitter_noise
    return "topk", options


def routing_fields(family: str, router: Router, layers: int = 1) -> dict[str, Any]:
    """The fields of a family's configuration that route, and go on learning, as a router does.

    Args:
        family: its model_type.
        router: of a layer.
        layers: L, how many layers with such a router the model has.

    Raises:
        UserError: where the family cannot, saying why and what to change.
    """
    if router.kind not in (TopK, DeepSeek, Switch):
        raise UserError(
            f"{family} routes each token to its top k experts, which {router.kind.__name__} does not: keep Shunter's "
            "own format, or train with the router topk"
        )
    assert isinstance(router, TopK)
    config = AutoConfig.for_model(family)
    renormalised = router.renormalize != "no" or (router.score_function == "softmax" and router.score_after)
    for misfit in _misfits(router, topk_options(config)):
        raise UserError(f"{family} {misfit}")
    if not renormalised and not hasattr(config, "norm_topk_prob"):
        raise UserError(
            f"{family} always divides a token's weights by their sum; the router has renormalize='no': train with "
            "renormalize='before_drop'"
        )
    fields = {
        "num_experts_per_tok": router.top_k,
        "norm_topk_prob": renormalised,
        "n_group": router.expert_groups,
        "topk_group": router.top_groups,
        "routed_scaling_factor": router.scaling_factor,
        "router_aux_loss_coef": _balance_there(router, layers),
        "router_jitter_noise": router.jitter,
    }
    return {name: value for name, value in fields.items() if hasattr(config, name)}


def left_behind(family: str, options: Options) -> list[str]:
    """The options of a layer in force that a family's configuration has no field for; all are of training alone."""
    config = AutoConfig.for_model(family)
    kept = {"load_balancing_loss": "router_aux_loss_coef", "jitter": "router_jitter_noise"}
    lost = [name for name in _TRAINING_ONLY if not hasattr(config, kept.get(name, ""))]
    return [f"{name}={options[name]}" for name in lost if options.get(name)]


def _misfits(router: TopK, rule: Options) -> Iterator[str]:
    """What a router does otherwise than a family, whose rule is given, could say; and what to change."""
    if router.capacity_factor:
        yield (
            f"drops no token; the router has capacity_factor={router.capacity_factor}: set capacity_factor to null in "
            "the options of every layer of config.shunter, and evaluate the model so before you export it"
        )
    if router.bias is not None or router.input_scale is not None:
        yield "has a plain matrix as its router: train with router_bias=False and input_norm=False"
    if router.logit_scale != 1 or router.logit_cap is not None:
        yield "leaves the logits as they are: train with logit_scale=1 and logit_cap=None"
    if router.expert_scale is not None:
        yield "has no learned scale for each expert: train with per_expert_scale=False"
    if router.norm_order != 1 or max(router.norm_eps, router.norm_min) > _NEGLIGIBLE:
        yield "divides weights by their plain sum: train with norm_order=1, norm_eps=0 and norm_min=0"
    function, biased = rule.get("score_function", "softmax"), rule.get("selection_bias", False)
    if router.score_function != function:
        yield f"scores by {function}, the router by {router.score_function}: train with score_function={function!r}"
    if (router.selection_bias is not None) != biased:
        yield (
            f"{'needs a' if biased else 'has no'} selection bias; the router has selection_bias={not biased}: train "
            f"with selection_bias={biased}"
        )
    # The largest logits have the largest scores, but not when a bias is added to either.
    if biased and router.score_after:
        yield "selects by scores, the router by logits: train with score_after=False"
    if rule.get("group_score") == "top2_sum" and router.num_experts // router.expert_groups < 2:
        yield (
            "ranks groups by the sum of their best two experts, even where there is but one group: train with at least "
            "two experts a group"
        )
    elif router.top_groups < router.expert_groups:
        if "expert_groups" not in rule:
            yield "has no groups of experts: train with expert_groups=1"
        elif router.group_score != rule["group_score"]:
            yield "ranks groups by the sum of their best two experts: train with group_score='top2_sum'"
        elif router.outside_score is not None:
            yield (
                f"takes no expert outside a token's groups; the router has outside_score={router.outside_score}: train "
                "with outside_score=None"
            )
    if router.scaling_factor != 1 and "scaling_factor" not in rule:
        yield (
            f"does not scale a token's weights; the router has scaling_factor={router.scaling_factor}: train with "
            "scaling_factor=1"
        )


_NEGLIGIBLE = 1e-20
"""What DeepSeek-V3 itself adds to a sum of weights before it divides by it."""
