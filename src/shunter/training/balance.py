"""Load balancing in any training: decisions in, losses of each layer, moved selection biases, metrics, warnings out.

transformers has a balancing loss for some of its families, over all layers together, so that two layers that each use
half of the experts look balanced; it has no z-loss for most, and it never updates the selection biases of the
DeepSeek-V3 families. `Balance` does all three for any of them, and for Shunter's layers, in a plain loop; `trainer.py`
in a `Trainer`.
"""

from __future__ import annotations

import math
import warnings
from contextlib import ExitStack
from typing import Any, Literal, Self, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import losses
from ..context import Context
from ..hf.observe.listening import Observation, listening
from ..hf.observe.taps import Tap
from ..metrics import balance, dead, normalised_entropy
from ..moe import RoutedLayer, update_routers
from ..ranks import is_first_rank, sum_over_ranks
from .alarms import LoadAlarm

__all__ = ["Balance", "BalanceWarning"]

Scope = Literal["micro_batch", "sequence", "global_batch"]

_BIAS_NAMES = ("e_score_correction_bias", "expert_bias", "balancing_biases")


class BalanceWarning(UserWarning):
    """An expert that gets no tokens, or a layer whose tokens gather on few experts."""


class Balance:
    """The load balance of any mixture-of-experts model's experts, transformers' or Shunter's, in a plain loop.

        balance = Balance(load_balancing_loss=0.01).attach(model)
        for batch in data:
            (model(**batch).loss + balance.loss()).backward()
            optimizer.step()
            balance.step()

    What counts is each training forward over its real tokens, once: evaluation, padding and the recomputations of
    activation checkpointing do not. On several ranks every rank must run the same forwards.

    Args:
        load_balancing_loss: coefficient of each layer's `shunter.losses.load_balancing_loss`; the layers' add up. In
            Shunter's layers it takes the place of the router's own.
        z_loss: coefficient of each layer's `shunter.losses.z_loss`; likewise.
        scope: over which tokens the shares f of the experts are taken: "micro_batch", those of one forward on one rank;
            "sequence", each sequence by itself (DeepSeek-V3, equations 17 to 20); "global_batch", all ranks and the
            micro-batches of the optimizer step so far (Qiu et al. 2025), which lets one domain use few experts.
        bias_update_rate: how much a selection bias moves each optimizer step, up for an expert with less than the mean
            load and down for one with more (Wang et al. 2024, algorithm 1). It is for the families whose checkpoints
            have such a bias, which is made float32; 0 leaves them. Shunter's routers have a rate of their own.
        score_function: what the routers make of logits, a key of `shunter.hf.observe.taps.SCORE_FUNCTIONS`; None reads
            it off the weights.
        patience: over how many optimizer steps an expert without tokens, or a layer whose tokens gather, is watched
            before a `BalanceWarning`.

    Attributes:
        biases: the selection biases that `step` moves, by layer.

    Raises:
        ValueError: for values out of range.

    Source: Fedus et al. 2021 (Switch), equations 4 to 6; Zoph et al. 2022 (ST-MoE), equation 5; Wang et al. 2024.
    """

    def __init__(
        self,
        load_balancing_loss: float = 0.01,
        z_loss: float = 0.0,
        *,
        scope: Scope = "micro_batch",
        bias_update_rate: float = 0.001,
        score_function: str | None = None,
        patience: int = 25,
    ) -> None:
        for name, value in (
            ("load_balancing_loss", load_balancing_loss),
            ("z_loss", z_loss),
            ("bias_update_rate", bias_update_rate),
        ):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{type(self).__name__}: {name} {value} must be a number of at least 0")
        if scope not in get_args(Scope):
            raise ValueError(
                f"{type(self).__name__}: scope {scope!r} is unknown; choose from {', '.join(get_args(Scope))}"
            )
        if patience < 1:
            raise ValueError(f"{type(self).__name__}: patience {patience} must be at least 1")
        self.coefficients = {"load_balancing_loss": load_balancing_loss, "z_loss": z_loss}
        self.scope = scope
        self.bias_update_rate = bias_update_rate
        self.score_function = score_function
        self.patience = patience
        self._attached: ExitStack | None = None
        self._begin_anew({})

    def _begin_anew(self, found: dict[str, Tap]) -> None:
        """The state of a training that has not begun, of these layers."""
        self._taps = found
        self._grad: bool | None = None
        self._heard: list[tuple[str, Observation]] = []
        self._loads: dict[str, Tensor] = {}
        self._demand: dict[str, Tensor] = {}
        self._alarm = LoadAlarm(self.patience)
        self._reset_window()
        self.biases: dict[str, Tensor] = {}
        if self.bias_update_rate:
            self.biases = {name: bias for name, tap in found.items() if (bias := _find_bias(tap)) is not None}

    def attach(self, model: nn.Module) -> Self:
        """Listen to the layers of a model from now on; returns itself.

        Raises:
            RuntimeError: where it listens already.
            ValueError: where the model has no layer whose routing can be read.
        """
        if self._attached is not None:
            raise RuntimeError(f"{type(self).__name__}: attached already; call detach() first")
        with ExitStack() as stack:
            found = stack.enter_context(listening(model, self._hear))
            stack.callback(model.register_forward_pre_hook(self._begin).remove)
            for tap in found.values():
                tap.score_function = self.score_function
                if tap.own is not None:
                    self._take_over(tap.own, stack)
            self._attached = stack.pop_all()
        if getattr(getattr(model, "config", None), "output_router_logits", False):
            warnings.warn(
                "config.output_router_logits is True: transformers adds its own balancing loss, over all layers "
                "together, to this callback's; set it to False (in TRL's configurations router_aux_loss_coef=0.0)",
                stacklevel=2,
            )
        self._model = model
        self._begin_anew(found)
        return self

    def detach(self) -> None:
        """Stop listening; Shunter's layers have their own losses again."""
        if self._attached is not None:
            self._attached.close()
            self._attached = None

    def _take_over(self, layer: RoutedLayer, stack: ExitStack) -> None:
        own = layer.decider.coefficients
        for name, coefficient in self.coefficients.items():
            if coefficient and own.get(name):
                stack.callback(own.__setitem__, name, own[name])
                own[name] = 0.0

    def _begin(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._grad = torch.is_grad_enabled()

    def _hear(self, name: str, heard: Observation) -> None:
        layer = self._taps[name].layer
        grad = torch.is_grad_enabled() if self._grad is None else self._grad
        if not (layer.training and grad):
            return
        counts = heard.routing.counts
        self._loads[name] = self._loads[name] + counts if name in self._loads else counts
        if heard.logits is None or not any(self.coefficients.values()):
            return
        if heard.logits.requires_grad:
            self._heard.append((name, heard))
            return
        router = self._taps[name].router
        if router is not None and any(p.requires_grad for p in router.parameters()):
            raise RuntimeError(
                f"the balancing losses of {name or 'the layer'} would carry no gradient: its forward ran without "
                "autograd. Under activation checkpointing pass use_reentrant=False; for an evaluation call model.eval()"
            )

    def loss(self) -> Tensor:
        """The weighted losses of the training forwards since the last call, a scalar in the graph.

        A sum over layers and losses; of a layer's several forwards, their mean. Zero after an evaluation.
        """
        heard, self._heard = self._heard, []
        if self.scope == "global_batch":
            self._add_demand(heard)
        forwards = {name: sum(n == name for n, _ in heard) for name, _ in heard}
        terms = []
        for name, observation in heard:
            for loss, value in self._terms(name, observation).items():
                self._window[loss].setdefault(name, []).append(value.detach())
                terms.append(self.coefficients[loss] * value / forwards[name])
        if not terms:
            parameter = next(self._model.parameters(), torch.zeros(()))
            return torch.zeros((), device=parameter.device)
        return torch.stack([term.to(terms[0]) for term in terms]).sum()

    def _terms(self, name: str, heard: Observation) -> dict[str, Tensor]:
        """The unweighted losses of one forward of one layer whose coefficients are not zero."""
        terms: dict[str, Tensor] = {}
        logits, probs = heard.logits, heard.probs
        if logits is None or probs is None:
            return terms
        if self.coefficients["load_balancing_loss"]:
            group = heard.sequence if self.scope == "sequence" else None
            if self.scope == "sequence" and group is None:
                raise ValueError(
                    f'{type(self).__name__}: the sequences of {name} are not known; use scope="micro_batch"'
                )
            terms["load_balancing_loss"] = losses.load_balancing_loss(
                probs, heard.routing, heard.mask, group=group, demand=self._demand.get(name)
            )
        if self.coefficients["z_loss"]:
            own = self._taps[name].own
            if own is not None:
                context = Context(mask=heard.mask)
                terms["z_loss"] = own.decider.loss_terms(logits, heard.routing, context)["z_loss"]()
            else:
                terms["z_loss"] = losses.z_loss(logits.to(probs.dtype), heard.mask)
        return terms

    def _add_demand(self, heard: list[tuple[str, Observation]]) -> None:
        counts: dict[str, Tensor] = {}
        for name, observation in heard:
            counts[name] = counts.get(name, 0) + observation.routing.counts
        for name, total in self._summed_over_ranks(counts).items():
            self._demand[name] = self._demand.get(name, 0) + total

    def _summed_over_ranks(self, counts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Counts (E,) by layer over all ranks, in one reduction; a rank that heard no token of a layer adds none."""
        if not (dist.is_available() and dist.is_initialized()):
            return counts
        device = next(self._model.parameters()).device
        none = {name: torch.zeros(tap.num_experts, dtype=torch.int64) for name, tap in self._taps.items()}
        every = {name: counts.get(name, zeros).to(device, copy=True) for name, zeros in none.items()}
        sum_over_ranks(*every.values())
        return every

    def step(self) -> None:
        """End an optimizer step: move the selection biases and Shunter's routers, watch for dead experts."""
        loads = self._summed_over_ranks(self._loads)
        self._loads, self._demand, self._heard = {}, {}, []
        for name, load in loads.items():
            bias = self.biases.get(name)
            if bias is not None and bias.numel() == load.numel():
                with torch.no_grad():
                    share = load.to(bias)
                    bias += self.bias_update_rate * (share.mean() - share).sign().reshape(bias.shape)
            known = self._window_loads.get(name)
            self._window_loads[name] = load if known is None else known + load
            self._watch(name, load)
        update_routers(self._model)

    def forget(self) -> None:
        """End an optimizer step that was skipped: nothing moves, and its forwards do not count."""
        self._loads, self._demand, self._heard = {}, {}, []

    def _watch(self, name: str, load: Tensor) -> None:
        """Warn once of each dead expert and each collapse, again only after it was well in between."""
        new = self._alarm.note(name, load, self._taps[name].top_k or 1)
        if new and is_first_rank():
            more = "" if len(new) <= 3 else f"; and {len(new) - 3} more experts of this layer"
            advice = "raise load_balancing_loss or bias_update_rate, or lower the learning rate of the router"
            warnings.warn("; ".join(new[:3]) + f"{more}. {advice}", BalanceWarning, stacklevel=4)

    def metrics(self) -> dict[str, float]:
        """What happened since the last call: percentiles over layers, so that the keys are few in a model of any depth.

        balance/load_balancing_loss_p50 and _max, balance/z_loss_max: the unweighted losses, on this rank.
        balance/max_violation_p50 and _max: the load of the busiest expert over the mean load, less 1 (Wang et al. 2024,
        MaxVio). balance/entropy_p50 and _min: the entropy of the load over that of an even one. balance/dead_experts:
        how many experts got no token, in all layers. Loads are those of all ranks.
        """
        out: dict[str, float] = {}
        for loss, by_layer in self._window.items():
            values = torch.tensor([float(torch.stack(terms).mean()) for terms in by_layer.values()])
            if values.numel():
                if loss == "load_balancing_loss":
                    out[f"balance/{loss}_p50"] = float(values.median())
                out[f"balance/{loss}_max"] = float(values.max())
        loads = [load.double().cpu() for load in self._window_loads.values() if float(load.sum()) > 0]
        if loads:
            violation = torch.stack([balance(load) - 1 for load in loads])
            even = torch.stack([normalised_entropy(load) for load in loads])
            out["balance/max_violation_p50"] = float(violation.median())
            out["balance/max_violation_max"] = float(violation.max())
            out["balance/entropy_p50"] = float(even.median())
            out["balance/entropy_min"] = float(even.min())
            out["balance/dead_experts"] = float(sum(int(dead(load, below=0).sum()) for load in loads))
        self._reset_window()
        return out

    def _reset_window(self) -> None:
        self._window: dict[str, dict[str, list[Tensor]]] = {name: {} for name, c in self.coefficients.items() if c}
        self._window_loads: dict[str, Tensor] = {}


def _find_bias(tap: Tap) -> Tensor | None:
    """The selection bias of a layer of transformers, made float32; None where it has none for its experts alone."""
    if tap.own is not None:
        return None
    for module in tap.layer.modules():
        for name in _BIAS_NAMES:
            bias = getattr(module, name, None)
            if isinstance(bias, Tensor) and bias.numel() == tap.num_experts:
                # Steps of 0.001 vanish in the rounding of bfloat16.
                bias.data = bias.data.float()
                bias.requires_grad_(False)
                return bias
    return None
