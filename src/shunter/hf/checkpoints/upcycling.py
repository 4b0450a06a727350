"""Make a dense model on disk a sparse one on disk: the experts start from the dense feed-forward blocks.

Tensors pass one by one from the dense folder to the sparse one, so that a model may be larger than memory. Every tensor
of the dense folder is accounted for in receipt.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from ... import routers
from ...environment import VERSION, Memory
from ...experts.weights import STACKED
from ...routers import Router
from ..blocks import FeedForward
from ..sparsifying import choose_blocks, sparsify
from .check import compare_logits
from .converting import Transfer, describe_check, megabytes
from .dense import Dense
from .folders import local_folder
from .gguf import unpacked
from .layouts import Key, Piece, Sizes, stacked_pieces
from .native import FAMILIES, Family, family_for
from .reading import Stored
from .writing import copy_companions, new_folder

__all__ = ["describe", "upcycle"]

Method = Literal["copy", "split", "noise", "drop", "siblings"]

Parts = dict[str, Tensor]
"""One block's tensors: gate and up (f, d), down (d, f), and gate_bias, up_bias (f,), down_bias (d,) where there."""


@dataclass(frozen=True)
class _Target:
    """What is written: None for `family` is Shunter's own format."""

    family: Family | None
    config: PreTrainedConfig
    layers: list[dict[Key, Piece]]
    why: str | None = None
    """Why it is not a native family, where one was looked for."""


