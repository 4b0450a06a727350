"""Make a dense Hugging Face model sparse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from .. import routers
from ..experts.weights import STACKED
from ..moe import MoE
from ..routers import Router
from .blocks import FeedForward, find_feed_forwards
from .hooks import install

__all__ = ["choose_blocks", "sparsify"]

Model = TypeVar("Model", bound=PreTrainedModel)


def sparsify(
    model: Model,
    num_experts: int,
    router: str | type[Router] = "switch",
    *,
    every: int = 1,
    layers: Sequence[int] | None = None,
    hidden: int | None = None,
    init: str = "scratch",
    backend: str = "auto",
    num_shared_experts: int = 0,
    allow_leak: bool = False,
    **options: Any,
) -> Model:
    """Replace the feed-forward blocks of a dense Hugging Face model by `MoE` layers, in place.

    Padding (attention_mask) and token ids (input_ids) reach the routers, and in training the auxiliary losses are part
    of `output.loss`, right under gradient accumulation. (A Trainer with label smoothing or a compute_loss_func makes
    its own loss: add `shunter.aux_loss(model)` there.) `save_pretrained` works as before; `shunter.from_pretrained`
    loads.

    Args:
        model: any model whose blocks `shunter.hf.blocks` knows: Llama, Qwen, Mistral, Gemma, GPT-2, BERT, T5,
            ViT and those built alike. Dropout inside a block (T5) is not kept; at its end it is.
        num_experts: E.
        router: a registered name, or a registered class.
        every: sparsify every n-th block, the n-th first (2: the second, fourth, …).
        layers: sparsify these blocks of each stack instead, counted from 0.
        hidden: f of one expert; default: the dense block's.
        init: "scratch" draws each expert from a normal distribution with the dense weights' standard deviation; "copy"
            makes each expert a copy of the dense block.
        backend: of the experts.
        num_shared_experts: see `MoE`.
        allow_leak: insist on a router that lets later tokens change earlier ones, in a causal model.
        **options: of the router. A hash router's vocab_size is the model's unless given.

    Returns:
        The same model.

    Raises:
        ValueError: for unknown architectures (with the modules that were looked at), models that are sparse already,
            impossible values, and a leaking router in a causal model.

    Source: Fedus et al. 2022, section 2.1 and figure 1; `every`: section 3.3.
    """
    name = router if isinstance(router, str) else next((n for n in routers.names() if routers.find(n) is router), None)
    if name is None:
        raise ValueError(f"sparsify: register {router!r} with shunter.routers.register first, so that it can be loaded")
    if init not in ("scratch", "copy"):
        raise ValueError(f"sparsify: init {init!r} is unknown; choose scratch or copy")
    if init == "copy" and num_shared_experts:
        raise ValueError("sparsify: copies beside a shared expert would not compute what the dense block does")
    known = routers.options(name)
    if "vocab_size" in known and options.get("vocab_size") is None:
        options["vocab_size"] = model.config.get_text_config().vocab_size
    chosen = choose_blocks(find_feed_forwards(model), every, layers)
    made = []
    for block in chosen:
        width = block.hidden if hidden is None else hidden
        if init == "copy" and width != block.hidden:
            raise ValueError(f"sparsify: init='copy' keeps the dense width {block.hidden}; leave hidden out")
        moe = MoE(
            block.dim,
            width,
            num_experts,
            name,
            backend,
            activation=block.activation,
            bias=block.up_bias is not None or block.down_bias is not None,
            num_shared_experts=num_shared_experts,
            dropout=block.dropout,
            causal=_is_causal(model, block) and not allow_leak,
            device=block.up.device,
            dtype=block.up.dtype,
            **options,
        )
        _initialise(moe, block, init)
        made.append(moe.train(model.training))
    for block, moe in zip(chosen, made, strict=True):
        model.set_submodule(block.path, moe)
        if block.second is not None:
            model.set_submodule(block.second, nn.Identity())
    unsaved = routers.find(name).unsaved_options
    model.config.shunter = {
        "num_experts": num_experts,
        "router": name,
        "every": every,
        "hidden": hidden,
        "backend": backend,
        "num_shared_experts": num_shared_experts,
        "allow_leak": allow_leak,
        **({} if layers is None else {"layers": list(layers)}),
        "layout": STACKED,
        **{key: value for key, value in options.items() if key not in unsaved},
    }
    install(model)
    return model


def choose_blocks(
    stacks: list[list[FeedForward]], every: int = 1, layers: Sequence[int] | None = None
) -> list[FeedForward]:
    """Every n-th block of each stack, or those that `layers` counts from 0.

    Raises:
        ValueError: where that leaves none, or a stack has no such block.
    """
    if every < 1:
        raise ValueError(f"sparsify: every={every} must be at least 1")
    if layers is None:
        chosen = [block for stack in stacks for block in stack[every - 1 :: every]]
        if not chosen:
            raise ValueError(f"sparsify: every={every} leaves no block to replace")
        return chosen
    shortest = min(map(len, stacks))
    if every != 1:
        raise ValueError("sparsify: layers and every both say which blocks are replaced; give one")
    if not layers or sorted(set(layers)) != list(layers) or layers[0] < 0 or layers[-1] >= shortest:
        raise ValueError(f"sparsify: layers={list(layers)} must be increasing numbers from 0 to {shortest - 1}")
    return [stack[i] for stack in stacks for i in layers]


def _is_causal(model: PreTrainedModel, block: FeedForward) -> bool:
    """Whether the layer around a block attends causally, by its attention's own flag."""
    parts = block.path.split(".")
    # The outermost number is the layer's: T5 numbers the parts of a layer too.
    number = next(i for i, part in enumerate(parts) if part.isdigit())
    layer = model.get_submodule(".".join(parts[: number + 1]))
    return any(getattr(module, "is_causal", False) is True for module in layer.modules())


@torch.no_grad()
def _initialise(moe: MoE, block: FeedForward, init: str) -> None:
    if moe.experts.weights.up.is_meta or block.up.is_meta:
        return  # about to be loaded
    if init == "scratch":
        for experts in (moe.experts, moe.shared_experts):
            if experts is not None:
                experts.reset_parameters(float(block.up.float().std()), float(block.down.float().std()))
        return
    weights = moe.experts.weights
    for ours, dense in (
        (weights.up, block.up),
        (weights.down, block.down),
        (weights.up_bias, block.up_bias),
        (weights.down_bias, block.down_bias),
    ):
        if ours is not None:
            ours.copy_(torch.zeros_like(ours[0]) if dense is None else dense)
