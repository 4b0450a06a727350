"""Llama 4's experts on Shunter's backends. transformers multiplies every token with every expert of these."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from ..experts import Weights, choose
from ..routing import Routing
from .architectures import known_activation

__all__ = ["use_experts"]


class _Experts(Llama4TextExperts):
    """Llama 4's experts, computing only the rows that its router left in: the others are zeros, and so are theirs."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Each expert's copy of the T tokens, (E T, d), scaled by its scores -> (E T, d)."""
        activation = known_activation(self.act_fn, gated=True)
        if activation is None:
            return super().forward(hidden_states)
        chosen = (hidden_states != 0).any(-1).nonzero().squeeze(1)
        rows = hidden_states[chosen]
        expert = chosen // (hidden_states.shape[0] // self.num_experts)
        weight = torch.ones(rows.shape[0], dtype=torch.promote_types(rows.dtype, torch.float32), device=rows.device)
        token = torch.arange(rows.shape[0], device=rows.device)
        routing = Routing(token, expert, weight, rows.shape[0], self.num_experts, check=False)
        weights = Weights(self.gate_up_proj.mT, self.down_proj.mT, activation=activation)
        out = choose("auto", rows, weights)[0].run(rows, weights, routing)
        return torch.zeros_like(hidden_states).index_copy(0, chosen, out)


def use_experts(model: PreTrainedModel) -> PreTrainedModel:
    """Run a model's experts on Shunter's backends, in place: `experts_implementation="shunter"`, and for Llama 4 too.

    Args:
        model: one of the families in docs/families.md.

    Returns:
        The same model.

    Raises:
        ValueError: where the model has no experts that Shunter can run.
    """
    llama4 = [module for module in model.modules() if type(module) in (Llama4TextExperts, _Experts)]
    for module in llama4:
        module.__class__ = _Experts
    if llama4:
        return model
    if not any("_apply_gate" in dir(module) and hasattr(module, "has_gate") for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has no experts that Shunter can run in place; docs/families.md lists the families"
        )
    model.set_experts_implementation("shunter")
    return model