def upcycle(
    model: str | Path,
    out: str | Path,
    num_experts: int | None = None,
    top_k: int = 2,
    *,
    method: Method = "copy",
    granularity: int | None = None,
    noise: float | None = None,
    drop: float | None = None,
    siblings: Sequence[str | Path] = (),
    prompts: Sequence[Sequence[str]] | None = None,
    to: str = "auto",
    every: int = 1,
    seed: int = 0,
    check: bool = True,
    max_shard_bytes: int = 5_000_000_000,
) -> dict[str, Any]:
    """Write a sparse model whose experts start from the feed-forward blocks of a dense one.

    Copies keep the function: each token's weights sum to 1 and its experts are equal, whatever the new router says.

    Args:
        model: the folder of any dense model that `sparsify` knows, in safetensors; or a GGUF file of a Llama model.
        out: the folder to make; it appears when it is whole.
        num_experts: E; 8 by default, and the number of siblings where there are any.
        top_k: k, how many experts a token takes.
        method: "copy" makes each expert a copy of the block. "split" cuts E / g copies into g parts each, which have
            equal routers, so that a token takes whole copies: the function is kept (He et al. 2024, virtual groups).
            "noise" adds normal noise to copies. "drop" draws a share of each copy's hidden units anew (Nakamura et
            al. 2025, Drop-Upcycling, section 3). "siblings" takes the blocks of several models that were fine-tuned
            from the same one, and the mean of their other weights (Sukhbaatar et al. 2024, Branch-Train-MiX).
        granularity: g, for "split"; E and k must be multiples of it. Default 2.
        noise: for "noise", its standard deviation as a multiple of each matrix's own. Default 0.01.
        drop: for "drop", the share of hidden units. Default 0.5.
        siblings: for "siblings", their folders; `model` itself is an expert only where it is among them.
        prompts: for "siblings", texts for each: the router's row of a sibling is the direction, from the mean over all
            siblings, of the mean hidden state that `model` has on its texts. Without, rows are drawn.
        to: "auto" takes the native family that continues the dense one where there is one, so that plain transformers
            loads the result, else "shunter", Shunter's own format (`shunter.from_pretrained` loads); or a family.
        every: sparsify every n-th block.
        seed: of what is drawn.
        check: load both models and compare their logits; "copy" and "split", which keep the function, fail where the
            difference is more than rounding.
        max_shard_bytes: of a file.

    Returns:
        What receipt.json in the new folder holds: what became of each tensor, what is new, the peak of memory, the
        measured difference.

    Raises:
        ValueError: for options that do not go together, folders that are damaged or cannot be a sparse model of the
            kind asked for, and an `out` that exists; nothing is left behind.

    Source: Komatsuzaki et al. 2023 (Sparse Upcycling), section 3; Fedus et al. 2022, section 5 (Dua et al. 2021).
    """
    if Path(model).suffix == ".gguf":
        with unpacked(Path(model), Path(out).parent) as folder:
            return upcycle(
                folder,
                out,
                num_experts,
                top_k,
                method=method,
                granularity=granularity,
                noise=noise,
                drop=drop,
                siblings=siblings,
                prompts=prompts,
                to=to,
                every=every,
                seed=seed,
                check=check,
                max_shard_bytes=max_shard_bytes,
            )
    amount = _amount(method, {"split": granularity, "noise": noise, "drop": drop})
    num_experts = num_experts or (len(siblings) or 8)
    _validate(method, num_experts, top_k, amount, siblings, prompts)
    memory = Memory()
    source = Dense.open(local_folder(model))
    members = [Dense.open(local_folder(sibling)) for sibling in siblings]
    for member in members:
        member.must_match(source)
    blocks = choose_blocks(source.stacks, every)
    theirs = [choose_blocks(member.stacks, every) for member in members]
    target = _target(source, blocks, to, num_experts, top_k, every, method, int(amount) if method == "split" else 1)
    passing = _passing(source, blocks)
    dtype = source.dtype_of(blocks)
    specs = {_kept_name(target, disk, name): source.checkpoint.tensors[disk] for disk, name in passing.items()}
    for layer in target.layers:
        for (part, _), piece in layer.items():
            specs[piece.name] = Stored(torch.float32 if part == "selection_bias" else dtype, piece.tensor)
    generator = torch.Generator().manual_seed(seed)
    gates = None if prompts is None else _gates(source, blocks, prompts)
    with new_folder(Path(out)) as folder:
        transfer = Transfer(source.checkpoint, source.unused, folder, specs, max_shard_bytes, memory)
        for disk, name in passing.items():
            kept = _kept_name(target, disk, name)
            transfer.write(kept, _mean(members or [source], name))
            transfer.account(disk, "mean of the siblings" if siblings else "copied", [kept])
        for number, (block, pieces) in enumerate(zip(blocks, target.layers, strict=True)):
            parts = None if siblings else source.parts(block)
            for e in range(num_experts):
                own = members[e].parts(theirs[e][number]) if parts is None else parts
                _write_expert(transfer, pieces, e, _expert(own, e, method, amount, generator))
            gate = None if gates is None else gates[number]
            _write_rest(transfer, pieces, dtype, source, method, amount, generator, gate)
            for part, disk in source.disk_names(block).items():
                names = [piece.name for (key, _), piece in pieces.items() if key == part]
                transfer.account(disk, _how(method, amount), names)
        transfer.finish()
        target.config.save_pretrained(folder)
        copy_companions(source.folder, folder)
        receipt: dict[str, Any] = {
            "made_by": f"shunter {VERSION} upcycle",
            "method": method,
            "options": {"num_experts": num_experts, "top_k": top_k, "every": every, "seed": seed, "amount": amount},
            "format": target.family.name if target.family else "shunter",
            "not_native_because": target.why,
            "layout": target.family.layout if target.family else STACKED,
            "dense_bytes": source.checkpoint.nbytes,
            "sparse_bytes": sum(stored.nbytes for stored in specs.values()),
            "layer_bytes": max(source.nbytes_of(block) for block in blocks),
            "peak_bytes": memory.peak,
            "check": None,
            "tensors": transfer.became,
            "new": transfer.new,
        }
        if check:
            receipt["check"] = compare_logits(source.folder, folder, dtype, exact=method in ("copy", "split"))
        (folder / "receipt.json").write_text(json.dumps(receipt, indent=1) + "\n", encoding="utf-8")
    return receipt


