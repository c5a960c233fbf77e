"""One layer's experts as stacked tensors, and the tokens routed through them.

The rows of all tokens are sorted by expert, and every pass goes from expert to expert: an expert's weights are asked
for once, and all its rows go through them, as many at a time as have room. So neither the number of experts nor that of
tokens decides how much memory a pass takes, and no weight is quantized twice for want of it.

Of several ranks each has some of the experts and all of the tokens, and sums up its part of every share's tokens; what
is found of each token is known to all of them, so that they choose alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch

from mmq.machine.team import ALONE, Team
from mmq.machine.threads import Item, Result, each
from mmq.quantize.delivery import Delivery
from mmq.tensors.experts import (
    Activation,
    Piece,
    Rows,
    combine,
    gated_rows,
    grouped_linear,
    grouped_rows,
    magnitude_sums,
    quadratic_form,
    row_squares,
    second_moments,
    squares_by_expert,
    token_losses,
)
from mmq.tensors.int4 import fake_quantize_scaled, working_bytes

# On a CPU, weights quantized at one time: fewer, and the threads wait for Python more than they compute; more, and they
# wait for each other at the end.
CPU_STEP_ELEMENTS = 2**21
# Tokens whose experts' outputs are summed at one time; on a CPU by each thread.
CPU_PART_TOKENS, PART_TOKENS = 512, 2**14
# Working memory where the recipe sets none: on a GPU enough that grouped products run at their full rate.
DEFAULT_BUDGET = {"cpu": 4 * 2**30, "cuda": 8 * 2**30}
# What a GPU whose memory turns out to be short is asked for at least.
LEAST_BUDGET = 2**28
# Of a GPU's memory, what libraries take for themselves.
SPARE_MEMORY = 2**30
# Of several ranks, in how many batches each computes its rows at least, so that one is sent while the next is computed.
ROUNDS = 4


def default_budget(device: torch.device) -> int:
    """Bytes of working memory where the recipe sets none."""
    return DEFAULT_BUDGET.get(device.type, DEFAULT_BUDGET["cpu"])


@dataclass(frozen=True)
class Batch:
    """Rows whose outputs are held at one time: the pieces of several steps' experts, or a part of one step's rows."""

    pieces: list[Piece]

    @property
    def start(self) -> int:
        return min(piece.start for piece in self.pieces)

    @property
    def rows(self) -> int:
        return sum(piece.stop - piece.start for piece in self.pieces)


@dataclass(frozen=True)
class Share:
    """A share of the tokens, and their rows by expert.

    Attributes:
        tokens: int64 [t], which.
        weight: float32 [n, k], the router's, of the tokens that this rank sums up.
        rows: this rank's experts' rows; their tokens count among all.
        batches: what is computed at one time, in order; those of one step's experts in one list.
        inputs: [R, H], the rows' inputs where the budget lets them be kept.
        delivery: which tokens this rank sums up, and how their rows come to it.
    """

    tokens: torch.Tensor
    weight: torch.Tensor
    rows: Rows
    batches: list[list[Batch]]
    inputs: torch.Tensor | None
    delivery: Delivery

    @property
    def mine(self) -> torch.Tensor:
        """int64 [n], the tokens that this rank sums up."""
        return self.tokens[self.delivery.mine.start : self.delivery.mine.stop]


@dataclass
class ExpertBlock:
    """One layer's experts and the tokens routed through them.

    Attributes:
        x: [T, H], the block's input.
        index, weight: int64 and float32 [T, k], the router's choices; sorted by expert, so that sums have one order.
        gate_up: [E, 2I, H], gate rows above up rows; of several ranks, of this one's own experts.
        down: [E, H, I].
        extra: rows that take part in the down search only; tokens that top up experts which few tokens reach. Given of
            all experts, kept of this rank's.
        budget: bytes of working memory; by default what suits the device.
        parts: how the tokens are shared out: every share is a sample of all of them, of about this part.
        team: the ranks that the experts are shared out among.
        own: which of all experts are this rank's; `experts`, how many there are.
        step: experts at a time.
        most_rows: rows at a time.
        workers: threads that take a step each; on a GPU the calling thread alone.
    """

    x: torch.Tensor
    index: torch.Tensor
    weight: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    activation: Activation
    group_size: int
    extra: Rows | None = None
    budget: int | None = None
    parts: tuple[float, ...] = (1.0,)
    team: Team = ALONE
    own: range = field(init=False)
    experts: int = field(init=False)
    shares: list[Share] = field(init=False)
    step: int = field(init=False)
    most_rows: int = field(init=False)
    workers: int = field(init=False)

    def __post_init__(self) -> None:
        hidden, width = self.x.shape[1], self.x.element_size()
        experts, inner = self.gate_up.shape[0], self.down.shape[2]
        self.experts = sum(self.team.everyone(experts))
        self.own = self.team.part(self.experts)
        self._all_rows = self.index.numel() + (self.extra.token.numel() if self.extra else 0)
        if self.extra:
            self.extra = self.extra.of_experts(self.own.start, self.own.stop)
        cpu = self.x.device.type == "cpu"
        # Weights of a step as a search changes them, and what changing them takes; or, in the down search, fp32 second
        # moments and a copy of them, the change of the weights, and its product.
        quantizing = working_bytes(self.gate_up) * max(self.gate_up[0].numel(), 2 * self.down[0].numel())
        moments = inner**2 * (4 + width) + self.down[0].numel() * (working_bytes(self.down) + width)
        per_expert = max(quantizing, moments)
        room = self.working_memory // (8 if cpu else 4)
        if cpu:
            # What is computed depends on the step at most, never on the number of threads.
            self.step = max(1, min(experts, min(room, 8 * CPU_STEP_ELEMENTS) // per_expert))
            steps, fit = -(-experts // self.step), room // (self.step * per_expert)
            self.workers = max(1, min(torch.get_num_threads(), steps, fit))
        else:
            self.step = max(1, min(experts, room // per_expert))
            self.workers = 1
        # A row's input, gate and up, their product, and its output.
        per_row = (2 * hidden + 3 * inner) * width
        # Some of the kernels count with 31 bits.
        self.most_rows = max(1, min(self.working_memory // 4 // per_row, 2**30 // max(hidden, 2 * inner)))
        self.shares = [self._share(tokens) for tokens in sampled(self.x.shape[0], self.parts, self.x.device)]
        together = (batch for share in self.shares for (batch, *_) in share.batches if len(batch.pieces) > 1)
        held = max((batch.rows for batch in together), default=0)
        self._outputs = self.x.new_empty(held, hidden)
        arriving = max(share.delivery.rows for share in self.shares) if self.team.size > 1 else 0
        self._arrived = self.x.new_empty(arriving, hidden)

    def _share(self, tokens: torch.Tensor) -> Share:
        cpu = self.x.device.type == "cpu"
        choices = self.index[tokens]
        rows = Rows.of(choices, self.experts).of_experts(self.own.start, self.own.stop)
        most = self.most_rows if self.team.size == 1 else min(self.most_rows, -(-rows.token.numel() // ROUNDS))
        inputs = None
        if cpu and rows.token.numel() * self.x[0].nbytes <= self.working_memory // 8:
            inputs = self.x.index_select(0, tokens[rows.token])
        batches: list[list[Batch]] = []
        gathered: list[Piece] = []
        for first in range(0, self.gate_up.shape[0], self.step):
            last = min(first + self.step, self.gate_up.shape[0])
            pieces = list(rows.pieces(first, last, self.most_rows))
            together = cpu and len(pieces) == 1
            if gathered and not (together and Batch(gathered + pieces).rows <= most):
                batches.append([Batch(gathered)])
                gathered = []
            if together:
                gathered += pieces
            elif pieces:
                batches.append([Batch([piece]) for piece in pieces])
        if gathered:
            batches.append([Batch(gathered)])
        bounds = [slice(batch.start, batch.start + batch.rows) for step in batches for batch in step]
        delivery = Delivery.plan(self.team, choices, self.experts, rows, bounds)
        weight = self.weight[tokens[delivery.mine.start : delivery.mine.stop]]
        return Share(tokens, weight, Rows(tokens[rows.token], rows.ends, rows.place), batches, inputs, delivery)

    @property
    def working_memory(self) -> int:
        """Bytes that the block's computations may take beside its tensors and one fp32 sum of its outputs [T, H]: a
        quarter each for the weights of a step and for the rows of a batch, an eighth for kept inputs, a sixteenth for
        what is summed of them at one time.

        The least is one expert at a time, which takes up to 16 bytes for each weight of its gate and up, and 32 bytes
        for each of a token's choices, by which the rows are sorted.
        """
        return self.budget or default_budget(self.x.device)

    def each(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """The function of every item, on the block's workers."""
        return each(function, items, self.workers, max(1, torch.get_num_threads() // self.workers))

    @property
    def counts(self) -> torch.Tensor:
        """int64 [E], routed tokens of each expert."""
        return torch.bincount(self.index.reshape(-1), minlength=self.experts)

    def passes(self, share: Share, weights: Weights) -> Iterator[tuple[int, torch.Tensor]]:
        """The experts' outputs of a share's rows, a batch after the other: the first row, and [n, H], which the next
        batch overwrites. Every expert's weights are asked for once."""
        for batches in share.batches:
            if len(batches[0].pieces) > 1:
                (batch,) = batches
                outputs = self._outputs[: batch.rows]
                # The largest first: threads that take what is left end at about the same time.
                pieces = sorted(batch.pieces, key=lambda piece: piece.start - piece.stop)
                self.each(partial(self._step, share, weights, outputs, batch.start), pieces)
                yield batch.start, outputs
                continue
            (piece,) = batches[0].pieces
            taken = weights.take(piece.first, piece.last)
            for batch in batches:
                (piece,) = batch.pieces
                middle = self._middle(share, piece, taken[0])
                yield batch.start, grouped_linear(middle, taken[1], piece.ends)

    def _step(self, share: Share, weights: Weights, outputs: torch.Tensor, begin: int, piece: Piece) -> None:
        """A piece's rows of a batch's outputs [n, H], which begin at a row of the share."""
        gate_up, down = weights.take(piece.first, piece.last)
        middle = self._middle(share, piece, gate_up)
        grouped_rows(middle, down, piece.ends, outputs[piece.start - begin : piece.stop - begin])

    def _middle(self, share: Share, piece: Piece, gate_up: torch.Tensor) -> torch.Tensor:
        """What goes into the down layers for a piece's rows: [n, I]."""
        own = slice(piece.start, piece.stop)
        if share.inputs is not None:
            return gated_rows(share.inputs[own], None, gate_up, piece.ends, self.activation)
        return gated_rows(self.x, share.rows.token[own], gate_up, piece.ends, self.activation)

    def arrivals(self, share: Share, weights: Weights) -> Iterator[tuple[int, torch.Tensor]]:
        """The outputs that this rank sums up: those of `passes` where it is alone, or all that the ranks send it."""
        if self.team.size == 1:
            yield from self.passes(share, weights)
            return
        arrived = self._arrived[: share.delivery.rows]
        share.delivery.send(self.team, (outputs for _, outputs in self.passes(share, weights)), arrived)
        yield 0, arrived

    def outputs(self, weights: Weights) -> list[torch.Tensor]:
        """The block's output for the tokens of each share that this rank sums up: float32 [n, H]."""
        results = []
        for share in self.shares:
            result = self.x.new_zeros(len(share.delivery.mine), self.x.shape[1], dtype=torch.float32)
            for begin, outputs in self.arrivals(share, weights):
                self._add(share, share.weight, begin, outputs, result)
            results.append(result)
        return results

    def output(self, weights: Weights) -> torch.Tensor:
        """The block's output for all tokens: float32 [T, H]."""
        return self.in_order(self.outputs(weights))

    def in_order(self, parts: list[torch.Tensor], chosen: torch.Tensor | None = None) -> torch.Tensor:
        """What the ranks give for their tokens of each share, [n, ...], for all tokens in their order: [T, ...].

        Args:
            chosen: bool [T], the tokens to give it for: [sum, ...].
        """
        if len(parts) == 1 and self.team.size == 1 and chosen is None:
            return parts[0]
        everyone = [
            torch.cat([share.tokens[own.start : own.stop] for share, own in zip(self.shares, owns, strict=True)])
            for owns in zip(*(self.team.parts(share.tokens.numel()) for share in self.shares), strict=True)
        ]
        own = torch.cat(parts)
        if chosen is not None:
            own = own[chosen[everyone[self.team.rank]]]
            everyone = [tokens[chosen[tokens]] for tokens in everyone]
        whole = self.team.gather(own, [tokens.numel() for tokens in everyone])
        tokens = torch.cat(everyone)
        result = torch.empty_like(whole)
        if chosen is not None:
            tokens = (chosen.cumsum(0) - 1)[tokens]
        result[tokens] = whole
        return result

    def losses(self, share: Share, weights: Weights, reference: torch.Tensor) -> torch.Tensor:
        """Squared distance of the block's output of each token of a share from a reference: float32 [t].

        Args:
            reference: float32 [n, H], of those that this rank sums up.
        """
        return self.team.gather_parts(self._own_losses(share, weights, reference), share.tokens.numel())

    def squared_distance(self, share: Share, outputs: torch.Tensor, other: torch.Tensor) -> float:
        """Sum of the squared differences of two outputs of a share, over all of its tokens.

        Args:
            outputs, other: float32 [n, H], of those that this rank sums up.
        """
        squares = row_squares(outputs - other)
        return float(self.team.gather_parts(squares, share.tokens.numel()).sum(dtype=torch.float64))

    def _own_losses(self, share: Share, weights: Weights, reference: torch.Tensor) -> torch.Tensor:
        left = sum(len(batches) for batches in share.batches) if self.team.size == 1 else 1
        rest = reference
        for begin, outputs in self.arrivals(share, weights):
            left -= 1
            if left:
                # What is left of the reference, so that the last batch's outputs need not be summed before.
                rest = reference.clone() if rest is reference else rest
                self._add(share, share.weight.neg(), begin, outputs, rest)
            else:
                lose = partial(self._lose, share, begin, outputs, rest)
                return torch.cat([reference.new_empty(0), *self.each(lose, self._parts(share))])
        return reference.square().sum(1)

    def _add(self, share: Share, weight: torch.Tensor, begin: int, outputs: torch.Tensor, result: torch.Tensor) -> None:
        """Add a batch's outputs, weighted, to float32 [n, H]."""
        place = share.delivery.place
        self.each(lambda part: combine(outputs, place[part], weight[part], result[part], begin), self._parts(share))

    def _lose(
        self, share: Share, begin: int, outputs: torch.Tensor, reference: torch.Tensor, part: slice
    ) -> torch.Tensor:
        """Losses of a part of a share's tokens, given a batch's outputs and what the others left of the reference."""
        place, whole = share.delivery.place[part], self.index.numel() * self.x.shape[1]
        return token_losses(outputs, place, share.weight[part], reference[part], begin, whole)

    def _parts(self, share: Share) -> list[slice]:
        """A share's tokens, as many at a time as suits the device."""
        # An output that is summed takes up to 8 bytes on the way.
        most = CPU_PART_TOKENS if self.x.device.type == "cpu" else PART_TOKENS
        step = max(1, min(most, self.working_memory // 16 // (8 * self.x.shape[1])))
        return [slice(start, start + step) for start in range(0, len(share.delivery.mine), step)]

    def down_inputs(self, first: int, last: int) -> DownInputs:
        """What goes into the down layers of experts first..last, from their routed and their extra rows."""
        kinds = [share.rows for share in self.shares] + ([self.extra] if self.extra else [])
        counts = torch.tensor([rows.counts[first:last] for rows in kinds]).sum(0)
        inputs = DownInputs.empty(counts.to(self.x.device), self.down.shape[2], self._all_rows, self.experts)
        for rows in kinds:
            for piece in rows.pieces(first, last, self.most_rows):
                token = rows.token[piece.start : piece.stop]
                inputs.add(gated_rows(self.x, token, self.gate_up[first:last], piece.ends, self.activation), piece.ends)
        return inputs


def sampled(tokens: int, parts: tuple[float, ...], device: torch.device) -> list[torch.Tensor]:
    """Tokens shared out into samples of about these parts, each drawn evenly from all of a text: int64 [t], ascending.

    A token's place in a sequence that fills the unit interval evenly (the golden ratio's multiples) says which share
    it belongs to, so that neighbours, which are alike, come into different shares.
    """
    if len(parts) == 1:
        return [torch.arange(tokens, device=device)]
    golden = (5**0.5 - 1) / 2
    position = torch.arange(tokens, dtype=torch.float64).mul_(golden).frac_()
    edges = torch.tensor(parts, dtype=torch.float64).cumsum(0)[:-1]
    share = torch.bucketize(position, edges, right=True)
    found = [(share == number).nonzero().flatten().to(device) for number in range(len(parts))]
    return [tokens for tokens in found if tokens.numel()]


@dataclass
class DownInputs:
    """Inputs X [n_e, I] of some experts' down layers, as far as the search needs them.

    Attributes:
        counts: int64 [E], n_e.
        sums: float32 [E, I], summed |x|.
        moments: float32 [E, I, I], X^T X, where the block has more rows than I to an expert on average.
        rows: otherwise the rows themselves, sorted by expert, and where each expert's end, one pair a piece.
        all_rows: how many the block's experts have together; how many are here must not decide what is summed how.
    """

    counts: torch.Tensor
    sums: torch.Tensor
    moments: torch.Tensor | None
    rows: list[tuple[torch.Tensor, torch.Tensor]]
    all_rows: int

    @classmethod
    def empty(cls, counts: torch.Tensor, inner: int, all_rows: int, experts: int) -> DownInputs:
        """Ready to take `counts` rows of each expert, of a block with so many rows and experts in all."""
        sums = torch.zeros(counts.shape[0], inner, dtype=torch.float32, device=counts.device)
        moments = sums.new_zeros(counts.shape[0], inner, inner) if all_rows > experts * inner else None
        return cls(counts, sums, moments, [], all_rows)

    def add(self, rows: torch.Tensor, ends: torch.Tensor) -> None:
        """Take rows [R, I], sorted by expert, and where each expert's end."""
        magnitude_sums(rows, ends, self.sums)
        if self.moments is None:
            self.rows.append((rows, ends))
        else:
            second_moments(rows, ends, self.moments)

    def squared_change(self, change: torch.Tensor) -> torch.Tensor:
        """Squared change of each expert's output, float32 [E], when its weight changes by D, `change` [E, H, I].

        It is trace(D G D^T) with G = X^T X, or the sum of squares of X D^T, whichever takes fewer products.
        """
        if self.moments is not None:
            return quadratic_form(change, self.moments)
        total = torch.zeros(change.shape[0], dtype=torch.float64, device=change.device)
        for rows, ends in self.rows:
            outputs = grouped_linear(rows, change, ends)
            total += squares_by_expert(outputs, ends, self.all_rows * outputs.shape[1])
        return total.float()


class Weights:
    """The experts' weights as a pass asks for them, a few experts at a time."""

    def __init__(self, block: ExpertBlock) -> None:
        self.block = block

    def take(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """gate_up [n, 2I, H] and down [n, H, I] of experts first..last."""
        return self.block.gate_up[first:last], self.block.down[first:last]


class SmoothedGateUp(Weights):
    """Gate and up as a point of the norm's grid leaves them, Q(W s) / s; down as it is."""

    def __init__(self, block: ExpertBlock, scales: torch.Tensor) -> None:
        super().__init__(block)
        self.scales = scales

    def take(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        gate_up, down = super().take(first, last)
        return fake_quantize_scaled(gate_up, self.scales, self.block.group_size), down


class Smoothed(Weights):
    """All three linear layers as the chosen scales leave them; with scales of 1, rounded to nearest.

    Args:
        norm: float32 [H], of gate's and up's inputs.
        inner: float32 [E, I], of down's inputs. Dividing up's rows by them moves the rows' group scales alone.
    """

    def __init__(self, block: ExpertBlock, norm: torch.Tensor, inner: torch.Tensor) -> None:
        super().__init__(block)
        self.norm, self.inner = norm, inner

    def take(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        gate_up, down = super().take(first, last)
        group_size = self.block.group_size
        scales = self.inner[first:last].unsqueeze(1)
        return fake_quantize_scaled(gate_up, self.norm, group_size), fake_quantize_scaled(down, scales, group_size)


def top_up(logits: torch.Tensor, index: torch.Tensor, minimum: int) -> Rows | None:
    """Rows that bring every expert to `minimum` tokens: those its router score ranks highest among the unrouted.

    Args:
        logits: float32 [T, E], the router's.
        index: int64 [T, k], its choices.

    Returns:
        None when every expert has enough. With fewer than `minimum` tokens in all, an expert gets all of them.
    """
    tokens, experts = logits.shape
    counts = torch.bincount(index.reshape(-1), minlength=experts)
    missing = (min(minimum, tokens) - counts).clamp(min=0)
    short = missing.nonzero().flatten()
    if short.numel() == 0:
        return None
    scores = logits[:, short].T.contiguous()
    position = torch.full((experts,), -1, device=index.device)
    position[short] = torch.arange(short.numel(), device=index.device)
    chosen = position[index]
    where = (chosen >= 0).nonzero()
    scores[chosen[where[:, 0], where[:, 1]], where[:, 0]] = -torch.inf
    most = int(missing.max())
    ranked = scores.topk(most, dim=1).indices
    wanted = torch.arange(most, device=index.device) < missing[short].unsqueeze(1)
    return Rows(ranked[wanted], missing.cumsum(0).tolist(), index[:0])
