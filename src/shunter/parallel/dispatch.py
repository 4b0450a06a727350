"""A routing over E experts in, the rows that this rank's E / P experts compute out; and their outputs back.

A rank sends the rows of its triples, in the order that `Routing` has them in, to the ranks of their experts: there they
are a routing of their own, one triple a row, of weight 1. The sender weighs and sums what comes back, so that the
router's gradient needs no exchange of its own. Tokens of many experts travel once to each rank, or to all. An exchange
may be cut in pieces, of which experts compute one while the next is under way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from ..errors import LostRank
from ..experts.combine import rows_of, weighted_sum
from ..ranks import rows_to_ranks
from ..routing import Routing
from .exchange import begin, exchange, exchange_numbers, exchange_weights, gather, scatter

__all__ = ["DISPATCHES", "FORMS", "Dispatch", "Form", "Sender", "choose_form", "received", "rows_sent"]

Form = Literal["choices", "ranks", "all"]
"""What travels: a row for each choice of a token, one for each rank with some of its experts, or one to every rank."""

FEW = 4
"""The choices of a token from which on its row goes once to each rank."""
NEARLY = 0.9
"""The share of the ranks that a token's experts are on from which on every row goes to all."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Sender:
    """What a rank says of itself with its counts, so that ranks that do not fit together find out before they block.

    Args:
        layer: the number of the layer.
        name: its name, for errors.
        group: the ranks among which the experts are.
        pieces: in how many its rows are exchanged.
    """

    layer: int
    name: str
    group: dist.ProcessGroup
    pieces: int = 1

    def __deepcopy__(self, memo: Any) -> Sender:
        return self  # a copied model is at the same place, among the same ranks

    def header(self, x: Tensor) -> list[int]:
        """The layer's number, its pieces, and how its input x is computed with."""
        return [self.layer, self.pieces, _DTYPES.index(x.dtype), int(torch.is_grad_enabled()), int(x.requires_grad)]

    def compare(self, own: list[int], heads: list[list[int]]) -> None:
        """Raise LostRank where another rank of the group is not where this one is."""
        for other, head in enumerate(heads):
            if head == own:
                continue
            rank = dist.get_global_rank(self.group, other)
            raise LostRank(
                f"{self.name}: rank {dist.get_rank()} is at {_said(own)}, and rank {rank} at {_said(head)}: every rank "
                "runs the same forwards alike, evaluation included"
            )


def _said(head: list[int]) -> str:
    layer, pieces, dtype, grad, learns, form, weighs = head
    graph = ("without" if not grad else "with") + " gradients" + ("" if learns or not grad else " but for its input's")
    how = f", a row for {FORMS[form]}" + (" with their weights' gradients" if weighs else "") if form else ""
    how += f", in {pieces} pieces" if pieces > 1 else ""
    return f"sparse layer {layer} in {str(_DTYPES[dtype]).removeprefix('torch.')} {graph}{how}"


