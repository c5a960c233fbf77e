"""AWQ's scale search on stacked experts, as a subclass of llmcompressor's AWQModifier.

The grid, its options and the mappings are the modifier's own; what differs is how a grid point is measured. The stock
search replays Python modules, one expert at a time. Here the tokens are routed and sorted once, and every point is a
vectorized quantization and a grouped product; the per-expert search needs no products with tokens at all, since its
loss is a quadratic form of the expert's second moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace

import torch
from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier

from mmq.architectures import Architecture
from mmq.tensors.experts import Activation, Rows, combine, gated, grouped_linear, second_moments
from mmq.tensors.int4 import fake_quantize_scaled, normalized_mean
from mmq.tensors.smoothing import candidate_scales

# On a CPU, weights quantized at one time; more would leave the cache.
CPU_STEP_ELEMENTS = 2**20
# Working memory where the recipe sets none: on a GPU enough that grouped products run at their full rate.
DEFAULT_BUDGET = {"cpu": 4 * 2**30, "cuda": 16 * 2**30}


def default_budget(device: torch.device) -> int:
    """Bytes of working memory where the recipe sets none."""
    return DEFAULT_BUDGET.get(device.type, DEFAULT_BUDGET["cpu"])


def awq_mappings(architecture: Architecture) -> list[AWQMapping]:
    """The family's smoothing in llmcompressor's words, on transformers' module names with linear experts.

    The router comes first: the statistics hook sits on the first balance layer, and only the router sees every token.
    """
    expert = architecture.module_name(architecture.expert).replace(r"{expert}", r"\d+")
    router = architecture.module_name(architecture.router).removesuffix(".weight")
    return [
        AWQMapping(
            f"re:.*{architecture.smooth_norm.removesuffix('.weight')}$",
            [f"re:.*{router}$", f"re:.*{expert}gate_proj$", f"re:.*{expert}up_proj$"],
        ),
        AWQMapping(f"re:.*{expert}up_proj$", [f"re:.*{expert}down_proj$"]),
    ]


@dataclass(frozen=True)
class Found:
    """The best point of a grid.

    Attributes:
        scales: float32 [..., in].
        ratio, duo, error, identity_error: float or bool tensors of the shape before [in], or of one element.
    """

    scales: torch.Tensor
    ratio: torch.Tensor
    duo: torch.Tensor
    error: torch.Tensor
    identity_error: torch.Tensor

    @property
    def identity(self) -> torch.Tensor:
        """Where no point was better than leaving the weights alone."""
        return (self.ratio == 0) & ~self.duo


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
    chunks: list[tuple[int, int, Rows]] = field(init=False)
    step: int = field(init=False)

    def __post_init__(self) -> None:
        experts = self.gate_up.shape[0]
        budget = self.working_memory
        # fake_quantize_scaled works in fp32 and has two more bytes a weight to write to; second moments are fp32 too.
        per_expert = 8 * max(self.gate_up[0].numel(), self.down[0].numel() + self.down.shape[2] ** 2)
        limit = budget // 8
        if self.x.device.type == "cpu":
            limit = min(limit, 8 * CPU_STEP_ELEMENTS)
        self.step = max(1, min(experts, limit // per_expert))
        # Per token: k rows of input, gate and up, their product and output, and the fp32 sum.
        hidden, inner = self.x.shape[1], self.down.shape[2]
        per_token = self.index.shape[1] * (2 * hidden + 3 * inner) * self.x.element_size() + 12 * hidden
        tokens = max(1, min(self.x.shape[0], budget // 4 // per_token))
        self.chunks = [
            (
                start,
                min(start + tokens, self.x.shape[0]),
                Rows.of(self.index[start : start + tokens], experts),
            )
            for start in range(0, self.x.shape[0], tokens)
        ]

    @property
    def working_memory(self) -> int:
        """Bytes that the block's computations may take beside its tensors: half of it for a quantized copy of gate and
        up, a quarter for the rows of a chunk of tokens, an eighth for the experts of a step."""
        return self.budget or default_budget(self.x.device)

    @property
    def counts(self) -> torch.Tensor:
        """int64 [E], routed tokens of each expert."""
        return torch.bincount(self.index.reshape(-1), minlength=self.gate_up.shape[0])


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


class StackedAWQModifier(AWQModifier):
    """AWQModifier whose searches run on stacked experts."""

    @torch.no_grad()
    def search_norm(self, block: ExpertBlock, reference: torch.Tensor) -> Found:
        """Scales of the norm before router and experts: those of the grid whose quantized gate and up layers change the
        block's output least.

        Args:
            reference: float32 [T, H], the unquantized block's output.

        Returns:
            scales [H]; ratio, duo and errors of one element. Errors are mean squared differences over all outputs.
        """
        x_mean = _mean_magnitude(block.x)
        sums = [normalized_mean(part, block.group_size).sum(0) for part in block.gate_up.split(block.step)]
        w_mean = torch.stack(sums).sum(0) / (block.gate_up.shape[0] * block.gate_up.shape[1])
        kept = torch.empty_like(block.gate_up) if self._fits(block) else None

        def error(scales: torch.Tensor) -> torch.Tensor:
            return block_loss(block, SmoothedGateUp(block, scales, kept), reference)

        return self._search(x_mean, w_mean, error)

    @torch.no_grad()
    def search_down(self, block: ExpertBlock) -> Found:
        """Scales of each up layer's output: those of the grid whose quantized down layer changes its output least.

        With G = X^T X of the expert's inputs and D = Q(W s)/s - W, the squared difference is trace(D G D^T); G is
        kept for `block.step` experts at a time.

        Returns:
            scales [E, I]; ratio, duo and errors [E]. An expert without rows keeps scales of 1.
        """
        step, experts = block.step, block.gate_up.shape[0]
        parts = [self._search_down(block, first, min(first + step, experts)) for first in range(0, experts, step)]
        return Found(*(torch.cat([getattr(part, name.name) for part in parts]) for name in fields(Found)))

    def _search_down(self, block: ExpertBlock, first: int, last: int) -> Found:
        moments, x_sum, rows = down_statistics(block, first, last)
        weight = block.down[first:last]
        count = rows.clamp(min=1).to(torch.float32)
        x_mean = x_sum / count.unsqueeze(1)
        w_mean = normalized_mean(weight, block.group_size) / weight.shape[1]
        moments = moments.to(weight.dtype)
        change = torch.empty_like(weight)

        def error(scales: torch.Tensor) -> torch.Tensor:
            fake_quantize_scaled(weight, scales.unsqueeze(1), block.group_size, change)
            change.sub_(weight)
            squares = torch.bmm(change, moments).mul_(change).sum((1, 2), dtype=torch.float32)
            return squares / (count * weight.shape[1])

        found = self._search(x_mean, w_mean, error)
        unused = rows == 0
        return replace(
            found,
            scales=torch.where(unused.unsqueeze(1), 1.0, found.scales),
            ratio=torch.where(unused, 0.0, found.ratio),
            duo=found.duo & ~unused,
        )

    def _search(
        self, x_mean: torch.Tensor, w_mean: torch.Tensor, error: Callable[[torch.Tensor], torch.Tensor]
    ) -> Found:
        """The grid for all leading dimensions at a time; the first of equal points wins, as in the stock search."""
        best: Found | None = None
        w_mean = w_mean.to(torch.float32)
        for ratio, duo in self._get_grid_search_params():
            scales = candidate_scales(x_mean, w_mean, ratio, duo)
            loss = error(scales)
            here = Found(scales, torch.full_like(loss, ratio), torch.full_like(loss, duo, dtype=torch.bool), loss, loss)
            if best is None:
                # Every form of the grid begins with (0, no duo scaling), which is the identity.
                best = here
                continue
            better = loss < best.error
            best = Found(
                torch.where(better.unsqueeze(-1), scales, best.scales),
                torch.where(better, here.ratio, best.ratio),
                torch.where(better, here.duo, best.duo),
                torch.where(better, loss, best.error),
                best.identity_error,
            )
        assert best is not None
        return best

    @staticmethod
    def _fits(block: ExpertBlock) -> bool:
        size = block.gate_up.numel() * block.gate_up.element_size()
        return len(block.chunks) == 1 or size <= block.working_memory // 2


def forward(
    block: ExpertBlock, weights: Weights, subtract: torch.Tensor | None = None
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """The block's output for one chunk of tokens after the other: yields (start, stop, float32 [stop-start, H]).

    With `subtract` [T, H], yields the output less that.
    """
    for start, stop, rows in block.chunks:
        x = block.x[start:stop]
        outputs = x.new_empty(rows.token.shape[0], x.shape[1])
        for piece in rows.pieces(block.step):
            inputs = x[rows.token[piece.start : piece.stop]]
            middle = gated(
                grouped_linear(inputs, weights.gate_up(piece.first, piece.last), piece.ends), block.activation
            )
            outputs[piece.start : piece.stop] = grouped_linear(
                middle, weights.down(piece.first, piece.last), piece.ends
            )
        begin = torch.zeros_like(x, dtype=torch.float32) if subtract is None else subtract[start:stop].neg()
        yield start, stop, combine(outputs, rows, block.weight[start:stop], begin)


@torch.no_grad()
def block_output(block: ExpertBlock, weights: Weights) -> torch.Tensor:
    """The block's output for all tokens: float32 [T, H]."""
    result = torch.empty_like(block.x, dtype=torch.float32)
    for start, stop, output in forward(block, weights):
        result[start:stop] = output
    return result


