"""One layer's experts as stacked tensors, and the tokens routed through them.

Tokens are sorted by expert once, in chunks; weights are asked for a few experts at a time. Both follow from a budget of
working memory, so that neither the number of experts nor that of tokens decides how much is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch

from mmq.machine.threads import Item, Result, each
from mmq.tensors.experts import (
    Activation,
    Piece,
    Rows,
    combine,
    gated,
    grouped_linear,
    magnitude_sums,
    second_moments,
    squares_by_expert,
    token_losses,
)
from mmq.tensors.int4 import fake_quantize_scaled

# On a CPU, weights quantized at one time: fewer, and the threads wait for Python more than they compute; more, and they
# wait for each other at the end.
CPU_STEP_ELEMENTS = 2**21
# On a CPU, tokens whose experts' outputs are summed at one time.
CPU_PART_TOKENS = 512
# Working memory where the recipe sets none: on a GPU enough that grouped products run at their full rate.
DEFAULT_BUDGET = {"cpu": 4 * 2**30, "cuda": 16 * 2**30}
# A search gives a point up at the first chunk that makes it worse than the best: at least this many chunks, as long as
# an expert's rows in a chunk are enough for an efficient product.
CHUNKS, ROWS_PER_EXPERT = 8, 128


def default_budget(device: torch.device) -> int:
    """Bytes of working memory where the recipe sets none."""
    return DEFAULT_BUDGET.get(device.type, DEFAULT_BUDGET["cpu"])


@dataclass(frozen=True)
class Chunk:
    """Tokens start..stop, their rows by expert, a step's rows at a time, and the rows' inputs [R, H] where the budget
    lets them be kept."""

    start: int
    stop: int
    rows: Rows
    pieces: list[Piece]
    inputs: torch.Tensor | None

    def within(self, tokens: slice) -> slice:
        """Where some of the chunk's tokens lie, counted from its first."""
        return slice(tokens.start - self.start, tokens.stop - self.start)


