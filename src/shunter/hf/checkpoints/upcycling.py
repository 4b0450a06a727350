"""A folder of a dense model to one of a sparse model, whose experts start from the dense feed-forward blocks.

Tensors pass one by one, so that a model may be larger than memory. Every tensor of the dense folder is accounted for in
receipt.json.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...environment import Memory
from ...errors import UserError
from ..blocks import FeedForward
from ..sparsifying import Placement, sparsify
from . import converting
from .converting import Plan, convert, loader_of, megabytes
from .dense import Dense
from .folders import local_folder
from .formats import OWN, find
from .gguf import unpacked
from .initialising import Method, MethodName, drawn_gate, gates, mean
from .layouts import Form
from .native import family_for
from .reading import Stored

__all__ = ["describe", "upcycle"]

Prompts = Sequence[Sequence[str]]


def upcycle(
    model: str | Path,
    out: str | Path,
    num_experts: int | None = None,
    top_k: int = 2,
    *,
    method: MethodName = "copy",
    granularity: int | None = None,
    noise: float | None = None,
    drop: float | None = None,
    siblings: Sequence[str | Path] = (),
    prompts: Sequence[Sequence[str]] | None = None,
    to: str = "auto",
    every: int = 1,
    placement: str = "",
    seed: int = 0,
    check: bool = True,
    max_shard_bytes: int = 5_000_000_000,
) -> dict[str, Any]:
    """Write a sparse model whose experts start from the feed-forward blocks of a dense one.

    Copies keep the function: each token's weights sum to 1 and its experts are equal, whatever the new router says.

    Args:
        model: the folder of any dense model that `sparsify` knows, in safetensors; or a GGUF file of a dense Llama.
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
        placement: the same in words, as "every 2, last 3, pyramid" (see `shunter.sparsify`); no family of transformers
            has a pyramid.
        seed: of what is drawn.
        check: load both models and compare their logits; "copy" and "split", which keep the function, fail where the
            difference is more than rounding.
        max_shard_bytes: of a file.

    Returns:
        What receipt.json in the new folder holds: what became of each tensor, what is new, the peak of memory, the
        measured difference.

    Raises:
        UserError: for options that do not go together, folders that are damaged or cannot be a sparse model of the
            kind asked for, and an `out` that exists; nothing is left behind.

    Source: Komatsuzaki et al. 2023 (Sparse Upcycling), section 3; Fedus et al. 2022, section 5 (Dua et al. 2021).
    """
    memory = Memory()
    how = Method.of(method, granularity=granularity, noise=noise, drop=drop)
    num_experts = num_experts or (len(siblings) or 8)
    _check(how, num_experts, top_k, siblings, prompts)
    place = Placement.parse(placement, every)
    if place.pyramid and siblings:
        raise UserError("upcycle: a pyramid has more experts in later blocks than there are siblings; leave it out")
    is_gguf = Path(model).suffix == ".gguf"
    with unpacked(Path(model), Path(out).parent) if is_gguf else nullcontext(local_folder(model)) as folder:
        source = Dense.open(folder)
        members = [Dense.open(local_folder(sibling)) for sibling in siblings]
        for member in members:
            member.must_match(source)
        start = _Start(source, members or [source], how, num_experts, top_k, place)
        form, why = start.form(to)
        plan = start.plan(form, why, prompts, seed)
        return convert("upcycle", plan, Path(out), memory, check, max_shard_bytes)


def describe(receipt: dict[str, Any]) -> str:
    """A receipt of `upcycle` in words."""
    options = receipt["options"]
    copied = sum(entry["how"] in ("copied", "mean of the siblings") for entry in receipt["tensors"].values())
    became = len(receipt["tensors"]) - copied
    dense, sparse, peak, block = (megabytes(receipt[f"{name}_bytes"]) for name in ("dense", "sparse", "peak", "layer"))
    lines = [
        f"{options['num_experts']} experts, {options['top_k']} a token, method {receipt['method']}; "
        f"{loader_of(receipt)} loads it (format {receipt['format']}).",
        f"Tensors: {copied} as they were, {became} became experts, {len(receipt['new'])} new; none left over "
        f"(receipt.json). {dense} became {sparse}.",
        f"Peak memory of the conversion: {peak} (the dense model is {dense}, its largest block {block}).",
    ]
    if receipt["not_native_because"]:
        lines.insert(1, f"No family of transformers: {receipt['not_native_because']}.")
    return converting.describe(receipt, lines, "dense")


def _check(
    method: Method, num_experts: int, top_k: int, siblings: Sequence[str | Path], prompts: Prompts | None
) -> None:
    if not 2 <= top_k <= num_experts <= 65536:
        raise UserError(
            f"upcycle: top_k={top_k} must be between 2 and num_experts={num_experts}, at most 65536. (One expert a "
            "token keeps the function only with a constant weight of 1, through which no router learns.)"
        )
    method.check(num_experts, top_k)
    if (method.name == "siblings") != bool(siblings):
        raise UserError('upcycle: method="siblings" needs siblings=[folders], and they need it')
    if siblings and len(siblings) != num_experts:
        raise UserError(f"upcycle: {len(siblings)} siblings make as many experts, not {num_experts}")
    if prompts is not None and (len(prompts) != len(siblings) or not all(prompts)):
        raise UserError(f"upcycle: prompts must be a list of texts for each of the {len(siblings)} siblings")


@dataclass(frozen=True)
class _Start:
    """What a sparse model starts from.

    Args:
        source: the dense model.
        members: those whose blocks become experts, of which other weights are the mean: the siblings, or it alone.
        method: how experts are made of a block.
        num_experts, top_k: E and k.
        place: which blocks become sparse.
    """

    source: Dense
    members: list[Dense]
    method: Method
    num_experts: int
    top_k: int
    place: Placement

    @property
    def blocks(self) -> list[FeedForward]:
        """The dense blocks that become sparse."""
        return self.place.blocks(self.source.stacks)

    def form(self, to: str) -> tuple[Form, str | None]:
        """The sparse model as the format that was asked for has it; and why it is no family's, where one was sought."""
        source, blocks, granularity = self.source, self.blocks, self.method.granularity
        widths = {(block.hidden, block.dim) for block in blocks}
        if blocks[0].hidden % granularity or (granularity > 1 and len(widths) > 1):
            raise UserError(
                f"upcycle: granularity={granularity} must divide the width of every block, {sorted(widths)}"
            )
        wanted, why = find(to, "upcycle"), None
        if wanted is not OWN:
            try:
                family = family_for(source.config, type(source.model).__name__)
                if wanted not in (None, family):
                    raise UserError(f"a {source.config.model_type} model continues as {family.name}, not as {to}")
                if len(widths) > 1 or any(block.bias for block in blocks):
                    raise UserError(f"{family.name} has no biases, and blocks of one width")
                dtype = source.dtype_of(blocks)
                if granularity > 1 and not family.float32_router and dtype.itemsize < 4:
                    raise UserError(
                        f"{family.name} computes its router in {dtype}, where ties between copies are common and "
                        "would mix their parts"
                    )
                return family.write(self.sparse(**family.new_router(self.top_k, len(blocks)))), None
            except ValueError as error:
                why = str(error)
                if wanted is not None:
                    raise UserError(f"upcycle: cannot write {to}: {why}") from None
        return OWN.write(self.sparse()), why

    def sparse(self, **options: Any) -> PreTrainedModel:
        """The sparse model in Shunter's form, its modules without memory."""
        granularity = self.method.granularity
        hidden = None if granularity == 1 else self.blocks[0].hidden // granularity
        model = copy.deepcopy(self.source.model)
        return sparsify(
            model, self.num_experts, "topk", top_k=self.top_k, placement=str(self.place), hidden=hidden, **options
        )

    def plan(self, form: Form, why: str | None, prompts: Prompts | None, seed: int) -> Plan:
        """How the folder of the sparse model comes about."""
        source, blocks, method = self.source, self.blocks, self.method
        used = {disk for block in blocks for disk in source.disk_names(block).values()}
        # A family knows the model's own names; Shunter's format is read with the dense model's renamings.
        names = {d: d if form.format == OWN.name else name for d, name in source.names.items() if d not in used}
        became: dict[str, dict[str, Any]] = {disk: {"how": "unused by the model", "to": []} for disk in source.unused}
        passing = "mean of the siblings" if method.name == "siblings" else "copied"
        became |= {disk: {"how": passing, "to": [name]} for disk, name in names.items()}
        tensors = {name: source.checkpoint.tensors[disk] for disk, name in names.items()}
        drawn = f"router, drawn with standard deviation {self.spread}"
        if method.granularity > 1:
            drawn += f", {method.granularity} equal rows a copy"
        dtype, new = source.dtype_of(blocks), {}
        for block in blocks:
            pieces = form.pieces[block.path]
            for (part, _), piece in pieces.items():
                tensors[piece.name] = Stored(torch.float32 if part == "selection_bias" else dtype, piece.tensor)
                if part == "router":
                    new[piece.name] = drawn if prompts is None else "router, from hidden states of prompts"
                elif _is_zero(part):
                    new[piece.name] = "zeros" if all(piece.shape) else "empty: there is no shared expert"
            for part, disk in source.disk_names(block).items():
                made = [piece.name for (key, _), piece in pieces.items() if key == part]
                before = became.get(disk, {"to": []})["to"]  # gate and up may lie in one tensor
                became[disk] = {"how": method.how, "to": list(dict.fromkeys([*before, *made]))}
        options = {"num_experts": self.num_experts, "top_k": self.top_k, "every": self.place.every, "seed": seed}
        if self.place.last is not None:
            options["last"] = self.place.last
        if self.place.pyramid:
            options["pyramid"] = True
        facts = {
            "method": method.name,
            "options": options | {"amount": method.amount},
            "format": form.format,
            "not_native_because": why,
            "layout": form.layout,
            "dense_bytes": source.checkpoint.nbytes,
            "sparse_bytes": sum(stored.nbytes for stored in tensors.values()),
            "layer_bytes": max(source.nbytes_of(block) for block in blocks),
        }
        routers = None if prompts is None else gates(source, blocks, prompts)
        values = self.values(form, names, tensors, routers, seed)
        return Plan(source.checkpoint, form.config, tensors, became, new, values, facts, dtype, method.exact)

    def values(
        self, form: Form, names: dict[str, str], tensors: dict[str, Stored], routers: list[Tensor] | None, seed: int
    ) -> Iterator[tuple[str, int, Tensor]]:
        """The tensors of the new folder, in pieces, as they are asked for."""
        source, method, generator = self.source, self.method, torch.Generator().manual_seed(seed)
        for disk, name in names.items():
            yield name, 0, mean(self.members, source.names[disk])
        theirs = [self.place.blocks(member.stacks) for member in self.members]
        for number, block in enumerate(self.blocks):
            pieces = form.pieces[block.path]
            one = None if method.name == "siblings" else source.parts(block)
            for e in range(pieces["router", 0].shape[0]):
                expert = method.expert(one or self.members[e].parts(theirs[e][number]), e, generator)
                for part in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias"):
                    piece = pieces.get((part, e))
                    if piece is not None:
                        tensor = expert.get(part)
                        tensor = torch.zeros(piece.shape, dtype=expert["up"].dtype) if tensor is None else tensor
                        assert tuple(tensor.shape) == piece.shape
                        yield piece.name, piece.offset, tensor
            gate = pieces["router", 0]
            rows = drawn_gate(gate.shape, method, self.spread, generator) if routers is None else routers[number]
            yield gate.name, 0, rows.to(tensors[gate.name].dtype)
            for (part, _), piece in pieces.items():
                if _is_zero(part):
                    yield piece.name, 0, torch.zeros(piece.shape, dtype=tensors[piece.name].dtype)

    @property
    def spread(self) -> float:
        """The standard deviation of a new router's weights."""
        return float(getattr(self.source.config, "initializer_range", 0.02))


def _is_zero(part: str) -> bool:
    """Whether a new layer has zeros there: the bias of a selection, and shared experts, of which it has none."""
    return part == "selection_bias" or part.startswith("shared")
