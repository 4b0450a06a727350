"""A model whose experts go by task, domain or language to the dense model of one of these, which transformers loads.

All tokens of a task have the same experts with the same weights, so that these are one dense block: their hidden units
side by side, each expert's part of the second matrix times its weight.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...context import Context
from ...durable import check_new_folder, new_folder
from ...environment import VERSION
from ...errors import UserError
from ...experts import Experts
from ...moe import MoE, tell
from ...routers.fixed import Domain, Language
from ...routers.task import Task
from ..blocks import FeedForward, find_feed_forwards
from ..config_file import forget_layers
from .check import probe
from .folders import local_folder, model_class, on_meta
from .formats import made_here
from .layouts import layers_of, must_be_blocks
from .loading import load_folder
from .writing import copy_companions

__all__ = ["describe", "extract"]

_KINDS: dict[str, type] = {"task": Task, "domain": Domain, "language": Language}
_WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim")


@torch.no_grad()
def extract(model: str | Path, out: str | Path, kind: str, number: int) -> dict[str, Any]:
    """Write the dense model that a sparse one is for one task, domain or language.

    Args:
        model: the folder of a model that `sparsify` made with the router task, domain or language in every layer.
        out: the folder to make; it appears when it is whole.
        kind: "task", "domain" or "language".
        number: which of them.

    Returns:
        What receipt.json in the new folder holds: of each layer the experts and their weights, and how far its logits
        are from the sparse model's.

    Raises:
        UserError: for other models, an `out` that exists, and where the two models compute differently.

    Source: Kudugunta et al. 2021 (Beyond Distillation: Task-level Mixture-of-Experts), section 3; Fedus et al. 2022,
    section 7.3.
    """
    folder = local_folder(model)
    check_new_folder(Path(out))
    sparse: Any = load_folder(folder)
    if not made_here(sparse.config):
        raise UserError(f"extract: {folder} is not a model that shunter.sparsify made, whose experts go by {kind}")
    must_be_blocks(sparse)
    chosen = {path: _experts_of(path, layer, kind, number) for path, layer in layers_of(sparse).items()}
    blocks = {path: _block(layer, chosen[path]) for path, layer in layers_of(sparse).items()}
    dense = _dense(sparse, folder, max(len(down[0]) for _, _, down, _ in blocks.values()))
    places = {block.path: block for stack in find_feed_forwards(dense) for block in stack}
    ours = sparse.state_dict()
    for name, tensor in dense.state_dict().items():
        if name in ours:
            _put(tensor, ours[name])
    for path, block in blocks.items():
        _write(places[path], *block)
    inputs = probe(sparse)
    with tell(sparse, **{kind: torch.tensor(number)}):
        expected = sparse(**inputs).logits.double()
    found = dense.eval()(**inputs).logits.double()
    difference, size = float((found - expected).abs().max()), float(expected.abs().max())
    if not difference <= 1e-3 * size + 1e-6 and dense.dtype == torch.float32:
        raise UserError(f"extract: the logits differ by {difference:.3g}, of {size:.3g}: the function was not kept")
    receipt = {
        "made_by": f"shunter {VERSION} extract",
        "of": {kind: number},
        "layers": {path: [list(pair) for pair in pairs] for path, pairs in chosen.items()},
        "parameters": {"before": sparse.num_parameters(), "after": dense.num_parameters()},
        "max_difference": difference,
        "max_logit": size,
    }
    with new_folder(Path(out)) as new:
        dense.save_pretrained(new)
        copy_companions(folder, new)
        (new / "receipt.json").write_text(json.dumps(receipt, indent=1) + "\n", encoding="utf-8")
    return receipt


def describe(receipt: dict[str, Any]) -> str:
    """A receipt of `extract` in words."""
    (kind, number), *_ = receipt["of"].items()
    sizes = receipt["parameters"]
    return (
        f"The dense model of {kind} {number}: {sizes['after']:,} of {sizes['before']:,} parameters; plain transformers "
        f"loads it. Logits differ by {receipt['max_difference']:.2g} at most, of {receipt['max_logit']:.2g}."
    )


def _experts_of(path: str, layer: MoE, kind: str, number: int) -> list[tuple[int, float]]:
    """The experts of all tokens of a task, domain or language, with their weights."""
    router = layer.decider
    right = kind in _KINDS and isinstance(router, _KINDS[kind])
    if not right:
        raise UserError(
            f"extract: {path} routes by {type(router).__name__}, not by {kind}; all layers must go by one of "
            f"{', '.join(_KINDS)}"
        )
    if router.capacity_factor is not None and router.eval_capacity_factor != "dropless":
        raise UserError(f"extract: {path} has a capacity, which drops tokens; call shunter.dropless(model) first")
    known: dict[str, Any] = {kind: torch.tensor([number])}
    context = Context(**known)
    try:
        routing = router.assign(router.score(torch.zeros(1, layer.dim), context), context)
    except (ValueError, IndexError) as error:
        raise UserError(f"extract: {path} has no {kind} {number}: {error}") from None
    return list(zip(routing.expert.tolist(), routing.weight.tolist(), strict=True))


Block = tuple[list[Tensor], Tensor | None, list[Tensor], Tensor | None]


def _block(layer: MoE, chosen: list[tuple[int, float]]) -> Block:
    """Experts side by side: [gate and] up (W, d), their bias, down transposed (W, d) as parts, its bias."""
    experts = layer.experts
    if layer.shared_gate is not None or layer.extra_mlp is not None:
        raise UserError("extract: a residual branch or an extra MLP is no dense block; train without them")
    if not isinstance(experts, Experts):
        raise UserError(f"extract: experts of {type(experts).__name__} cannot be read")
    parts = [(experts, e, weight) for e, weight in chosen]
    if layer.shared_experts is not None:
        parts.append((layer.shared_experts, 0, 1.0))
    ways = 2 if experts.gated else 1
    ups: list[list[Tensor]] = [[] for _ in range(ways)]
    up_biases: list[list[Tensor]] = [[] for _ in range(ways)]
    downs: list[Tensor] = []
    down_bias: Tensor | None = None
    for module, e, weight in parts:
        up, down, up_bias, bias = module.weights.expert(e)
        for i, rows in enumerate(up.chunk(ways)):
            ups[i].append(rows)
        if up_bias is not None and bias is not None:
            for i, rows in enumerate(up_bias.chunk(ways)):
                up_biases[i].append(rows)
            down_bias = weight * bias + (0 if down_bias is None else down_bias)
        downs.append((down * weight).T)
    up_bias_all = torch.stack([torch.cat(rows) for rows in up_biases]) if up_biases[0] else None
    return [torch.cat(rows) for rows in ups], up_bias_all, [torch.cat(downs)], down_bias


def _dense(sparse: PreTrainedModel, folder: Path, width: int) -> Any:
    """The dense model with blocks of at least a width, its weights to be written."""
    config = copy.deepcopy(sparse.config)
    forget_layers(config)
    kind = model_class(config, str(folder))

    def widths(config: Any) -> list[int]:
        return [block.hidden for stack in find_feed_forwards(on_meta(kind, config, folder)) for block in stack]

    old = widths(config)
    wanted = max(width, *old) if len(layers_of(sparse)) < len(old) else width  # others stay dense as they are
    if set(old) != {wanted}:
        for field in _WIDTHS:
            trial = copy.deepcopy(config)
            if hasattr(trial, field):
                setattr(trial, field, wanted)
                if set(widths(trial)) == {wanted}:
                    config = trial
                    break
        else:
            raise UserError(f"extract: no field of {config.model_type} makes its blocks {wanted} wide")
    made: Any = kind(config)
    made = made.to(sparse.dtype)
    return made


def _put(tensor: Tensor, value: Tensor) -> None:
    """Write a value into a tensor that may be larger along any axis, where zeros come after."""
    tensor.zero_()
    tensor[tuple(slice(size) for size in value.shape)] = value


def _write(block: FeedForward, ups: list[Tensor], up_bias: Tensor | None, downs: list[Tensor], bias: Any) -> None:
    names = ["gate", "up"] if len(ups) == 2 else ["up"]
    for i, (name, rows) in enumerate(zip(names, ups, strict=True)):
        _put(block.maps[name].weight, rows)
        target = block.maps[name].bias
        if target is not None:
            _put(target, torch.zeros(0) if up_bias is None else up_bias[i])
    _put(block.maps["down"].weight, downs[0].T)
    target = block.maps["down"].bias
    if target is not None:
        _put(target, torch.zeros(0) if bias is None else bias)
