"""How the families of transformers route, in the words of Shunter's routers, and back.

Only what decides the function is translated exactly: which experts, with which weights. A rule that a family cannot
say is refused, with what to change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedConfig

from ..routers import Router
from ..routers.deepseek import DeepSeek
from ..routers.switch import Switch
from ..routers.topk import TopK

if TYPE_CHECKING:
    from .families import Family

__all__ = ["TRAINING_ONLY", "router_of", "routing_fields"]

TRAINING_ONLY = frozenset(
    {
        "balance_choices",
        "bias_update_rate",
        "importance_loss",
        "init_scale",
        "input_dropout",
        "policy",
        "sequence_balance_loss",
        "z_loss",
    }
)
"""Options of routers that no family has a field for and that leave a model in evaluation as it is."""

_NEGLIGIBLE = 1e-20
"""What DeepSeek-V3 itself adds to a sum of weights before it divides by it."""


def router_of(family: Family, config: PreTrainedConfig) -> tuple[str, dict[str, Any]]:
    """The name and the options of the router that routes as a sparse model's configuration says.

    Raises:
        ValueError: where there is none.
    """
    top_k = config.num_experts_per_tok
    normalises = config.norm_topk_prob if family.optional_norm else True
    if normalises and top_k == 1:
        raise ValueError(
            f"{family.name} with one expert a token weighs it by the constant 1, through which no router learns: take "
            "a model with num_experts_per_tok of 2 or more, or norm_topk_prob=false where the family has it"
        )
    options: dict[str, Any] = {"top_k": top_k, "renormalize": "before_drop" if normalises else "no"}
    if family.sigmoid:
        groups = config.n_group or 1
        options |= {"expert_groups": groups, "top_groups": config.topk_group or groups}
        return "deepseek", options | {"scaling_factor": config.routed_scaling_factor}
    options["load_balancing_loss"] = config.router_aux_loss_coef
    if getattr(config, "router_jitter_noise", 0.0):
        options["jitter"] = config.router_jitter_noise
    return "topk", options


def routing_fields(family: Family, router: Router) -> dict[str, Any]:
    """The fields of a family's configuration that route as a router does.

    Raises:
        ValueError: where the family cannot, saying why and what to change.
    """
    if type(router) not in (TopK, DeepSeek, Switch):
        raise ValueError(
            f"{family.name} routes each token to its top k experts, which {type(router).__name__} does not: keep "
            "Shunter's own format, or train with the router topk"
        )
    assert isinstance(router, TopK)
    for holds, why in _RULES:
        if not holds(router):
            raise ValueError(f"{family.name} {why(router)}")
    _check_scores(family, router)
    fields: dict[str, Any] = {"num_experts_per_tok": router.top_k}
    renormalised = router.renormalize != "no" or (router.score_function == "softmax" and router.score_after)
    if family.optional_norm:
        fields["norm_topk_prob"] = renormalised
    elif not renormalised:
        raise ValueError(
            f"{family.name} always divides a token's weights by their sum; the router has renormalize='no': train with "
            "renormalize='before_drop'"
        )
    if family.sigmoid:
        return fields | {
            "n_group": router.expert_groups,
            "topk_group": router.top_groups,
            "routed_scaling_factor": router.scaling_factor,
        }
    fields["router_aux_loss_coef"] = router.coefficients["load_balancing_loss"]
    if family.name == "mixtral":
        fields["router_jitter_noise"] = router.jitter
    return fields


def _check_scores(family: Family, router: TopK) -> None:
    function = "sigmoid" if family.sigmoid else "softmax"
    if router.score_function != function:
        raise ValueError(
            f"{family.name} scores by {function}, the router by {router.score_function}: train with "
            f"score_function={function!r}"
        )
    if (router.selection_bias is not None) != family.sigmoid:
        raise ValueError(
            f"{family.name} {'needs a' if family.sigmoid else 'has no'} selection bias; the router has "
            f"selection_bias={router.selection_bias is not None}: train with selection_bias={family.sigmoid}"
        )
    if family.sigmoid:
        if router.score_after:
            raise ValueError(f"{family.name} selects by scores, the router by logits: train with score_after=False")
        small = router.num_experts // router.expert_groups < 2
        if router.top_groups < router.expert_groups and (router.group_score != "top2_sum" or small):
            raise ValueError(
                f"{family.name} ranks groups by the sum of their best two experts: train with group_score='top2_sum' "
                "and at least two experts a group"
            )
        if router.top_groups < router.expert_groups and router.outside_score is not None:
            raise ValueError(
                f"{family.name} takes no expert outside a token's groups; the router has outside_score="
                f"{router.outside_score}: train with outside_score=None"
            )
        return
    if router.top_groups < router.expert_groups:
        raise ValueError(f"{family.name} has no groups of experts: train with expert_groups=1")
    if router.scaling_factor != 1:
        raise ValueError(
            f"{family.name} does not scale a token's weights; the router has scaling_factor={router.scaling_factor}: "
            "train with scaling_factor=1"
        )


_Holds = Callable[[TopK], bool]
_Why = Callable[[TopK], str]
_RULES: list[tuple[_Holds, _Why]] = [
    (
        lambda r: r.capacity_factor is None,
        lambda r: (
            f"drops no token; the router has capacity_factor={r.capacity_factor}: set capacity_factor to null in "
            "config.shunter, and evaluate the model so before you export it"
        ),
    ),
    (
        lambda r: r.bias is None and r.input_scale is None,
        lambda r: "has a plain matrix as its router: train with router_bias=False and input_norm=False",
    ),
    (
        lambda r: r.logit_scale == 1 and r.logit_cap is None,
        lambda r: "leaves the logits as they are: train with logit_scale=1 and logit_cap=None",
    ),
    (
        lambda r: r.expert_scale is None,
        lambda r: "has no learned scale for each expert: train with per_expert_scale=False",
    ),
    (
        lambda r: r.norm_order == 1 and r.norm_eps <= _NEGLIGIBLE and r.norm_min <= _NEGLIGIBLE,
        lambda r: "divides weights by their plain sum: train with norm_order=1, norm_eps=0 and norm_min=0",
    ),
]