def describe(receipt: dict[str, Any]) -> str:
    """A receipt of `upcycle` in words."""
    options, check = receipt["options"], receipt["check"]
    copied = sum(entry["how"] in ("copied", "mean of the siblings") for entry in receipt["tensors"].values())
    became = len(receipt["tensors"]) - copied
    dense, sparse, peak, block = (megabytes(receipt[f"{name}_bytes"]) for name in ("dense", "sparse", "peak", "layer"))
    loader = "shunter.from_pretrained" if receipt["format"] == "shunter" else "plain transformers"
    lines = [
        f"{options['num_experts']} experts, {options['top_k']} a token, method {receipt['method']}; {loader} loads it "
        f"(format {receipt['format']}).",
        f"Tensors: {copied} as they were, {became} became experts, {len(receipt['new'])} new; none left over "
        f"(receipt.json). {dense} became {sparse}.",
        f"Peak memory of the conversion: {peak} (the dense model is {dense}, its largest block {block}).",
    ]
    if receipt["not_native_because"]:
        lines.insert(1, f"No family of transformers: {receipt['not_native_because']}.")
    if check:
        lines.append(f"Logits against the dense model: {describe_check(check)}")
    return "\n".join(lines)


def _amount(method: str, given: dict[str, int | float | None]) -> float:
    """The one number that a method takes, or 0."""
    if method not in get_args(Method):
        raise ValueError(f"upcycle: method {method!r} is unknown; choose from {', '.join(get_args(Method))}")
    names = {"split": "granularity", "noise": "noise", "drop": "drop"}
    for other, value in given.items():
        if other != method and value is not None:
            raise ValueError(f"upcycle: {names[other]} is for method {other!r}; the method is {method!r}")
    value = given.get(method)
    return {"split": 2, "noise": 0.01, "drop": 0.5}.get(method, 0) if value is None else value


def _validate(
    method: str,
    num_experts: int,
    top_k: int,
    amount: float,
    siblings: Sequence[str | Path],
    prompts: Sequence[Sequence[str]] | None,
) -> None:
    if not 2 <= top_k <= num_experts <= 65536:
        raise ValueError(
            f"upcycle: top_k={top_k} must be between 2 and num_experts={num_experts}, at most 65536. (One expert a "
            "token keeps the function only with a constant weight of 1, through which no router learns.)"
        )
    if method == "split" and (amount < 2 or num_experts % amount or top_k % amount):
        raise ValueError(
            f"upcycle: granularity={amount} must be at least 2 and divide num_experts={num_experts} and top_k={top_k}: "
            "a token takes whole copies"
        )
    if method == "noise" and not 0 < amount < float("inf"):
        raise ValueError(f"upcycle: noise={amount} must be above 0")
    if method == "drop" and not 0 < amount <= 1:
        raise ValueError(f"upcycle: drop={amount} must be above 0 and at most 1")
    if (method == "siblings") != bool(siblings):
        raise ValueError('upcycle: method="siblings" needs siblings=[folders], and they need it')
    if siblings and len(siblings) != num_experts:
        raise ValueError(f"upcycle: {len(siblings)} siblings make as many experts, not {num_experts}")
    if prompts is not None and (len(prompts) != len(siblings) or not all(prompts)):
        raise ValueError(f"upcycle: prompts must be a list of texts for each of the {len(siblings)} siblings")


