"""A sparse model's folder and held-out data in, a model of the same family with fewer experts out, with both losses.

Which experts stay is decided layer by layer from what each of them does on the data: how often it is chosen, what it
adds, or what its outputs are like. What a model larger than memory needs comes from disk, a module at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import psutil
import torch
from torch import Tensor, nn

from ..analysis.inspect.inspecting import load, material_for
from ..analysis.inspect.material import Batch, Material
from ..analysis.inspect.recording import batch_losses
from ..durable import aside, check_new_folder, make_folder
from ..environment import Memory
from ..errors import UserError
from ..hf.checkpoints import converting
from ..hf.checkpoints.converting import convert, megabytes
from ..hf.checkpoints.folders import local_folder
from ..hf.checkpoints.loading import load_folder
from ..hf.checkpoints.reading import Checkpoint
from ..hf.checkpoints.shrinking import Shrinking
from ..hf.observe.listening import Observation, listening
from ..hf.observe.taps import Tap
from ..recomputation import recomputing
from ..routing import Routing

__all__ = ["METHODS", "Doing", "Method", "choose", "describe", "look", "merge", "prune"]

Method = Literal["random", "use", "reap", "merge"]

METHODS: dict[Method, str] = {
    "random": "experts that are drawn",
    "use": "the experts that most tokens choose (Kim et al. 2021)",
    "reap": "the experts that add most: the mean over an expert's tokens of its weight times the norm of its output "
    "(Lasby et al. 2025, REAP)",
    "merge": "groups of experts with similar mean outputs, each their mean by use (Chen et al. 2024, HC-SMoE)",
}


def prune(
    model: str | Path,
    out: str | Path,
    keep: int,
    method: Method = "reap",
    *,
    data: Sequence[str] | None = None,
    material: Material | None = None,
    tokens: int = 16384,
    length: int = 128,
    seed: int = 0,
    check: bool = True,
    offload: bool | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> dict[str, Any]:
    """Write a model of the same family with fewer experts in each layer, which what loaded the old one loads.

    A router goes on with the rows of the experts that stay, so that a token whose experts all stay has the same ones.
    Where weights are renormalised over the choice, an expert that no token chooses leaves without a trace; where they
    are shares of a softmax over all experts, what it had goes to the others.

    Args:
        model: the folder of a mixture of experts of transformers or of Shunter, or its name on the Hugging Face Hub.
        out: the folder to make; it appears when it is whole.
        keep: how many experts stay in each layer.
        method: a key of `METHODS`; ties stay by the lower number.
        data: held-out data as `shunter.data.documents.read_domains` takes it, or images; None takes the built-in text.
            One half of it chooses, on the other the loss is measured before and after.
        material: batches in place of data.
        tokens: how many of the data.
        length: of a window of text.
        seed: of method "random".
        check: measure the losses.
        offload: keep the weights on disk while the model runs, and in memory one module's; None does where they would
            take more than half of the memory that is free.
        max_shard_bytes: of a file.

    Returns:
        What receipt.json in the new folder holds: of each layer, of which old experts each new one is, and how much;
        what became of each tensor; the losses; the peak of memory.

    Raises:
        UserError: for fewer experts than a token takes, or a number that the router's groups do not divide; for
            families whose experts cannot be told apart; for damaged folders and an `out` that exists. Nothing is left
            behind.
        NotWritten: where `out` cannot be made, before the work begins, or the disk is full.

    Source: Kim et al. 2021 (Z-code M3), section 3.3; Lasby et al. 2025 (REAP); Chen et al. 2024 (HC-SMoE).
    """
    memory = Memory()
    if method not in get_args(Method):
        raise UserError(f"prune: method {method!r} is unknown; choose from {', '.join(METHODS)}")
    with ExitStack() as stack:
        folder = local_folder(model)
        size = Checkpoint(folder).nbytes if (folder / "config.json").is_file() else 0
        if offload or (offload is None and size > psutil.virtual_memory().available / 2):
            make_folder(Path(out).parent)
            options: dict[str, Any] = {
                "device_map": {"": "disk"},
                "offload_folder": str(stack.enter_context(aside(Path(out)))),
            }
        else:
            options = {}
        subject = load(str(model), **options)
        shrinking = Shrinking.open(subject.folder, keep)
        check_new_folder(Path(out))
        material = material or material_for(subject, data, tokens, length)
        choosing, judging = material.batches[::2], material.batches[1::2] or material.batches
        found = look(subject.model, choosing, method, memory)
        mixes = {
            name: choose(found.get(name), tap, keep, shrinking.groups, method, seed)
            for name, tap in shrinking.layers.items()
        }
        before = _loss(subject.model, judging) if check else None
        del subject

        def measure(new: Path) -> dict[str, Any]:
            memory.note()
            return {"loss_before": before, "loss_after": _loss(load_folder(new, **options), judging)}

        facts = {
            "method": method,
            "options": {"keep": keep, "seed": seed, "tokens": material.tokens, "offload": bool(options)},
            "layers": {name: _describe(mix) for name, mix in mixes.items()},
        }
        plan = shrinking.plan(mixes, facts, measure)
        return convert("prune", plan, Path(out), memory, check and before is not None, max_shard_bytes)


def describe(receipt: dict[str, Any]) -> str:
    """A receipt of `prune` in words."""
    options, check = receipt["options"], receipt["check"]
    sizes = {sum(len(of) for of in layer["of"]) + len(layer["left_out"]) for layer in receipt["layers"].values()}
    lines = [
        f"{options['keep']} of {max(sizes)} experts in each of {len(receipt['layers'])} layers, method "
        f"{receipt['method']}; {converting.loader_of(receipt)} loads it.",
        f"{megabytes(receipt['bytes_before'])} became {megabytes(receipt['bytes'])}; peak memory "
        f"{megabytes(receipt['peak_bytes'])}.",
    ]
    if check:
        before, after = check["loss_before"], check["loss_after"]
        lines.append(
            f"Loss on the other half of the data: {before:.4f} before, {after:.4f} after ({after - before:+.4f})."
        )
    return "\n".join(lines)


@dataclass
class Doing:
    """What the experts of a layer did on some tokens.

    Attributes:
        count: (E,) float64, how many tokens chose each.
        added: (E,) float64, the sum over these of the weight times the norm of the output.
        output: (E, d) float64, the sum of the outputs for all tokens, chosen or not; None where it was not asked for.
    """

    count: Tensor
    added: Tensor
    output: Tensor | None = None


@torch.no_grad()
def look(model: nn.Module, batches: Sequence[Batch], method: Method, memory: Memory | None = None) -> dict[str, Doing]:
    """What the experts of each layer do on some batches, as far as a method asks; empty for method "random".

    Raises:
        UserError: where the outputs are asked for of experts that cannot be called one by one.
    """
    found: dict[str, Doing] = {}
    if method == "random":
        return found

    def hear(name: str, seen: Observation) -> None:
        found[name].count += seen.routing.counts[: len(found[name].count)].double().cpu()

    def compute(tap: Tap, module: nn.Module, args: Any, kwargs: Any) -> None:
        if recomputing():
            return
        call, doing = _call_of(tap, args, kwargs), found[tap.name]
        if method == "reap":
            norms = call.outputs(call.token, call.expert).double().norm(dim=-1)
            doing.added.index_add_(0, call.expert.cpu(), (norms * call.weight.double()).cpu())
        else:
            everyone = torch.arange(len(call.x), device=call.x.device)
            if doing.output is None:
                doing.output = torch.zeros(tap.num_weights, call.x.shape[-1], dtype=torch.float64)
            for e in range(tap.num_weights):
                doing.output[e] += call.outputs(everyone, torch.full_like(everyone, e)).double().sum(0).cpu()

    model.eval()
    with ExitStack() as stack:
        heard = stack.enter_context(listening(model, hear))
        for name, tap in heard.items():
            found[name] = Doing(*torch.zeros(2, tap.num_weights, dtype=torch.float64))
            if method != "use":
                module: Any = tap.experts if tap.own is None else tap.own.experts
                if module is None:
                    raise UserError(
                        f"prune: the experts of {tap.name} cannot be called one by one, which method {method} does; "
                        "take use or random"
                    )
                hook = module.register_forward_pre_hook(partial(compute, tap), with_kwargs=True)
                stack.callback(hook.remove)
        for batch in batches:
            batch_losses(model, batch)  # type: ignore[arg-type]
            if memory is not None:
                memory.note()
    return found


@dataclass
class _Call:
    """One call of a layer's experts: x (T, d), and of each choice the token, the expert and the weight, each (N,)."""

    module: Any
    own: bool
    num_experts: int
    x: Tensor
    token: Tensor
    expert: Tensor
    weight: Tensor

    def outputs(self, token: Tensor, expert: Tensor) -> Tensor:
        """What experts make of tokens, unweighted: (N,) and (N,) -> (N, d)."""
        rows, one = (
            self.x.index_select(0, token),
            torch.ones(len(token), 1, device=self.x.device, dtype=self.weight.dtype),
        )
        forward = self.module.forward  # not the module, whose hooks these numbers come from
        if self.own:
            routing = Routing.from_topk(expert[:, None], one.float(), self.num_experts, check=False)
            out: Tensor = forward(rows, routing)
            return out
        out = forward(rows, expert[:, None], one)
        return out.reshape(rows.shape)  # DBRX takes the first axis for sequences