@dataclass
class ExpertBlock:
    """One layer's experts and the tokens routed through them.

    Attributes:
        x: [T, H], the block's input.
        index, weight: int64 and float32 [T, k], the router's choices.
        gate_up: [E, 2I, H], gate rows above up rows.
        down: [E, H, I].
        extra: rows that take part in the down search only; tokens that top up experts which few tokens reach.
        budget: bytes of working memory; by default what suits the device.
        step: experts at a time.
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
    chunks: list[Chunk] = field(init=False)
    step: int = field(init=False)
    workers: int = field(init=False)

    def __post_init__(self) -> None:
        (tokens, hidden), top_k = self.x.shape, self.index.shape[1]
        experts, inner, width = self.gate_up.shape[0], self.down.shape[2], self.x.element_size()
        # fake_quantize_scaled works in fp32 and has two more bytes a weight to write to; second moments are fp32 too.
        per_expert = 8 * max(self.gate_up[0].numel(), self.down[0].numel() + inner**2)
        room = self.working_memory // 8
        if self.x.device.type == "cpu":
            # What is computed depends on the step at most, never on the number of threads.
            self.step = max(1, min(experts, min(room, 8 * CPU_STEP_ELEMENTS) // per_expert))
            steps, fit = -(-experts // self.step), room // (self.step * per_expert)
            self.workers = max(1, min(torch.get_num_threads(), steps, fit))
        else:
            self.step = max(1, min(experts, room // per_expert))
            self.workers = 1
        # Per token: k rows of input, gate and up, their product and output, and the fp32 sum.
        per_token = top_k * (2 * hidden + 3 * inner) * width + 12 * hidden
        most = self.working_memory // 4 // per_token
        efficient = max(-(-tokens // CHUNKS), ROWS_PER_EXPERT * experts // top_k)
        size = max(1, min(tokens, most, efficient))
        keep = tokens * top_k * hidden * width <= self.working_memory // 8
        self.chunks = []
        for start in range(0, tokens, size):
            stop = min(start + size, tokens)
            rows = Rows.of(self.index[start:stop], experts)
            # The largest first: threads that take what is left end at about the same time.
            pieces = sorted(rows.pieces(self.step), key=lambda piece: piece.start - piece.stop)
            inputs = self.x[start:stop].index_select(0, rows.token) if keep else None
            self.chunks.append(Chunk(start, stop, rows, pieces, inputs))
        self._outputs = self.x.new_empty(size * top_k, hidden)

    @property
    def working_memory(self) -> int:
        """Bytes that the block's computations may take beside its tensors: half for a quantized copy of gate and up, a
        quarter for the rows of a chunk of tokens, an eighth each for kept inputs and for the experts of a step.

        The least is one expert at a time, which takes up to 14 bytes for each weight of its gate and up, and 24 bytes
        for each of a token's choices, by which the rows are sorted.
        """
        return self.budget or default_budget(self.x.device)

    def each(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """The function of every item, on the block's workers."""
        return each(function, items, self.workers, max(1, torch.get_num_threads() // self.workers))

    @property
    def keeps_copy(self) -> bool:
        """Whether a quantized copy of gate and up has room; with one chunk it would not be used again."""
        size = self.gate_up.numel() * self.gate_up.element_size()
        return len(self.chunks) > 1 and size <= self.working_memory // 2

    @property
    def counts(self) -> torch.Tensor:
        """int64 [E], routed tokens of each expert."""
        return torch.bincount(self.index.reshape(-1), minlength=self.gate_up.shape[0])

    def inputs(self, chunk: Chunk, piece: Piece) -> torch.Tensor:
        """[R, H], the inputs of a piece of a chunk's rows."""
        if chunk.inputs is not None:
            return chunk.inputs[piece.start : piece.stop]
        return self.x[chunk.start : chunk.stop].index_select(0, chunk.rows.token[piece.start : piece.stop])

    def forward(self, weights: Weights) -> Iterator[tuple[Chunk, torch.Tensor]]:
        """The experts' outputs [R, H] for each chunk's rows; the tensor is overwritten by the next chunk."""
        for chunk in self.chunks:
            outputs = self._outputs[: chunk.rows.token.shape[0]]
            self.each(partial(self._linears, chunk, weights, outputs), chunk.pieces)
            yield chunk, outputs

    def _linears(self, chunk: Chunk, weights: Weights, outputs: torch.Tensor, piece: Piece) -> None:
        """The experts' own outputs of a piece of a chunk's rows, into [R, H] of the whole chunk."""
        gate_up = weights.gate_up(piece.first, piece.last)
        middle = gated(grouped_linear(self.inputs(chunk, piece), gate_up, piece.ends), self.activation)
        outputs[piece.start : piece.stop] = grouped_linear(middle, weights.down(piece.first, piece.last), piece.ends)

    def output(self, weights: Weights) -> torch.Tensor:
        """The block's output for all tokens: float32 [T, H]."""
        result = torch.zeros_like(self.x, dtype=torch.float32)
        for chunk, outputs in self.forward(weights):
            self.each(partial(self._add, chunk, outputs, result), self._parts(chunk))
        return result

    def loss(self, weights: Weights, reference: torch.Tensor, limit: float = torch.inf) -> torch.Tensor:
        """Mean squared difference between the block's output and float32 [T, H]: float64 [].

        Args:
            limit: infinity is returned as soon as the loss is sure to be larger than this.
        """
        total = torch.zeros((), dtype=torch.float64, device=reference.device)
        for chunk, outputs in self.forward(weights):
            parts = self.each(partial(self._squared_error, chunk, outputs, reference), self._parts(chunk))
            total += torch.stack(parts).sum()
            if total > limit * reference.numel():
                return torch.full_like(total, torch.inf)
        return total / reference.numel()

    def _add(self, chunk: Chunk, outputs: torch.Tensor, result: torch.Tensor, part: slice) -> None:
        """Add a part of a chunk's tokens to float32 [T, H]."""
        combine(outputs, chunk.rows.place[chunk.within(part)], self.weight[part], result[part])

    def _squared_error(self, chunk: Chunk, outputs: torch.Tensor, reference: torch.Tensor, part: slice) -> torch.Tensor:
        """How far a part of a chunk's tokens is from float32 [T, H]: the sum of squares, float64 []."""
        place = chunk.rows.place[chunk.within(part)]
        return token_losses(outputs, place, self.weight[part], reference[part]).sum(dtype=torch.float64)

    def _parts(self, chunk: Chunk) -> list[slice]:
        """A chunk's tokens, as many at a time as suits the device."""
        step = CPU_PART_TOKENS if self.x.device.type == "cpu" else chunk.stop - chunk.start
        return [slice(start, min(start + step, chunk.stop)) for start in range(chunk.start, chunk.stop, step)]

    def down_inputs(self, first: int, last: int) -> DownInputs:
        """What goes into the down layers of experts first..last, from their routed and their extra rows."""
        chunks = list(self.chunks)
        if self.extra is not None:
            most = self._outputs.shape[0]
            chunks += [Chunk(0, self.x.shape[0], rows, [], None) for rows in self.extra.cut(most)]
        counts = torch.tensor([chunk.rows.counts[first:last] for chunk in chunks]).sum(0)
        inputs = DownInputs.empty(counts.to(self.x.device), self.down.shape[2])
        for chunk in chunks:
            piece = chunk.rows.piece(first, last)
            if piece is not None:
                gate_up = grouped_linear(self.inputs(chunk, piece), self.gate_up[first:last], piece.ends)
                inputs.add(gated(gate_up, self.activation), piece.ends)
        return inputs


@dataclass
class DownInputs:
    """Inputs X [n_e, I] of some experts' down layers, as far as the search needs them.

    Attributes:
        counts: int64 [E], n_e.
        sums: float32 [E, I], summed |x|.
        moments: float32 [E, I, I], X^T X, where there are more rows than I to an expert on average.
        rows: otherwise the rows themselves, sorted by expert, and where each expert's end, one pair a chunk.
    """

    counts: torch.Tensor
    sums: torch.Tensor
    moments: torch.Tensor | None
    rows: list[tuple[torch.Tensor, torch.Tensor]]

    @classmethod
    def empty(cls, counts: torch.Tensor, inner: int) -> DownInputs:
        """Ready to take `counts` rows of each expert."""
        experts = counts.shape[0]
        sums = torch.zeros(experts, inner, dtype=torch.float32, device=counts.device)
        many = int(counts.sum()) > experts * inner
        return cls(counts, sums, sums.new_zeros(experts, inner, inner) if many else None, [])

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
            moments = self.moments.to(change.dtype)
            # Row by row: a sum over all of a matrix is cut up among threads, in another order for each number of them.
            return torch.bmm(change, moments).mul_(change).sum(2, dtype=torch.float32).sum(1)
        total = torch.zeros(change.shape[0], dtype=torch.float64, device=change.device)
        for rows, ends in self.rows:
            total += squares_by_expert(grouped_linear(rows, change, ends), ends)
        return total.float()


class Weights:
    """The experts' weights as a forward pass asks for them, a few experts at a time."""

    def __init__(self, block: ExpertBlock) -> None:
        self.block = block

    def gate_up(self, first: int, last: int) -> torch.Tensor:
        return self.block.gate_up[first:last]

    def down(self, first: int, last: int) -> torch.Tensor:
        return self.block.down[first:last]


class SmoothedGateUp(Weights):
    """Gate and up as a point of the norm's grid leaves them, Q(W s) / s; kept if the budget holds the copy."""

    def __init__(self, block: ExpertBlock, scales: torch.Tensor, kept: torch.Tensor | None) -> None:
        super().__init__(block)
        self.scales = scales
        self._kept = kept
        self._ready: set[int] = set()

    def gate_up(self, first: int, last: int) -> torch.Tensor:
        out = None if self._kept is None else self._kept[first:last]
        if out is not None and first in self._ready:
            return out
        self._ready.add(first)
        return fake_quantize_scaled(self.block.gate_up[first:last], self.scales, self.block.group_size, out)


class Smoothed(Weights):
    """All three linear layers as the chosen scales leave them; with scales of 1, rounded to nearest.

    Args:
        norm: float32 [H], of gate's and up's inputs.
        inner: float32 [E, I], of down's inputs. Dividing up's rows by them moves the rows' group scales alone.
    """

    def __init__(self, block: ExpertBlock, norm: torch.Tensor, inner: torch.Tensor) -> None:
        super().__init__(block)
        self.norm, self.inner = norm, inner

    def gate_up(self, first: int, last: int) -> torch.Tensor:
        return fake_quantize_scaled(self.block.gate_up[first:last], self.norm, self.block.group_size)

    def down(self, first: int, last: int) -> torch.Tensor:
        scales = self.inner[first:last].unsqueeze(1)
        return fake_quantize_scaled(self.block.down[first:last], scales, self.block.group_size)


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