def _target(
    source: Dense,
    blocks: list[FeedForward],
    to: str,
    num_experts: int,
    top_k: int,
    every: int,
    method: str,
    parts: int,
) -> _Target:
    widths = {(block.hidden, block.dim) for block in blocks}
    hidden = blocks[0].hidden
    if hidden % parts or (parts > 1 and len(widths) > 1):
        raise ValueError(f"upcycle: granularity={parts} must divide the width of every block, {sorted(widths)}")
    if to not in ("auto", "shunter", *FAMILIES):
        raise ValueError(f"upcycle: to={to!r} is unknown; choose from auto, shunter, {', '.join(FAMILIES)}")
    why = None
    if to != "shunter":
        try:
            family = family_for(source.config, type(source.model).__name__)
            if to not in ("auto", family.name):
                raise ValueError(f"a {source.config.model_type} model continues as {family.name}, not as {to}")
            if len(widths) > 1 or any(block.up_bias is not None or block.down_bias is not None for block in blocks):
                raise ValueError(f"{family.name} has no biases, and blocks of one width")
            if parts > 1 and not family.float32_router and source.dtype_of(blocks).itemsize < 4:
                raise ValueError(
                    f"{family.name} computes its router in {source.dtype_of(blocks)}, where ties between copies are "
                    "common and would mix their parts"
                )
            layers = [int(block.path.split(".")[-2]) for block in blocks]
            router = _router(family, source.config.hidden_size, num_experts, top_k)
            config = family.sparse_config(source.config, num_experts, hidden // parts, layers, router)
            config.architectures = [family.architecture]
            config.dtype = source.config.dtype
            sizes = replace(family.sizes(config), experts=num_experts)
            config.shunter_dense = source.config.model_type
            return _Target(family, config, [family.pieces(i, sizes) for i in layers])
        except ValueError as error:
            why = str(error)
            if to != "auto":
                raise ValueError(f"upcycle: cannot write {to}: {why}") from None
    sparse = sparsify(source.model, num_experts, "topk", top_k=top_k, every=every, hidden=hidden // parts)
    pieces = []
    for block in blocks:
        sizes = Sizes.of(num_experts, block.dim, block.hidden // parts, block.activation, bias=_has_bias(block))
        pieces.append(stacked_pieces(block.path, sizes))
    config = sparse.config
    if parts == 1:
        config.shunter["hidden"] = None
    config.architectures = [type(source.model).__name__]
    return _Target(None, config, pieces, why)


def _router(family: Family, dim: int, num_experts: int, top_k: int) -> Router:
    """How a new model of the family is to route: a token's weights sum to 1, the balance loss is the family's own."""
    options: dict[str, Any] = {"score_function": "sigmoid", "selection_bias": True}
    if not family.sigmoid:
        options = {"load_balancing_loss": AutoConfig.for_model(family.name).router_aux_loss_coef}
    return routers.create("topk", dim, num_experts, device="meta", top_k=top_k, **options)


def _has_bias(block: FeedForward) -> bool:
    return block.up_bias is not None or block.down_bias is not None


def _passing(source: Dense, blocks: list[FeedForward]) -> dict[str, str]:
    """The tensors outside the blocks: name on disk -> name in the model."""
    used = {disk for block in blocks for disk in source.disk_names(block).values()}
    return {disk: name for disk, name in source.names.items() if disk not in used}


def _kept_name(target: _Target, disk: str, name: str) -> str:
    # A native family knows the model's own names; Shunter's format is read with the dense model's renamings.
    return name if target.family else disk


def _mean(members: list[Dense], name: str) -> Tensor:
    """The mean over models of a tensor by its name in the model, rounded once."""
    first = members[0].read(name)
    if len(members) == 1:
        return first
    if not first.is_floating_point():
        if any(not torch.equal(first, member.read(name)) for member in members[1:]):
            raise ValueError(f"upcycle: {name} is not a weight and differs between siblings")
        return first
    total = first.double()
    for member in members[1:]:
        total += member.read(name)
    return (total / len(members)).to(first.dtype)


def _expert(parts: Parts, e: int, method: str, amount: float, generator: torch.Generator) -> Parts:
    if method == "split":
        return _part_of(parts, e % int(amount), int(amount))
    if method == "noise":
        return {name: _with_noise(t, amount, generator) if t.dim() == 2 else t for name, t in parts.items()}
    if method == "drop":
        return _redrawn(parts, amount, generator)
    return parts


def _part_of(parts: Parts, which: int, granularity: int) -> Parts:
    """One of g equal parts of the hidden units; down is multiplied by g, as each part has 1/g of a copy's weight."""
    width = parts["up"].shape[0] // granularity
    units = slice(which * width, (which + 1) * width)
    found = {name: t[units] for name, t in parts.items() if not name.startswith("down")}
    found["down"] = parts["down"][:, units] * granularity
    if "down_bias" in parts:
        found["down_bias"] = parts["down_bias"]
    return found


def _with_noise(tensor: Tensor, amount: float, generator: torch.Generator) -> Tensor:
    wide = tensor.float()
    return (wide + torch.randn(wide.shape, generator=generator) * (amount * wide.std())).to(tensor.dtype)


def _redrawn(parts: Parts, share: float, generator: torch.Generator) -> Parts:
    """A copy of which a share of the hidden units is drawn anew, with the mean and spread of what it replaces."""
    width = parts["up"].shape[0]
    units = torch.randperm(width, generator=generator)[: round(share * width)]
    found = {}
    for name, tensor in parts.items():
        if name == "down_bias":
            found[name] = tensor
            continue
        found[name] = tensor.clone()
        at = (slice(None), units) if name == "down" else (units,)
        old = tensor[at].float()
        drawn = old.mean() + torch.randn(old.shape, generator=generator) * old.std(correction=0)
        found[name][at] = drawn.to(tensor.dtype)
    return found


def _write_expert(transfer: Transfer, pieces: dict[Key, Piece], e: int, expert: Parts) -> None:
    for part in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias"):
        piece = pieces.get((part, e))
        if piece is None:
            continue
        tensor = expert.get(part)
        if tensor is None:
            tensor = torch.zeros(piece.shape, dtype=expert["up"].dtype)
        assert tuple(tensor.shape) == piece.shape
        transfer.write(piece.name, tensor, piece.offset)


def _write_rest(
    transfer: Transfer,
    pieces: dict[Key, Piece],
    dtype: torch.dtype,
    source: Dense,
    method: str,
    amount: float,
    generator: torch.Generator,
    gate: Tensor | None,
) -> None:
    """The router and what else is new."""
    router = pieces["router", 0]
    spread = float(getattr(source.config, "initializer_range", 0.02))
    if gate is None:
        copies = int(amount) if method == "split" else 1
        rows = torch.randn(router.shape[0] // copies, router.shape[1], generator=generator) * spread
        gate = rows.repeat_interleave(copies, 0)
        words = f"router, drawn with standard deviation {spread}" + (f", {copies} equal rows a copy" * (copies > 1))
    else:
        words = "router, from hidden states of prompts"
    transfer.write_new(router.name, gate.to(dtype), words)
    for (part, _), piece in pieces.items():
        if part == "selection_bias" or part.startswith("shared"):
            zeros = torch.zeros(piece.shape, dtype=torch.float32 if part == "selection_bias" else dtype)
            transfer.write_new(piece.name, zeros, "zeros" if zeros.numel() else "empty: there is no shared expert")


def _how(method: str, amount: float) -> str:
    return {
        "copy": "copied to every expert",
        "split": f"split into {amount:g} parts, down times {amount:g}",
        "noise": f"copied to every expert with noise of {amount:g} times its standard deviation",
        "drop": f"copied to every expert, {amount:g} of the hidden units drawn anew",
        "siblings": "replaced by the siblings' own, an expert each",
    }[method]


@torch.no_grad()
def _gates(source: Dense, blocks: list[FeedForward], prompts: Sequence[Sequence[str]]) -> list[Tensor]:
    """For each block a router (E, d) of unit rows that tells the siblings' prompts apart by their hidden states."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"upcycle: prompts need a tokenizer in {source.folder}: {str(error)[:200]}") from None
    model: Any = type(source.model).from_pretrained(source.folder, dtype=torch.float32, use_safetensors=True)
    model.eval()
    sums = torch.zeros(len(blocks), len(prompts), blocks[0].dim, dtype=torch.float64)
    counts = torch.zeros(len(prompts), dtype=torch.int64)
    now = 0

    def note(number: int) -> Any:
        def hook(module: torch.nn.Module, args: tuple[Any, ...]) -> None:
            sums[number, now] += args[0].double().reshape(-1, args[0].shape[-1]).sum(0)

        return hook

    for number, block in enumerate(blocks):
        model.get_submodule(block.path).register_forward_pre_hook(note(number))
    for now, texts in enumerate(prompts):
        for text in texts:
            ids = tokenizer(text, return_tensors="pt").input_ids
            counts[now] += ids.numel()
            model(input_ids=ids)
    means = sums / counts[:, None]
    directions = means - means.mean(1, keepdim=True)
    norms = directions.norm(dim=-1, keepdim=True)
    if not bool((norms > 1e-6 * means.norm(dim=-1, keepdim=True)).all()):
        raise ValueError("upcycle: the prompts of some siblings look alike to the model; give others, or none")
    return list(directions / norms)