@torch.no_grad()
def block_loss(block: ExpertBlock, weights: Weights, reference: torch.Tensor) -> torch.Tensor:
    """Mean squared difference between the block's output and float32 [T, H], float64 []."""
    total = torch.zeros((), dtype=torch.float64, device=reference.device)
    for _, _, difference in forward(block, weights, reference):
        total += difference.square_().sum(dtype=torch.float64)
    return total / reference.numel()


@torch.no_grad()
def down_statistics(block: ExpertBlock, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the down search needs of experts first..last, over their routed and extra rows: second moments float32
    [n, I, I], summed |x| float32 [n, I] and the number of rows int64 [n]."""
    inner, device = block.down.shape[2], block.x.device
    moments = torch.zeros(last - first, inner, inner, dtype=torch.float32, device=device)
    sums = torch.zeros(last - first, inner, dtype=torch.float32, device=device)
    counts = torch.zeros(last - first, dtype=torch.int64)
    parts = [(block.x[start:stop], rows) for start, stop, rows in block.chunks]
    if block.extra is not None:
        parts.append((block.x, block.extra))
    for x, rows in parts:
        counts += torch.tensor(rows.counts[first:last])
        piece = rows.piece(first, last)
        if piece is None:
            continue
        inputs = x[rows.token[piece.start : piece.stop]]
        middle = gated(grouped_linear(inputs, block.gate_up[first:last], piece.ends), block.activation)
        begin = 0
        for expert, end in enumerate(piece.ends.tolist()):
            second_moments(middle[begin:end], moments[expert])
            sums[expert] = sums[expert] + middle[begin:end].abs().sum(0, dtype=torch.float32)
            begin = end
    return moments, sums, counts.to(device)


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
    return Rows(ranked[wanted], missing.cumsum(0).tolist(), None)


def _mean_magnitude(x: torch.Tensor, step: int = 2**14) -> torch.Tensor:
    total = torch.zeros(x.shape[1], dtype=torch.float32, device=x.device)
    for start in range(0, x.shape[0], step):
        total += x[start : start + step].abs().sum(0, dtype=torch.float32)
    return total / x.shape[0]