class Dispatch:
    """Where the rows of one forward go: a row for each choice of a token.

    Args:
        x: (T, d).
        routing: of its tokens, over all E experts, which the ranks have in equal parts, in order.
        sender: this rank.

    Attributes:
        local: the `Routing` over the experts of this rank, of the R rows that come to it.

    Making it exchanges counts: one all-to-all of E integers, with a header for each rank, and one wait for the device.

    Raises:
        LostRank: where a rank is elsewhere, or does not come.
    """

    form: Form = "choices"

    def __init__(self, x: Tensor, routing: Routing, sender: Sender) -> None:
        self.sender, self.size = sender, dist.get_world_size(sender.group)
        self.counts = routing.counts.view(self.size, -1)
        self.routing = self._travelling(routing)
        own = [*sender.header(x), FORMS.index(self.form), self.form != "choices" and int(routing.weight.requires_grad)]
        head = torch.tensor(own, device=self.counts.device).expand(self.size, -1)
        mine = torch.stack([self.routing.counts.view(self.size, -1).sum(1), self.counts.sum(1)], 1)
        came = exchange_numbers(torch.cat([head, mine, self.counts], 1), sender.group, f"the counts of {sender.name}")
        head, theirs = came[:, : len(own)], came[:, len(own) :]
        # The one wait for the device of the layer.
        numbers = torch.cat([mine, theirs[:, :2], head], 1).tolist()
        sender.compare(own, [row[4:] for row in numbers])
        self.send, self.choices_sent, self.recv, self.choices_received = ([row[i] for row in numbers] for i in range(4))
        self.local = self._local(x, routing, theirs[:, 2:])

    def _travelling(self, routing: Routing) -> Routing:
        """The routing whose triples are the rows that travel, sorted by the rank that they go to."""
        return routing

    def _local(self, x: Tensor, routing: Routing, counts: Tensor) -> Routing:
        return received(counts, torch.promote_types(x.dtype, torch.float32))

    def computed(
        self, x: Tensor, experts: Callable[[Tensor, Routing], Tensor], meanwhile: Callable[[], object] | None = None
    ) -> Tensor:
        """The outputs (T, d) of this rank's tokens x (T, d), from all ranks' experts.

        Of several pieces, experts compute one while the later ones come and what was made of the earlier ones goes
        back; likewise in the backward.

        Args:
            x: (T, d).
            experts: rows (n, d) and the routing of them over this rank's experts to their outputs (n, d).
            meanwhile: what to do before the first rows are waited for.

        Source: Hwang et al. 2023 (Tutel), adaptive pipelining.
        """
        if self.sender.pieces == 1:
            return self.combined(experts(self.rows(x, meanwhile), self.local))
        group, name = self.sender.group, self.sender.name
        send, recv = (_cut(whole, self.sender.pieces) for whole in (self.send, self.recv))
        pieces = zip(_split(rows_of(x, self.routing), send), send, recv, strict=True)
        coming = [begin(rows, to, of, group, f"the dispatch of {name}") for rows, to, of in pieces]
        if meanwhile is not None:
            meanwhile()
        going = [
            begin(experts(arrive(), local), of, to, group, f"the combine of {name}")
            for arrive, local, to, of in zip(coming, self._locals(recv), send, recv, strict=True)
        ]
        return weighted_sum(_join([arrive() for arrive in going], send), self.routing)

    def _locals(self, recv: list[list[int]]) -> Iterator[Routing]:
        """The part of `local` of each piece, its rows numbered from 0."""
        device, pieces = self.local.token.device, len(recv)
        lengths = torch.tensor(recv, device=device).T.reshape(-1)
        piece = torch.arange(pieces, device=device).repeat(self.size).repeat_interleave(lengths)
        for number in range(pieces):
            mine = piece == number
            own = self.local.masked(mine[self.local.token])
            yield replace(own, token=(mine.cumsum(0) - 1)[own.token], num_tokens=sum(recv[number]), check=False)

    def rows(self, x: Tensor, meanwhile: Callable[[], object] | None = None) -> Tensor:
        """The rows (R, d) that this rank's experts compute, of all ranks' tokens x (T, d); what is done meanwhile."""
        place = f"the dispatch of {self.sender.name}"
        return exchange(rows_of(x, self.routing), self.send, self.recv, self.sender.group, place, meanwhile)

    def combined(self, y: Tensor) -> Tensor:
        """The outputs (T, d) of this rank's tokens, of all ranks' rows y (R, d)."""
        place = f"the combine of {self.sender.name}"
        return weighted_sum(exchange(y, self.recv, self.send, self.sender.group, place), self.routing)