def _call_of(tap: Tap, args: Any, kwargs: Any) -> _Call:
    given = [*args, *kwargs.values()]
    if tap.own is not None:
        x, routing = given
        return _Call(tap.own.experts, True, tap.num_experts, x, routing.token, routing.expert, routing.weight)
    x, index, weight = given
    if index.dim() == 3:
        raise UserError(f"prune: the experts of {tap.name} take one-hot choices; take method use or random")
    x, weight = x.reshape(-1, x.shape[-1]), weight.reshape(-1, weight.shape[-1])
    here = (index >= 0) & (index < tap.num_weights)
    token, place = here.nonzero(as_tuple=True)
    return _Call(tap.experts, False, tap.num_weights, x, token, index[token, place], weight[token, place])


def choose(found: Doing | None, tap: Tap, keep: int, groups: int, method: Method, seed: int) -> Tensor:
    """(keep, E) float64: how much of each old expert is in each new one; rows sum to 1, and groups stay in order.

    Args:
        found: what the layer's experts did; None for method "random".
        tap: the layer.
        keep: how many stay, a multiple of the groups.
        groups: equal groups of successive experts, of which as many of each stay.
        method: a key of `METHODS`.
        seed: of "random", with the layer's name.
    """
    size, part = tap.num_weights, tap.num_weights // groups
    if method == "random":
        generator = torch.Generator().manual_seed(seed + sum(map(ord, tap.name)))
        score = torch.rand(size, generator=generator)
    else:
        assert found is not None
        score = found.count if method == "use" else found.added / found.count.clamp_min(1)
    rows = torch.zeros(keep, size, dtype=torch.float64)
    for group in range(groups):
        inside = torch.arange(group * part, (group + 1) * part)
        first = group * (keep // groups)
        if method == "merge":
            assert found is not None and found.output is not None
            mix = merge(found.output[inside], found.count[inside], keep // groups)
            rows[first : first + len(mix)][:, inside] = mix
        else:
            best = score[inside].argsort(descending=True, stable=True)[: keep // groups].sort().values
            rows[torch.arange(first, first + len(best)), inside[best]] = 1
    return rows


def merge(output: Tensor, count: Tensor, keep: int) -> Tensor:
    """(keep, E): groups of experts whose outputs are alike, each the mean of its experts by use.

    Hierarchical clustering of the outputs by the mean distance between the members of two groups; of equal distances
    the groups with the lower numbers join.

    Args:
        output: (E, d) float64, the sum of each expert's outputs over the same tokens.
        count: (E,) how many tokens chose each; a group that none chose is the plain mean.
        keep: how many groups.

    Source: Chen et al. 2024 (Retraining-Free Merging of Sparse MoE via Hierarchical Clustering), section 3.
    """
    members = [[e] for e in range(len(output))]
    # Not by products, by which equal ones of more than 25 have a distance.
    distance = torch.cdist(output, output, compute_mode="donot_use_mm_for_euclid_dist")
    while len(members) > keep:
        best = min(
            ((float(distance[a][:, b].mean()), i, j) for i, a in enumerate(members) for j, b in enumerate(members[:i])),
            key=lambda found: (found[0], found[2], found[1]),
        )
        members[best[2]] = sorted(members[best[2]] + members.pop(best[1]))
    rows = torch.zeros(keep, len(output), dtype=torch.float64)
    for row, group in zip(rows, sorted(members), strict=True):
        shares = count[group].double()
        row[group] = shares / shares.sum() if bool(shares.any()) else 1 / len(group)
    return rows


def _describe(mix: Tensor) -> dict[str, Any]:
    groups = [row.nonzero().flatten().tolist() for row in mix]
    left = (mix.sum(0) == 0).nonzero().flatten().tolist()
    shares = [row[group].tolist() for row, group in zip(mix, groups, strict=True)]
    return {"of": groups, "shares": shares, "left_out": left}


def _loss(model: Any, batches: Sequence[Batch]) -> float | None:
    """The mean cross-entropy in nats over the targets of some batches; None for a model that has no logits for them."""
    parts = [batch_losses(model, batch) for batch in batches]
    if any(part is None for part in parts):
        return None
    nats = torch.cat([part for part in parts if part is not None]).double()
    return float(nats[~nats.isnan()].mean())
