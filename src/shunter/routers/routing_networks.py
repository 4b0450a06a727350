"""Learned by reward: every task has an agent of its own, which is paid for working with the others."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from .. import losses
from ..context import NO_CONTEXT, Context
from ..ranks import sum_over_ranks
from ..routing import Routing
from .policy_gradient import Baseline, Decision, taken
from .reinforce import Reinforce

__all__ = ["RoutingNetworks"]

Policy = Literal["tabular", "linear"]
Learner = Literal["reinforce", "wpl"]


class RoutingNetworks(Reinforce):
    """Routing networks: the agent of the token's task draws a function block, an expert, and learns by its reward.

    Each layer has an agent for each task. Its return is the reward of the outcome (`shunter.give_reward`; the paper's
    is +1 for right and -1 for wrong, or minus the loss) and, for its own decision and those of the layers after it, the
    collaboration reward: rho times the share of all tasks' tokens that took the same block, by the running average,
    over the number of layers that decide. It leads tasks to share blocks.

    Args:
        num_tasks: how many tasks, and agents, there are; `task` ids are 0 to num_tasks - 1.
        policy: "tabular" (the agent has one distribution over blocks, whatever the token is) or "linear" (softmax of a
            linear map of the hidden state, through which no gradient goes).
        learner: how an agent learns from its returns: "reinforce", or "wpl", the paper's choice where agents share
            blocks: the Weighted Policy Learner. Its update of the probability pi(a) of the action that was taken is the
            return less the average that the task's agent had for that action, times 1 - pi(a) where that is positive,
            times pi(a) where it is negative. It is minus the gradient of the policy loss in pi(a); the softmax is in
            place of the projection on the simplex.
        return_decay: of the average returns of "wpl", which are zero at first and advance in `update`.
        collaboration: rho; 0.1 in the authors' code. 0 leaves the collaboration reward out.
        usage_decay: of the running average of the blocks' use, which advances in `update`.
        **options: of `Reinforce`; without a baseline, balance loss or entropy bonus.

    Raises:
        ValueError: where num_tasks is missing, a task id is out of range, policy or learner are unknown, rho is
            negative, a decay is not in [0, 1), "wpl" is given a baseline besides its average returns, or a tabular
            policy an option for the hidden states it does not read.

    Source: Rosenbaum et al. 2018 (Routing Networks: Adaptive Selection of Non-linear Functions for Multi-Task
    Learning), section 3 and algorithm 2; Abdallah and Lesser 2006 (Learning the Task Allocation Game) for "wpl".
    """

    source: ClassVar[str] = "Rosenbaum et al. 2018"
    example_options: ClassVar[dict[str, Any]] = {"num_tasks": 4}
    needs: ClassVar[tuple[str, ...]] = ("task",)

    usage: Tensor
    observed: Tensor
    returns: Tensor
    average_return: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        num_tasks: int | None = None,
        policy: Policy = "tabular",
        learner: Learner = "reinforce",
        return_decay: float = 0.9,
        collaboration: float = 0.1,
        usage_decay: float = 0.99,
        baseline: Baseline = "none",
        load_balancing_loss: float = 0.0,
        entropy_bonus: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        if num_tasks is None or num_tasks < 1:
            raise ValueError(f"routing_networks needs num_tasks=, the number of tasks; got {num_tasks}")
        if policy not in get_args(Policy):
            raise ValueError(f"policy {policy!r} is unknown; choose from {', '.join(get_args(Policy))}")
        if learner not in get_args(Learner):
            raise ValueError(f"learner {learner!r} is unknown; choose from {', '.join(get_args(Learner))}")
        if learner == "wpl" and baseline != "none":
            raise ValueError(f"routing_networks: wpl compares with average returns; leave baseline={baseline!r} out")
        if collaboration < 0 or not (0 <= usage_decay < 1 and 0 <= return_decay < 1):
            raise ValueError(
                f"routing_networks: collaboration {collaboration} must be at least 0, usage_decay {usage_decay} in "
                f"[0, 1), and return_decay {return_decay} likewise"
            )
        unread = [key for key in ("jitter", "router_bias", "input_norm") if options.get(key)]
        if policy == "tabular" and unread:
            raise ValueError(
                f"routing_networks: a tabular policy reads no hidden states, so {', '.join(unread)} would do nothing; "
                'leave it out, or take policy="linear"'
            )
        self.num_tasks = num_tasks
        self.policy = policy
        options.update(baseline=baseline, load_balancing_loss=load_balancing_loss, entropy_bonus=entropy_bonus)
        super().__init__(dim, num_experts, device=device, dtype=dtype, **options)
        self.table: nn.Parameter | None = None
        if policy == "tabular":
            self.register_parameter("weight", None)
            self.table = nn.Parameter(torch.zeros(num_tasks, num_experts, device=device, dtype=dtype))
        self.collaboration = collaboration
        self.usage_decay = usage_decay
        even = torch.full((num_experts,), 1 / num_experts, dtype=torch.float32, device=device)
        self.register_buffer("usage", even)
        self.register_buffer("observed", torch.zeros_like(even), persistent=False)
        self.learner = learner
        self.return_decay = return_decay
        if learner == "wpl":
            agents = torch.zeros(num_tasks, num_experts, dtype=torch.float32, device=device)
            self.register_buffer("average_return", agents)
            # Sum and number of the returns of each agent's actions since the last update.
            self.register_buffer("returns", torch.zeros(2, *agents.shape, device=device), persistent=False)

    @property
    def num_rows(self) -> int:
        """E for each task."""
        return self.num_tasks * self.num_experts

    def project(self, x: Tensor, context: Context) -> Tensor:
        """The logits (T, E) of the agent of each token's task."""
        task = self.require(context, "task", self.num_tasks)
        if self.table is not None:
            return self.table.to(x.dtype)[task]
        agents = super().project(x.detach(), context).unflatten(-1, (self.num_tasks, self.num_experts))
        return agents[torch.arange(x.shape[0], device=x.device), task]

    def action_reward(self, decision: Decision, decisions: int) -> Tensor | None:
        """The collaboration reward (T,): rho times the use of each token's block, over the number of decisions."""
        if not self.collaboration:
            return None
        use = taken(decision.routing).to(self.usage.dtype) @ self.usage
        return self.collaboration / decisions * use

    def reward_losses(self, decision: Decision, reward: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """The weighted losses by name that a reward (T,) makes of a decision, by REINFORCE or as WPL has it."""
        if self.learner == "reinforce":
            return super().reward_losses(decision, reward, mask)
        task = self.require(decision.context, "task", self.num_tasks)
        action = taken(decision.routing)
        rewarded = action if mask is None else action & mask[:, None]
        reward = reward.detach().to(decision.logits.dtype)
        for total, value in zip(self.returns, (reward, torch.ones_like(reward)), strict=True):
            total.index_add_(0, task, torch.where(rewarded, value[:, None], 0).to(total.dtype))
        chance = (decision.logits.softmax(-1) * action).sum(-1)
        better = reward - (self.average_return[task].to(reward.dtype) * action).sum(-1)
        weight = torch.where(better < 0, chance, 1 - chance).detach()
        loss = losses.mean_over_tokens(-chance * better * weight, mask)
        return {"policy_loss": self.reward_coefficients["policy_loss"] * loss}

    def observe(self, logits: Tensor, routing: Routing, context: Context = NO_CONTEXT) -> None:
        """Count the tokens that took each block for the next `update`."""
        self.observed += routing.demand

    def update(self) -> None:
        """Take the blocks' shares of the tokens since the last update, of all ranks, into the running average.

        The returns of agents that learn by "wpl" likewise.
        """
        sum_over_ranks(self.observed, group=self.process_group)
        total = self.observed.sum()
        if total > 0:
            self.usage.lerp_(self.observed / total, 1 - self.usage_decay)
        self.observed.zero_()
        if self.learner == "wpl":
            sum_over_ranks(self.returns, group=self.process_group)
            total, number = self.returns
            mean = torch.where(number > 0, total / number.clamp_min(1), self.average_return)
            self.average_return.lerp_(mean, 1 - self.return_decay)
            self.returns.zero_()
