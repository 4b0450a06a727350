"""The sparse layer and its kin: hidden states to hidden states by a router and experts; a model's layers together."""

from .calls import mark
from .layer import MoE
from .routed_layer import RoutedLayer, moe_layers, must_not_leak
from .whole_model import aux_loss, dropless, expect_steps, give_reward, plain_experts, tell, update_routers

__all__ = [
    "MoE",
    "RoutedLayer",
    "aux_loss",
    "dropless",
    "expect_steps",
    "give_reward",
    "mark",
    "moe_layers",
    "must_not_leak",
    "plain_experts",
    "tell",
    "update_routers",
]
