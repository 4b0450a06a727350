"""The record of a model's routing decisions: as serving engines return it, on disk, and how fragile it is."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...metrics import QUANTILES, Margins, near_tie, summarise
from ...untrusted import open_file, parse_json

__all__ = ["NearTies", "RoutingRecord"]

_FORMAT = "shunter routing record 1"


@dataclass(frozen=True)
class NearTies:
    """How many decisions fall otherwise when numbers are rounded otherwise: in bfloat16, another batch, another kernel.

    A decision, one token's in one layer, is a near-tie where bfloat16 may make the scores of the last expert taken and
    of the first not taken equal. The scores are the logits, or what else the router ranks (a selection bias added,
    experts outside of the best groups left out).

    Args:
        layers: by name, the distribution of the margins; None where no token had a choice.
        decisions: the share of near-ties among all decisions.
        tokens: the share of the tokens that have one in any layer.

    `str()` is a table of it.
    """

    layers: dict[str, Margins | None]
    decisions: float
    tokens: float

    def __str__(self) -> str:
        wide = max([len("layer"), *map(len, self.layers)])
        lines = [
            f"{100 * self.decisions:.2f} % of the decisions are near-ties, which rounding in bfloat16 can turn; "
            f"{100 * self.tokens:.1f} % of the tokens have one in some layer",
            f"{'layer':<{wide}}  near-ties  median margin",
        ]
        for name, margins in self.layers.items():
            near = 0.0 if margins is None else 100 * margins.near_ties
            median = float("nan") if margins is None else margins.quantiles[QUANTILES.index(0.5)]
            lines.append(f"{name:<{wide}}  {near:>7.2f} %  {median:>13.4g}")
        return "\n".join(lines)


class RoutingRecord:
    """Which experts every token took in every layer.

    The tokens are the real ones, without padding, forward after forward and within a forward sequence after sequence:
    for one sequence in one forward it is what vLLM returns as `routed_experts`.

    Args:
        experts: (N, L, k) integers, N tokens, L layers, -1 for none; a row of only -1 is not known, and in a replay the
            token chooses by itself.
        lengths: the tokens of each sequence of each forward, in order; they add up to N.
        layers: the names of the layers; None where they are not known.
        forwards: how many sequences each forward had; None for one forward.
        starts: how many real tokens of its sequence came before each of `lengths`, in a cache, -1 where a cache does
            not say; None takes each to go on where the forward before ended.
        drafts: for each forward, whether a cache was given, so that its tokens behind the first may be drafts that were
            rejected (prompt lookup, assisted decoding); None where none was.
        exchanged: whether the rows of a generation became other sequences on the way, as in beam search.
        margin: (N, L) float32 and
        size: (N, L) float32, of `shunter.metrics.margins`; None where they are not known.

    Attributes:
        experts: (N, L, k) int16.

    Raises:
        ValueError: where these do not fit together.
    """

    def __init__(
        self,
        experts: Tensor,
        lengths: Sequence[int],
        *,
        layers: Sequence[str] | None = None,
        forwards: Sequence[int] | None = None,
        starts: Sequence[int] | None = None,
        drafts: Sequence[bool] | None = None,
        exchanged: bool = False,
        margin: Tensor | None = None,
        size: Tensor | None = None,
    ) -> None:
        self.experts = _checked(experts)
        self.lengths = [int(length) for length in lengths]
        self.layers = None if layers is None else list(layers)
        self.forwards = [len(self.lengths)] if forwards is None else [int(number) for number in forwards]
        self.starts = None if starts is None else [int(start) for start in starts]
        self.drafts = None if drafts is None else [bool(draft) for draft in drafts]
        self.exchanged = bool(exchanged)
        self.margin, self.size = margin, size
        tokens, num_layers, _ = self.experts.shape
        if sum(self.lengths) != tokens or min(self.lengths, default=0) < 0:
            raise ValueError(
                f"RoutingRecord: lengths {_short(self.lengths)} do not add up to the {tokens} tokens of experts"
            )
        if self.layers is not None and len(self.layers) != num_layers:
            raise ValueError(f"RoutingRecord: {len(self.layers)} names for the {num_layers} layers of experts")
        if self.starts is not None and len(self.starts) != len(self.lengths):
            raise ValueError(f"RoutingRecord: {len(self.starts)} starts for {len(self.lengths)} sequences")
        if self.drafts is not None and len(self.drafts) != len(self.forwards):
            raise ValueError(f"RoutingRecord: {len(self.drafts)} drafts for {len(self.forwards)} forwards")
        if sum(self.forwards) != len(self.lengths):
            raise ValueError(
                f"RoutingRecord: forwards {_short(self.forwards)} do not add up to {len(self.lengths)} sequences"
            )
        for name, value in (("margin", margin), ("size", size)):
            if value is not None and value.shape != (tokens, num_layers):
                raise ValueError(f"RoutingRecord: {name} has shape {tuple(value.shape)}, not {(tokens, num_layers)}")

    def __repr__(self) -> str:
        tokens, layers, k = self.experts.shape
        return f"RoutingRecord({tokens} tokens, {layers} layers, k={k}, {len(self.forwards)} forwards)"

    @classmethod
    def from_numpy(cls, arrays: Any, lengths: Sequence[int] | Tensor | None = None) -> RoutingRecord:
        """A record of one forward from arrays (tokens, layers, k), as vLLM returns them.

        Args:
            arrays: one array of integers for each sequence (prompt and generation concatenated), or one alone.
            lengths: the real tokens of each sequence in the forward that will replay, as `attention_mask.sum(1)`; None
                takes the arrays'. A sequence may have one more token than its array: the last that was sampled never
                went through the model; in a replay it chooses by itself.

        Raises:
            ValueError: where the arrays are not such integers, name an expert twice for a token, or do not fit each
                other or the lengths.
        """
        parts = [torch.as_tensor(each) for each in (arrays if isinstance(arrays, list | tuple) else [arrays])]
        for part in parts:
            if part.dim() != 3 or part.is_floating_point() or part.shape[1:] != parts[0].shape[1:]:
                raise ValueError(
                    "RoutingRecord.from_numpy: arrays are integers of shape (tokens, layers, k), the last two alike; "
                    f"got {', '.join(f'{p.dtype} {tuple(p.shape)}' for p in parts[:8])}"
                )
        if not parts:
            raise ValueError("RoutingRecord.from_numpy: no array is given")
        parts = [part.to(torch.int64) for part in parts]
        for part in parts:
            _check_repeats(part)
        return cls._of_sequences("RoutingRecord.from_numpy", parts, lengths, cut=False)

    @classmethod
    def _of_sequences(
        cls, what: str, parts: list[Tensor], lengths: Sequence[int] | Tensor | None, cut: bool, **rest: Any
    ) -> RoutingRecord:
        wanted = [len(part) for part in parts] if lengths is None else [int(length) for length in lengths]
        if len(wanted) != len(parts):
            raise ValueError(f"{what}: {len(wanted)} lengths for {len(parts)} sequences")
        whole = []
        for number, (part, length) in enumerate(zip(parts, wanted, strict=True)):
            if not (len(part) in (length, length - 1) or (cut and len(part) > length)):
                raise ValueError(
                    f"{what}: sequence {number} has {length} tokens, its record {len(part)}; only the last token, "
                    "which is sampled and not run, may lack"
                )
            unknown = torch.full((max(0, length - len(part)), *part.shape[1:]), -1, dtype=part.dtype)
            whole.append(torch.cat([part[:length], unknown]))
        return cls(torch.cat(whole), wanted, **rest)

    def sequences(self) -> list[Tensor]:
        """The experts of each sequence of each forward by itself, (tokens, layers, k) int16 each."""
        return list(self.experts.split(self.lengths))

    def joined(self, lengths: Sequence[int] | Tensor | None = None) -> RoutingRecord:
        """The record of a generation, prompt and then token by token, as that of one forward over whole sequences.

        A token that is run again, as by generation without a cache, counts as it was run last; drafts that were
        rejected (prompt lookup, assisted decoding) do not count.

        Args:
            lengths: the real tokens of each sequence in the forward that will replay, as `attention_mask.sum(1)`; None
                takes all that are recorded. What was run behind the end of a shorter sequence is left out; the last
                token may lack, as in `from_numpy`, and does where a draft was run in its place.

        Raises:
            ValueError: where the forwards have different numbers of sequences or rows became other sequences (beam
                search), where there are several generations, where it is not known where they begin or what of their
                drafts was kept, or where the lengths do not fit.
        """
        if len(set(self.forwards)) > 1:
            raise ValueError(
                f"joined: the forwards have {_short(self.forwards)} sequences; only the forwards of one generation, "
                "all of the same sequences, can be joined"
            )
        if self.exchanged:
            raise ValueError(
                "joined: the rows of the forwards did not stay the same sequences, as in beam search, so that it is "
                "not known which tokens came to be those that were returned: record a forward over these instead"
            )
        pieces, count = self.sequences(), self.forwards[0] if self.forwards else 0
        parts = [
            self._history(pieces, row, count, None if lengths is None else int(lengths[row])) for row in range(count)
        ]
        return self._of_sequences("joined", parts, lengths, cut=True, layers=self.layers)

    def _history(self, pieces: list[Tensor], row: int, count: int, length: int | None) -> Tensor:
        """What the tokens of one row of a generation took, as its cache was at the end."""
        known, start, cached = pieces[row][:0], 0, False
        for place in range(row, len(pieces), count):
            start = len(known) if self.starts is None else self.starts[place]
            if not 0 <= start <= len(known):
                raise ValueError(
                    f"joined: a forward of sequence {row} begins behind {start} tokens, of which {len(known)} are "
                    "recorded; record the whole generation, of a model whose cache says how long it is"
                )
            cached = cached or start > 0
            drafted = self.drafts is not None and self.drafts[place // count]
            if place > row and start == 0 and (cached or (not drafted and len(pieces[place]) <= len(known))):
                raise ValueError(
                    "joined: the record holds more than one generation, each from its first token on; record them apart"
                )
            known = torch.cat([known[:start], pieces[place]])
        if self.drafts is not None and self.drafts[-1] and len(known) > start + 1:
            if length is None:
                raise ValueError(
                    "joined: the last forward ran several tokens, of which some may be drafts that were rejected; give "
                    "the lengths of the sequences that were returned"
                )
            if start + 1 < length <= len(known):  # the token that took the place of the first rejected one
                known[length - 1] = -1
        return known

    def near_ties(self) -> NearTies:
        """How fragile the decisions are; its `str()` is a table.

        Raises:
            ValueError: where the record has no margins, as one that comes from elsewhere.
        """
        if self.margin is None or self.size is None:
            raise ValueError("near_ties: the record has no margins; only shunter.record notes them")
        names = self.layers or [str(place) for place in range(self.experts.shape[1])]
        layers = {
            name: summarise(margin, size) for name, margin, size in zip(names, self.margin.T, self.size.T, strict=True)
        }
        near = near_tie(self.margin, self.size)
        decided = self.margin.isfinite()
        return NearTies(
            layers,
            int((near & decided).sum()) / max(1, int(decided.sum())),
            float((near & decided).any(1).double().mean()) if len(near) else 0.0,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the record to a safetensors file; `load` reads it."""
        tensors = {"experts": self.experts, "margin": self.margin, "size": self.size}
        about = {
            name: getattr(self, name) for name in ("layers", "lengths", "forwards", "starts", "drafts", "exchanged")
        }
        metadata = {"format": _FORMAT, "record": json.dumps(about)}
        save_file({name: t.contiguous() for name, t in tensors.items() if t is not None}, path, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RoutingRecord:
        """Read a record that `save` wrote.

        Raises:
            ValueError: where the file is not one, or is damaged.
            FileNotFoundError: where there is none.
        """
        try:
            open_file(Path(path)).close()
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError("it is of another kind")
                tensors = {name: file.get_tensor(name) for name in ("experts", "margin", "size") if name in file.keys()}
            about = parse_json(metadata["record"])
            return cls(
                tensors.pop("experts"),
                about["lengths"],
                layers=about["layers"],
                forwards=about["forwards"],
                starts=about.get("starts"),
                drafts=about.get("drafts"),
                exchanged=about.get("exchanged", False),
                **tensors,
            )
        except (SafetensorError, ArithmeticError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a routing record of RoutingRecord.save: {error}") from error


def _checked(experts: Tensor) -> Tensor:
    if experts.dim() != 3 or experts.is_floating_point() or experts.is_complex() or experts.dtype == torch.bool:
        raise ValueError(
            f"RoutingRecord: experts are {experts.dtype} {tuple(experts.shape)}, not integers (tokens, layers, k)"
        )
    limit = torch.iinfo(torch.int16).max
    if experts.numel() and (int(experts.min()) < -1 or int(experts.max()) > limit):
        bad = int(experts[(experts < -1) | (experts > limit)][0])
        raise ValueError(f"RoutingRecord: expert {bad} is out of range; experts are 0 to {limit}, and -1 for none")
    return experts.to("cpu", torch.int16)


def _check_repeats(experts: Tensor) -> None:
    row = experts.sort(-1).values
    again = ((row[..., 1:] == row[..., :-1]) & (row[..., 1:] >= 0)).any(-1)
    if bool(again.any()):
        token, layer = again.nonzero()[0].tolist()
        raise ValueError(
            f"RoutingRecord.from_numpy: token {token} of a sequence has experts {experts[token, layer].tolist()} in "
            f"layer {layer}; an expert may come once only"
        )


def _short(numbers: Sequence[int]) -> str:
    head = ", ".join(map(str, numbers[:8]))
    return f"[{head}{', …' if len(numbers) > 8 else ''}]"
