"""How the outputs of experts that lie on several ranks come to the rank that sums up a token.

A rank computes the rows of its own experts, of all tokens; every token of a share is summed by one rank, which is sent
the token's k rows as they are. So a token's sum is taken over its experts in their order wherever they lie, and comes
out the same for any number of ranks; sums of a rank's own experts would not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from mmq.machine.team import Exchange, Team
from mmq.tensors.experts import Rows


@dataclass(frozen=True)
class Round:
    """What is exchanged at one time, one batch of every rank's rows.

    Attributes:
        order: int64 [n], the batch's rows, those for rank 0 first.
        sent, received: rows to and from each rank.
        start, stop: where those received lie among all that arrive.
    """

    order: torch.Tensor
    sent: list[int]
    received: list[int]
    start: int
    stop: int


@dataclass(frozen=True)
class Delivery:
    """The rows of a share's tokens on their way.

    Attributes:
        mine: which of the share's tokens this rank sums up.
        place: int64 [t, k], where the rows of each of these lie among all that arrive.
        rows: how many arrive.
        rounds: in how many parts; none where one rank has all, and nothing has to go anywhere.
    """

    mine: range
    place: torch.Tensor
    rows: int
    rounds: list[Round]

    @classmethod
    def plan(cls, team: Team, choices: torch.Tensor, experts: int, rows: Rows, batches: Sequence[slice]) -> Delivery:
        """Agree with the other ranks on who sends what when.

        Args:
            choices: int64 [T, k] of the share's tokens, sorted by expert.
            rows: this rank's experts' rows; their tokens count among the share's.
            batches: those of them that are computed at one time, in order.
        """
        tokens, top_k = choices.shape
        mine = team.part(tokens)
        if team.size == 1:
            return cls(mine, rows.place, tokens * top_k, [])
        edges = torch.tensor([part.stop for part in team.parts(tokens)], device=choices.device)
        summed_by = torch.bucketize(rows.token, edges, right=True)
        orders = [torch.argsort(summed_by[batch], stable=True) for batch in batches]
        sent = [torch.bincount(summed_by[batch], minlength=team.size).tolist() for batch in batches]
        everyone = team.everyone(sent)
        nothing = [0] * team.size
        tables = [[*table, *[nothing] * (max(map(len, everyone)) - len(table))] for table in everyone]
        received = [[table[number][team.rank] for table in tables] for number in range(len(tables[0]))]
        starts = [0, *accumulate(map(sum, received))]
        none = rows.token.new_empty(0)
        rounds = []
        for number, (counts, start) in enumerate(zip(received, starts, strict=False)):
            order = orders[number] if number < len(orders) else none
            rounds.append(Round(order, tables[team.rank][number], counts, start, start + sum(counts)))
        # A rank's rows come expert by expert, cut into rounds; sorted by expert, they would lie one after the other.
        places = [
            torch.arange(counts[rank]) + start + sum(counts[:rank])
            for rank in range(team.size)
            for counts, start in zip(received, starts, strict=False)
        ]
        own = Rows.of(choices[mine.start : mine.stop], experts)
        return cls(mine, torch.cat(places).to(choices.device)[own.place], starts[-1], rounds)

    def send(self, team: Team, batches: Iterable[torch.Tensor], out: torch.Tensor) -> None:
        """Send each batch's rows [n, H] while the next one is computed, and wait for all that come: [rows, H]."""
        under_way: list[Exchange] = []
        computed: Iterator[torch.Tensor] = iter(batches)
        for part in self.rounds:
            outputs = next(computed, out[:0])
            rows = outputs.index_select(0, part.order)
            under_way.append(team.exchange(rows, part.sent, part.received, out[part.start : part.stop]))
        for exchange in under_way:
            exchange.wait()