class ByRanks(Dispatch):
    """A row goes once to each rank that has some of its token's experts, with the weights of these: one exchange more.

    The far side weighs and sums what they make of it, so that one row comes back.
    """

    form: Form = "ranks"

    def _travelling(self, routing: Routing) -> Routing:
        """One triple for each token and rank, the ranks taken for experts."""
        tokens = routing.num_tokens
        pair = routing.expert // self.counts.shape[1] * tokens + routing.token
        sent = torch.zeros(self.size * tokens, dtype=torch.bool, device=pair.device)
        sent[pair] = True
        rows = sent.nonzero()[:, 0]
        to = rows // max(tokens, 1)
        weight = torch.ones(rows.shape, dtype=routing.weight.dtype, device=rows.device)
        travelling = Routing(rows % max(tokens, 1), to, weight, tokens, self.size, check=False)
        # Of each choice, where its row is among those that go to the same rank.
        self.place = sent.cumsum(0)[pair] - 1 - travelling.offsets[pair // max(tokens, 1)]
        return travelling

    def _local(self, x: Tensor, routing: Routing, counts: Tensor) -> Routing:
        place = f"the weights of {self.sender.name}"
        send, recv = self.choices_sent, self.choices_received
        weight, row = exchange_weights(routing.weight, self.place, send, recv, self.sender.group, place)
        ends = torch.tensor([0, *self.recv], device=row.device).cumsum(0)
        first = ends[:-1].repeat_interleave(torch.tensor(recv, device=row.device))
        order = received(counts, weight.dtype)  # each rank's are sorted by expert, then by row
        token = (row + first)[order.token]
        return Routing(token, order.expert, weight[order.token], int(ends[-1]), counts.shape[1], check=False)


class ToAll(ByRanks):
    """Every row goes to every rank, by an all-gather, and a sum over the ranks comes back, by a reduce-scatter."""

    form: Form = "all"

    def _travelling(self, routing: Routing) -> Routing:
        tokens, device = routing.num_tokens, routing.token.device
        self.place = routing.token
        every = torch.arange(tokens, device=device).repeat(self.size)
        to = torch.arange(self.size, device=device).repeat_interleave(tokens)
        return Routing(every, to, every.to(routing.weight.dtype), tokens, self.size, check=False)

    def _local(self, x: Tensor, routing: Routing, counts: Tensor) -> Routing:
        self.recv = [max(self.recv)] * self.size  # ranks with fewer tokens send blank ones too
        return super()._local(x, routing, counts)

    def rows(self, x: Tensor, meanwhile: Callable[[], object] | None = None) -> Tensor:
        padded = F.pad(x, (0, 0, 0, self.recv[0] - x.shape[0]))
        return gather(padded, self.sender.group, f"the dispatch of {self.sender.name}")

    def combined(self, y: Tensor) -> Tensor:
        return scatter(y, self.sender.group, f"the combine of {self.sender.name}")[: self.routing.num_tokens]


def _cut(numbers: list[int], pieces: int) -> list[list[int]]:
    """For each piece, how many rows of those of each rank are in it; on both sides of an exchange alike."""
    return [[n * (i + 1) // pieces - n * i // pieces for n in numbers] for i in range(pieces)]


def _split(rows: Tensor, cuts: list[list[int]]) -> list[Tensor]:
    """The rows of the ranks, one rank's after another's, as pieces with a part of those of each."""
    parts = rows.split([n for of_rank in zip(*cuts, strict=True) for n in of_rank])
    return [torch.cat(parts[i :: len(cuts)]) for i in range(len(cuts))]


def _join(pieces: list[Tensor], cuts: list[list[int]]) -> Tensor:
    """The rows of which `_split` made pieces."""
    parts = [piece.split(cut) for piece, cut in zip(pieces, cuts, strict=True)]
    return torch.cat([part for of_rank in zip(*parts, strict=True) for part in of_rank])


DISPATCHES: dict[Form, type[Dispatch]] = {kind.form: kind for kind in (Dispatch, ByRanks, ToAll)}
FORMS: list[Form] = list(DISPATCHES)


def choose_form(top_k: float, num_experts: int, ranks: int, backend: str = "gloo") -> tuple[Form, str]:
    """In which form rows travel, and why, in words.

    A token's k experts are on D different ranks in the mean. Each choice is a row while k is small. From k = 4 on a row
    goes once to each rank; and to all, which needs no lists of rows, where nearly every token goes nearly everywhere,
    except by gloo, whose reduce-scatter takes longer than its all-to-all of as many rows.

    Args:
        top_k: k.
        num_experts: E.
        ranks: P.
        backend: of the group.
    """
    k = max(1, min(round(top_k), num_experts))
    if k < FEW:
        return "choices", f"a token takes {k}, fewer than {FEW}"
    needed = rows_to_ranks(k, num_experts, ranks)
    on = f"a token's {k} are on {needed:.3g} of the {ranks} ranks"
    return ("all", on) if needed >= NEARLY * ranks and "gloo" not in backend else ("ranks", on)


def rows_sent(form: Form, top_k: float, num_experts: int, ranks: int) -> float:
    """The rows that leave a rank in an exchange for each of its tokens, in the mean."""
    if form == "all":
        return ranks - 1
    k = max(1, min(round(top_k), num_experts))
    return (rows_to_ranks(k, num_experts, ranks) if form == "ranks" else top_k) * (1 - 1 / ranks)


def received(counts: Tensor, dtype: torch.dtype) -> Routing:
    """The routing of the rows that ranks sent, each sorted by expert: one triple a row, of weight 1.

    Args:
        counts: (P, e) int64, how many rows rank p sent for each of e experts.
        dtype: of the weights.
    """
    ranks, num_experts = counts.shape
    expert = torch.arange(num_experts, device=counts.device).repeat(ranks).repeat_interleave(counts.reshape(-1))
    expert, token = expert.sort(stable=True)
    weight = torch.ones(expert.shape, dtype=dtype, device=counts.device)
    return Routing(token, expert, weight, expert.numel(), num_experts, check=False)
